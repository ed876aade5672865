/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * DNS over UDP with backend `tc`: a query goes to the proxy by lo, as segments
 * of TCP do, and arrives for the address of the resolver that was meant. Just
 * the port is another one, for a socket of the proxy's to have it; in the
 * answer it is put back.
 *
 * The port does not make the receiver the proxy: an app may have a socket that
 * gets more of a datagram than the proxy's wildcard one. Who would get it is
 * asked where it is about to, on lo.
 *
 * To be included after segment.h.
 */
#ifndef PYAMBIENT_QUERY_H
#define PYAMBIENT_QUERY_H

#include "dns_gate.h"
#include "ports.h"
#include "segment.h"

#define UDP_SOURCE	0
#define UDP_DEST	2
#define UDP_CHECK	6

DEFINE_FORWARDED_QUERIES;
DEFINE_SPLIT_QUERIES;

/* Of the proxy in this pod. */
static __always_inline __be16 dns_port(void)
{
	return bpf_htons(swap_port(constant(netns), DNS_PORT));
}

/* Only the first fragment has ports. */
static __always_inline int is_datagram(const struct segment *seg)
{
	return seg->protocol == IPPROTO_UDP && seg->fragment != LATER;
}

/* 0 if it cannot be written. */
static __always_inline int set_port(struct __sk_buff *skb, __u32 udp, __u32 offset, __be16 from,
				    __be16 to)
{
	__u64 flags = BPF_F_MARK_MANGLED_0 | sizeof(to);

	return !bpf_l4_csum_replace(skb, udp + UDP_CHECK, from, to, flags) &&
	       !bpf_skb_store_bytes(skb, udp + offset, &to, sizeof(to), 0);
}

static __always_inline void set_packet(struct packet *packet, const struct segment *seg)
{
	packet->netns = constant(netns);
	set_ipv6(packet->from, seg->ends.from);
	set_ipv6(packet->to, seg->ends.to);
	packet->id = seg->id;
	packet->padding = 0;
}

static __always_inline int is_of_split_query(const struct segment *seg)
{
	struct packet packet;

	set_packet(&packet, seg);
	return map_lookup(split_dns, &packet) != NULL;
}

/* A packet's first fragment decides about those that follow; ids come back. 0 if it cannot. */
static __always_inline int decide_fragments(const struct segment *seg, int are_captured)
{
	struct packet packet;
	__u8 yes = 1;

	if (seg->fragment != FIRST)
		return 1;
	set_packet(&packet, seg);
	if (are_captured)
		return !map_update(split_dns, &packet, &yes);
	map_delete(split_dns, &packet);
	return 1;
}

/* Fills in the ports. A query that the pod's selection leaves out is none. */
static __always_inline int is_query(struct segment *seg, const struct udphdr *udp)
{
	seg->ends.from_port = bpf_ntohs(udp->source);
	seg->ends.to_port = bpf_ntohs(udp->dest);
	return seg->ends.to_port == RESOLVER_PORT &&
	       !is_excluded(constant(netns), OUTBOUND, seg->ends.to, RESOLVER_PORT);
}

/* Readdressed, and noted if nobody in the pod has asked; 0 if that cannot be. */
static __always_inline int divert(struct __sk_buff *skb, struct bpf_sock *sk,
				  const struct segment *seg, const struct udphdr *udp)
{
	__u8 yes = 1;

	if (!sk && map_update(forwarded_dns, &seg->ends, &yes))
		return 0;
	return set_port(skb, seg->offset, UDP_DEST, udp->dest, dns_port());
}

/* On lo: whether the proxy itself would receive what has come. */
static __always_inline int reaches_proxy(struct __sk_buff *skb, const struct segment *seg,
					 const struct udphdr *udp)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	int is_proxys;

	if (is_mapped_ipv4(seg->ends.to)) {
		tuple.ipv4.saddr = seg->ends.from[3];
		tuple.ipv4.daddr = seg->ends.to[3];
		tuple.ipv4.sport = udp->source;
		tuple.ipv4.dport = udp->dest;
		sk = bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		set_ipv6(tuple.ipv6.saddr, seg->ends.from);
		set_ipv6(tuple.ipv6.daddr, seg->ends.to);
		tuple.ipv6.sport = udp->source;
		tuple.ipv6.dport = udp->dest;
		sk = bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return 0;
	is_proxys = storage_get(proxy_sockets, sk, 0) != NULL;
	bpf_sk_release(sk);
	return is_proxys;
}

static __always_inline int is_to_forwarded(const struct segment *answer, const struct udphdr *udp)
{
	struct connection ends = { .netns = constant(netns), .to_port = RESOLVER_PORT };

	set_ipv6(ends.from, answer->ends.to);
	set_ipv6(ends.to, answer->ends.from);
	ends.from_port = bpf_ntohs(udp->dest);
	return map_lookup(forwarded_dns, &ends) != NULL;
}

#endif
