/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the programs decide, told to whoever reads it at the moment: `trace`.
 *
 * Each reader brings a ring buffer of its own, so that a slow one loses events
 * of nobody else's. While nobody reads, a decision costs one look-up in an array;
 * what is no enrolled pod's business does not cost even that.
 *
 * A reader that is killed takes nothing back. So its place is a lease, which it
 * prolongs for as long as it lives.
 */
#ifndef PYAMBIENT_TRACE_H
#define PYAMBIENT_TRACE_H

#include "maps.h"

#define READERS		4
#define RING_BYTES	(1 << 20)

/* A place for a reader; pyambient/intercept/trace_reader.py writes it. */
struct reader {
	__u64 until;	/* bpf_ktime_get_ns() when the lease ends; 0 if there is none */
	__u64 netns;	/* whose events are wanted: those of all with 0 in both */
	__u64 mask;
	__u64 lost;	/* events that the ring had no room for */
	__u64 ring;	/* the id of the ring: whose place it is */
	__u64 padding[3];
};

struct readers {
	struct reader places[READERS];
};

/* User space maps it into its memory, to write a word at a time. */
DEFINE_MAPPED_ARRAY(trace_readers, struct readers, 1);
DEFINE_ARRAY_OF_RINGS(trace_rings, READERS, RING_BYTES);

/* What was decided; pyambient/intercept/trace_event.py has a word for each of all these. */
#define EVENT_CAPTURED		1	/* a connection goes to the proxy */
#define EVENT_REDIRECTED	2	/* a query over UDP does */
#define EVENT_STEERED		3	/* a connection from outside is given to a listener */
#define EVENT_DELIVERED		4	/* the proxy connects to an app */
#define EVENT_EXCLUDED		5	/* by the pod's selection */
#define EVENT_PROBE		6	/* a health probe of the node goes to the app */
#define EVENT_REFUSED		7
#define EVENT_DROPPED		8	/* by a guard; the reason is one of drops.h */
#define EVENT_COUNTED		9	/* it would have been */

#define HOOK_CONNECT	1
#define HOOK_SENDMSG	2
#define HOOK_BIND	3
#define HOOK_SK_LOOKUP	4
#define HOOK_REDIRECT	5
#define HOOK_ARRIVAL	6
#define HOOK_GUARD	7
#define HOOK_GUARD_NODE	8

/* Why something was refused. */
#define WHY_NO_LISTENER	1	/* the proxy is away */
#define WHY_NO_ROUTE	2	/* of the device that the socket is bound to */
#define WHY_NO_ROOM	3	/* to remember what was decided */
#define WHY_FORGED	4	/* what says that it is the proxy's does not agree */
#define WHY_RESERVED	5	/* the port is the proxy's */
#define WHY_UNREADABLE	6	/* it may be a query */

/* A decision is a word, so that what decides nothing has but one to clear; 0 is none. */
#define OF_UDP			0x40
#define INWARDS			0x80
#define DECISION(what, why, port) ((what) | (why) << 8 | (__u32)(port) << 16)

struct event {
	struct connection ends;	/* zero, where it is not known yet */
	__u64 time;		/* bpf_ktime_get_ns() */
	char process[16];	/* which called; "" where a packet was judged */
	__u32 pid;
	__u32 decision;
	__u16 hook;
	__u16 protocol;		/* of a call; 0 where a packet was judged */
	__u16 family;		/* AF_INET if the last word is an IPv4 address, not mapped */
	__u16 padding;
};

/* Who reads, or NULL. */
static __always_inline struct readers *find_readers(void)
{
	__u32 only = 0;
	struct readers *readers = map_lookup(trace_readers, &only);
	__u64 leases = 0;
	int i;

	if (!readers)
		return NULL;
#pragma unroll
	for (i = 0; i < READERS; i++)
		leases |= readers->places[i].until;
	return leases ? readers : NULL;
}

static __always_inline int wants(const struct reader *reader, const struct event *event)
{
	return reader->until > event->time &&
	       (event->ends.netns & reader->mask) == reader->netns;
}

static __always_inline void tell_one(struct reader *reader, __u32 place, struct event *event)
{
	void *ring;

	if (!wants(reader, event))
		return;
	ring = map_lookup(trace_rings, &place);
	if (ring && bpf_ringbuf_output(ring, event, sizeof(*event), 0))
		__sync_fetch_and_add(&reader->lost, 1);
}

static __always_inline void tell(struct readers *readers, struct event *event)
{
	int i;

	event->time = bpf_ktime_get_ns();
#pragma unroll
	for (i = 0; i < READERS; i++)
		tell_one(&readers->places[i], i, event);
}

/*
 * Of programs that judge packets: both ends are known, who sent it is not. What
 * is read here of a packet multiplies what the verifier has to look at, with `tc`
 * at each enrolment; so the protocol is told by the decision.
 */
static __always_inline void trace_packet(const struct connection *ends, __u64 netns, __u16 hook,
					 __u16 family, __u32 decision)
{
	struct readers *readers = find_readers();
	struct event event = {};

	if (!readers)
		return;
	event.ends = *ends;
	event.ends.netns = netns;
	event.decision = decision;
	event.hook = hook;
	event.family = family;
	tell(readers, &event);
}

#endif
