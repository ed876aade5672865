/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Is this packet TCP, or a query to a resolver? Read from its own bytes:
 * skb->protocol is what the sender says, and the sender may be an app with a
 * packet socket.
 *
 * What is provably something else is OTHER; what cannot be followed to its
 * transport header (a later fragment of TCP, a chain of extension headers longer
 * than anybody needs, a header cut off) is UNREADABLE, and the caller drops it.
 * TCP inside another protocol (a tunnel) is that protocol's.
 */
#ifndef PYAMBIENT_SEGMENT_H
#define PYAMBIENT_SEGMENT_H

#include "maps.h"
#include "packet.h"

#define OTHER		0
#define SEGMENT		1
#define UNREADABLE	2
#define QUERY		3	/* UDP to port 53; of `tcp` only the ports are read */

#define MOST_TAGS	2	/* 802.1Q in 802.1ad */
#define MOST_EXTENSIONS	4

#define IP_OFFSET	0x1fff
#define IP_MORE		0x2000
#define IP6_OFFSET	0xfff8
#define IP6_MORE	0x0001

struct segment {
	struct connection ends;	/* from the pod outwards */
	__u32 offset;		/* of the header to be read next */
	__u32 end;		/* where the packet ends, as its IP header says */
	__u32 protocol;		/* of that header, as far as headers could be followed */
	__u32 fragment;		/* FIRST or LATER of a packet in fragments, else 0 */
	__u32 id;		/* which its fragments share */
	struct tcphdr tcp;
};

#define FIRST		1
#define LATER		2

/* No extension header is shorter than 8 bytes; `id` is that of a fragment header. */
struct extension {
	__u8 next;
	__u8 length;
	__be16 fragment;
	__be32 id;
};

#define READ(skb, offset, header) bpf_skb_load_bytes(skb, offset, &(header), sizeof(header))

/* RFC 8200 section 4, and the others that IANA lists as extension headers; AH is IPv4's as well. */
static __always_inline int is_extension(__u32 protocol)
{
	switch (protocol) {
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_FRAGMENT:
	case IPPROTO_AH:
	case IPPROTO_DSTOPTS:
	case IPPROTO_MH:
		return 1;
	}
	return 0;
}

/* The EtherType; sets the offset of what follows it. A device without link header has none. */
static __always_inline __u32 read_link(struct __sk_buff *skb, struct segment *seg, int is_ethernet)
{
	__u8 version;
	__be16 type;
	int i;

	seg->offset = 0;
	if (!is_ethernet) {
		if (READ(skb, 0, version))
			return 0;
		return version >> 4 == 4 ? ETH_P_IP : version >> 4 == 6 ? ETH_P_IPV6 : 0;
	}
	seg->offset = ETH_HLEN;
	if (READ(skb, ETH_HLEN - sizeof(type), type))
		return 0;
	for (i = 0; i < MOST_TAGS; i++) {
		if (type != bpf_htons(ETH_P_8021Q) && type != bpf_htons(ETH_P_8021AD))
			break;
		if (READ(skb, seg->offset + sizeof(type), type))
			return 0;
		seg->offset += 4;
	}
	return bpf_ntohs(type);
}

/*
 * Only the first fragment tells what the later ones are: receivers take the
 * protocol from there, so a later one that says it holds extension headers may
 * hold anything.
 */
static __always_inline int judge_later_fragment(__u32 protocol)
{
	return protocol == IPPROTO_TCP || is_extension(protocol) ? UNREADABLE : OTHER;
}

static __always_inline void note_fragment(struct segment *seg, __u32 offset, __u32 more, __u32 id)
{
	if (!offset && !more)
		return;
	seg->fragment = offset ? LATER : FIRST;
	seg->id = id;
}

static __always_inline __u32 extension_bytes(__u32 protocol, const struct extension *header)
{
	if (protocol == IPPROTO_FRAGMENT)
		return 8;
	if (protocol == IPPROTO_AH)	/* RFC 4302 section 2.2: in words of 4, less 2 */
		return (header->length + 2) * 4;
	return (header->length + 1) * 8;
}

/* Any first fragment holds the ports: none is shorter than 8 bytes (RFC 791). */
static __always_inline int read_datagram(struct __sk_buff *skb, struct segment *seg)
{
	if (bpf_skb_load_bytes(skb, seg->offset, &seg->tcp, 2 * sizeof(__be16)))
		return UNREADABLE;
	return seg->tcp.dest == bpf_htons(RESOLVER_PORT) ? QUERY : OTHER;
}

static __always_inline int find_segment(struct __sk_buff *skb, struct segment *seg,
					__u32 protocol)
{
	struct extension header;
	__u32 fragment, is_split = 0;
	int i;

	seg->protocol = protocol;

	for (i = 0; i < MOST_EXTENSIONS; i++) {
		if (!is_extension(protocol))
			break;
		if (READ(skb, seg->offset, header))
			return UNREADABLE;
		seg->offset += extension_bytes(protocol, &header);
		fragment = protocol == IPPROTO_FRAGMENT ? bpf_ntohs(header.fragment) : 0;
		protocol = header.next;
		seg->protocol = protocol;
		note_fragment(seg, fragment & IP6_OFFSET, fragment & IP6_MORE, header.id);
		if (fragment & IP6_OFFSET)
			return judge_later_fragment(protocol);
		is_split |= fragment & IP6_MORE;
	}
	if (protocol == IPPROTO_TCP)
		return is_split || READ(skb, seg->offset, seg->tcp) ? UNREADABLE : SEGMENT;
	if (protocol == IPPROTO_UDP)
		return read_datagram(skb, seg);
	return is_extension(protocol) ? UNREADABLE : OTHER;
}

static __always_inline int read_ipv4(struct __sk_buff *skb, struct segment *seg)
{
	struct iphdr ip;
	__u32 fragment;

	if (READ(skb, seg->offset, ip) || ip.version != 4 || ip.ihl < 5)
		return UNREADABLE;
	set_ipv4(seg->ends.from, ip.saddr);
	set_ipv4(seg->ends.to, ip.daddr);
	seg->end = seg->offset + bpf_ntohs(ip.tot_len);
	seg->offset += ip.ihl * 4;
	fragment = bpf_ntohs(ip.frag_off);
	seg->protocol = ip.protocol;
	note_fragment(seg, fragment & IP_OFFSET, fragment & IP_MORE, ip.id);
	if (fragment & IP_OFFSET || (fragment & IP_MORE && ip.protocol == IPPROTO_TCP))
		return judge_later_fragment(ip.protocol);
	return find_segment(skb, seg, ip.protocol);
}

static __always_inline int read_ipv6(struct __sk_buff *skb, struct segment *seg)
{
	struct ipv6hdr ip;

	if (READ(skb, seg->offset, ip) || ip.version != 6)
		return UNREADABLE;
	set_ipv6(seg->ends.from, ip.saddr.s6_addr32);
	set_ipv6(seg->ends.to, ip.daddr.s6_addr32);
	seg->offset += sizeof(ip);
	seg->end = seg->offset + bpf_ntohs(ip.payload_len);
	return find_segment(skb, seg, ip.nexthdr);
}

/* What of it could be read is in `seg`; of the TCP header all with SEGMENT. */
static __always_inline int read_segment(struct __sk_buff *skb, struct segment *seg,
					int is_ethernet)
{
	__u32 type = read_link(skb, seg, is_ethernet);
	int kind = OTHER;

	if (type == ETH_P_IP)
		kind = read_ipv4(skb, seg);
	else if (type == ETH_P_IPV6)
		kind = read_ipv6(skb, seg);
	else if (type == ETH_P_8021Q || type == ETH_P_8021AD)
		kind = UNREADABLE;
	if (kind == SEGMENT || kind == QUERY) {
		seg->ends.from_port = bpf_ntohs(seg->tcp.source);
		seg->ends.to_port = bpf_ntohs(seg->tcp.dest);
	}
	return kind;
}

#endif
