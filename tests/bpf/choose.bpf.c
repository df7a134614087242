// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0
/* One program for most tests: constants say what it matches, what it selects and how it ends. */
#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2
#define AF_INET6 10
#define NOTHING 0xffffffff

const volatile __u32 slot = NOTHING; /* the slot of `sockets` to select */
const volatile __u64 flags = 0;      /* of bpf_sk_assign() */
const volatile __u32 verdict = SK_PASS;
const volatile __u32 who = 0;        /* the name under which this one is entered in `order` */
const volatile __u32 protocol = 0;   /* what it is about: 0 is any */
const volatile __u16 port_min = 0;
const volatile __u16 port_max = 65535;
const volatile __u32 ip4 = 0;        /* network byte order; 0 is any */
const volatile __u32 ip6[4] = {};    /* likewise */

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 8);
	__type(key, __u32);
	__type(value, __u64);
} sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 8);
	__type(key, __u32);
	__type(value, __u64);
} by_port SEC(".maps");

struct result {
	__u64 runs;  /* how often the program ran on what it is about */
	__u32 found; /* whether the slot held a socket */
	__s32 error; /* what bpf_sk_assign() returned */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct result);
} result SEC(".maps");

struct order {
	__u32 length;
	__u32 who[63];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct order);
} order SEC(".maps");

/* The context is read at once: behind branches the compiler would compute a pointer into it. */
static __always_inline bool mine(struct bpf_sk_lookup *ctx)
{
	__u32 family = ctx->family, port = ctx->local_port, local = ctx->local_ip4;
	__u32 a = ctx->local_ip6[0], b = ctx->local_ip6[1];
	__u32 c = ctx->local_ip6[2], d = ctx->local_ip6[3];

	barrier();
	if (protocol && ctx->protocol != protocol)
		return false;
	if (port < port_min || port > port_max)
		return false;
	if (ip4)
		return family == AF_INET && local == ip4;
	if (ip6[0] | ip6[1] | ip6[2] | ip6[3])
		return family == AF_INET6 && a == ip6[0] && b == ip6[1] && c == ip6[2] &&
		       d == ip6[3];
	return true;
}

static __always_inline void enter(void)
{
	__u32 zero = 0;
	struct result *r = bpf_map_lookup_elem(&result, &zero);
	struct order *o = bpf_map_lookup_elem(&order, &zero);

	if (r)
		__sync_fetch_and_add(&r->runs, 1);
	if (o && o->length < 63)
		o->who[o->length++] = who;
}

static __always_inline void leave(bool found, long error)
{
	__u32 zero = 0;
	struct result *r = bpf_map_lookup_elem(&result, &zero);

	if (r) {
		r->found = found;
		r->error = error;
	}
}

SEC("sk_lookup")
int choose(struct bpf_sk_lookup *ctx)
{
	__u32 key = slot;
	struct bpf_sock *sk;
	long error = 0;

	if (!mine(ctx))
		return SK_PASS;
	enter();
	if (key == NOTHING)
		return verdict;
	sk = bpf_map_lookup_elem(&sockets, &key);
	leave(sk, 0);
	if (!sk)
		return verdict;
	error = bpf_sk_assign(ctx, sk, flags);
	bpf_sk_release(sk);
	leave(true, error);
	return verdict;
}

SEC("sk_lookup")
int by_hash(struct bpf_sk_lookup *ctx)
{
	__u32 key = ctx->local_port;
	struct bpf_sock *sk = bpf_map_lookup_elem(&by_port, &key);

	enter();
	if (sk) {
		bpf_sk_assign(ctx, sk, 0);
		bpf_sk_release(sk);
	}
	return SK_PASS;
}

/* The first look-up goes to slot 0, each later one to slot 1. */
SEC("sk_lookup")
int first_then_other(struct bpf_sk_lookup *ctx)
{
	__u32 zero = 0, key;
	struct result *r = bpf_map_lookup_elem(&result, &zero);
	struct bpf_sock *sk;

	if (!r)
		return SK_PASS;
	key = r->runs ? 1 : 0;
	enter();
	sk = bpf_map_lookup_elem(&sockets, &key);
	if (sk) {
		bpf_sk_assign(ctx, sk, 0);
		bpf_sk_release(sk);
	}
	return SK_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
