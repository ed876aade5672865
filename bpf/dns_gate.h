/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Whether a pod's DNS is captured, whoever captures it.
 */
#ifndef PYAMBIENT_DNS_GATE_H
#define PYAMBIENT_DNS_GATE_H

#include "maps.h"

DEFINE_DNS_PODS;

static __always_inline int captures_dns(__u64 netns)
{
	return map_lookup(dns_pods, &netns) != NULL;
}

#endif
