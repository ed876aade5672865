/* SPDX-License-Identifier: Apache-2.0
 *
 * load: TCP traffic of the benchmarks.
 *
 *   load serve PORT                               echo on PORT, sink on PORT+1, source on PORT+2,
 *                                                 on PORT+3 one echo and then the end
 *   load trips ADDRESS PORT CONNECTIONS SECONDS   round trips of 64 bytes
 *   load connections ADDRESS PORT AT_ONCE SECONDS connect, one byte each way, close
 *   load visits ADDRESS PORT AT_ONCE SECONDS      the same, but the server closes first
 *   load upload ADDRESS PORT STREAMS SECONDS      to the sink
 *   load download ADDRESS PORT STREAMS SECONDS    from the source
 *   load idle ADDRESS PORT CONNECTIONS            open, one byte each way; hold until stdin ends
 *   load deaf ADDRESS PORT CONNECTIONS            open and never read; hold until stdin ends
 *   load flood ADDRESS PORT AT_ONCE SECONDS [FILE]
 *                                                 connect, send FILE, wait for a byte, reset
 *
 * One thread, one epoll. measure.h says what it prints.
 */
#define _GNU_SOURCE
#include "servers.h"

#define TRIP 64
#define STALL_MS 5000

/* The clients: each kind has one function that is called for an event of one connection. */

static int open_connection(uint32_t events)
{
	int fd = socket(target.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0);

	if (fd < 0)
		die("socket");
	no_delay(fd);
	if (connect(fd, (void *)&target, target_length) && errno != EINPROGRESS)
		die("connect");
	table[fd] = (struct connection){ .began = now(), .state = CONNECTING };
	watch(fd, events, EPOLL_CTL_ADD);
	return fd;
}

static void send_trip(int fd, struct connection *c)
{
	c->began = now();
	c->got = 0;
	if (write(fd, buffer, TRIP) != TRIP)
		die("a round trip's message was not taken whole");
}

static void on_trip(int fd, uint32_t events)
{
	struct connection *c = &table[fd];
	ssize_t got;

	(void)events;
	if (c->state == CONNECTING) {
		c->state = WAITING;
		watch(fd, EPOLLIN, EPOLL_CTL_MOD);
		send_trip(fd, c);
		return;
	}
	got = read(fd, buffer, TRIP);
	if (still_coming(got))
		return;
	if (got <= 0)
		die("a round trip's connection ended");
	c->got += got;
	if (c->got < TRIP)
		return;
	record(c->began);
	send_trip(fd, c);
}

static void on_connection(int fd, uint32_t events)
{
	struct connection *c = &table[fd];
	char byte = 'x';
	ssize_t count;

	(void)events;
	if (c->state == CONNECTING) {
		count = write(fd, &byte, 1);
		if (count == 1) {
			c->state = WAITING;
			watch(fd, EPOLLIN, EPOLL_CTL_MOD);
			return;
		}
	} else {
		count = read(fd, &byte, 1);
		if (count == 1)
			record(c->began);
	}
	if (still_coming(count))
		return;
	errors += count != 1;
	drop(fd);
	open_connection(EPOLLOUT);
}

static void on_visit(int fd, uint32_t events)
{
	struct connection *c = &table[fd];
	char byte = 'x';
	ssize_t count;

	if (c->state == CONNECTING) {
		on_connection(fd, events);
		return;
	}
	count = read(fd, &byte, 1);
	if (still_coming(count))
		return;
	if (count == 1 && c->state == WAITING) {
		record(c->began);
		c->state = ENDING;
		return;
	}
	errors += count != 0 || c->state != ENDING;
	drop(fd);
	open_connection(EPOLLOUT);
}

static void on_upload(int fd, uint32_t events)
{
	ssize_t count = write(fd, buffer, CHUNK);

	(void)events;
	if (count > 0)
		bytes += count;
	else if (!still_coming(count))
		die("upload");
}

static void on_download(int fd, uint32_t events)
{
	ssize_t count = read(fd, buffer, sizeof(buffer));

	(void)events;
	if (count > 0)
		bytes += count;
	else if (!still_coming(count))
		die("download");
}

static const char *flood_data;
static size_t flood_length;

static void on_flood(int fd, uint32_t events)
{
	static const struct linger reset = { .l_onoff = 1 };
	struct connection *c = &table[fd];
	char byte;

	if (c->state == CONNECTING && !(events & (EPOLLERR | EPOLLHUP)) && flood_length) {
		if (write(fd, flood_data, flood_length) > 0) {
			c->state = WAITING;
			watch(fd, EPOLLIN, EPOLL_CTL_MOD);
			return;
		}
	} else if (c->state == WAITING && still_coming(read(fd, &byte, 1))) {
		return;
	}
	operations++;
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	drop(fd);
	open_connection(EPOLLOUT);
}

static void read_flood(const char *path)
{
	static char data[64 << 10];
	int fd = open(path, O_RDONLY);
	ssize_t length = fd < 0 ? -1 : read(fd, data, sizeof(data));

	if (length < 0)
		die(path);
	close(fd);
	flood_data = data;
	flood_length = length;
}

static void run(void (*on_event)(int, uint32_t), int count, uint32_t first, double seconds)
{
	struct epoll_event events[EVENTS];
	double start = now(), time;
	int warm = 0;

	for (int i = 0; i < count; i++)
		open_connection(first);
	for (;;) {
		int ready = epoll_wait(epoll, events, EVENTS, STALL_MS);

		if (!ready) {
			errno = ETIMEDOUT;
			die("nothing moves");
		}
		for (int i = 0; i < ready; i++)
			on_event(events[i].data.fd, events[i].events);
		time = now();
		if (!warm && time - start > WARM_PART * seconds) {
			warm = 1;
			say_start();
			start = now();
		} else if (warm && time - start > seconds) {
			break;
		}
	}
	print_result(time - start);
}

static void hold(int count, int deaf)
{
	char byte = 'x';

	for (int i = 0; i < count; i++) {
		int fd = socket(target.ss_family, SOCK_STREAM, 0);

		if (fd < 0 || connect(fd, (void *)&target, target_length))
			die("connect");
		if (write(fd, &byte, 1) != 1 || (!deaf && read(fd, &byte, 1) != 1))
			die("the first byte");
	}
	say_start();
	while (read(0, &byte, 1) > 0)
		continue;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	int count = argc > 4 ? atoi(argv[4]) : 0;
	double seconds = argc > 5 ? atof(argv[5]) : 0;

	prepare();
	if (!strcmp(what, "serve") && argc == 3)
		serve(atoi(argv[2]));
	if (argc < 5) {
		fputs("load: see the top of load.c\n", stderr);
		return 2;
	}
	set_target(argv[2], argv[3]);
	if (!strcmp(what, "trips"))
		run(on_trip, count, EPOLLOUT, seconds);
	else if (!strcmp(what, "connections"))
		run(on_connection, count, EPOLLOUT, seconds);
	else if (!strcmp(what, "visits"))
		run(on_visit, count, EPOLLOUT, seconds);
	else if (!strcmp(what, "upload"))
		run(on_upload, count, EPOLLOUT, seconds);
	else if (!strcmp(what, "download"))
		run(on_download, count, EPOLLIN, seconds);
	else if (!strcmp(what, "idle"))
		hold(count, 0);
	else if (!strcmp(what, "deaf"))
		hold(count, 1);
	else if (!strcmp(what, "flood")) {
		if (argc > 6)
			read_flood(argv[6]);
		run(on_flood, count, EPOLLOUT, seconds);
	}
	return 0;
}
