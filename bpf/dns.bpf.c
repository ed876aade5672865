// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * cgroup/connect, sendmsg, recvmsg and getpeername: capture of DNS over UDP.
 *
 * Neither a mark nor a routing rule can do what TCP gets. A mark set at
 * sendmsg() comes too late for that datagram, and a rule on port 53 makes the
 * kernel take the answers to the proxy's own queries for martians. So here the
 * destination is rewritten, and the source of the answer back.
 *
 * Which resolver the app meant has to reach the proxy, and the socket's own
 * port is not chosen yet at connect(). So the new destination itself says it:
 * each resolver of a pod has a slot, and each slot an address of either family
 * that is local in every pod. A wildcard socket on 15053, or on what stands for
 * it in the pod, gets all of them.
 *
 * What is rewritten never leaves the pod, listener or not. Whether one is there
 * is asked for the app's sake: it learns at once.
 */
#include "maps.h"
#include "selection.h"
#include "trace_call.h"

DEFINE_DNS_PODS;
DEFINE_RESOLVERS;
DEFINE_ADDRESSES;
DEFINE_DEVICES;
DEFINE_PROXY_SOCKETS;
DEFINE_CONSTANTS;

#include "hooks.h"
#include "ports.h"

/* pyambient/model/numbers.py has them as text: 127.53.0.0/22 and 100::53:0/118. */
#define SLOTS		1024
#define IPV4_SLOTS	0x7f350000
#define IPV6_SLOTS	0x00530000
#define IPV6_PREFIX	0x01000000

#define PROBES		8
/* Nobody waits that long for an answer; who connected a socket and then rests may be wrong. */
#define IDLE		(60 * 1000000000ULL)

/* Instead of the number of a slot. */
#define PASS		-1
#define REFUSED		-2

static __always_inline int is_link_local(const __u32 *ip)
{
	return (ip[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

static __always_inline int is_same(const struct resolver *one, const struct resolver *other)
{
	return !((one->ip[0] ^ other->ip[0]) | (one->ip[1] ^ other->ip[1]) |
		 (one->ip[2] ^ other->ip[2]) | (one->ip[3] ^ other->ip[3]) |
		 (one->scope ^ other->scope));
}

static __always_inline __u32 hash(const struct resolver *resolver)
{
	__u32 value = resolver->scope;
	int i;

#pragma unroll
	for (i = 0; i < 4; i++) {
		value = (value ^ resolver->ip[i]) * 0x9e3779b1;
		value ^= value >> 15;
	}
	return value;
}

/*
 * The slot that is the resolver's, or becomes it, or REFUSED. A slot goes to
 * another resolver only when nobody has used it for a while: an answer would be
 * taken for the other's. So a pod that asks very many is refused some.
 */
static __always_inline int slot_of(__u64 netns, const struct resolver *wanted)
{
	struct slot key = { .netns = netns };
	__u64 longest = IDLE, idle;
	int i, victim = REFUSED;
	struct resolver *found;

#pragma unroll
	for (i = 0; i < PROBES; i++) {
		key.number = (hash(wanted) + i) % SLOTS;
		found = map_lookup(resolvers, &key);
		if (!found) {
			if (!map_insert(resolvers, &key, wanted))
				return key.number;
			continue;	/* another CPU was faster, or the map is full */
		}
		if (is_same(found, wanted)) {
			found->used = wanted->used;
			return key.number;
		}
		idle = wanted->used - found->used;
		if ((__s64)idle > (__s64)longest) {
			longest = idle;
			victim = key.number;
		}
	}
	if (victim < 0)
		return REFUSED;
	key.number = victim;
	return map_update(resolvers, &key, wanted) ? REFUSED : victim;
}

/* Of the proxy in this pod. */
static __always_inline __be16 dns_port(__u64 netns)
{
	return bpf_htons(swap_port(netns, DNS_PORT));
}

/* Does what is sent to this slot reach a socket, and is it the proxy's? */
static __always_inline int has_listener(struct bpf_sock_addr *ctx, int is_ipv4, __u32 number,
					__be16 port)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	int is_proxys;

	if (is_ipv4) {
		tuple.ipv4.daddr = bpf_htonl(IPV4_SLOTS | number);
		tuple.ipv4.dport = port;
		sk = bpf_sk_lookup_udp(ctx, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		tuple.ipv6.daddr[0] = bpf_htonl(IPV6_PREFIX);
		tuple.ipv6.daddr[3] = bpf_htonl(IPV6_SLOTS | number);
		tuple.ipv6.dport = port;
		sk = bpf_sk_lookup_udp(ctx, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return 0;
	is_proxys = storage_get(proxy_sockets, sk, 0) != NULL;
	bpf_sk_release(sk);
	return is_proxys;
}

/*
 * The slots' addresses are local by lo, and by each device for the sockets
 * bound to it; where that is not so (yet), what is rewritten could leave.
 */
static __always_inline int has_route(struct bpf_sock *sk, __u64 netns, int is_ipv4)
{
	struct device key = { .netns = netns, .family = is_ipv4 ? AF_INET : AF_INET6 };

	key.index = load(&sk->bound_dev_if);
	if (!key.index)
		key.index = LOOPBACK_IFINDEX;
	return map_lookup(devices, &key) != NULL;
}

static __always_inline int capture(struct bpf_sock_addr *ctx, struct bpf_sock *sk,
				   const struct address *to, __u32 *decision)
{
	struct resolver wanted = { .used = bpf_ktime_get_ns() };
	int is_ipv4 = is_mapped_ipv4(to->ip), number;

	*decision = DECISION(EVENT_REFUSED, WHY_NO_ROUTE, 0);
	if (!has_route(sk, to->netns, is_ipv4)) {
		refuse(ENETUNREACH);
		return REFUSED;
	}
	set_ipv6(wanted.ip, to->ip);
	if (is_link_local(to->ip))
		wanted.scope = load(&sk->bound_dev_if);
	number = slot_of(to->netns, &wanted);
	*decision = number < 0 ? DECISION(EVENT_REFUSED, WHY_NO_ROOM, 0) :
				 DECISION(EVENT_REFUSED, WHY_NO_LISTENER, DNS_PORT);
	if (number < 0 || !has_listener(ctx, is_ipv4, number, dns_port(to->netns))) {
		refuse(ECONNREFUSED);
		return REFUSED;
	}
	*decision = DECISION(EVENT_REDIRECTED, 0, DNS_PORT);
	return number;
}

/* A slot, PASS or REFUSED. A resolver inside the pod is the pod's own business. */
static __always_inline int judge(struct bpf_sock_addr *ctx, const struct address *to,
				 __u32 *decision)
{
	struct bpf_sock *sk = ctx->sk;	/* once: a second load may be NULL again */
	__u8 *by = map_lookup(dns_pods, &to->netns);

	if (!by || *by != BY_HOOKS)
		return PASS;
	if (!sk)
		return REFUSED;
	if (storage_get(proxy_sockets, sk, 0))
		return PASS;
	if (is_loopback(to->ip) || map_lookup(addresses, to))
		return PASS;
	if (is_excluded(to->netns, OUTBOUND, to->ip, RESOLVER_PORT)) {
		*decision = DECISION(EVENT_EXCLUDED, 0, 0);
		return PASS;
	}
	return capture(ctx, sk, to, decision);
}

static __always_inline int judge_and_tell(struct bpf_sock_addr *ctx, const struct address *to,
					  __u16 hook)
{
	__u32 decision = 0;
	int number = judge(ctx, to, &decision);

	if (decision)
		trace_call(ctx, to, hook, decision);
	return number;
}

static __always_inline int is_query(struct bpf_sock_addr *ctx)
{
	return ctx->protocol == IPPROTO_UDP && ctx->user_port == bpf_htons(RESOLVER_PORT);
}

static __always_inline int redirect4(struct bpf_sock_addr *ctx, __u16 hook)
{
	struct address to;
	int number;

	if (!is_query(ctx))
		return ALLOW;
	to.netns = bpf_get_netns_cookie(ctx);
	set_ipv4(to.ip, ctx->user_ip4);
	number = judge_and_tell(ctx, &to, hook);
	if (number < 0)
		return number == PASS ? ALLOW : DENY;
	ctx->user_ip4 = bpf_htonl(IPV4_SLOTS | number);
	ctx->user_port = dns_port(to.netns);
	return ALLOW;
}

static __always_inline int redirect6(struct bpf_sock_addr *ctx, __u16 hook)
{
	struct address to;
	int number, is_ipv4;

	if (!is_query(ctx))
		return ALLOW;
	to.netns = bpf_get_netns_cookie(ctx);
	set_ipv6(to.ip, ctx->user_ip6);
	is_ipv4 = is_mapped_ipv4(to.ip);
	number = judge_and_tell(ctx, &to, hook);
	if (number < 0)
		return number == PASS ? ALLOW : DENY;
	if (!is_ipv4) {
		ctx->user_ip6[0] = bpf_htonl(IPV6_PREFIX);
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[2] = 0;
	}
	ctx->user_ip6[3] = bpf_htonl((is_ipv4 ? IPV4_SLOTS : IPV6_SLOTS) | number);
	ctx->user_port = dns_port(to.netns);
	return ALLOW;
}

/*
 * Not through the gate: a pod that is being released still awaits answers. From
 * another port than the proxy's an app may have sent it.
 */
static __always_inline struct resolver *behind_slot(struct bpf_sock_addr *ctx, __u32 number)
{
	struct slot key = { .number = number };
	struct resolver *found;

	if (number >= SLOTS)
		return NULL;
	key.netns = bpf_get_netns_cookie(ctx);
	if (ctx->user_port != dns_port(key.netns))
		return NULL;
	found = map_lookup(resolvers, &key);
	if (found)
		found->used = bpf_ktime_get_ns();
	return found;
}

static __always_inline void restore4(struct bpf_sock_addr *ctx)
{
	struct resolver *found;

	if (ctx->protocol != IPPROTO_UDP)
		return;
	found = behind_slot(ctx, bpf_ntohl(ctx->user_ip4) - IPV4_SLOTS);
	if (!found || !is_mapped_ipv4(found->ip))
		return;
	ctx->user_ip4 = found->ip[3];
	ctx->user_port = bpf_htons(RESOLVER_PORT);
}

static __always_inline void restore6(struct bpf_sock_addr *ctx)
{
	struct resolver *found;
	__u32 ip[4], base;

	if (ctx->protocol != IPPROTO_UDP)
		return;
	set_ipv6(ip, ctx->user_ip6);
	base = is_mapped_ipv4(ip) ? IPV4_SLOTS : IPV6_SLOTS;
	if (base == IPV6_SLOTS && (ip[0] != bpf_htonl(IPV6_PREFIX) || ip[1] || ip[2]))
		return;
	found = behind_slot(ctx, bpf_ntohl(ip[3]) - base);
	if (!found || is_mapped_ipv4(found->ip) != is_mapped_ipv4(ip))
		return;
	ctx->user_ip6[0] = found->ip[0];
	ctx->user_ip6[1] = found->ip[1];
	ctx->user_ip6[2] = found->ip[2];
	ctx->user_ip6[3] = found->ip[3];
	ctx->user_port = bpf_htons(RESOLVER_PORT);
}

/*
 * Hook: cgroup/connect4 on --cgroup. Linux 5.7 (5.18 for the errno).
 * Returns ALLOW, with another destination for an app's DNS. DENY where the
 * pod's proxy has no DNS socket or the pod no slot (ECONNREFUSED), or where the
 * slots are not local for this socket (ENETUNREACH); before 5.18 it is EPERM.
 */
SEC("cgroup/connect4")
int pyamb_dns_conn4(struct bpf_sock_addr *ctx)
{
	return redirect4(ctx, HOOK_CONNECT);
}

/* Hook: cgroup/connect6 on --cgroup. Linux 5.7. Returns as pyamb_dns_conn4. */
SEC("cgroup/connect6")
int pyamb_dns_conn6(struct bpf_sock_addr *ctx)
{
	return redirect6(ctx, HOOK_CONNECT);
}

/*
 * Hook: cgroup/sendmsg4 on --cgroup: datagrams with a destination of their own,
 * IPv4-mapped ones included. Linux 5.7. Returns as pyamb_dns_conn4.
 */
SEC("cgroup/sendmsg4")
int pyamb_dns_send4(struct bpf_sock_addr *ctx)
{
	return redirect4(ctx, HOOK_SENDMSG);
}

/* Hook: cgroup/sendmsg6 on --cgroup. Linux 5.7. Returns as pyamb_dns_conn4. */
SEC("cgroup/sendmsg6")
int pyamb_dns_send6(struct bpf_sock_addr *ctx)
{
	return redirect6(ctx, HOOK_SENDMSG);
}

/*
 * Hook: cgroup/recvmsg4 on --cgroup. Linux 5.7.
 * Returns ALLOW always (the kernel wants that), with the resolver as the sender
 * of what came from its slot.
 */
SEC("cgroup/recvmsg4")
int pyamb_dns_recv4(struct bpf_sock_addr *ctx)
{
	restore4(ctx);
	return ALLOW;
}

/* Hook: cgroup/recvmsg6 on --cgroup. Linux 5.7. Returns as pyamb_dns_recv4; mapped IPv4 comes here. */
SEC("cgroup/recvmsg6")
int pyamb_dns_recv6(struct bpf_sock_addr *ctx)
{
	restore6(ctx);
	return ALLOW;
}

/*
 * Hook: cgroup/getpeername4 on --cgroup. Linux 5.8.
 * Returns ALLOW always (the kernel wants that), with the resolver for its slot.
 */
SEC("cgroup/getpeername4")
int pyamb_dns_peer4(struct bpf_sock_addr *ctx)
{
	restore4(ctx);
	return ALLOW;
}

/* Hook: cgroup/getpeername6 on --cgroup. Linux 5.8. Returns as pyamb_dns_peer4. */
SEC("cgroup/getpeername6")
int pyamb_dns_peer6(struct bpf_sock_addr *ctx)
{
	restore6(ctx);
	return ALLOW;
}

DEFINE_LICENSE;
