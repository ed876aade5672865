/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the guards of a pod dropped: a number for each reason, and the last
 * connections.
 */
#ifndef PYAMBIENT_DROPS_H
#define PYAMBIENT_DROPS_H

#include "segment.h"
#include "trace.h"

/* pyambient/intercept/guard_maps.py has a word for each. */
#define REASON_CAPTURED		0	/* a connection given to the proxy, past lo */
#define REASON_SOCKET		1	/* a TCP socket that was never given to the proxy */
#define REASON_RAW		2	/* a raw or packet socket */
#define REASON_FORWARDED	3	/* no socket of this namespace */
#define REASON_UNREADABLE	4	/* a fragment, or headers that cannot be followed */
#define REASON_UNSIGNED		5	/* on the node: it has not passed the pod's guard */
#define REASON_DNS		6	/* a query over UDP */
#define REASONS			7

#define LAST_DROPS		16

struct drop {
	struct connection ends;
	__u64 time;	/* bpf_ktime_get_ns() */
	__u32 reason;
	__u32 count;
};

/* `last` by a hash of the ends, so that retransmissions do not push out the others. */
struct drops {
	__u64 counts[REASONS];
	struct drop last[LAST_DROPS];
};

/* User space makes the entry of a pod, before its first guard is there. */
DEFINE_HASH(drops, __u64, struct drops, 4096);

/* Whose guard it is, and what its operator chose. */
struct guarded {
	__u64 netns;
	__u32 is_ethernet;	/* packets of this device have an Ethernet header */
	__u32 counts_only;	/* what would be dropped is counted, and passes */
	__u32 sign;		/* what is left in skb->hash for the guard on the node, or 0 */
};

static __always_inline int is_same_drop(const struct drop *drop, const struct segment *seg,
					__u32 reason)
{
	const struct connection *one = &drop->ends, *other = &seg->ends;

	return drop->reason == reason && one->from_port == other->from_port &&
	       one->to_port == other->to_port && one->from[3] == other->from[3] &&
	       one->to[3] == other->to[3] && one->to[1] == other->to[1];
}

/* Not atomic: two CPUs that meet in a place garble one line of a report, and no number. */
static __always_inline void note_drop(struct drops *drops, const struct segment *seg,
				      __u32 reason)
{
	__u32 place = (seg->ends.from_port * 31 + seg->ends.to_port + seg->ends.to[3] + reason) %
		      LAST_DROPS;
	struct drop *last = &drops->last[place];

	last->count = is_same_drop(last, seg, reason) ? last->count + 1 : 1;
	last->ends = seg->ends;
	last->reason = reason;
	last->time = bpf_ktime_get_ns();
}

/* What becomes of the packet; `counts_only` lets it go its way. */
static __always_inline int drop(const struct guarded *pod, const struct segment *seg,
				__u32 reason, __u16 hook)
{
	struct drops *noted = map_lookup(drops, &pod->netns);
	__u32 what = pod->counts_only ? EVENT_COUNTED : EVENT_DROPPED;

	if (noted && reason < REASONS) {
		__sync_fetch_and_add(&noted->counts[reason], 1);
		note_drop(noted, seg, reason);
	}
	trace_packet(&seg->ends, pod->netns, hook, 0, DECISION(what, reason, 0));
	return pod->counts_only ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}

#endif
