/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The ends of a connection, as the sockops hook sees them. */
#ifndef PYAMBIENT_ENDS_H
#define PYAMBIENT_ENDS_H

#include "maps.h"

static __always_inline void read_ends(struct connection *key, struct bpf_sock_ops *ctx)
{
	key->from_port = ctx->local_port;
	key->to_port = bpf_ntohl(ctx->remote_port);
	if (ctx->family == AF_INET) {
		set_ipv4(key->from, ctx->local_ip4);
		set_ipv4(key->to, ctx->remote_ip4);
	} else {
		set_ipv6(key->from, ctx->local_ip6);
		set_ipv6(key->to, ctx->remote_ip6);
	}
}

#endif
