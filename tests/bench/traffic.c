/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The traffic of traffic.py: traffic udp|tcp FD FILE sends to one after the other of the destinations (struct
 * sockaddr_in6) in a file, and takes what comes from the server's socket, in one thread. Each line on standard input
 * asks for one round; the answer is the nanoseconds that each datagram or connection took.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <netinet/in.h>
#include <sys/socket.h>

enum { DATAGRAMS = 16384, SIZE = 64, TOGETHER = 64, CONNECTIONS = 512 };

#define MUST(condition) do { if (!(condition)) { perror(#condition); exit(1); } } while (0)

static struct sockaddr_in6 *destinations;
static size_t count, next;

static struct sockaddr_in6 *destination(void)
{
	return &destinations[next++ % count];
}

static int udp(int server)
{
	static char data[TOGETHER][SIZE];
	static struct mmsghdr out[TOGETHER], in[TOGETHER];
	static struct iovec vectors[TOGETHER];
	static int client = -1;

	if (client < 0)
		MUST((client = socket(AF_INET6, SOCK_DGRAM, 0)) >= 0);
	for (int sent = 0; sent < DATAGRAMS; sent += TOGETHER) {
		for (int i = 0; i < TOGETHER; i++) {
			vectors[i] = (struct iovec){ data[i], SIZE };
			in[i].msg_hdr = (struct msghdr){ .msg_iov = &vectors[i], .msg_iovlen = 1 };
			out[i].msg_hdr = in[i].msg_hdr;
			out[i].msg_hdr.msg_name = destination();
			out[i].msg_hdr.msg_namelen = sizeof(*destinations);
		}
		MUST(sendmmsg(client, out, TOGETHER, 0) == TOGETHER);
		for (int came = 0, more; came < TOGETHER; came += more)
			MUST((more = recvmmsg(server, in, TOGETHER, MSG_WAITFORONE, NULL)) > 0);
	}
	return DATAGRAMS;
}

static int tcp(int server)
{
	struct linger none = { 1, 0 }; /* no TIME_WAIT, which would use up the ports */

	for (int i = 0; i < CONNECTIONS; i++) {
		int client = socket(AF_INET6, SOCK_STREAM, 0), accepted;

		MUST(client >= 0 && !setsockopt(client, SOL_SOCKET, SO_LINGER, &none, sizeof(none)));
		MUST(!connect(client, (struct sockaddr *)destination(), sizeof(*destinations)));
		MUST((accepted = accept(server, NULL, NULL)) >= 0);
		close(client);
		close(accepted);
	}
	return CONNECTIONS;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e9 + time.tv_nsec;
}

int main(int number, char **arguments)
{
	struct timeval patience = { .tv_sec = 5 };
	char line[16];
	FILE *file;
	long size;
	int server;

	MUST(number == 4 && (file = fopen(arguments[3], "r")) && !fseek(file, 0, SEEK_END) && (size = ftell(file)) > 0);
	rewind(file);
	count = size / sizeof(*destinations);
	MUST((destinations = malloc(size)) && fread(destinations, sizeof(*destinations), count, file) == count);
	server = atoi(arguments[2]);
	MUST(!setsockopt(server, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)));
	while (fflush(stdout), fgets(line, sizeof(line), stdin)) {
		double began = now();
		int done = strcmp(arguments[1], "tcp") ? udp(server) : tcp(server);

		printf("%f\n", (now() - began) / done);
	}
	return 0;
}
