// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * tc ingress on the pod's lo: tells sk_lookup, which cannot know before Linux
 * 5.17, that the SYN it is asked about came in by lo. One instance per pod.
 *
 * The look-up of a packet runs in the same call chain as its tc ingress, on the
 * same CPU, so one note per CPU is exact: no packet from outside comes between.
 *
 * The note says "by lo" and nothing of who sent it. The socket is gone here
 * (lo orphans what it sends) and a mark can be forged. So the mark only chooses
 * whose headers are worth reading; sk_lookup asks `upstreams`, which is written
 * from the proxy's own sockets, whether the SYN is the proxy's.
 */
#include "maps.h"
#include "packet.h"

DEFINE_NOTES;
DEFINE_CONSTANTS;

#define READ_HEADER(skb, offset, header) \
	bpf_skb_load_bytes_relative(skb, offset, &(header), sizeof(header), BPF_HDR_START_NET)

/* The proxy's SYN has neither fragments nor extension headers; 0 for what is not TCP. */
static __always_inline __u32 read_ipv4(struct __sk_buff *skb, struct connection *syn)
{
	struct iphdr ip;

	if (READ_HEADER(skb, 0, ip) || ip.protocol != IPPROTO_TCP)
		return 0;
	set_ipv4(syn->from, ip.saddr);
	set_ipv4(syn->to, ip.daddr);
	return ip.ihl * 4;
}

static __always_inline __u32 read_ipv6(struct __sk_buff *skb, struct connection *syn)
{
	struct ipv6hdr ip;

	if (READ_HEADER(skb, 0, ip) || ip.nexthdr != IPPROTO_TCP)
		return 0;
	set_ipv6(syn->from, ip.saddr.s6_addr32);
	set_ipv6(syn->to, ip.daddr.s6_addr32);
	return sizeof(ip);
}

static __always_inline int read_syn(struct __sk_buff *skb, struct connection *syn)
{
	struct tcphdr tcp;
	__u32 offset = 0;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		offset = read_ipv4(skb, syn);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		offset = read_ipv6(skb, syn);
	if (!offset || READ_HEADER(skb, offset, tcp) || !tcp.syn || tcp.ack)
		return 0;
	syn->from_port = bpf_ntohs(tcp.source);
	syn->to_port = bpf_ntohs(tcp.dest);
	return 1;
}

/*
 * Hook: clsact ingress of lo. Linux 4.18.
 * Returns TC_ACT_UNSPEC always: packets and other filters go on as without it.
 */
SEC("tc")
int pyamb_note(struct __sk_buff *skb)
{
	struct connection syn = { .netns = constant(netns) };
	struct note *note;
	__u32 only = 0;

	if ((skb->mark & MARK_MASK) != LOOPBACK_MARK || !read_syn(skb, &syn))
		return TC_ACT_UNSPEC;
	note = map_lookup(notes, &only);
	if (note) {
		note->syn = syn;
		note->time = bpf_ktime_get_ns();
	}
	return TC_ACT_UNSPEC;
}

DEFINE_LICENSE;
