// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0
/* Sequences of bpf_sk_assign(), each return value recorded, and what ctx->sk says between them. */
#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

const volatile __u32 verdict = SK_PASS;

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} sockets SEC(".maps");

struct step {
	__s32 error;     /* of bpf_sk_assign() */
	__u32 selected;  /* is ctx->sk anything afterwards? */
	__u32 same;      /* is it what was assigned? */
	__u32 family, type, protocol, src_port, src_ip4, state; /* read through ctx->sk */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, struct step);
} steps SEC(".maps");

static __always_inline void look(struct bpf_sk_lookup *ctx, struct step *s)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return;
	s->selected = 1;
	s->family = sk->family;
	s->type = sk->type;
	s->protocol = sk->protocol;
	s->src_port = sk->src_port;
	s->src_ip4 = sk->src_ip4;
	s->state = sk->state;
}

static __always_inline void assign(struct bpf_sk_lookup *ctx, __u32 n, __u32 slot, __u64 flags)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(&sockets, &slot);
	struct step s = {};

	if (!sk)
		return;
	s.error = bpf_sk_assign(ctx, sk, flags);
	s.same = ctx->sk == sk;
	bpf_sk_release(sk);
	look(ctx, &s);
	bpf_map_update_elem(&steps, &n, &s, BPF_ANY);
}

static __always_inline void assign_null(struct bpf_sk_lookup *ctx, __u32 n, __u64 flags)
{
	struct step s = {};

	s.error = bpf_sk_assign(ctx, NULL, flags);
	s.same = !ctx->sk;
	look(ctx, &s);
	bpf_map_update_elem(&steps, &n, &s, BPF_ANY);
}

SEC("sk_lookup")
int twice(struct bpf_sk_lookup *ctx)
{
	assign(ctx, 0, 0, 0);
	assign(ctx, 1, 1, 0);
	return verdict;
}

SEC("sk_lookup")
int replace(struct bpf_sk_lookup *ctx)
{
	assign(ctx, 0, 0, 0);
	assign(ctx, 1, 1, BPF_SK_LOOKUP_F_REPLACE);
	return verdict;
}

SEC("sk_lookup")
int null(struct bpf_sk_lookup *ctx)
{
	assign(ctx, 0, 0, 0);
	assign_null(ctx, 1, 0);
	assign_null(ctx, 2, BPF_SK_LOOKUP_F_REPLACE);
	return verdict;
}

SEC("sk_lookup")
int null_then_other(struct bpf_sk_lookup *ctx)
{
	assign_null(ctx, 0, 0);
	assign(ctx, 1, 1, 0);
	return verdict;
}

/* Selects nothing: what did the programs before it select? */
SEC("sk_lookup")
int peek(struct bpf_sk_lookup *ctx)
{
	struct step s = {};
	__u32 n = 3;

	look(ctx, &s);
	bpf_map_update_elem(&steps, &n, &s, BPF_ANY);
	return verdict;
}

/* Deselects what the programs before it selected. */
SEC("sk_lookup")
int deselect(struct bpf_sk_lookup *ctx)
{
	assign_null(ctx, 3, BPF_SK_LOOKUP_F_REPLACE);
	return verdict;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
