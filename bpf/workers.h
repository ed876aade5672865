/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The listeners of a pod: each worker of the proxy has its own.
 *
 * A worker of several says on its listener which one it is, and how many there
 * are (proxy_socket.bpf.c). Of one that is gone no entry is left: another
 * worker's listener stands in for it until it is back.
 */
#ifndef PYAMBIENT_WORKERS_H
#define PYAMBIENT_WORKERS_H

#include "maps.h"

DEFINE_LISTENERS;
DEFINE_WORKERS;

static __always_inline __u32 count_workers(__u64 netns)
{
	__u32 *count = map_lookup(workers, &netns);

	return count ? *count : 1;
}

/* Any worker's listener for the key's port, `first`'s if it has one; to be released. */
static __always_inline struct bpf_sock *find_listener(struct listener *key, __u32 first,
						      __u32 count)
{
	__u32 i, worker = first % count;
	struct bpf_sock *sk;

	for (i = 0; i < MAX_WORKERS; i++) {
		/* Else clang counts down from the smaller bound, which the verifier does not know. */
		barrier_var(i);
		if (i >= count)
			break;
		key->worker = worker;
		sk = map_lookup(listeners, key);
		if (sk)
			return sk;
		worker = worker + 1 == count ? 0 : worker + 1;
	}
	return NULL;
}

static __always_inline int is_served(struct listener *key)
{
	struct bpf_sock *sk = find_listener(key, 0, count_workers(key->netns));

	if (!sk)
		return 0;
	bpf_sk_release(sk);
	return 1;
}

#endif
