/* SPDX-License-Identifier: BSD-2-Clause
 *
 * Many UDP datagrams in one call: recvmmsg(2) and sendmmsg(2), with what belongs to each datagram in flat structs that
 * pyskl/_sys.py unpacks and packs at once. A function that can fail gives a negative errno.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include <linux/filter.h>

#ifndef IPV6_ORIGDSTADDR
#define IPV6_ORIGDSTADDR 74
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

/* Addresses are as the kernel has them, with zeros after the shorter one. */
struct pyskl_received {
	uint32_t size;
	uint16_t segment; /* the size of each datagram but the last, where it is several (UDP_GRO of udp(7)); else 0 */
	uint16_t truncated;
	struct sockaddr_in6 source, destination; /* the latter of family 0 where the kernel did not tell it */
};

struct pyskl_batch {
	size_t size;
	unsigned truncated; /* how many of those that came last were longer than there was room for */
	unsigned coalesced; /* and how many were several datagrams */
	char *data; /* `size` bytes for each datagram */
	struct pyskl_received *received;
	struct mmsghdr *messages;
	struct iovec *vectors;
	char (*control)[512]; /* room for what the socket's owner asked for beside our own */
};

static void pyskl_batch_free(struct pyskl_batch *batch)
{
	if (!batch)
		return;
	free(batch->data);
	free(batch->received);
	free(batch->messages);
	free(batch->vectors);
	free(batch->control);
	free(batch);
}

/* Room for `count` datagrams of up to `size` bytes; memory that is never written to is never there. */
static struct pyskl_batch *pyskl_batch_new(unsigned count, size_t size)
{
	struct pyskl_batch *batch = calloc(1, sizeof(*batch));

	if (!batch)
		return NULL;
	batch->size = size;
	batch->data = size <= SIZE_MAX / count ? malloc(count * size + 1) : NULL;
	batch->received = calloc(count, sizeof(*batch->received));
	batch->messages = calloc(count, sizeof(*batch->messages));
	batch->vectors = calloc(count, sizeof(*batch->vectors));
	batch->control = calloc(count, sizeof(*batch->control));
	if (batch->data && batch->received && batch->messages && batch->vectors && batch->control)
		return batch;
	pyskl_batch_free(batch);
	return NULL;
}

/* What a call on a socket failed with. With IP_RECVERR the same error is in a queue too, where poll(2) goes on to tell of
 * it until it is taken out. */
static int take_error(int socket)
{
	int error = errno;

	if (error != EAGAIN && error != EINTR)
		recvmsg(socket, &(struct msghdr){}, MSG_ERRQUEUE | MSG_DONTWAIT);
	return error;
}

static void read_control(struct pyskl_received *received, struct msghdr *message)
{
	for (struct cmsghdr *each = CMSG_FIRSTHDR(message); each; each = CMSG_NXTHDR(message, each))
		if (each->cmsg_level == IPPROTO_IP && each->cmsg_type == IP_ORIGDSTADDR) {
			memcpy(&received->destination, CMSG_DATA(each), sizeof(struct sockaddr_in));
		} else if (each->cmsg_level == IPPROTO_IPV6 && each->cmsg_type == IPV6_ORIGDSTADDR) {
			memcpy(&received->destination, CMSG_DATA(each), sizeof(received->destination));
		} else if (each->cmsg_level == IPPROTO_UDP && each->cmsg_type == UDP_GRO) {
			int segment;

			memcpy(&segment, CMSG_DATA(each), sizeof(segment));
			received->segment = segment < (int64_t)received->size ? segment : 0;
		}
}

/* Receive up to `count` datagrams of up to `size` bytes, neither more than the batch has room for; how many came. A socket
 * in a sockmap gives nothing, and keeps the datagram, where there is room for no byte: so there is room for one. */
static int pyskl_batch_receive(struct pyskl_batch *batch, int socket, unsigned count, size_t size)
{
	int came;

	batch->truncated = batch->coalesced = 0;
	for (unsigned i = 0; i < count; i++) {
		batch->received[i] = (struct pyskl_received){};
		batch->vectors[i] = (struct iovec){ batch->data + i * batch->size, size ? size : 1 };
		batch->messages[i].msg_hdr = (struct msghdr){
			.msg_name = &batch->received[i].source,
			.msg_namelen = sizeof(batch->received[i].source),
			.msg_iov = &batch->vectors[i],
			.msg_iovlen = 1,
			.msg_control = batch->control[i],
			.msg_controllen = sizeof(batch->control[i]),
		};
	}
	came = recvmmsg(socket, batch->messages, count, MSG_WAITFORONE, NULL);
	if (came < 0)
		return -take_error(socket);
	for (int i = 0; i < came; i++) {
		struct msghdr *message = &batch->messages[i].msg_hdr;

		batch->received[i].size = size ? batch->messages[i].msg_len : 0;
		batch->received[i].truncated = message->msg_flags & MSG_TRUNC || batch->messages[i].msg_len > size;
		batch->truncated += batch->received[i].truncated;
		read_control(&batch->received[i], message);
		batch->coalesced += batch->received[i].segment != 0;
	}
	return came;
}

/* A datagram that goes out of a socket, from its own address or from another one. */
struct pyskl_outgoing {
	int32_t socket;
	uint32_t size;
	struct sockaddr_in6 to, source; /* of AF_INET or AF_INET6; the latter of family 0 for the socket's own */
};

enum { TOGETHER = 64 }; /* in one sendmmsg(2) */

union control {
	struct cmsghdr align;
	char room[CMSG_SPACE(sizeof(struct in6_pktinfo))];
};

static void write_source(struct msghdr *message, const struct sockaddr_in6 *from)
{
	struct cmsghdr *header = message->msg_control;

	memset(header, 0, sizeof(union control));
	if (from->sin6_family == AF_INET) {
		struct in_pktinfo info = { .ipi_spec_dst = ((const struct sockaddr_in *)from)->sin_addr };

		message->msg_controllen = CMSG_SPACE(sizeof(info));
		*header = (struct cmsghdr){ CMSG_LEN(sizeof(info)), IPPROTO_IP, IP_PKTINFO };
		memcpy(CMSG_DATA(header), &info, sizeof(info));
	} else {
		struct in6_pktinfo info = { .ipi6_addr = from->sin6_addr, .ipi6_ifindex = from->sin6_scope_id };

		message->msg_controllen = CMSG_SPACE(sizeof(info));
		*header = (struct cmsghdr){ CMSG_LEN(sizeof(info)), IPPROTO_IPV6, IPV6_PKTINFO };
		memcpy(CMSG_DATA(header), &info, sizeof(info));
	}
}

/* Send datagrams (struct pyskl_outgoing), whose data stand one after the other, in order and without waiting. It gives
 * how many went out, and where that is not all what stopped the next, as an errno times 2^32. */
static int64_t pyskl_send(const char *described, unsigned count, const char *data)
{
	const struct pyskl_outgoing *datagrams = (const void *)described;
	struct mmsghdr messages[TOGETHER];
	struct iovec vectors[TOGETHER];
	union control controls[TOGETHER];
	unsigned sent = 0;

	while (sent < count) {
		const struct pyskl_outgoing *first = datagrams + sent;
		const char *start = data;
		unsigned together = 0;
		int went;

		/* Only what goes out of one socket goes in one call. */
		for (; together < TOGETHER && sent + together < count; together++) {
			const struct pyskl_outgoing *each = first + together;
			struct msghdr *message = &messages[together].msg_hdr;
			int v4 = each->to.sin6_family == AF_INET;

			if (each->socket != first->socket)
				break;
			vectors[together] = (struct iovec){ (char *)start, each->size };
			start += each->size;
			*message = (struct msghdr){
				.msg_name = (void *)&each->to,
				.msg_namelen = v4 ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6),
				.msg_iov = &vectors[together],
				.msg_iovlen = 1,
			};
			if (each->source.sin6_family) {
				message->msg_control = &controls[together];
				write_source(message, &each->source);
			}
		}
		went = sendmmsg(first->socket, messages, together, MSG_DONTWAIT);
		if (went < 0)
			return (int64_t)take_error(first->socket) << 32 | sent;
		for (int i = 0; i < went; i++)
			data += first[i].size;
		sent += went;
	}
	return sent;
}

/* Let a socket receive nothing, for good: a classic filter that returns 0. */
static int pyskl_mute(int socket)
{
	struct sock_filter nothing = BPF_STMT(BPF_RET | BPF_K, 0);
	struct sock_fprog program = { .len = 1, .filter = &nothing };

	return setsockopt(socket, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program)) ? -errno : 0;
}
