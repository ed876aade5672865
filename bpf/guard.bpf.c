// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * tc egress on each device of a pod: a captured socket stays captured.
 *
 * The mark that turns a connection to the proxy is the app's to change once it
 * is connected (CAP_NET_RAW is enough), and its next bytes would then go to
 * their destination in plain text. What connect() noted on the socket itself is
 * not the app's to change, and nothing of such a socket belongs on the wire:
 * captured packets go out over lo.
 */
#include "maps.h"
#include "packet.h"

DEFINE_CAPTURED_SOCKETS;

/*
 * Hook: tc egress (tcx, before Linux 6.6 clsact) of a pod's device. Linux 5.9.
 * Returns TC_ACT_SHOT for a packet of a socket whose connection was given to
 * the proxy, TC_ACT_UNSPEC (as if this program were not there) for all else.
 */
SEC("tc")
int pyamb_guard(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	__u8 *decided;

	if (!sk)
		return TC_ACT_UNSPEC;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return TC_ACT_UNSPEC;
	decided = storage_get(captured_socks, sk, 0);
	return decided && *decided == CAPTURED ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

DEFINE_LICENSE;
