/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What captures a pod's connections: asked when it matters, so that one program
 * does while the pod changes over.
 */
#ifndef PYAMBIENT_GATE_H
#define PYAMBIENT_GATE_H

#include "maps.h"

DEFINE_PODS;

static __always_inline int is_captured(__u64 netns)
{
	return map_lookup(pods, &netns) != NULL;
}

static __always_inline int is_captured_by_devices(__u64 netns)
{
	struct pod *pod = map_lookup(pods, &netns);

	return pod && pod->by == BY_DEVICES;
}

#endif
