/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Whether the DNS of the pod that this instance serves is captured, whoever
 * captures it. To be included after DEFINE_CONSTANTS.
 */
#ifndef PYAMBIENT_DNS_GATE_H
#define PYAMBIENT_DNS_GATE_H

#include "maps.h"

DEFINE_DNS_PODS;

static __always_inline int captures_dns(void)
{
	__u64 netns = constant(netns);

	return map_lookup(dns_pods, &netns) != NULL;
}

#endif
