// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Backend `tc`: capture where packets leave the pod. One instance per device.
 *
 * No hook sees these apps connect(), so their packets are turned round where
 * they would leave: a SYN, and whatever follows it, goes back in by lo with the
 * mark that makes it local there. sk_lookup then finds the listener, as it does
 * for `bpf`; assigning it here would bypass what the kernel does with tuples
 * in TIME_WAIT.
 *
 * While the pod changes over to `bpf`, or from it, the hooks may leave a SYN to
 * this program that it finds given to the hooks: it takes whatever comes so far.
 *
 * What follows is known by a note on the app's socket. A connection that the
 * pod forwards (of a nested namespace, of a virtual machine) has no socket
 * here, so its ends are remembered instead. A connection from before the
 * enrolment has neither, and goes on.
 *
 * The proxy's answers carry the mark of the SYN (tcp_fwmark_accept) or one of the
 * proxy's own, and most come to lo. One that belongs to a forwarded connection
 * is taken off there, and starts anew without a mark: routed, and translated if
 * the pod translates, as if it came from outside.
 */
#include "selection.h"
#include "workers.h"

#define TCP_SEQ		4
#define TCP_ACK_SEQ	8
#define TCP_FLAGS	12	/* with the length of the header before them */
#define TCP_CHECK	16
#define RST_AND_ACK	0x14
#define LOCALLY_ADMINISTERED	0x02	/* first byte of a link-layer address that no device has */

DEFINE_PROXY_SOCKETS;
DEFINE_CAPTURED_SOCKETS;
DEFINE_FORWARDED;
DEFINE_CONSTANTS;

#include "gate.h"
#include "query.h"
#include "trace.h"

/*
 * The packet goes in by lo. A device without a link layer (tun, WireGuard) has
 * no header for it, and gets one that is not for lo: like all that comes so.
 */
static __always_inline int to_lo(struct __sk_buff *skb)
{
	struct ethhdr link = { .h_dest = { LOCALLY_ADMINISTERED }, .h_proto = skb->protocol };

	skb->mark = (skb->mark & ~MARK_MASK) | LOOPBACK_MARK;
	if (!constant(is_ethernet) && (bpf_skb_change_head(skb, ETH_HLEN, 0) ||
				       bpf_skb_store_bytes(skb, 0, &link, sizeof(link), 0)))
		return TC_ACT_SHOT;
	return bpf_redirect(LOOPBACK_IFINDEX, BPF_F_INGRESS);
}

static __always_inline void swap_bytes(struct __sk_buff *skb, __u32 one, __u32 other, __u32 length)
{
	__u8 first[16], second[16];

	bpf_skb_load_bytes(skb, one, first, length);
	bpf_skb_load_bytes(skb, other, second, length);
	bpf_skb_store_bytes(skb, one, second, length, 0);
	bpf_skb_store_bytes(skb, other, first, length, 0);
}

static __always_inline void set_word(struct __sk_buff *skb, __u32 tcp, __u32 offset, __u32 value,
				     __u32 length)
{
	__u32 old = 0;

	bpf_skb_load_bytes(skb, tcp + offset, &old, length);
	bpf_l4_csum_replace(skb, tcp + TCP_CHECK, old, value, length);
	bpf_skb_store_bytes(skb, tcp + offset, &value, length, 0);
}

/*
 * The SYN becomes the RST that a closed port would answer, and comes in by the
 * device it was to leave by. The kernel itself would not answer IPv4 from an
 * address that is not the pod's, and the app would wait.
 */
static __always_inline int refuse(struct __sk_buff *skb, const struct segment *syn)
{
	__u32 network = constant(is_ethernet) ? ETH_HLEN : 0;
	__u32 tcp = syn->offset;
	__u8 flags[2] = { syn->tcp.doff << 4, RST_AND_ACK };

	if (skb->protocol == bpf_htons(ETH_P_IP))
		swap_bytes(skb, network + 12, network + 16, 4);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		swap_bytes(skb, network + 8, network + 24, 16);
	else
		return TC_ACT_SHOT;	/* with tags of its own before the packet */
	if (network)
		swap_bytes(skb, 0, ETH_ALEN, ETH_ALEN);
	swap_bytes(skb, tcp, tcp + 2, 2);
	set_word(skb, tcp, TCP_SEQ, 0, 4);
	set_word(skb, tcp, TCP_ACK_SEQ, bpf_htonl(bpf_ntohl(syn->tcp.seq) + 1), 4);
	set_word(skb, tcp, TCP_FLAGS, *(__u16 *)flags, 2);
	skb->mark &= ~MARK_MASK;
	return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

/* The port sk_lookup will choose, too (lookup.bpf.c). */
static __always_inline __u32 outbound_port(const struct connection *ends)
{
	return ends->to_port == RESOLVER_PORT && captures_dns(constant(netns)) ? DNS_PORT : OUTBOUND_PORT;
}

static __always_inline int has_listener(__u32 port)
{
	struct listener key = { .netns = constant(netns), .port = port };

	return is_served(&key);
}

/* 0 if it cannot be noted: then it must not begin. */
static __always_inline int note_captured(struct bpf_sock *sk, const struct connection *ends)
{
	__u8 captured = CAPTURED, *decided;

	if (!sk)
		return !map_update(forwarded, ends, &captured);
	decided = storage_get(captured_socks, sk, BPF_SK_STORAGE_GET_F_CREATE);
	if (!decided)
		return 0;
	*decided = CAPTURED;
	return 1;
}

/*
 * It goes its own way, and goes on if the pod's selection is another one later.
 * A socket may connect twice, and ends may be used again: nothing of the first
 * time must stay.
 */
static __always_inline int passes(struct bpf_sock *sk, const struct connection *ends)
{
	__u8 *decided;

	if (!sk) {
		map_delete(forwarded, ends);
		return TC_ACT_UNSPEC;
	}
	decided = storage_get(captured_socks, sk, BPF_SK_STORAGE_GET_F_CREATE);
	if (!decided)
		return TC_ACT_SHOT;
	*decided = EXCLUDED;
	return TC_ACT_UNSPEC;
}

static __always_inline int opens(struct __sk_buff *skb, struct bpf_sock *sk,
				 const struct segment *syn, __u32 *decision)
{
	__u64 netns = constant(netns);
	__u32 port;

	if (!is_captured(netns))
		return passes(sk, &syn->ends);
	*decision = DECISION(EVENT_EXCLUDED, 0, 0);
	if (is_excluded(netns, OUTBOUND, syn->ends.to, syn->ends.to_port))
		return passes(sk, &syn->ends);
	port = outbound_port(&syn->ends);
	*decision = DECISION(EVENT_REFUSED, WHY_NO_LISTENER, port);
	if (!has_listener(port))
		return refuse(skb, syn);
	*decision = DECISION(EVENT_REFUSED, WHY_NO_ROOM, 0);
	if (!note_captured(sk, &syn->ends))
		return TC_ACT_SHOT;
	*decision = DECISION(EVENT_CAPTURED, 0, port);
	return to_lo(skb);
}

/* Whether somebody else in the pod has the other end of this connection: the proxy. */
static __always_inline int has_other_end(struct __sk_buff *skb, const struct connection *ends)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	int found;

	if (is_mapped_ipv4(ends->from)) {
		tuple.ipv4.saddr = ends->from[3];
		tuple.ipv4.daddr = ends->to[3];
		tuple.ipv4.sport = bpf_htons(ends->from_port);
		tuple.ipv4.dport = bpf_htons(ends->to_port);
		sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		set_ipv6(tuple.ipv6.saddr, ends->from);
		set_ipv6(tuple.ipv6.daddr, ends->to);
		tuple.ipv6.sport = bpf_htons(ends->from_port);
		tuple.ipv6.dport = bpf_htons(ends->to_port);
		sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return 0;
	found = sk->state != BPF_TCP_LISTEN;
	bpf_sk_release(sk);
	return found;
}

static __always_inline int goes_on(struct __sk_buff *skb, struct bpf_sock *sk,
				   const struct connection *ends)
{
	__u8 *decided = sk ? storage_get(captured_socks, sk, 0) : map_lookup(forwarded, ends);

	if (decided)
		return *decided == CAPTURED ? to_lo(skb) : TC_ACT_UNSPEC;
	return has_other_end(skb, ends) ? to_lo(skb) : TC_ACT_UNSPEC;
}

/*
 * A fragment of a captured connection is put together on lo. What may be a
 * datagram does not leave where it could be a query; for TCP there is the guard.
 */
static __always_inline int unreadable(struct bpf_sock *sk, const struct segment *seg,
				      struct __sk_buff *skb, __u32 *decision)
{
	__u8 *decided = sk ? storage_get(captured_socks, sk, 0) : NULL;

	if (decided)
		return *decided == CAPTURED ? to_lo(skb) : TC_ACT_UNSPEC;
	if (seg->protocol == IPPROTO_TCP || !captures_dns(constant(netns)))
		return TC_ACT_UNSPEC;
	*decision = DECISION(EVENT_REFUSED, WHY_UNREADABLE, 0);
	return TC_ACT_SHOT;
}

static __always_inline int datagram(struct __sk_buff *skb, struct bpf_sock *sk,
				    struct segment *seg, __u32 *decision)
{
	struct udphdr udp;
	int captured;

	*decision = DECISION(EVENT_REFUSED | OF_UDP, WHY_UNREADABLE, 0);
	if (READ(skb, seg->offset, udp))
		return TC_ACT_SHOT;
	captured = is_query(seg, &udp);
	*decision = DECISION(EVENT_REFUSED | OF_UDP, WHY_NO_ROOM, 0);
	if (!decide_fragments(seg, captured))
		return TC_ACT_SHOT;
	if (!captured) {
		*decision = seg->ends.to_port == RESOLVER_PORT ?
				    DECISION(EVENT_EXCLUDED | OF_UDP, 0, 0) : 0;
		return TC_ACT_UNSPEC;
	}
	if (!divert(skb, sk, seg, &udp))
		return TC_ACT_SHOT;
	*decision = DECISION(EVENT_REDIRECTED | OF_UDP, 0, DNS_PORT);
	return to_lo(skb);
}

static __always_inline int other(struct __sk_buff *skb, struct bpf_sock *sk, struct segment *seg,
				 __u32 *decision)
{
	if (!captures_dns(constant(netns)))
		return TC_ACT_UNSPEC;
	if (is_datagram(seg))
		return datagram(skb, sk, seg, decision);
	decide_fragments(seg, 0);
	return TC_ACT_UNSPEC;
}

static __always_inline int judge(struct __sk_buff *skb, struct bpf_sock *sk, struct segment *seg,
				 __u32 *decision)
{
	int kind = read_segment(skb, seg, constant(is_ethernet));

	if (seg->fragment == LATER && is_of_split_query(seg))
		return to_lo(skb);
	if (kind == UNREADABLE)
		return unreadable(sk, seg, skb, decision);
	if (kind != SEGMENT)
		return other(skb, sk, seg, decision);
	if (seg->tcp.syn && !seg->tcp.ack)
		return opens(skb, sk, seg, decision);
	return goes_on(skb, sk, &seg->ends);
}

/*
 * Hook: tc egress (tcx, before Linux 6.6 clsact) of a pod's device. Linux 5.9.
 * Returns TC_ACT_REDIRECT for segments of captured connections and for queries
 * (to lo) and for a SYN that nobody would take (back, as a RST), TC_ACT_SHOT
 * where there is no memory to do so and, where DNS is captured, for what may be
 * a query and cannot be read; TC_ACT_UNSPEC (as if this program were not there)
 * for the proxy, for other protocols, and for connections that are not captured.
 */
SEC("tc")
int pyamb_redirect(struct __sk_buff *skb)
{
	struct segment segment = { .ends = { .netns = constant(netns) } };
	struct bpf_sock *sk = skb->sk;	/* once: a second load may be NULL again */
	__u32 decision = 0;
	int verdict;

	if (sk)
		sk = bpf_sk_fullsock(sk);
	if (sk && storage_get(proxy_sockets, sk, 0))
		return TC_ACT_UNSPEC;
	verdict = judge(skb, sk, &segment, &decision);
	if (decision)
		trace_packet(&segment.ends, constant(netns), HOOK_REDIRECT, 0, decision);
	return verdict;
}

static __always_inline int is_answer_to_forwarded(const struct connection *answer)
{
	struct connection ends = { .netns = answer->netns };

	set_ipv6(ends.from, answer->to);
	set_ipv6(ends.to, answer->from);
	ends.from_port = answer->to_port;
	ends.to_port = answer->from_port;
	return map_lookup(forwarded, &ends) != NULL;
}

/* Routed, and translated if the pod translates, as if it came from outside. */
static __always_inline int anew(struct __sk_buff *skb)
{
	skb->mark &= ~MARK_MASK;
	return bpf_redirect(LOOPBACK_IFINDEX, BPF_F_INGRESS);
}

/* From another device: its link-layer address is that of a router, and it is for this host. */
static __always_inline int comes(struct __sk_buff *skb, struct segment *seg)
{
	struct udphdr udp;

	bpf_skb_change_type(skb, PACKET_HOST);
	if (!is_datagram(seg))
		return TC_ACT_UNSPEC;
	if (!READ(skb, seg->offset, udp) && reaches_proxy(skb, seg, &udp))
		return TC_ACT_UNSPEC;
	seg->ends.to_port = RESOLVER_PORT;	/* as it was sent */
	trace_packet(&seg->ends, constant(netns), HOOK_ARRIVAL, 0,
		     DECISION(EVENT_REFUSED | OF_UDP, WHY_NO_LISTENER, DNS_PORT));
	return TC_ACT_SHOT;
}

/* The proxy's answer to a query stays where it is: a socket bound to a device still gets it. */
static __always_inline int answers(struct __sk_buff *skb, const struct segment *seg)
{
	struct udphdr udp;

	if (READ(skb, seg->offset, udp) || udp.source != dns_port())
		return TC_ACT_UNSPEC;
	if (!set_port(skb, seg->offset, UDP_SOURCE, udp.source, bpf_htons(RESOLVER_PORT)))
		return TC_ACT_SHOT;
	return is_to_forwarded(seg, &udp) ? anew(skb) : TC_ACT_UNSPEC;
}

/*
 * Hook: tc ingress (tcx, before Linux 6.6 clsact) of a pod's lo. Linux 5.9.
 * Returns TC_ACT_UNSPEC, having said of what came from another device that it
 * is for this host, and of an answer to a query that the resolver's port sent
 * it; TC_ACT_REDIRECT, to lo again, for answers to what the pod forwards;
 * TC_ACT_SHOT for a query that would not reach the proxy.
 */
SEC("tc")
int pyamb_arrival(struct __sk_buff *skb)
{
	struct segment segment = { .ends = { .netns = constant(netns) } };
	int kind;

	if (!(skb->mark & MARK_MASK))
		return TC_ACT_UNSPEC;
	kind = read_segment(skb, &segment, constant(is_ethernet));
	if (skb->pkt_type == PACKET_OTHERHOST)
		return comes(skb, &segment);
	if (is_datagram(&segment))
		return answers(skb, &segment);
	if (kind != SEGMENT || !is_answer_to_forwarded(&segment.ends))
		return TC_ACT_UNSPEC;
	return anew(skb);
}

DEFINE_LICENSE;
