/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Telling what was decided about a call: by whom is known here, as the process is the caller. */
#ifndef PYAMBIENT_TRACE_CALL_H
#define PYAMBIENT_TRACE_CALL_H

#include "trace.h"

/* What the socket is bound to, which may be nothing yet. */
static __always_inline void set_source(struct connection *ends, struct bpf_sock *sk)
{
	ends->from_port = load(&sk->src_port);
	if (load(&sk->family) == AF_INET)
		set_ipv4(ends->from, load(&sk->src_ip4));
	else
		set_ipv6(ends->from, sk->src_ip6);
}

/* `to` is what the call is about: where it sends, or what it binds. */
static __always_inline void trace_call(struct bpf_sock_addr *ctx, const struct address *to,
				       __u16 hook, __u32 decision)
{
	struct readers *readers = find_readers();
	struct bpf_sock *sk = ctx->sk;	/* once: a second load may be NULL again */
	struct event event = {};

	if (!readers)
		return;
	event.ends.netns = to->netns;
	set_ipv6(event.ends.to, to->ip);
	event.ends.to_port = bpf_ntohs(ctx->user_port);
	if (sk)
		set_source(&event.ends, sk);
	event.pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(event.process, sizeof(event.process));
	event.decision = decision;
	event.hook = hook;
	event.protocol = ctx->protocol;
	tell(readers, &event);
}

#endif
