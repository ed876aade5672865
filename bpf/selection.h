/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Which connections of a pod are not captured: its selections, one for each
 * direction, as pyambient/intercept/selection_map.py writes them.
 *
 * A selection is a trie of its own, so that a pod's many CIDRs cost no other
 * pod anything, and a new selection takes the place of the old one in a single
 * update: no connection ever meets half of one. A direction without an entry
 * is captured whole, which is what most pods pay for: one failed look-up.
 */
#ifndef PYAMBIENT_SELECTION_H
#define PYAMBIENT_SELECTION_H

#include "maps.h"

#define OUTBOUND	0
#define INBOUND		1

struct selection {
	__u64 netns;
	__u64 direction;
};

/* What a selector is about; its first 32 bits. */
#define OF_PORT		0
#define OF_IPV4		4
#define OF_IPV6		6
#define KIND_BITS	32

/* A key of a trie: `value` is an address or a port, in network order. */
struct selector {
	__u32 prefixlen;
	__u32 kind;
	__u32 value[4];
};

/* The value of a selector: 1 if it excludes. The most specific one counts. */
DEFINE_HASH_OF_MAPS(selections, struct selection, 8192, OF_TRIES, struct selector, __u8, 131072,
		    BPF_F_NO_PREALLOC);

static __always_inline int excludes(void *trie, const struct selector *key)
{
	__u8 *excluded = bpf_map_lookup_elem(trie, (void *)key);

	return excluded && *excluded;
}

/*
 * Whether the pod's selection leaves this connection alone. Decided by what the
 * kernel will use or has used, the address of the other end (`ip`) and the port
 * that is connected to (in host order), and nothing else.
 */
static __always_inline int is_excluded(__u64 netns, __u64 direction, const __u32 *ip, __u16 port)
{
	struct selection key = { .netns = netns, .direction = direction };
	struct selector by_port = {}, by_ip = {};
	void *trie = bpf_map_lookup_elem(MAP(selections), &key);

	if (!trie)
		return 0;
	/* Not as initialisers: constant ones become part of .rodata. */
	by_port.prefixlen = KIND_BITS + 16;
	by_port.kind = OF_PORT;
	by_port.value[0] = bpf_htonl((__u32)port << 16);
	if (excludes(trie, &by_port))
		return 1;
	if (is_mapped_ipv4(ip)) {
		by_ip.prefixlen = KIND_BITS + 32;
		by_ip.kind = OF_IPV4;
		by_ip.value[0] = ip[3];
	} else {
		by_ip.prefixlen = KIND_BITS + 128;
		by_ip.kind = OF_IPV6;
		set_ipv6(by_ip.value, ip);
	}
	return excludes(trie, &by_ip);
}

#endif
