/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the guards of a pod dropped: a number for each reason, and the last
 * connections. Both maps are the pod's own, shared by the guards of its devices.
 * To be included after DEFINE_CONSTANTS.
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

DEFINE_PERCPU_ARRAY(drop_counts, __u64, REASONS);

/* By a hash of the ends, so that retransmissions do not push out the others. */
DEFINE_ARRAY(last_drops, struct drop, LAST_DROPS);

static __always_inline int is_same_drop(const struct drop *drop, const struct segment *seg,
					__u32 reason)
{
	const struct connection *one = &drop->ends, *other = &seg->ends;

	return drop->reason == reason && one->from_port == other->from_port &&
	       one->to_port == other->to_port && one->from[3] == other->from[3] &&
	       one->to[3] == other->to[3] && one->to[1] == other->to[1];
}

/* Not atomic: two CPUs that meet in a place garble one line of a report, and no number. */
static __always_inline void note_drop(const struct segment *seg, __u32 reason)
{
	__u32 place = (seg->ends.from_port * 31 + seg->ends.to_port + seg->ends.to[3] + reason) %
		      LAST_DROPS;
	struct drop *last = map_lookup(last_drops, &place);

	if (!last)
		return;
	last->count = is_same_drop(last, seg, reason) ? last->count + 1 : 1;
	last->ends = seg->ends;
	last->reason = reason;
	last->time = bpf_ktime_get_ns();
}

/* What becomes of the packet; `counts_only` lets it go its way. */
static __always_inline int drop(const struct segment *seg, __u32 reason, __u16 hook)
{
	__u64 *count = map_lookup(drop_counts, &reason);
	__u32 what = constant(counts_only) ? EVENT_COUNTED : EVENT_DROPPED;

	if (count)
		*count += 1;
	note_drop(seg, reason);
	trace_packet(&seg->ends, constant(netns), hook, 0, DECISION(what, reason, 0));
	return constant(counts_only) ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}

#endif
