/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The C side of the benchmarks: what subject.py does through pyskl, straight over libbpf. Each line on standard input
 * asks for one round; the answer is a line of nanoseconds.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <arpa/inet.h>
#include <sys/socket.h>

#include <linux/bpf.h>
#include <bpf/bpf.h>
#include <bpf/libbpf.h>

enum { UPDATES = 4000 }; /* of a sockmap in a round, as in subject.py */

#define MUST(condition) do { if (!(condition)) { perror(#condition); exit(1); } } while (0)

/* The nanoseconds since it was called before. */
static double lap(void)
{
	static double before;
	struct timespec now;
	double passed;

	clock_gettime(CLOCK_MONOTONIC, &now);
	passed = now.tv_sec * 1e9 + now.tv_nsec - before;
	before += passed;
	return passed;
}

static int asked(void)
{
	char line[16];

	fflush(stdout);
	return fgets(line, sizeof(line), stdin) && lap();
}

static int make_socket(int type)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, type, 0);

	MUST(fd >= 0 && !bind(fd, (struct sockaddr *)&address, sizeof(address)));
	MUST(type == SOCK_DGRAM || !listen(fd, 1));
	return fd;
}

static void sockmap(int type, uint32_t count)
{
	int map = bpf_map_create(BPF_MAP_TYPE_SOCKMAP, "bench", 4, 8, count, NULL);
	uint64_t *sockets = calloc(count, sizeof(*sockets));

	MUST(map >= 0 && sockets);
	for (uint32_t i = 0; i < count; i++)
		sockets[i] = make_socket(type);
	while (asked()) {
		for (uint32_t n = 0; n < UPDATES; n++) {
			uint32_t i = n % count;

			MUST(!bpf_map_update_elem(map, &i, &sockets[i], BPF_ANY));
		}
		printf("%f\n", lap() / UPDATES);
	}
}

static void hash(uint32_t count)
{
	int map = bpf_map_create(BPF_MAP_TYPE_HASH, "bench", 4, 8, count, NULL);
	uint32_t *keys = calloc(count, sizeof(*keys)), *found = calloc(count, sizeof(*found)), read, bucket;
	uint64_t *values = calloc(count, sizeof(*values));

	MUST(map >= 0 && keys && found && values);
	for (uint32_t i = 0; i < count; i++)
		values[i] = keys[i] = i;
	while (asked()) {
		for (uint32_t i = 0; i < count; i++)
			MUST(!bpf_map_update_elem(map, &keys[i], &values[i], BPF_ANY));
		printf("%f ", lap() / count);
		for (uint32_t i = 0; i < count; i++)
			MUST(!bpf_map_lookup_elem(map, &keys[i], &values[i]));
		printf("%f ", lap() / count);
		read = count;
		MUST(!bpf_map_update_batch(map, keys, values, &read, NULL));
		printf("%f ", lap() / count);
		read = count;
		MUST(bpf_map_lookup_batch(map, NULL, &bucket, found, values, &read, NULL) == -ENOENT && read == count);
		printf("%f\n", lap() / count);
		for (uint32_t i = 0; i < count; i++) /* batch order is the buckets' */
			values[i] = i;
	}
}

static void load(const char *path)
{
	struct bpf_sk_lookup context = {
		.family = AF_INET, .protocol = IPPROTO_TCP, .local_ip4 = htonl(INADDR_LOOPBACK), .local_port = 80,
		.remote_ip4 = htonl(INADDR_LOOPBACK), .remote_port = htons(40000),
	};
	int netns = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);

	MUST(netns >= 0);
	while (asked()) {
		LIBBPF_OPTS(bpf_test_run_opts, options, .ctx_in = &context, .ctx_out = &context,
			    .ctx_size_in = sizeof(context), .ctx_size_out = sizeof(context), .repeat = 1);
		struct bpf_object *object = bpf_object__open_file(path, NULL);
		struct bpf_program *program;
		struct bpf_link *link;
		struct bpf_map *constants;
		size_t size;
		const void *initial;
		void *copy;

		MUST(object && (constants = bpf_object__find_map_by_name(object, ".rodata")));
		initial = bpf_map__initial_value(constants, &size);
		MUST((copy = malloc(size)) && memcpy(copy, initial, size));
		MUST(!bpf_map__set_initial_value(constants, copy, size));
		MUST(!bpf_object__load(object));
		printf("%f ", lap());
		MUST((program = bpf_object__next_program(object, NULL)));
		MUST((link = bpf_program__attach_netns(program, netns)));
		printf("%f ", lap());
		MUST(!bpf_prog_test_run_opts(bpf_program__fd(program), &options));
		printf("%f ", lap());
		bpf_link__destroy(link);
		bpf_object__close(object);
		printf("%f\n", lap());
		free(copy);
	}
}

int main(int count, char **arguments)
{
	MUST(count == 3);
	if (!strcmp(arguments[1], "tcp"))
		sockmap(SOCK_STREAM, atoi(arguments[2]));
	else if (!strcmp(arguments[1], "udp"))
		sockmap(SOCK_DGRAM, atoi(arguments[2]));
	else if (!strcmp(arguments[1], "hash"))
		hash(atoi(arguments[2]));
	else
		load(arguments[2]);
	return 0;
}
