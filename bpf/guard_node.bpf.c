// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * tc ingress on the node's end of a pod's veth: what has not passed the pod's
 * guard does not get further. Root in the pod can send past its guard
 * (PACKET_QDISC_BYPASS, AF_XDP) or take it away, but does not reach this one.
 *
 * No socket and no mark comes over a veth. What does is skb->hash, which no
 * system call sets: there the pod's guard leaves a number that only this pod's
 * guards know, on each packet that it has judged. It is taken off again here,
 * so that what comes after spreads the pod's packets as it would have.
 */
#include "maps.h"

DEFINE_CONSTANTS;

#include "dns_gate.h"
#include "drops.h"

/*
 * Hook: tc ingress (tcx, before Linux 6.6 clsact) of the veth's end on the node.
 * Linux 4.9. Returns TC_ACT_SHOT for TCP, for queries of a pod whose DNS is
 * captured, and for what may be either, without the sign of the pod's guard;
 * TC_ACT_UNSPEC for all else, and where it only counts.
 */
SEC("tc")
int pyamb_guard_node(struct __sk_buff *skb)
{
	struct guarded pod = { .netns = constant(netns), .counts_only = constant(counts_only) };
	struct segment seg = {};
	int kind;

	if (skb->hash == constant(sign)) {
		bpf_set_hash_invalid(skb);
		return TC_ACT_UNSPEC;
	}
	kind = read_segment(skb, &seg, 1);	/* a veth is like Ethernet */
	if (kind == OTHER || (kind == QUERY && !captures_dns(pod.netns)))
		return TC_ACT_UNSPEC;
	return drop(&pod, &seg, REASON_UNSIGNED, HOOK_GUARD_NODE);
}

DEFINE_LICENSE;
