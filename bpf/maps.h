/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the programs share: ports, marks, keys, maps.
 *
 * Every map is one per node and pinned. Whatever is said about a pod is keyed
 * by the cookie of its network namespace, never by an address alone: plain
 * namespaces reuse addresses, and two pods with the same one must never meet.
 * Each program declares just the maps it uses.
 */
#ifndef PYAMBIENT_MAPS_H
#define PYAMBIENT_MAPS_H

#include "compat.h"

#define OUTBOUND_PORT	15001
#define INBOUND_PORT	15006
#define HBONE_PORT	15008
#define DNS_PORT	15053
#define RESOLVER_PORT	53

#define MARK_MASK	0xfff
#define LOOPBACK_MARK	0x111

#define LOOPBACK_IFINDEX	1	/* in every network namespace */

#define MAX_WORKERS	16	/* of a proxy; pyambient/model/numbers.py */

/* What a cgroup hook returns: the call goes on, or fails with an errno. */
#define ALLOW		1
#define DENY		0

/* An IPv4 address is kept as the IPv4-mapped IPv6 one, in network order. */
struct address {
	__u64 netns;
	__u32 ip[4];
};

/* A device by which the pod's routing table captures; `family` is an AF_ number. */
struct device {
	__u64 netns;
	__u32 index;
	__u32 family;
};

struct listener {
	__u64 netns;
	__u32 port;	/* the well-known one, whatever the socket's */
	__u32 worker;
};

struct pod {
	__u32 inode;	/* of the namespace: for people who read the map */
	__u32 by;	/* what captures its connections */
};

/* What captures: hooks on the calls of apps, or the devices of the pod (backend `tc`). */
#define BY_HOOKS	1
#define BY_DEVICES	2

struct pod_port {
	__u64 netns;
	__u32 port;	/* in host order */
	__u32 padding;
};

/* Both ends of a TCP connection, from the one that opens it; ports in host order. */
struct connection {
	__u64 netns;
	__u32 from[4];
	__u32 to[4];
	__u32 from_port;
	__u32 to_port;
};

/* The last SYN that came in by lo, and when (bpf_ktime_get_ns()). */
struct note {
	struct connection syn;
	__u64 time;
};

/* One of the numbered addresses in a pod that stand for the resolvers its apps ask. */
struct slot {
	__u64 netns;
	__u32 number;
	__u32 padding;
};

/* What the fragments of a packet have in common. */
struct packet {
	__u64 netns;
	__u32 from[4];
	__u32 to[4];
	__u32 id;
	__u32 padding;
};

/* Whose connection sk_lookup is asked about: the pod's entry says so, right before. */
struct entered {
	__u64 netns;
	__be16 remote_port;
	__u16 local_port;
	__u32 padding;
};

struct resolver {
	__u32 ip[4];
	__u64 used;	/* when, at the last time (bpf_ktime_get_ns()) */
	__u32 scope;	/* of a link-local address: the index of its device, 0 if unknown */
	__u32 padding;
};

/* The gate: no namespace is captured that is not in here. */
#define DEFINE_PODS DEFINE_HASH(pods, __u64, struct pod, 4096)

/* Ports of a pod that have changed places, each with the other (ports.h). */
#define DEFINE_MOVED_PORTS DEFINE_HASH(moved_ports, struct pod_port, __u32, 16384)

/* Connections without a socket in the pod (it forwards them) that were given to the proxy. */
#define DEFINE_FORWARDED DEFINE_LRU_HASH(forwarded, struct connection, __u8, 65536)

/* The same for queries over UDP: ends by which an answer is known. */
#define DEFINE_FORWARDED_QUERIES DEFINE_LRU_HASH(forwarded_dns, struct connection, __u8, 16384)

/* Queries in fragments, of which the first was given to the proxy. */
#define DEFINE_SPLIT_QUERIES DEFINE_LRU_HASH(split_dns, struct packet, __u8, 4096)

/* The addresses of each pod. */
#define DEFINE_ADDRESSES DEFINE_HASH(addresses, struct address, __u8, 16384)

/* The devices of each pod, per family, that have their route for captured sockets. */
#define DEFINE_DEVICES DEFINE_HASH(devices, struct device, __u8, 16384)

/* The proxy's listening sockets; an entry goes away with its socket. */
#define DEFINE_LISTENERS DEFINE_SOCKHASH(listeners, struct listener, 16384)

/* How many workers the proxy in a pod says it has; without an entry it is one. */
#define DEFINE_WORKERS DEFINE_HASH(workers, __u64, __u32, 4096)

/* On every socket that the proxy's cgroup made, and on those accepted from them: its netns. */
#define DEFINE_PROXY_SOCKETS DEFINE_SK_STORAGE(proxy_sockets, __u64, BPF_F_CLONE)

/* The proxy's connections to apps, from before their SYN to the answer. Kept before 5.17 only. */
#define DEFINE_UPSTREAMS DEFINE_HASH(upstreams, struct connection, __u8, 65536)

/* Written by the pods' entries (pyambient/intercept/entry.py), read by lookup.bpf.c. */
#define DEFINE_ENTERED DEFINE_PERCPU_ARRAY(entered, struct entered, 1)

/* Written by note.bpf.c on a pod's lo, read by lookup.bpf.c. */
#define DEFINE_NOTES DEFINE_PERCPU_ARRAY(notes, struct note, 1)

/*
 * On an app's socket since its connect(): what was decided. Not cloned: what
 * is accepted from a socket that once connected is another connection.
 */
#define DEFINE_CAPTURED_SOCKETS DEFINE_SK_STORAGE(captured_socks, __u8, 0)
#define CAPTURED	1	/* given to the proxy */
#define EXCLUDED	2	/* goes its way, as the pod's selection wants it */

/* The pods whose DNS goes to the proxy while they are enrolled, and what sends it there. */
#define DEFINE_DNS_PODS DEFINE_HASH(dns_pods, __u64, __u8, 4096)

/* Which resolver a slot of a pod stands for (dns.bpf.c). */
#define DEFINE_RESOLVERS DEFINE_HASH(resolvers, struct slot, struct resolver, 131072)

#define LOOPBACK_IFINDEX 1

#define AF_INET		2
#define AF_INET6	10

static __always_inline int is_our_port(__u32 port)
{
	return port == OUTBOUND_PORT || port == INBOUND_PORT || port == HBONE_PORT ||
	       port == DNS_PORT;
}

/*
 * Questions to an address in one comparison: with one for each word, the verifier
 * goes through all that follows once for each way by which they can be answered.
 */
static __always_inline int is_mapped_ipv4(const __u32 *ip)
{
	return !(ip[0] | ip[1] | (ip[2] ^ bpf_htonl(0xffff)));
}

/* 127.0.0.0/8 and ::1; connect() takes 0.0.0.0 and :: for the same. */
static __always_inline int is_loopback(const __u32 *ip)
{
	if (is_mapped_ipv4(ip))
		return ip[3] == 0 || (bpf_ntohl(ip[3]) >> 24) == IN_LOOPBACKNET;
	return !(ip[0] | ip[1] | ip[2] | (ip[3] & ~bpf_htonl(1)));
}

static __always_inline void set_ipv4(__u32 *ip, __u32 ipv4)
{
	ip[0] = 0;
	ip[1] = 0;
	ip[2] = bpf_htonl(0xffff);
	ip[3] = ipv4;
}

/* One volatile load: else clang 14 selects between two pointers into the socket. */
static __always_inline __u32 load(const volatile __u32 *field)
{
	__u32 value = *field;

	barrier_var(value);
	return value;
}

/* Volatile loads: else clang 14 merges those of two families and moves ctx itself. */
static __always_inline void set_ipv6(__u32 *ip, const volatile __u32 *ipv6)
{
	ip[0] = ipv6[0];
	ip[1] = ipv6[1];
	ip[2] = ipv6[2];
	ip[3] = ipv6[3];
}

#endif
