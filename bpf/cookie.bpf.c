// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * cgroup/connect4 on a cgroup made for the moment: what a kernel without
 * SO_NETNS_COOKIE (before Linux 5.14) tells nobody but a BPF program.
 *
 * Nobody is in that cgroup but the process that asks, so whoever connects is
 * the one; its pid would prove nothing more, and is another in a container.
 */
#include "maps.h"

DEFINE_HASH(cookies, __u32, __u64, 1);

/*
 * Hook: cgroup/connect4 on a cgroup of its own. Linux 5.7.
 * Returns DENY (EPERM) always: the connect is the question, nothing is sent.
 */
SEC("cgroup/connect4")
int pyamb_cookie(struct bpf_sock_addr *ctx)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	__u32 only = 0;

	map_update(cookies, &only, &cookie);
	return DENY;
}

DEFINE_LICENSE;
