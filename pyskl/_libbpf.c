/* SPDX-License-Identifier: BSD-2-Clause
 *
 * The C of the extension module: what libbpf leaves to macros, variadic callbacks and inline functions, and one fast
 * path. Everything else that Python calls is libbpf's own; build_ffi.py declares both. A function that can fail gives a
 * negative errno.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <linux/magic.h>
#include <linux/membarrier.h>
#include <linux/nsfs.h>
#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>

#if LIBBPF_MAJOR_VERSION < 1 || (LIBBPF_MAJOR_VERSION == 1 && LIBBPF_MINOR_VERSION < 1)
#error "pyskl needs libbpf 1.1 or later"
#endif

/* What libbpf prints during a call of ours, as records of a digit (the level), the text and a NUL. It is kept for each
 * thread, so that it needs no lock and no interpreter; what another user of libbpf in this process makes it print goes
 * where it went before. */
static __thread struct {
	int active;
	char *text;
	size_t size, room;
} captured;

static libbpf_print_fn_t print_of_others;

static int print(enum libbpf_print_level level, const char *format, va_list arguments)
{
	va_list again;
	int length;

	if (!captured.active)
		return print_of_others ? print_of_others(level, format, arguments) : 0;
	va_copy(again, arguments);
	length = vsnprintf(NULL, 0, format, again);
	va_end(again);
	if (length < 0)
		return length;
	if (captured.room - captured.size < (size_t)length + 2) {
		size_t room = 2 * captured.room + length + 2;
		char *text = realloc(captured.text, room);

		if (!text)
			return -ENOMEM;
		captured.text = text;
		captured.room = room;
	}
	captured.text[captured.size++] = '0' + level;
	vsnprintf(captured.text + captured.size, length + 1, format, arguments);
	captured.size += length + 1;
	return length;
}

static void pyskl_init(void)
{
	libbpf_print_fn_t before = libbpf_set_print(print);

	if (before != print) /* as it is when the module is imported again */
		print_of_others = before;
}

static void pyskl_capture_begin(void)
{
	captured.active++; /* a signal's handler may be inside a call of ours already */
}

/* The caller frees what it gets, which may be NULL. */
static char *pyskl_capture_end(size_t *size)
{
	char *text = captured.text;

	*size = captured.size;
	captured.active--;
	captured.text = NULL;
	captured.size = captured.room = 0;
	return text;
}

/* A global variable of an object, by its place in its section's map. */
struct pyskl_variable {
	const char *name, *section;
	uint32_t offset, size;
	int integer, is_signed;
};

/* The type behind typedefs and qualifiers; NULL where the BTF is damaged. */
static const struct btf_type *resolve(const struct btf *btf, uint32_t id)
{
	int real = btf__resolve_type(btf, id);

	return real < 0 ? NULL : btf__type_by_id(btf, real);
}

/* Fill at most `room` of the object's global variables, and give how many there are. */
static int pyskl_variables(const struct bpf_object *object, struct pyskl_variable *found, int room)
{
	const struct btf *btf = bpf_object__btf(object);
	int count = 0;

	for (uint32_t id = 1; btf && id < btf__type_cnt(btf); id++) {
		const struct btf_type *section = btf__type_by_id(btf, id);

		if (!btf_is_datasec(section))
			continue;
		for (int i = 0; i < btf_vlen(section); i++) {
			const struct btf_var_secinfo *place = btf_var_secinfos(section) + i;
			const struct btf_type *type = btf__type_by_id(btf, place->type);
			const char *name = type ? btf__name_by_offset(btf, type->name_off) : NULL;
			const char *in = btf__name_by_offset(btf, section->name_off);

			if (!name || !in || !btf_is_var(type) || count++ >= room)
				continue;
			type = resolve(btf, type->type);
			found[count - 1] = (struct pyskl_variable){
				.name = name,
				.section = in,
				.offset = place->offset,
				.size = place->size,
				.integer = type && (btf_is_int(type) || btf_is_any_enum(type)),
				.is_signed = type && btf_is_int(type) && (btf_int_encoding(type) & BTF_INT_SIGNED),
			};
		}
	}
	return count;
}

/* Make static what takes a pointer, as the context is: the verifier follows the calls of such a function, where else it
 * looks at it once, for any arguments. It reads this in the BTF, where libbpf itself writes it for hidden functions. */
static void pyskl_follow_calls(struct bpf_object *object)
{
	const struct btf *btf = bpf_object__btf(object);

	for (uint32_t id = 1; btf && id < btf__type_cnt(btf); id++) {
		const struct btf_type *type = btf__type_by_id(btf, id), *function;

		if (!btf_is_func(type))
			continue;
		function = btf__type_by_id(btf, type->type);
		if (btf_vlen(function) && btf_is_ptr(btf__type_by_id(btf, btf_params(function)->type)))
			((struct btf_type *)type)->info = BTF_KIND_FUNC << 24 | BTF_FUNC_STATIC;
	}
}

/* A socket as the value of a map, whose size says how wide it is. */
union pyskl_socket {
	uint32_t narrow;
	uint64_t wide;
};

static union pyskl_socket socket_value(int socket, uint32_t size)
{
	return size == sizeof(uint64_t) ? (union pyskl_socket){ .wide = (uint32_t)socket } :
					  (union pyskl_socket){ .narrow = socket };
}

/* Whether this kernel puts an unbound UDP socket into a map, where no look-up could select it. Asked once, with flags
 * that are refused after the socket is, so that nothing is changed. */
static int takes_unbound(int map, const void *key, uint32_t value_size)
{
	static int answer = -1;

	if (answer < 0) {
		int unbound = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
		union pyskl_socket value = socket_value(unbound, value_size);

		answer = bpf_map_update_elem(map, key, &value, BPF_EXIST + 1) != -EOPNOTSUPP;
		if (unbound >= 0)
			close(unbound);
	}
	return answer;
}

/* The port of an IPv4 or IPv6 socket, 0 where it is bound to none; negative for anything else. */
static int port_of(int socket)
{
	struct sockaddr_in6 address = {}; /* the port of a sockaddr_in is at the same place */
	socklen_t size = sizeof(address);

	if (getsockname(socket, (struct sockaddr *)&address, &size))
		return -errno;
	if (address.sin6_family != AF_INET && address.sin6_family != AF_INET6)
		return -EAFNOSUPPORT;
	return ntohs(address.sin6_port);
}

/* Set a slot of a SOCKMAP, SOCKHASH or REUSEPORT_SOCKARRAY. */
static int pyskl_socket_update(int map, const void *key, int socket, uint32_t value_size, uint64_t flags)
{
	union pyskl_socket value = socket_value(socket, value_size);

	if (takes_unbound(map, key, value_size) && !port_of(socket))
		return -EOPNOTSUPP;
	return bpf_map_update_elem(map, key, &value, flags);
}

/* The same for many, keys one after the other. `done` tells how many were set: all, or those before the one that failed. */
static int pyskl_sockets_update(int map, const char *keys, uint32_t key_size, const int *sockets, uint32_t count,
				uint32_t value_size, uint32_t *done)
{
	int error = 0;

	for (*done = 0; *done < count && !error; *done += !error)
		error = pyskl_socket_update(map, keys + (size_t)*done * key_size, sockets[*done], value_size, BPF_ANY);
	return error;
}

/* One packet's look-up, from `remote` to `local`, in network byte order: 4 bytes each for AF_INET, else 16. */
static int pyskl_test_run(int program, int protocol, int family, const void *local, uint16_t local_port,
			  const void *remote, uint16_t remote_port, int repeat, uint32_t *verdict,
			  uint64_t *cookie, uint32_t *duration)
{
	struct bpf_sk_lookup context = {
		.family = family,
		.protocol = protocol,
		.local_port = local_port,
		.remote_port = htons(remote_port),
	};
	LIBBPF_OPTS(bpf_test_run_opts, options, .ctx_in = &context, .ctx_out = &context,
		    .ctx_size_in = sizeof(context), .ctx_size_out = sizeof(context), .repeat = repeat);
	int error;

	if (family == AF_INET) {
		memcpy(&context.local_ip4, local, 4);
		memcpy(&context.remote_ip4, remote, 4);
	} else {
		memcpy(context.local_ip6, local, 16);
		memcpy(context.remote_ip6, remote, 16);
	}
	error = bpf_prog_test_run_opts(program, &options);
	*verdict = options.retval;
	*cookie = context.cookie;
	*duration = options.duration;
	return error;
}

static int pyskl_namespace_type(int fd)
{
	int type = ioctl(fd, NS_GET_NSTYPE);

	return type < 0 ? -errno : type;
}

struct pyskl_socket_state {
	int domain, type, protocol, listens, reuseport, port, connected;
};

static int pyskl_socket_state(int socket, struct pyskl_socket_state *state)
{
	static const int names[] = { SO_DOMAIN, SO_TYPE, SO_PROTOCOL, SO_ACCEPTCONN, SO_REUSEPORT };
	int *values[] = { &state->domain, &state->type, &state->protocol, &state->listens, &state->reuseport };
	socklen_t size = sizeof(int);

	for (int i = 0; i < 5; i++)
		if (getsockopt(socket, SOL_SOCKET, names[i], values[i], &size))
			return -errno;
	state->port = port_of(socket);
	size = 0;
	state->connected = !getpeername(socket, NULL, &size);
	return 0;
}

static int pyskl_dup(int fd)
{
	int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);

	return copy < 0 ? -errno : copy;
}

static int pyskl_setns(int fd)
{
	return setns(fd, CLONE_NEWNET) ? -errno : 0;
}

static int pyskl_unshare(void)
{
	return unshare(CLONE_NEWNET) ? -errno : 0;
}

static int pyskl_socket_cookie(int socket, uint64_t *cookie)
{
	socklen_t size = sizeof(*cookie);

	return getsockopt(socket, SOL_SOCKET, SO_COOKIE, cookie, &size) ? -errno : 0;
}

/* The magic number of the file system that a path is on (statfs(2)). */
static int64_t pyskl_filesystem(const char *path)
{
	struct statfs status;

	return statfs(path, &status) ? -errno : (int64_t)(uint32_t)status.f_type;
}

static int pyskl_grace_period(void)
{
	return syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) ? -errno : 0;
}

struct pyskl_link_info {
	uint32_t type, id, prog_id, netns_ino, attach_type;
};

/* What is common to every link, and the place of one in a network namespace (zeros for other types). */
static int pyskl_link_info(int link, struct pyskl_link_info *found)
{
	struct bpf_link_info info = {};
	uint32_t size = sizeof(info);
	int error = bpf_obj_get_info_by_fd(link, &info, &size);

	*found = (struct pyskl_link_info){ .type = info.type, .id = info.id, .prog_id = info.prog_id };
	if (info.type == BPF_LINK_TYPE_NETNS) {
		found->netns_ino = info.netns.netns_ino;
		found->attach_type = info.netns.attach_type;
	}
	return error;
}

/* pidfd_getfd(2), which glibc 2.31 does not have. */
static int pyskl_pidfd_getfd(int pidfd, int fd)
{
	int copy = syscall(SYS_pidfd_getfd, pidfd, fd, 0);

	return copy < 0 ? -errno : copy;
}
