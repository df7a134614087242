// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0
/* An image of struct bpf_sk_lookup, from `family` to `local_port`, read in words, halves and bytes. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

/* Not offsetof: bpf_helpers.h has one of its own, which is no constant expression. */
#define FROM __builtin_offsetof(struct bpf_sk_lookup, family)
#define SIZE (__builtin_offsetof(struct bpf_sk_lookup, local_port) + sizeof(__u32) - FROM)

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__uint(value_size, SIZE);
} image SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} ifindex SEC(".maps");

/* volatile: each read is one load of just this size; unrolled: at a constant offset. */
#define READ(name, type)                                                                           \
	SEC("sk_lookup")                                                                           \
	int name(struct bpf_sk_lookup *ctx)                                                        \
	{                                                                                          \
		__u32 zero = 0;                                                                    \
		type *to = bpf_map_lookup_elem(&image, &zero);                                     \
                                                                                                   \
		if (!to)                                                                           \
			return SK_DROP;                                                            \
		_Pragma("unroll") for (__u32 i = 0; i < SIZE / sizeof(type); i++)                  \
			to[i] = ((volatile type *)((void *)ctx + FROM))[i];                        \
		return SK_PASS;                                                                    \
	}

READ(words, __u32)
READ(halves, __u16)
READ(bytes, __u8)

/* Since 5.17. */
SEC("sk_lookup")
int ingress(struct bpf_sk_lookup *ctx)
{
	__u32 zero = 0;
	__u64 *to = bpf_map_lookup_elem(&ifindex, &zero);

	if (to)
		*to = ctx->ingress_ifindex;
	return SK_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
