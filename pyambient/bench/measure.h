/* SPDX-License-Identifier: Apache-2.0
 *
 * What the traffic tools of the benchmarks count, and how they say it. When the traffic is warm they
 * print "start"; at the end one JSON object with what was counted since then, before anything is
 * closed: whoever reads that can take the CPU clocks of others at exactly these two moments. A second
 * object has the latencies, which take time to sort.
 */
#ifndef MEASURE_H
#define MEASURE_H

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

/* Warm after this part of the time that is measured then. */
#define WARM_PART 0.25

static struct sockaddr_storage target;
static socklen_t target_length;

static float *latencies;
static size_t latency_count, latency_room;
static uint64_t operations, bytes, errors;

static void die(const char *what)
{
	fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, what, strerror(errno));
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static void set_target(const char *address, const char *port)
{
	struct sockaddr_in *v4 = (void *)&target;
	struct sockaddr_in6 *v6 = (void *)&target;

	if (inet_pton(AF_INET, address, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(atoi(port));
		target_length = sizeof(*v4);
	} else if (inet_pton(AF_INET6, address, &v6->sin6_addr) == 1) {
		v6->sin6_family = AF_INET6;
		v6->sin6_port = htons(atoi(port));
		target_length = sizeof(*v6);
	} else {
		die(address);
	}
}

static void record(double began)
{
	operations++;
	if (latency_count == latency_room) {
		latency_room = latency_room ? 2 * latency_room : 1 << 16;
		latencies = realloc(latencies, latency_room * sizeof(*latencies));
		if (!latencies)
			die("latencies");
	}
	latencies[latency_count++] = (now() - began) * 1e6;
}

static void say_start(void)
{
	puts("start");
	fflush(stdout);
	operations = bytes = errors = latency_count = 0;
}

static int by_size(const void *left, const void *right)
{
	float a = *(const float *)left, b = *(const float *)right;

	return a < b ? -1 : a > b;
}

static double percentile(double part)
{
	return latency_count ? latencies[(size_t)(part * (latency_count - 1))] : 0;
}

static void print_result(double seconds)
{
	printf("{\"seconds\": %.6f, \"operations\": %llu, \"bytes\": %llu, \"errors\": %llu",
	       seconds, (unsigned long long)operations, (unsigned long long)bytes,
	       (unsigned long long)errors);
	puts("}");
	fflush(stdout);
	qsort(latencies, latency_count, sizeof(*latencies), by_size);
	printf("{\"p50\": %.1f, \"p90\": %.1f, \"p99\": %.1f, \"p999\": %.1f}\n", percentile(.5),
	       percentile(.9), percentile(.99), percentile(.999));
	fflush(stdout);
}

#endif
