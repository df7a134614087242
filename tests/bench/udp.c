/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The C side of udp.py: datagrams received, or echoed, by recvmmsg(2) and sendmmsg(2), with their destinations. Each line
 * on standard input asks for one round; the answer is the nanoseconds of CPU time that each datagram took.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <arpa/inet.h>
#include <sys/socket.h>

enum { DATAGRAMS = 2000, SIZE = 64, TOGETHER = 64 }; /* as in udp.py */

#define MUST(condition) do { if (!(condition)) { perror(#condition); exit(1); } } while (0)

static double cpu_time(void)
{
	struct timespec now;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return now.tv_sec * 1e9 + now.tv_nsec;
}

static int make_socket(struct sockaddr_in *address)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0), room = 32 << 20, on = 1;
	socklen_t size = sizeof(*address);

	*address = (struct sockaddr_in){ .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	MUST(fd >= 0 && !bind(fd, (struct sockaddr *)address, size));
	MUST(!getsockname(fd, (struct sockaddr *)address, &size));
	MUST(!setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)));
	MUST(!setsockopt(fd, IPPROTO_IP, IP_RECVORIGDSTADDR, &on, sizeof(on)));
	return fd;
}

static char data[TOGETHER][65535];

int main(int count, char **arguments)
{
	int echo = count > 1 && !strcmp(arguments[1], "echo");
	struct sockaddr_in address, from[TOGETHER], other;
	int server = make_socket(&address), client = make_socket(&other);
	struct mmsghdr messages[TOGETHER];
	struct iovec vectors[TOGETHER];
	char control[TOGETHER][64], line[16], payload[SIZE] = {};

	while (fflush(stdout), fgets(line, sizeof(line), stdin)) {
		double began;

		for (int i = 0; i < DATAGRAMS; i++)
			MUST(sendto(client, payload, SIZE, 0, (struct sockaddr *)&address, sizeof(address)) == SIZE);
		began = cpu_time();
		for (int done = 0, came; done < DATAGRAMS; done += came) {
			for (int i = 0; i < TOGETHER; i++) {
				vectors[i] = (struct iovec){ data[i], sizeof(data[i]) };
				messages[i].msg_hdr = (struct msghdr){
					&from[i], sizeof(from[i]), &vectors[i], 1, control[i], sizeof(control[i]), 0,
				};
			}
			MUST((came = recvmmsg(server, messages, TOGETHER, MSG_WAITFORONE, NULL)) > 0);
			for (int i = 0; echo && i < came; i++) {
				vectors[i].iov_len = messages[i].msg_len;
				messages[i].msg_hdr.msg_control = NULL;
				messages[i].msg_hdr.msg_controllen = 0;
			}
			MUST(!echo || sendmmsg(server, messages, came, 0) == came);
		}
		printf("%f\n", (cpu_time() - began) / DATAGRAMS);
		while (recv(client, data[0], sizeof(data[0]), MSG_DONTWAIT) >= 0)
			;
	}
}
