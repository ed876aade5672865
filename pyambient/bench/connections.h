/* SPDX-License-Identifier: Apache-2.0
 *
 * The connections of load.c, by their descriptors, on one epoll.
 */
#ifndef CONNECTIONS_H
#define CONNECTIONS_H

#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <unistd.h>

#include "measure.h"

#define EVENTS 512
#define CHUNK (256 << 10)

enum state { UNUSED, CONNECTING, WAITING, ENDING, ECHO, SINK, SOURCE, HOST };

struct connection {
	double began;
	uint32_t got;
	enum state state;
	/* Echo: what the socket did not take yet. */
	char *unsent;
	uint32_t unsent_at, unsent_end;
};

static struct connection *table;
static char buffer[1 << 20];
static int epoll;

static void watch(int fd, uint32_t events, int operation)
{
	struct epoll_event event = { .events = events, .data.fd = fd };

	if (epoll_ctl(epoll, operation, fd, &event))
		die("epoll_ctl");
}

static void prepare(void)
{
	struct rlimit limit;

	signal(SIGPIPE, SIG_IGN);
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	table = calloc(limit.rlim_max, sizeof(*table));
	epoll = epoll_create1(0);
	memset(buffer, 'x', sizeof(buffer));
	if (!table || epoll < 0)
		die("start");
}

static void no_delay(int fd)
{
	int on = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

static int still_coming(ssize_t count)
{
	return count < 0 && (errno == EAGAIN || errno == ENOTCONN);
}

#endif
