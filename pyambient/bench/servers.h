/* SPDX-License-Identifier: Apache-2.0
 *
 * The servers of load.c: a port for each kind, and one function for an event of a connection.
 */
#ifndef SERVERS_H
#define SERVERS_H

#include "connections.h"

#define SERVERS 4

static int listener(int port)
{
	struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	int fd = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0);
	int on = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(fd, (void *)&any, sizeof(any)) || listen(fd, 4096))
		die("listen");
	watch(fd, EPOLLIN, EPOLL_CTL_ADD);
	return fd;
}

static void accept_all(int listening, enum state state)
{
	int fd;

	while ((fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
		no_delay(fd);
		table[fd] = (struct connection){ .state = state };
		watch(fd, state == SOURCE ? EPOLLIN | EPOLLOUT : EPOLLIN, EPOLL_CTL_ADD);
	}
}

static void drop(int fd)
{
	free(table[fd].unsent);
	table[fd] = (struct connection){ 0 };
	close(fd);
}

static void echo_rest(int fd, struct connection *c)
{
	ssize_t count = write(fd, c->unsent + c->unsent_at, c->unsent_end - c->unsent_at);

	if (count < 0 && errno != EAGAIN) {
		drop(fd);
		return;
	}
	c->unsent_at += count > 0 ? count : 0;
	if (c->unsent_at == c->unsent_end) {
		free(c->unsent);
		c->unsent = NULL;
		watch(fd, EPOLLIN, EPOLL_CTL_MOD);
	}
}

static void echo(int fd, struct connection *c)
{
	ssize_t got, sent;

	if (c->unsent) {
		echo_rest(fd, c);
		return;
	}
	got = read(fd, buffer, 64 << 10);
	if (got <= 0) {
		if (!still_coming(got))
			drop(fd);
		return;
	}
	sent = write(fd, buffer, got);
	if (sent == got)
		return;
	sent = sent < 0 ? 0 : sent;
	c->unsent_at = 0;
	c->unsent_end = got - sent;
	c->unsent = malloc(got - sent);
	memcpy(c->unsent, buffer + sent, got - sent);
	watch(fd, EPOLLOUT, EPOLL_CTL_MOD);
}

static void sink(int fd)
{
	ssize_t got = read(fd, buffer, sizeof(buffer));

	if (got <= 0 && !still_coming(got))
		drop(fd);
}

static void source(int fd, uint32_t events)
{
	ssize_t count;

	if (events & EPOLLIN) {
		count = read(fd, buffer, sizeof(buffer));
		if (count <= 0 && !still_coming(count)) {
			drop(fd);
			return;
		}
	}
	count = write(fd, buffer, CHUNK);
	if (count < 0 && !still_coming(count))
		drop(fd);
}

/* The one byte back and the end at once: TIME_WAIT is the server's, as with most of HTTP/1. */
static void host(int fd)
{
	char byte;
	ssize_t got = read(fd, &byte, 1);

	if (still_coming(got))
		return;
	if (got == 1 && write(fd, &byte, 1) != 1)
		errors++;
	drop(fd);
}

static void serve(int port)
{
	struct epoll_event events[EVENTS];
	int first = listener(port);

	for (int i = 1; i < SERVERS; i++)
		if (listener(port + i) != first + i)
			die("descriptors out of order");
	say_start();
	for (;;) {
		int count = epoll_wait(epoll, events, EVENTS, -1);

		for (int i = 0; i < count; i++) {
			int fd = events[i].data.fd;

			if (fd >= first && fd < first + SERVERS)
				accept_all(fd, ECHO + fd - first);
			else if (table[fd].state == ECHO)
				echo(fd, &table[fd]);
			else if (table[fd].state == SINK)
				sink(fd);
			else if (table[fd].state == SOURCE)
				source(fd, events[i].events);
			else if (table[fd].state == HOST)
				host(fd);
		}
	}
}

#endif
