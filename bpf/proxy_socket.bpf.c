// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * cgroup/sock_create and sockops on the proxy's own cgroup: who the proxy is,
 * where its listeners are, and which connections to apps are its own. All of it
 * works without the proxy's help, so an unmodified ztunnel is served as well.
 *
 * The netns cookie goes into the socket's storage where the socket is made:
 * sockops programs can read that, but not the cookie itself before Linux 5.15.
 */
#include "ends.h"
#include "maps.h"
#include "ports.h"

DEFINE_LISTENERS;
DEFINE_WORKERS;
DEFINE_ADDRESSES;
DEFINE_PROXY_SOCKETS;
DEFINE_UPSTREAMS;
DEFINE_CONSTANTS;

/*
 * Hook: cgroup/sock_create on the proxy's cgroup. Linux 5.9.
 * Returns ALLOW once the socket is known as the proxy's. DENY (EPERM) if there
 * is no memory to say so: its connections would be captured again and again.
 */
SEC("cgroup/sock_create")
int pyamb_sock(struct bpf_sock *sk)
{
	__u64 *netns = storage_get(proxy_sockets, sk, BPF_SK_STORAGE_GET_F_CREATE);

	if (!netns)
		return DENY;
	*netns = bpf_get_netns_cookie(sk);
	return ALLOW;
}

/*
 * In place of an older one: the proxy that came last gets the connections. A
 * worker of several has said so in the socket's priority (proxy/sockets.py): how
 * many there are, and in the last 8 bits its number. No app can: it has no
 * socket that comes here.
 */
static __always_inline void listening(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 netns)
{
	struct listener key = { .netns = netns, .port = swap_port(netns, ctx->local_port) };
	__u32 said = sk->priority, count = said >> 8;

	if (!is_our_port(key.port))
		return;
	if (count > 1 && count <= MAX_WORKERS && (said & 0xff) < count) {
		key.worker = said & 0xff;
		map_update(workers, &netns, &count);
	} else {
		map_delete(workers, &netns);
	}
	bpf_sock_hash_update(ctx, MAP(listeners), &key, BPF_ANY);
}

/* Noted before the SYN leaves; where that fails the SYN is dropped, not captured. */
static __always_inline void connecting(struct bpf_sock_ops *ctx, __u64 netns)
{
	struct connection key = { .netns = netns };
	struct address to = { .netns = netns };
	__u8 yes = 1;

	read_ends(&key, ctx);
	set_ipv6(to.ip, key.to);
	if (!map_lookup(addresses, &to))
		return;
	map_update(upstreams, &key, &yes);
	bpf_sock_ops_cb_flags_set(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* Answered, refused or given up: from here on these ends may be anybody's again. */
static __always_inline void left_syn_sent(struct bpf_sock_ops *ctx, __u64 netns)
{
	struct connection key = { .netns = netns };

	read_ends(&key, ctx);
	map_delete(upstreams, &key);
	bpf_sock_ops_cb_flags_set(ctx, 0);
}

/* The kernel comes here several times for each connection of the proxy. */
static __always_inline int is_noted(__u32 op)
{
	if (op == BPF_SOCK_OPS_TCP_LISTEN_CB)
		return 1;
	return !constant(has_ingress_ifindex) &&
	       (op == BPF_SOCK_OPS_TCP_CONNECT_CB || op == BPF_SOCK_OPS_STATE_CB);
}

/*
 * Hook: sockops on the proxy's cgroup. Linux 5.9.
 * Returns ALLOW always. Keeps `listeners` (our ports) and, where sk_lookup has
 * no ingress_ifindex, `upstreams`. What cannot be kept is missing there, and
 * the other programs fail closed.
 */
SEC("sockops")
int pyamb_sockops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk;
	__u64 *netns;

	if (!is_noted(ctx->op))
		return ALLOW;
	sk = ctx->sk;	/* once: a second load may be NULL again */
	netns = sk ? storage_get(proxy_sockets, sk, 0) : NULL;
	if (!netns)
		return ALLOW;
	if (ctx->op == BPF_SOCK_OPS_TCP_LISTEN_CB)
		listening(ctx, sk, *netns);
	if (constant(has_ingress_ifindex))
		return ALLOW;
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		connecting(ctx, *netns);
	if (ctx->op == BPF_SOCK_OPS_STATE_CB && ctx->args[0] == BPF_TCP_SYN_SENT)
		left_syn_sent(ctx, *netns);
	return ALLOW;
}

DEFINE_LICENSE;
