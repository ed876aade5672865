/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * On which ports the proxy listens in a pod. Where somebody else has one of the
 * well-known ones, another port has changed places with it, and the map says so
 * both ways: which of its ports one of the proxy's stands for, and where a
 * well-known one has gone. All else speaks of the well-known ones alone.
 */
#ifndef PYAMBIENT_PORTS_H
#define PYAMBIENT_PORTS_H

#include "maps.h"

DEFINE_MOVED_PORTS;

/* In host order. An app's, of which the proxy has no more need, is none of ours. */
static __always_inline __u32 swap_port(__u64 netns, __u32 port)
{
	struct pod_port key = { .netns = netns, .port = port };
	__u32 *other = map_lookup(moved_ports, &key);

	return other ? *other : port;
}

#endif
