/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Connections by which the node asks a pod how it is; kept by probe.bpf.c. */
#ifndef PYAMBIENT_PROBES_H
#define PYAMBIENT_PROBES_H

#include "maps.h"

/* On a socket of the node's own network namespace since its connect(). */
#define DEFINE_PROBE_SOCKETS DEFINE_SK_STORAGE(probe_sockets, __u8, 0)

/*
 * Those that are about to open, from before their SYN to the answer.
 *
 * Keyed by the ends alone (netns is 0): neither of them is chosen by a pod, as
 * the socket was made in the node's own namespace. The least recently used
 * entry makes room: what is lost is one probe, not the isolation of a pod.
 */
#define DEFINE_PROBES DEFINE_LRU_HASH(probes, struct connection, __u8, 65536)

#endif
