/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Connections by which the node asks a pod how it is; written by probe.bpf.c. */
#ifndef PYAMBIENT_PROBES_H
#define PYAMBIENT_PROBES_H

#include "maps.h"

/* Its SYN is to reach the app. */
#define PROBE_OPENING	1
/* It is open, or was until `until` at most. */
#define PROBE_OPEN	2

struct probe {
	__u64 until;	/* bpf_ktime_get_ns(); 0 while the node's socket lives */
	__u64 state;
};

/* On a socket of the node's own network namespace since its connect(). */
#define DEFINE_PROBE_SOCKETS DEFINE_SK_STORAGE(probe_sockets, __u8, 0)

/*
 * Keyed by the ends alone (netns is 0): neither of them is chosen by a pod, as
 * the socket was made in the node's own namespace. The least recently used
 * entry makes room: what is lost is one probe, not the isolation of a pod.
 */
#define DEFINE_PROBES DEFINE_LRU_HASH(probes, struct connection, struct probe, 65536)

#endif
