// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * sk_lookup: which listener gets a new connection. This hook can ask neither
 * for the namespace's cookie nor for a mark, without which "A's outbound to B"
 * and "proxy to app in B" are the same. So each pod has an entry, which says
 * whose look-up it is and goes on to here (pyambient/intercept/entry.py).
 *
 * The answer is by addresses alone, except that "proxy to app" is what arrives
 * on lo. ingress_ifindex is no good for more: for a connection to an own
 * address the kernel reports the device that owns the address. Before Linux
 * 5.17, where it cannot be read, a program on lo leaves a note (note.bpf.c).
 */
#include "maps.h"
#include "probes.h"
#include "selection.h"
#include "trace.h"
#include "workers.h"

#define NOTE_LIFETIME	5000000	/* ns; a note is read within microseconds, or never */

DEFINE_DNS_PODS;
DEFINE_ADDRESSES;
DEFINE_ENTERED;
DEFINE_UPSTREAMS;
DEFINE_NOTES;
DEFINE_PROBES;
DEFINE_CONSTANTS;

#include "gate.h"

/*
 * Of both ends, so that a connection's later segments find the listener of its
 * SYN. Fields of the other family are 0.
 */
static __always_inline __u32 hash_ends(struct bpf_sk_lookup *ctx)
{
	__u32 words[9], value = ctx->local_port;
	int i;

	set_ipv6(words, ctx->local_ip6);
	set_ipv6(words + 4, ctx->remote_ip6);
	words[3] |= ctx->local_ip4;
	words[7] |= ctx->remote_ip4;
	words[8] = bpf_ntohs(ctx->remote_port);
#pragma unroll
	for (i = 0; i < 9; i++) {
		value = (value ^ words[i]) * 0x9e3779b1;
		value ^= value >> 15;
	}
	return value;
}

/* This very socket: who is root may share its port, and would get a part. */
static __always_inline int steer_to(struct bpf_sk_lookup *ctx, __u64 netns, __u32 port)
{
	struct listener key = { .netns = netns, .port = port };
	__u32 count = count_workers(key.netns);
	struct bpf_sock *sk = find_listener(&key, count > 1 ? hash_ends(ctx) : 0, count);
	long error;

	if (!sk)
		return SK_DROP;
	error = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
	bpf_sk_release(sk);
	return error ? SK_DROP : SK_PASS;
}

/* Both are free of padding: words of 8 bytes say it all. */
static __always_inline int is_same(const struct connection *one, const struct connection *other)
{
	const __u64 *a = (const void *)one, *b = (const void *)other;
	int i;

#pragma unroll
	for (i = 0; i < (int)(sizeof(*one) / sizeof(*a)); i++)
		if (a[i] != b[i])
			return 0;
	return 1;
}

/* Whether the program on lo has just seen this very SYN; it is told once. */
static __always_inline int is_noted(const struct connection *syn)
{
	__u32 only = 0;
	struct note *note = map_lookup(notes, &only);

	if (!note || !is_same(&note->syn, syn))
		return 0;
	if (bpf_ktime_get_ns() - note->time > NOTE_LIFETIME)
		return 0;
	note->time = 0;
	return 1;
}

static __always_inline int is_opening_probe(struct bpf_sk_lookup *ctx, const __u32 *local,
					    const __u32 *remote)
{
	struct connection key = {};

	set_ipv6(key.from, remote);
	set_ipv6(key.to, local);
	key.from_port = bpf_ntohs(ctx->remote_port);
	key.to_port = ctx->local_port;
	return map_lookup(probes, &key) != NULL;
}

static __always_inline int to_listener(__u32 port, __u32 *decision)
{
	*decision = DECISION(EVENT_STEERED | INWARDS, 0, port);
	return port;
}

/*
 * What is judged below has a verdict (SK_DROP, SK_PASS), or goes to the listener
 * for the port that is returned. That is looked for in one place, at the end:
 * the verifier walks through its loop as often as it stands here.
 *
 * HBONE is the mesh's own way in, whatever the pod's selection says.
 */
static __always_inline int inbound_from_outside(struct bpf_sk_lookup *ctx,
						const struct address *local,
						const struct address *remote, __u32 *decision)
{
	if (ctx->local_port == HBONE_PORT)
		return to_listener(HBONE_PORT, decision);
	*decision = DECISION(EVENT_EXCLUDED | INWARDS, 0, 0);
	if (is_excluded(remote->netns, INBOUND, remote->ip, ctx->local_port))
		return SK_PASS;
	*decision = DECISION(EVENT_PROBE | INWARDS, 0, 0);
	if (is_opening_probe(ctx, local->ip, remote->ip))
		return SK_PASS;
	return to_listener(INBOUND_PORT, decision);
}

static __always_inline void set_ends(struct connection *syn, struct bpf_sk_lookup *ctx,
				     const __u32 *local, const __u32 *remote)
{
	set_ipv6(syn->from, remote);
	set_ipv6(syn->to, local);
	syn->from_port = bpf_ntohs(ctx->remote_port);
	syn->to_port = ctx->local_port;
}

/*
 * Before 5.17. What is the proxy's must have come by lo, and what was marked on
 * lo must be the proxy's. Where one holds without the other somebody forges, or
 * the program on lo is gone: captured, the proxy's SYN would come back to the
 * proxy, again and again.
 */
static __always_inline int inbound_by_note(struct bpf_sk_lookup *ctx, const struct address *local,
					   const struct address *remote, __u32 *decision)
{
	struct connection syn = { .netns = local->netns };
	int is_upstream, by_lo;

	set_ends(&syn, ctx, local->ip, remote->ip);
	is_upstream = map_lookup(upstreams, &syn) != NULL;
	by_lo = is_noted(&syn);
	if (is_upstream != by_lo) {
		*decision = DECISION(EVENT_REFUSED | INWARDS, WHY_FORGED, 0);
		return SK_DROP;
	}
	return by_lo ? SK_PASS : inbound_from_outside(ctx, local, remote, decision);
}

/* To an address of this pod, and neither from one of its own nor from loopback. */
static __always_inline int inbound(struct bpf_sk_lookup *ctx, const struct address *local,
				   const struct address *remote, __u32 *decision)
{
	if (!constant(has_ingress_ifindex))
		return inbound_by_note(ctx, local, remote, decision);
	if (ctx->ingress_ifindex == LOOPBACK_IFINDEX)
		return SK_PASS;
	return inbound_from_outside(ctx, local, remote, decision);
}

/* DNS over TCP has a listener of its own. */
static __always_inline __u32 outbound_port(struct bpf_sk_lookup *ctx, __u64 netns)
{
	if (ctx->local_port == RESOLVER_PORT && map_lookup(dns_pods, &netns))
		return DNS_PORT;
	return OUTBOUND_PORT;
}

/* Neither end is the pod's: whether its devices sent it to lo. Nobody else's comes by lo. */
static __always_inline int is_forwarded(struct bpf_sk_lookup *ctx, const struct address *local,
					const struct address *remote)
{
	struct connection syn = { .netns = local->netns };

	if (!is_captured_by_devices(local->netns))
		return 0;
	if (constant(has_ingress_ifindex))
		return ctx->ingress_ifindex == LOOPBACK_IFINDEX;
	set_ends(&syn, ctx, local->ip, remote->ip);
	return is_noted(&syn);
}

/*
 * To an address that is not this pod's: the rule for marked packets brought it
 * here. Neither end known means an address that is not recorded yet, so that
 * nobody can say which way it goes: refused, as by a closed port. With backend
 * `tc` it may be a connection that the pod forwards.
 *
 * Nothing is told of it: there is word already, where it was captured. And the
 * programs on devices may just be asking who has the other end of a segment.
 */
static __always_inline int outbound(struct bpf_sk_lookup *ctx, const struct address *local,
				    const struct address *remote, int from_pod)
{
	if (is_loopback(local->ip))
		return SK_PASS;
	if (from_pod || is_forwarded(ctx, local, remote))
		return outbound_port(ctx, local->netns);
	return SK_DROP;
}

/* A decision is set for what comes from outside. */
static __always_inline int judge(struct bpf_sk_lookup *ctx, const struct address *local,
				 const struct address *remote, __u32 *decision)
{
	int to_pod = map_lookup(addresses, local) != NULL;
	int from_pod = map_lookup(addresses, remote) != NULL;

	if (!to_pod)
		return outbound(ctx, local, remote, from_pod);
	if (from_pod || is_loopback(remote->ip))
		return SK_PASS;
	return inbound(ctx, local, remote, decision);
}

/*
 * Fields of the other family are 0. To read all of them takes no branch: with
 * one for each family the verifier follows the two all the way from the start.
 */
static __always_inline void trace(struct bpf_sk_lookup *ctx, __u64 netns, __u32 decision)
{
	struct connection syn = {};

	set_ipv6(syn.from, ctx->remote_ip6);
	set_ipv6(syn.to, ctx->local_ip6);
	syn.from[3] |= ctx->remote_ip4;
	syn.to[3] |= ctx->local_ip4;
	syn.from_port = bpf_ntohs(ctx->remote_port);
	syn.to_port = ctx->local_port;
	trace_packet(&syn, netns, HOOK_SK_LOOKUP, ctx->family, decision);
}

/*
 * What the pod's entry said, to be copied at once. Softirqs of a CPU take turns,
 * so nothing comes between the two but where a look-up that no packet is waiting
 * for (sock_diag) is interrupted, or if the kernel lets softirqs preempt each
 * other (PREEMPT_RT without its lock, Linux 6.18). Then it is another's, and no good.
 */
static __always_inline int has_entered(struct bpf_sk_lookup *ctx, struct entered *by)
{
	__u32 only = 0;
	struct entered *said = map_lookup(entered, &only);

	if (!said)
		return 0;
	*by = *said;
	return by->remote_port == ctx->remote_port && by->local_port == ctx->local_port;
}

/*
 * Hook: sk_lookup on the pod's network namespace, by the pod's entry. Linux 5.9
 * (before 5.17 with the help of note.bpf.c).
 * Returns SK_PASS with a listener assigned for what is captured, SK_PASS alone
 * for what stays as it is (other protocols, loopback, the pod to itself, proxy
 * to app, what the pod's selection excludes), SK_DROP where the listener is
 * missing: fail closed.
 */
SEC("sk_lookup")
int pyamb_sk_lookup(struct bpf_sk_lookup *ctx)
{
	struct address local = {}, remote = {};
	__u32 decision = 0, port;
	struct entered by;
	int verdict;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	if (!has_entered(ctx, &by))
		return SK_DROP;
	local.netns = by.netns;
	remote.netns = by.netns;
	if (ctx->family == AF_INET) {
		set_ipv4(local.ip, ctx->local_ip4);
		set_ipv4(remote.ip, ctx->remote_ip4);
	} else {
		set_ipv6(local.ip, ctx->local_ip6);
		set_ipv6(remote.ip, ctx->remote_ip6);
	}
	verdict = judge(ctx, &local, &remote, &decision);
	if (verdict > SK_PASS) {
		port = verdict;
		verdict = steer_to(ctx, by.netns, port);
		if (decision && verdict == SK_DROP)
			decision = DECISION(EVENT_REFUSED | INWARDS, WHY_NO_LISTENER, port);
	}
	if (decision)
		trace(ctx, by.netns, decision);
	return verdict;
}

DEFINE_LICENSE;
