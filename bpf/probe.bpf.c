// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * cgroup/connect4, connect6 and sockops on the cgroup of what probes pods from
 * this node: which connections are health probes.
 *
 * An address cannot tell. Whoever is masqueraded by the node has the node's
 * address as well. A socket can: it was made in the node's own network
 * namespace, where no pod is. Both ends are noted before the SYN leaves, and
 * the pod's sk_lookup program lets that very SYN through to the app.
 *
 * The namespace is asked for at connect(), as sockops programs can do so only
 * from Linux 5.15 on; the source port is not known there.
 */
#include "ends.h"
#include "probes.h"

DEFINE_PROBE_SOCKETS;
DEFINE_PROBES;
DEFINE_CONSTANTS;

/* Without memory for the note it is a connection like any other. */
static __always_inline int note_socket(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;	/* once: a second load may be NULL again */
	__u8 *is_probe;

	if (!sk || ctx->protocol != IPPROTO_TCP || bpf_get_netns_cookie(ctx) != constant(node))
		return ALLOW;
	is_probe = storage_get(probe_sockets, sk, BPF_SK_STORAGE_GET_F_CREATE);
	if (is_probe)
		*is_probe = 1;
	return ALLOW;
}

/* Hook: cgroup/connect4 on --probe-cgroup. Linux 5.9. Returns ALLOW always. */
SEC("cgroup/connect4")
int pyamb_probe4(struct bpf_sock_addr *ctx)
{
	return note_socket(ctx);
}

/* Hook: cgroup/connect6 on --probe-cgroup. Linux 5.9. Returns ALLOW always. */
SEC("cgroup/connect6")
int pyamb_probe6(struct bpf_sock_addr *ctx)
{
	return note_socket(ctx);
}

/*
 * Hook: sockops on --probe-cgroup. Linux 5.9.
 * Returns ALLOW always. Keeps `probes`; what cannot be kept there is judged by
 * policy like any other connection.
 */
SEC("sockops")
int pyamb_probing(struct bpf_sock_ops *ctx)
{
	struct connection key = {};
	struct bpf_sock *sk;
	__u8 yes = 1;

	/* The kernel comes here several times for each connection of the cgroup. */
	if (ctx->op != BPF_SOCK_OPS_TCP_CONNECT_CB && ctx->op != BPF_SOCK_OPS_STATE_CB)
		return ALLOW;
	sk = ctx->sk;	/* once: a second load may be NULL again */
	if (!sk || !storage_get(probe_sockets, sk, 0))
		return ALLOW;
	read_ends(&key, ctx);
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		map_update(probes, &key, &yes);
		bpf_sock_ops_cb_flags_set(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
	} else if (ctx->op == BPF_SOCK_OPS_STATE_CB && ctx->args[0] == BPF_TCP_SYN_SENT) {
		map_delete(probes, &key);
		bpf_sock_ops_cb_flags_set(ctx, 0);
	}
	return ALLOW;
}

DEFINE_LICENSE;
