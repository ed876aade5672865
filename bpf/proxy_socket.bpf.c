// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * cgroup/sock_create and sockops on the proxy's own cgroup: who the proxy is,
 * and where its listeners are. Both work without the proxy's help, so an
 * unmodified ztunnel is served as well.
 */
#include "maps.h"

DEFINE_LISTENERS;
DEFINE_PROXY_SOCKETS;

/*
 * Hook: cgroup/sock_create on the proxy's cgroup. Linux 5.9.
 * Returns ALLOW once the socket is known as the proxy's. DENY (EPERM) if there
 * is no memory to say so: its connections would be captured again and again.
 */
SEC("cgroup/sock_create")
int pyamb_sock(struct bpf_sock *sk)
{
	if (!storage_get(proxy_sockets, sk, BPF_SK_STORAGE_GET_F_CREATE))
		return DENY;
	return ALLOW;
}

/*
 * Hook: sockops on the proxy's cgroup. Linux 5.15 (bpf_get_netns_cookie here).
 * Returns ALLOW always; a socket that starts to listen on one of our ports is
 * recorded, in place of an older one. Where that fails the pod has no listener
 * and the other programs fail closed.
 */
SEC("sockops")
int pyamb_sockops(struct bpf_sock_ops *ctx)
{
	struct listener key = { .port = ctx->local_port };

	if (ctx->op != BPF_SOCK_OPS_TCP_LISTEN_CB || !is_our_port(key.port))
		return ALLOW;
	key.netns = bpf_get_netns_cookie(ctx);
	bpf_sock_hash_update(ctx, MAP(listeners), &key, BPF_ANY);
	return ALLOW;
}

DEFINE_LICENSE;
