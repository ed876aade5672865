// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * tc egress on each device of a pod: TCP leaves by the proxy, or not at all; so
 * do queries over UDP where the pod's DNS is captured. A device has an entry,
 * which says whose it is and goes on to here (pyambient/intercept/entry.py).
 *
 * Every TCP packet is judged by the socket that sent it. Nothing in the packet
 * counts, and no mark: both are the app's to choose (CAP_NET_RAW is enough).
 * What connect() noted on a socket is not; nor is the socket's cookie, by which
 * the connections from before the enrolment are known. Captured packets go out
 * over lo, and so do an app's answers to the proxy: nothing of them comes here.
 *
 * Some segments come without a socket that could be asked: the kernel's own
 * answers for what has none (any more). They hold no data, and pass if they are
 * a reset, or belong to a connection that the kernel still has in TIME-WAIT or
 * is about to accept. An IPv4 answer comes from a raw socket of the kernel's,
 * which nothing tells from an app's: so an app with CAP_NET_RAW can send such
 * segments, too. They open nothing and carry nothing.
 *
 * A query that comes here and is not the proxy's has missed the hooks that would
 * have readdressed it: of a socket that was connected to its resolver before the
 * enrolment, or written by the app itself.
 */
#include "probes.h"
#include "selection.h"

DEFINE_PROXY_SOCKETS;
DEFINE_CAPTURED_SOCKETS;
DEFINE_PROBES;
/* Cookies of each pod's sockets whose connections are older than the enrolment. */
DEFINE_HASH_OF_MAPS(existing, __u64, 4096, OF_HASHES, __u64, __u8, 1, 0);
/* Cookies of connections that a pod's selection let come in, from their SYN-ACK on. */
DEFINE_LRU_HASH(let_in, __u64, __u8, 32768);

#include "dns_gate.h"
#include "drops.h"
#include "gate.h"

#define PASS		-1

/* What an entry says of its device (pyambient/intercept/entry.py). */
#define IS_ETHERNET	1
#define COUNTS_ONLY	2

#define SOCK_STREAM	1
#define SOCK_DGRAM	2
#define SOCK_RAW	3

static __always_inline int is_internet(struct bpf_sock *sk)
{
	return sk->family == AF_INET || sk->family == AF_INET6;
}

static __always_inline int is_the_proxys(struct bpf_sock *sk)
{
	return storage_get(proxy_sockets, sk, 0) != NULL;
}

/* Of a connection about to be accepted as well: its socket inherits the cookie. */
static __always_inline int is_older(struct __sk_buff *skb, const struct guarded *pod)
{
	void *older = map_lookup(existing, &pod->netns);
	__u64 cookie = bpf_get_socket_cookie(skb);

	return older && bpf_map_lookup_elem(older, &cookie);
}

/* An answer to a client that the pod's selection lets come in directly. */
static __always_inline int is_to_excluded(const struct guarded *pod, const struct segment *seg)
{
	return is_excluded(pod->netns, INBOUND, seg->ends.to, seg->ends.from_port);
}

/* The answer to a health probe of the node, which waits for it. */
static __always_inline int is_to_probe(const struct segment *seg)
{
	struct connection key = {};

	set_ipv6(key.from, seg->ends.to);
	set_ipv6(key.to, seg->ends.from);
	key.from_port = seg->ends.to_port;
	key.to_port = seg->ends.from_port;
	return map_lookup(probes, &key) != NULL;
}

/*
 * The answer to a SYN. An app may speak on its socket for the first time when
 * the selection is another one: known by the cookie, as it inherits that.
 */
static __always_inline int pass_opening(struct __sk_buff *skb)
{
	__u64 cookie = bpf_get_socket_cookie(skb);
	__u8 yes = 1;

	map_update(let_in, &cookie, &yes);
	return PASS;
}

static __always_inline int is_let_in(struct __sk_buff *skb)
{
	__u64 cookie = bpf_get_socket_cookie(skb);

	return map_lookup(let_in, &cookie) != NULL;
}

/* Once seen it is noted: it goes on if the pod's selection is another one later. */
static __always_inline int pass_excluded(struct bpf_sock *sk)
{
	__u8 *noted = storage_get(captured_socks, sk, BPF_SK_STORAGE_GET_F_CREATE);

	if (noted)
		*noted = EXCLUDED;
	return PASS;
}

/* The note comes first: a socket from before the enrolment may connect again. */
static __always_inline int judge_stream(struct __sk_buff *skb, struct bpf_sock *sk,
					const struct guarded *pod, int kind,
					const struct segment *seg)
{
	__u8 *noted = storage_get(captured_socks, sk, 0);

	if (noted && *noted == CAPTURED)
		return REASON_CAPTURED;
	if (noted && *noted == EXCLUDED)
		return PASS;
	if (is_older(skb, pod))
		return PASS;
	if (is_let_in(skb) || (kind == SEGMENT && is_to_excluded(pod, seg)))
		return pass_excluded(sk);
	return REASON_SOCKET;
}

static __always_inline int is_empty(const struct segment *seg)
{
	return seg->offset + seg->tcp.doff * 4 == seg->end;
}

/* `found` is what the connection, seen from its other end, is looked up as. */
static __always_inline int may_answer(struct bpf_sock *found, const struct guarded *pod,
				      const struct segment *seg)
{
	struct bpf_sock *listener;

	if (found->state == BPF_TCP_TIME_WAIT || found->state == BPF_TCP_NEW_SYN_RECV)
		return 1;
	if (found->state != BPF_TCP_LISTEN || !seg->tcp.syn)
		return 0;
	/* Flooded, a listener answers with a SYN cookie and keeps nothing. */
	if (is_to_excluded(pod, seg))
		return 1;
	listener = bpf_sk_fullsock(found);
	return listener && is_the_proxys(listener);
}

static __always_inline struct bpf_sock *look_up(struct __sk_buff *skb, const struct segment *seg)
{
	struct bpf_sock_tuple tuple = {};

	if (is_mapped_ipv4(seg->ends.to)) {
		tuple.ipv4.saddr = seg->ends.to[3];
		tuple.ipv4.daddr = seg->ends.from[3];
		tuple.ipv4.sport = seg->tcp.dest;
		tuple.ipv4.dport = seg->tcp.source;
		return bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	set_ipv6(tuple.ipv6.saddr, seg->ends.to);
	set_ipv6(tuple.ipv6.daddr, seg->ends.from);
	tuple.ipv6.sport = seg->tcp.dest;
	tuple.ipv6.dport = seg->tcp.source;
	return bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
}

static __always_inline int is_kernels_answer(struct __sk_buff *skb, const struct guarded *pod,
					     const struct segment *seg)
{
	struct bpf_sock *found;
	int answers;

	if (!is_empty(seg))
		return 0;
	if (seg->tcp.rst)
		return 1;
	if (!seg->tcp.ack)
		return 0;
	found = look_up(skb, seg);
	if (!found)
		return 0;
	answers = may_answer(found, pod, seg);
	bpf_sk_release(found);
	return answers;
}

static __always_inline int judge_other(struct __sk_buff *skb, struct bpf_sock *sk,
				       const struct guarded *pod, const struct segment *seg)
{
	if (sk->family == AF_INET && sk->type == SOCK_RAW && sk->protocol == IPPROTO_TCP &&
	    is_kernels_answer(skb, pod, seg))
		return PASS;
	return REASON_RAW;
}

/*
 * Forwarded packets have come in by a device, the kernel's own have not. Where
 * a redirect is ahead of this program, it has taken those it is to take.
 */
static __always_inline int judge_without(struct __sk_buff *skb, const struct guarded *pod,
					 const struct segment *seg)
{
	struct bpf_sock *sk = skb->sk, *listener = sk ? bpf_get_listener_sock(sk) : NULL;

	if (listener && is_the_proxys(listener))
		return PASS;
	if (sk && is_older(skb, pod))
		return PASS;
	if (sk && (is_to_excluded(pod, seg) || is_to_probe(seg)))
		return pass_opening(skb);
	if (skb->ingress_ifindex)
		return is_captured_by_devices(pod->netns) ? PASS : REASON_FORWARDED;
	return is_kernels_answer(skb, pod, seg) ? PASS : REASON_FORWARDED;
}

/* No socket says that it was judged before: each query is, by where it goes now. */
static __always_inline int judge_query(struct __sk_buff *skb, const struct guarded *pod,
				       const struct segment *seg)
{
	if (is_excluded(pod->netns, OUTBOUND, seg->ends.to, RESOLVER_PORT))
		return PASS;
	if (!skb->sk && skb->ingress_ifindex && is_captured_by_devices(pod->netns))
		return PASS;
	return REASON_DNS;
}

/* Sockets that send nothing that counts, or all they like: no packet has to be read. */
static __always_inline int is_free(struct bpf_sock *sk, const struct guarded *pod)
{
	if (is_the_proxys(sk))
		return 1;
	return is_internet(sk) && sk->type == SOCK_DGRAM && !captures_dns(pod->netns);
}

static __always_inline int is_stream(struct bpf_sock *sk)
{
	return is_internet(sk) && sk->type == SOCK_STREAM && sk->protocol == IPPROTO_TCP;
}

/* A stream's packet is judged whatever it looks like by now: a tunnel may have wrapped it. */
static __always_inline int judge(struct __sk_buff *skb, const struct guarded *pod, int kind,
				 const struct segment *seg)
{
	struct bpf_sock *sk = skb->sk ? bpf_sk_fullsock(skb->sk) : NULL;

	if (sk && is_stream(sk))
		return judge_stream(skb, sk, pod, kind, seg);
	if (kind == OTHER)
		return PASS;
	if (kind == QUERY)
		return captures_dns(pod->netns) ? judge_query(skb, pod, seg) : PASS;
	if (kind == UNREADABLE)
		return REASON_UNREADABLE;
	return sk ? judge_other(skb, sk, pod, seg) : judge_without(skb, pod, seg);
}

static __always_inline int judge_packet(struct __sk_buff *skb, const struct guarded *pod)
{
	struct segment seg = {};
	int verdict = judge(skb, pod, read_segment(skb, &seg, pod->is_ethernet), &seg);

	return verdict == PASS ? TC_ACT_UNSPEC : drop(pod, &seg, verdict, HOOK_GUARD);
}

/* As the device's entry has written it, and nobody else: it comes right before. */
static __always_inline void read_entry(struct __sk_buff *skb, struct guarded *pod)
{
	__u32 choices = skb->cb[2];

	pod->netns = (__u64)skb->cb[1] << 32 | skb->cb[0];
	pod->is_ethernet = choices & IS_ETHERNET;
	pod->counts_only = choices & COUNTS_ONLY;
	pod->sign = skb->cb[3];
}

/*
 * Hook: tc egress (tcx, before Linux 6.6 clsact) of a pod's device, by the
 * device's entry. Linux 5.9.
 * Returns TC_ACT_SHOT for TCP that is not of the proxy, excluded, from before
 * the enrolment or a bare answer of the kernel's, for queries that are neither
 * of the proxy nor excluded, and for what may be one of them and cannot be read;
 * TC_ACT_UNSPEC (as if this program were not there) for all else, and for
 * everything where it only counts.
 */
SEC("tc")
int pyamb_guard(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk ? bpf_sk_fullsock(skb->sk) : NULL;
	struct guarded pod;

	read_entry(skb, &pod);
	if ((!sk || !is_free(sk, &pod)) && judge_packet(skb, &pod) == TC_ACT_SHOT)
		return TC_ACT_SHOT;
	if (pod.sign)
		bpf_set_hash(skb, pod.sign);
	return TC_ACT_UNSPEC;
}

DEFINE_LICENSE;
