// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * cgroup/bind4 and bind6: the proxy's ports in an enrolled pod are the proxy's.
 *
 * Without this an app could listen on 15008 while the proxy restarts and be
 * handed the pod's traffic. A mark proves nothing (any container with the
 * default capabilities can set one), so only the socket's storage counts.
 */
#include "ports.h"
#include "trace_call.h"

DEFINE_PODS;
DEFINE_PROXY_SOCKETS;

/* Sets the namespace. */
static __always_inline int may_bind(struct bpf_sock_addr *ctx, struct address *own)
{
	struct bpf_sock *sk;
	struct pod *pod;

	own->netns = bpf_get_netns_cookie(ctx);
	pod = map_lookup(pods, &own->netns);
	if (!pod || pod->by != BY_HOOKS)
		return 1;
	if (!is_our_port(swap_port(own->netns, bpf_ntohs(ctx->user_port))))
		return 1;
	sk = ctx->sk;
	return sk && storage_get(proxy_sockets, sk, 0);
}

static __always_inline int refuse(struct bpf_sock_addr *ctx, const struct address *own)
{
	trace_call(ctx, own, HOOK_BIND, DECISION(EVENT_REFUSED | INWARDS, WHY_RESERVED, 0));
	return DENY;
}

/*
 * Hook: cgroup/bind4 on --cgroup. Linux 5.9.
 * Returns DENY (EPERM) for 15001, 15006, 15008 and 15053 of any protocol in an
 * enrolled pod, or for what stands for them there, unless the socket is the
 * proxy's; else ALLOW.
 */
SEC("cgroup/bind4")
int pyamb_bind4(struct bpf_sock_addr *ctx)
{
	struct address own;

	if (may_bind(ctx, &own))
		return ALLOW;
	set_ipv4(own.ip, ctx->user_ip4);
	return refuse(ctx, &own);
}

/* Hook: cgroup/bind6 on --cgroup. Linux 5.9. Returns as pyamb_bind4. */
SEC("cgroup/bind6")
int pyamb_bind6(struct bpf_sock_addr *ctx)
{
	struct address own;

	if (may_bind(ctx, &own))
		return ALLOW;
	set_ipv6(own.ip, ctx->user_ip6);
	return refuse(ctx, &own);
}

DEFINE_LICENSE;
