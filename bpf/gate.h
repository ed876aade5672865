/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What captures the connections of the pod that this instance serves: asked
 * when it matters, so that one instance does while the pod changes over.
 * To be included after DEFINE_CONSTANTS.
 */
#ifndef PYAMBIENT_GATE_H
#define PYAMBIENT_GATE_H

#include "maps.h"

DEFINE_PODS;

static __always_inline int is_captured(void)
{
	__u64 netns = constant(netns);

	return map_lookup(pods, &netns) != NULL;
}

static __always_inline int is_captured_by_devices(void)
{
	__u64 netns = constant(netns);
	struct pod *pod = map_lookup(pods, &netns);

	return pod && pod->by == BY_DEVICES;
}

#endif
