/* SPDX-License-Identifier: Apache-2.0
 *
 * null: a proxy that costs next to nothing, so that it does not hide what an interception costs.
 *
 *   null steered                     the original destination is the accepted socket's address
 *   null turned                      likewise; answers to queries carry the mark that leads to lo
 *   null redirected                  conntrack knows the original destination (SO_ORIGINAL_DST)
 *   null explicit ADDRESS PORT       all goes there, for clients that connect to us on purpose
 *
 * It runs in the pod's network namespace and does to sockets what the real proxy does: what comes to
 * 15001 goes on to where the app meant, what comes to 15006 to the app under the client's address,
 * what comes to 15053 is answered at once. It prints "start" when it listens, and when its standard
 * input ends how many connections and queries it had. One thread, one epoll.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define OUTBOUND 15001
#define INBOUND 15006
#define DNS 15053
#define PROXY_MARK 0x539
#define LOOPBACK_MARK 0x111
#define SO_ORIGINAL_DST 80 /* linux/netfilter_ipv4.h; the same number for IPv6 */
#define CHUNK (256 << 10)
#define EVENTS 512
#define LONGEST_QUERY 4096
#define QR 2
#define ANSWERED 0x80
/* Below the ports that the load tool's sockets get: its tuple and ours must not meet. */
#define FIRST_SOURCE 2000
#define LAST_SOURCE 14999

struct end {
	int peer;
	uint8_t finished; /* its input has ended */
	char *unsent;     /* what it did not take yet; its peer is not read meanwhile */
	size_t at, length;
};

static struct end *ends;
static int epoll, outbound, inbound, dns;
static int redirected, turned, explicit;
static struct sockaddr_in6 upstream_of_all;
static char buffer[CHUNK];
static unsigned long accepted, answered;

static void die(const char *what)
{
	fprintf(stderr, "null: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void watch(int fd, uint32_t events, int operation)
{
	struct epoll_event event = { .events = events, .data.fd = fd };

	if (epoll_ctl(epoll, operation, fd, &event))
		die("epoll_ctl");
}

static void set(int fd, int level, int option, int value)
{
	if (setsockopt(fd, level, option, &value, sizeof(value)))
		die("setsockopt");
}

static void make_transparent(int fd, int family)
{
	if (family == AF_INET6)
		set(fd, IPPROTO_IPV6, IPV6_TRANSPARENT, 1);
	else
		set(fd, IPPROTO_IP, IP_TRANSPARENT, 1);
}

static int bound(int kind, int port)
{
	struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	int fd = socket(AF_INET6, kind | SOCK_NONBLOCK, 0);

	set(fd, IPPROTO_IPV6, IPV6_V6ONLY, 0);
	set(fd, SOL_SOCKET, SO_REUSEPORT, 1);
	make_transparent(fd, AF_INET6);
	if (redirected)
		set(fd, SOL_SOCKET, SO_MARK, PROXY_MARK);
	if (kind == SOCK_STREAM)
		set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
	else
		set(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1);
	if (bind(fd, (void *)&any, sizeof(any)))
		die("bind");
	if (kind == SOCK_STREAM && listen(fd, 4096))
		die("listen");
	watch(fd, EPOLLIN, EPOLL_CTL_ADD);
	return fd;
}

/* Relaying. */

static void renew(int fd)
{
	struct end *e = &ends[fd];
	uint32_t in = e->finished || ends[e->peer].unsent ? 0 : EPOLLIN;

	watch(fd, in | (e->unsent ? EPOLLOUT : 0), EPOLL_CTL_MOD);
}

static void drop(int fd)
{
	free(ends[fd].unsent);
	ends[fd] = (struct end){ .peer = -1 };
	close(fd);
}

static void drop_both(int fd)
{
	int peer = ends[fd].peer;

	drop(fd);
	drop(peer);
}

static void finish(int from)
{
	int to = ends[from].peer;

	ends[from].finished = 1;
	shutdown(to, SHUT_WR);
	if (ends[to].finished)
		drop_both(from);
	else
		renew(from);
}

static void keep(int from, int to, const char *data, size_t length)
{
	struct end *e = &ends[to];

	e->unsent = malloc(length);
	if (!e->unsent)
		die("malloc");
	memcpy(e->unsent, data, length);
	e->at = 0;
	e->length = length;
	renew(to);
	renew(from);
}

static void forward(int from)
{
	int to = ends[from].peer;
	ssize_t sent, got = read(from, buffer, sizeof(buffer));

	if (got == 0) {
		finish(from);
		return;
	}
	sent = got > 0 ? write(to, buffer, got) : 0;
	if (sent == got)
		return;
	if ((got < 0 || sent < 0) && errno == EAGAIN) {
		if (got > 0)
			keep(from, to, buffer, got);
	} else if (got < 0 || sent < 0) {
		drop_both(from);
	} else {
		keep(from, to, buffer + sent, got - sent);
	}
}

static void flush(int to)
{
	struct end *e = &ends[to];
	ssize_t sent = write(to, e->unsent + e->at, e->length - e->at);

	if (sent < 0 && errno != EAGAIN) {
		drop_both(to);
		return;
	}
	e->at += sent > 0 ? sent : 0;
	if (e->at < e->length)
		return;
	free(e->unsent);
	e->unsent = NULL;
	renew(to);
	renew(e->peer);
}

static void on_event(int fd, uint32_t events)
{
	if (ends[fd].peer < 0)
		return;
	if (events & EPOLLERR)
		drop_both(fd);
	else if (events & EPOLLOUT && ends[fd].unsent)
		flush(fd);
	else if (events & EPOLLIN)
		forward(fd);
}

/* Where to, and from which address. */

static void unmap(struct sockaddr_storage *address)
{
	struct sockaddr_in6 *v6 = (void *)address;
	struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_port = v6->sin6_port };

	if (v6->sin6_family != AF_INET6 || !IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr))
		return;
	memcpy(&v4.sin_addr, &v6->sin6_addr.s6_addr[12], sizeof(v4.sin_addr));
	memcpy(address, &v4, sizeof(v4));
}

static int find_destination(int fd, struct sockaddr_storage *found)
{
	socklen_t length = sizeof(*found);

	if (explicit) {
		memcpy(found, &upstream_of_all, sizeof(upstream_of_all));
		return 0;
	}
	if (getsockname(fd, (void *)found, &length))
		return -1;
	unmap(found);
	if (!redirected)
		return 0;
	length = sizeof(*found);
	return getsockopt(fd, found->ss_family == AF_INET ? SOL_IP : SOL_IPV6, SO_ORIGINAL_DST, found,
			  &length);
}

static void bind_source(int fd, struct sockaddr_storage *client)
{
	static int port = FIRST_SOURCE;

	make_transparent(fd, client->ss_family);
	set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
	for (int tries = 0; tries < 64; tries++) {
		/* sin_port and sin6_port are at the same place. */
		((struct sockaddr_in *)client)->sin_port = htons(port);
		port = port < LAST_SOURCE ? port + 1 : FIRST_SOURCE;
		if (!bind(fd, (void *)client,
			  client->ss_family == AF_INET ? sizeof(struct sockaddr_in)
						       : sizeof(struct sockaddr_in6)))
			return;
	}
	die("no source port is free");
}

static int open_upstream(int fd, struct sockaddr_storage *client)
{
	struct sockaddr_storage to = { 0 };
	int made;

	if (find_destination(fd, &to))
		return -1;
	made = socket(to.ss_family, SOCK_STREAM, 0);
	if (made < 0)
		die("socket");
	set(made, SOL_SOCKET, SO_MARK, PROXY_MARK);
	set(made, IPPROTO_TCP, TCP_NODELAY, 1);
	if (client)
		bind_source(made, client);
	/* Waiting here is free: on one CPU the handshake is done when the SYN is sent. */
	if (connect(made, (void *)&to, to.ss_family == AF_INET ? sizeof(struct sockaddr_in)
							       : sizeof(struct sockaddr_in6))) {
		close(made);
		return -1;
	}
	return made;
}

static void accept_all(int listening)
{
	struct sockaddr_storage client;
	socklen_t length = sizeof(client);
	int down, up;

	while ((down = accept4(listening, (void *)&client, &length, SOCK_NONBLOCK)) >= 0) {
		accepted++;
		unmap(&client);
		up = open_upstream(down, listening == inbound ? &client : NULL);
		length = sizeof(client);
		if (up < 0) {
			fprintf(stderr, "null: not connected: %s\n", strerror(errno));
			close(down);
			continue;
		}
		fcntl(up, F_SETFL, O_NONBLOCK);
		ends[down] = (struct end){ .peer = up };
		ends[up] = (struct end){ .peer = down };
		watch(down, EPOLLIN, EPOLL_CTL_ADD);
		watch(up, EPOLLIN, EPOLL_CTL_ADD);
	}
}

/* The answer comes from the address that was asked, which the control message names. */
static void answer_all(void)
{
	char control[CMSG_SPACE(sizeof(struct in6_pktinfo))];
	struct sockaddr_in6 peer;
	struct iovec data = { .iov_base = buffer };
	struct msghdr m = { .msg_name = &peer, .msg_iov = &data, .msg_iovlen = 1 };

	for (;;) {
		ssize_t got;

		m.msg_namelen = sizeof(peer);
		m.msg_control = control;
		m.msg_controllen = sizeof(control);
		data.iov_len = LONGEST_QUERY;
		got = recvmsg(dns, &m, 0);
		if (got <= QR)
			return;
		answered++;
		buffer[QR] |= ANSWERED;
		((struct in6_pktinfo *)CMSG_DATA(CMSG_FIRSTHDR(&m)))->ipi6_ifindex = 0;
		data.iov_len = got;
		sendmsg(dns, &m, 0);
	}
}

static void end(void)
{
	char byte;

	if (read(0, &byte, 1) > 0)
		return;
	printf("{\"accepted\": %lu, \"answered\": %lu}\n", accepted, answered);
	exit(0);
}

/* New connections come last: a descriptor that is reused has no event of its predecessor then. */
static void run(void)
{
	struct epoll_event events[EVENTS];

	for (;;) {
		int count = epoll_wait(epoll, events, EVENTS, -1);
		int new[2] = { 0 };

		for (int i = 0; i < count; i++) {
			int fd = events[i].data.fd;

			if (fd == outbound || fd == inbound)
				new[fd == inbound] = 1;
			else if (fd == dns)
				answer_all();
			else if (fd == 0)
				end();
			else
				on_event(fd, events[i].events);
		}
		if (new[0])
			accept_all(outbound);
		if (new[1])
			accept_all(inbound);
	}
}

static void prepare(void)
{
	struct rlimit limit;

	signal(SIGPIPE, SIG_IGN);
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	ends = calloc(limit.rlim_max, sizeof(*ends));
	epoll = epoll_create1(0);
	if (!ends || epoll < 0)
		die("start");
	watch(0, EPOLLIN, EPOLL_CTL_ADD);
}

static void set_upstream(const char *address, const char *port)
{
	struct sockaddr_in *v4 = (void *)&upstream_of_all;

	upstream_of_all.sin6_port = htons(atoi(port));
	if (inet_pton(AF_INET6, address, &upstream_of_all.sin6_addr) == 1)
		upstream_of_all.sin6_family = AF_INET6;
	else if (inet_pton(AF_INET, address, &v4->sin_addr) == 1)
		v4->sin_family = AF_INET;
	else
		die(address);
}

int main(int argc, char **argv)
{
	redirected = argc == 2 && !strcmp(argv[1], "redirected");
	turned = argc == 2 && !strcmp(argv[1], "turned");
	explicit = argc == 4 && !strcmp(argv[1], "explicit");
	if (!redirected && !turned && !explicit && (argc != 2 || strcmp(argv[1], "steered"))) {
		fputs("null: see the top of null.c\n", stderr);
		return 2;
	}
	if (explicit)
		set_upstream(argv[2], argv[3]);
	prepare();
	outbound = bound(SOCK_STREAM, OUTBOUND);
	inbound = bound(SOCK_STREAM, INBOUND);
	dns = bound(SOCK_DGRAM, DNS);
	if (turned)
		set(dns, SOL_SOCKET, SO_MARK, LOOPBACK_MARK);
	puts("start");
	fflush(stdout);
	run();
}
