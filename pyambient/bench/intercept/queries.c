/* SPDX-License-Identifier: Apache-2.0
 *
 * queries: DNS over UDP, as far as an interception sees it.
 *
 *   queries serve PORT                  answer each query with itself
 *   queries ask ADDRESS PORT SECONDS    one query after the other, each from a socket of its own,
 *                                       as resolver libraries do
 */
#define _GNU_SOURCE
#include "measure.h"

#include <sys/time.h>
#include <unistd.h>

#define LONGEST 512
#define ANSWERED 0x80 /* QR, the first bit of the third byte: RFC 1035 section 4.1.1 */
#define QR 2
#define PATIENCE 2

/* ID, RD, one question: bench. IN A */
static uint8_t query[] = "\0\0\1\0\0\1\0\0\0\0\0\0\5bench\0\0\1\0";

static void serve(int port)
{
	struct sockaddr_in6 peer, any = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	int fd = socket(AF_INET6, SOCK_DGRAM, 0);
	uint8_t data[LONGEST];

	if (bind(fd, (void *)&any, sizeof(any)))
		die("bind");
	say_start();
	for (;;) {
		socklen_t length = sizeof(peer);
		ssize_t got = recvfrom(fd, data, sizeof(data), 0, (void *)&peer, &length);

		if (got <= QR)
			continue;
		data[QR] |= ANSWERED;
		sendto(fd, data, got, 0, (void *)&peer, length);
	}
}

static void ask_once(void)
{
	struct timeval patience = { .tv_sec = PATIENCE };
	double began = now();
	uint8_t answer[LONGEST];
	int fd = socket(target.ss_family, SOCK_DGRAM, 0);

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (connect(fd, (void *)&target, target_length))
		die("connect");
	query[0]++;
	if (send(fd, query, sizeof(query), 0) != sizeof(query))
		die("send");
	if (recv(fd, answer, sizeof(answer), 0) == sizeof(query) && answer[0] == query[0] &&
	    answer[QR] & ANSWERED)
		record(began);
	else
		errors++;
	close(fd);
}

static void ask(double seconds)
{
	double start = now();

	while (now() - start < WARM_PART * seconds)
		ask_once();
	if (!operations) {
		errno = ETIMEDOUT;
		die("no answer");
	}
	say_start();
	start = now();
	while (now() - start < seconds)
		ask_once();
	print_result(now() - start);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "serve"))
		serve(atoi(argv[2]));
	if (argc != 5 || strcmp(argv[1], "ask")) {
		fputs("queries: see the top of queries.c\n", stderr);
		return 2;
	}
	set_target(argv[2], argv[3]);
	ask(atof(argv[4]));
	return 0;
}
