// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * sk_lookup: which listener gets a new connection. One instance per pod,
 * because this hook can ask neither for the namespace's cookie nor for a mark:
 * a program shared by two pods could not tell "A's outbound to B" from "proxy
 * to app in B".
 *
 * The answer is by addresses alone, except that "proxy to app" is what arrives
 * on lo. ingress_ifindex is no good for more: for a connection to an own
 * address the kernel reports the device that owns the address.
 */
#include "maps.h"

#define LOOPBACK_IFINDEX 1

DEFINE_LISTENERS;
DEFINE_ADDRESSES;
DEFINE_CONSTANTS;

static __always_inline int steer_to(struct bpf_sk_lookup *ctx, __u32 port)
{
	struct listener key = { .netns = constant(netns), .port = port };
	struct bpf_sock *sk = map_lookup(listeners, &key);
	long error;

	if (!sk)
		return SK_DROP;
	error = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return error ? SK_DROP : SK_PASS;
}

static __always_inline int comes_from_proxy(struct bpf_sk_lookup *ctx)
{
	return constant(has_ingress_ifindex) && ctx->ingress_ifindex == LOOPBACK_IFINDEX;
}

/* To an address of this pod; `from_pod`: from one of its own, or from loopback. */
static __always_inline int inbound(struct bpf_sk_lookup *ctx, int from_pod)
{
	if (from_pod || comes_from_proxy(ctx))
		return SK_PASS;
	return steer_to(ctx, ctx->local_port == HBONE_PORT ? HBONE_PORT : INBOUND_PORT);
}

/*
 * To an address that is not this pod's: the rule for marked packets brought it
 * here. Neither end known means an address that is not recorded yet; the SYN is
 * sent again and meets a later look.
 */
static __always_inline int outbound(struct bpf_sk_lookup *ctx, const struct address *local,
				    int from_pod)
{
	if (is_loopback(local->ip))
		return SK_PASS;
	return from_pod ? steer_to(ctx, OUTBOUND_PORT) : SK_DROP;
}

/* Volatile loads: else clang 14 merges the two families' and moves ctx itself. */
static __always_inline void read_ipv6(struct address *address, const volatile __u32 *ip)
{
	address->ip[0] = ip[0];
	address->ip[1] = ip[1];
	address->ip[2] = ip[2];
	address->ip[3] = ip[3];
}

/*
 * Hook: sk_lookup on the pod's network namespace. Linux 5.9 (5.17 to be of use:
 * without ingress_ifindex the proxy's connections to the app are captured too).
 * Returns SK_PASS with a listener assigned for what is captured, SK_PASS alone
 * for what stays as it is (other protocols, loopback, the pod to itself, proxy
 * to app), SK_DROP where the listener is missing: fail closed.
 */
SEC("sk_lookup")
int pyamb_sk_lookup(struct bpf_sk_lookup *ctx)
{
	struct address local = { .netns = constant(netns) };
	struct address remote = { .netns = constant(netns) };
	int to_pod, from_pod;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	if (ctx->family == AF_INET) {
		set_ipv4(&local, ctx->local_ip4);
		set_ipv4(&remote, ctx->remote_ip4);
	} else {
		read_ipv6(&local, ctx->local_ip6);
		read_ipv6(&remote, ctx->remote_ip6);
	}
	to_pod = map_lookup(addresses, &local) != NULL;
	from_pod = map_lookup(addresses, &remote) != NULL;
	if (to_pod)
		return inbound(ctx, from_pod || is_loopback(remote.ip));
	return outbound(ctx, &local, from_pod);
}

DEFINE_LICENSE;
