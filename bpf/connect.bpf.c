// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * cgroup/connect4 and connect6: outbound capture.
 *
 * An app's socket gets a mark before its SYN leaves; the pod's routing rule
 * turns a marked packet back to lo, where sk_lookup hands it to the proxy. The
 * destination is never rewritten, so getpeername() in the app tells the truth.
 *
 * Nothing here unbinds a device: bpf_setsockopt() checks the *app's*
 * CAP_NET_RAW for that, so an unprivileged app would get away. A route per
 * device captures device-bound sockets instead. Where that route is not there
 * yet the connect is refused here, because no routing rule can do it: IPv4
 * takes every destination for on-link when a device-bound lookup fails.
 */
#include "maps.h"
#include "selection.h"
#include "trace_call.h"
#include "workers.h"

#define SOL_SOCKET	1
#define SO_BINDTODEVICE	25
#define SO_MARK		36

DEFINE_PODS;
DEFINE_DNS_PODS;
DEFINE_ADDRESSES;
DEFINE_DEVICES;
DEFINE_PROXY_SOCKETS;
DEFINE_CAPTURED_SOCKETS;
DEFINE_CONSTANTS;

#include "hooks.h"

static __always_inline int set_mark(struct bpf_sock_addr *ctx, __u32 mark)
{
	if (bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)))
		return DENY;
	return ALLOW;
}

static __always_inline int has_route(struct bpf_sock *sk, __u64 netns, __u32 family)
{
	struct device key = { .netns = netns, .family = family };

	key.index = load(&sk->bound_dev_if);
	return !key.index || map_lookup(devices, &key);
}

/* The port sk_lookup will choose, too (lookup.bpf.c). */
static __always_inline __u32 outbound_port(struct bpf_sock_addr *ctx, __u64 netns)
{
	if (ctx->user_port == bpf_htons(RESOLVER_PORT) && map_lookup(dns_pods, &netns))
		return DNS_PORT;
	return OUTBOUND_PORT;
}

static __always_inline int has_listener(__u64 netns, __u32 port)
{
	struct listener key = { .netns = netns, .port = port };

	return is_served(&key);
}

/*
 * Whether a socket is bound to an address. The proxy's that is not calls the
 * pod from the pod's own address: a pod that is an endpoint of the service it
 * calls. That stays inside by itself. On lo its answers would not find it, for
 * the kernel reports those of an own address by the device that has it.
 */
static __always_inline int has_source(struct bpf_sock *sk)
{
	if (load(&sk->family) == AF_INET)
		return load(&sk->src_ip4) != 0;
	return (load(&sk->src_ip6[0]) | load(&sk->src_ip6[1]) | load(&sk->src_ip6[2]) |
		load(&sk->src_ip6[3])) != 0;
}

/*
 * The proxy delivers to an app of this pod. The mark makes the app's answers
 * (tcp_fwmark_accept) come back over lo although the client's own address is
 * their destination; the device tells sk_lookup not to capture this SYN again.
 */
static __always_inline int to_app(struct bpf_sock_addr *ctx, struct bpf_sock *sk, __u32 *decision)
{
	char lo[] = "lo";

	if (!has_source(sk))
		return ALLOW;
	if (bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, lo, sizeof(lo)))
		return DENY;
	*decision = DECISION(EVENT_DELIVERED | INWARDS, 0, 0);
	return set_mark(ctx, (load(&sk->mark) & ~MARK_MASK) | LOOPBACK_MARK);
}

/* A socket may connect twice: nothing of the first time must stay. */
static __always_inline int without_mark(struct bpf_sock_addr *ctx, struct bpf_sock *sk)
{
	__u32 mark = load(&sk->mark);

	if ((mark & MARK_MASK) != LOOPBACK_MARK)
		return ALLOW;
	return set_mark(ctx, mark & ~MARK_MASK);
}

/* It stays inside the pod. */
static __always_inline int from_app_to_pod(struct bpf_sock_addr *ctx, struct bpf_sock *sk)
{
	__u8 *decided = storage_get(captured_socks, sk, 0);

	if (decided)
		*decided = 0;
	return without_mark(ctx, sk);
}

/* It goes its own way, and goes on if the pod's selection is another one later. */
static __always_inline int from_app_directly(struct bpf_sock_addr *ctx, struct bpf_sock *sk,
					     __u32 *decision)
{
	__u8 *decided = storage_get(captured_socks, sk, BPF_SK_STORAGE_GET_F_CREATE);

	*decision = DECISION(EVENT_REFUSED, WHY_NO_ROOM, 0);
	if (!decided)
		return DENY;
	*decision = DECISION(EVENT_EXCLUDED, 0, 0);
	*decided = EXCLUDED;
	return without_mark(ctx, sk);
}

static __always_inline int from_app_outwards(struct bpf_sock_addr *ctx, struct bpf_sock *sk,
					     const struct address *to, __u32 *decision)
{
	__u64 netns = to->netns;
	__u32 family = is_mapped_ipv4(to->ip) ? AF_INET : AF_INET6, port;
	__u8 *decided;

	*decision = DECISION(EVENT_REFUSED, WHY_NO_ROUTE, 0);
	if (!has_route(sk, netns, family))
		return refuse(ENETUNREACH);
	port = outbound_port(ctx, netns);
	*decision = DECISION(EVENT_REFUSED, WHY_NO_LISTENER, port);
	if (!has_listener(netns, port))
		return refuse(ECONNREFUSED);
	decided = storage_get(captured_socks, sk, BPF_SK_STORAGE_GET_F_CREATE);
	*decision = DECISION(EVENT_REFUSED, WHY_NO_ROOM, 0);
	if (!decided)
		return DENY;
	*decision = DECISION(EVENT_CAPTURED, 0, port);
	*decided = CAPTURED;	/* for the guard: the mark is the app's to change */
	return set_mark(ctx, (load(&sk->mark) & ~MARK_MASK) | LOOPBACK_MARK);
}

/*
 * The gate is for apps alone: while a pod drains the proxy still delivers to them.
 * No decision is set for what is no enrolled pod's, or stays inside of it. Whoever
 * is not enrolled pays for one look at the socket and one look-up.
 */
static __always_inline int judge(struct bpf_sock_addr *ctx, const struct address *to,
				 __u32 *decision)
{
	struct bpf_sock *sk = ctx->sk;	/* once: a second load may be NULL again */
	struct pod *pod;

	if (sk && storage_get(proxy_sockets, sk, 0))
		return map_lookup(addresses, to) ? to_app(ctx, sk, decision) : ALLOW;
	pod = map_lookup(pods, &to->netns);
	if (!pod || pod->by != BY_HOOKS)
		return ALLOW;
	if (!sk)
		return DENY;
	if (is_loopback(to->ip) || map_lookup(addresses, to))
		return from_app_to_pod(ctx, sk);
	if (is_excluded(to->netns, OUTBOUND, to->ip, bpf_ntohs(ctx->user_port)))
		return from_app_directly(ctx, sk, decision);
	return from_app_outwards(ctx, sk, to, decision);
}

static __always_inline int judge_and_tell(struct bpf_sock_addr *ctx, const struct address *to)
{
	__u32 decision = 0;
	int verdict = judge(ctx, to, &decision);

	if (decision)
		trace_call(ctx, to, HOOK_CONNECT, decision);
	return verdict;
}

/*
 * Hook: cgroup/connect4 on --cgroup. Linux 5.9 (5.18 for the errno).
 * Returns ALLOW outside enrolled pods, for other protocols, for the proxy, and
 * for an app once its socket has the right mark (for what the pod's selection
 * excludes: none). DENY where the pod has no live outbound listener
 * (ECONNREFUSED), or the device of a bound socket no route for captures
 * (ENETUNREACH); before 5.18 both are EPERM. Multipath TCP comes here as well:
 * its first subflow is a TCP socket.
 */
SEC("cgroup/connect4")
int pyamb_connect4(struct bpf_sock_addr *ctx)
{
	struct address to = { .netns = bpf_get_netns_cookie(ctx) };

	if (ctx->protocol != IPPROTO_TCP)
		return ALLOW;
	set_ipv4(to.ip, ctx->user_ip4);
	return judge_and_tell(ctx, &to);
}

/*
 * Hook: cgroup/connect6 on --cgroup. Linux 5.9 (5.18 for the errno).
 * Returns as pyamb_connect4; an IPv4-mapped destination comes here and needs
 * nothing of its own, because that is the form of every address key.
 */
SEC("cgroup/connect6")
int pyamb_connect6(struct bpf_sock_addr *ctx)
{
	struct address to = { .netns = bpf_get_netns_cookie(ctx) };

	if (ctx->protocol != IPPROTO_TCP)
		return ALLOW;
	set_ipv6(to.ip, ctx->user_ip6);
	return judge_and_tell(ctx, &to);
}

DEFINE_LICENSE;
