// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0
/* Sockets in a SOCKMAP that is itself the element of an ARRAY_OF_MAPS. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct sockmap {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct sockmap);
} outer SEC(".maps");

SEC("sk_lookup")
int nested(struct bpf_sk_lookup *ctx)
{
	__u32 zero = 0;
	void *inner = bpf_map_lookup_elem(&outer, &zero);
	struct bpf_sock *sk;

	if (!inner)
		return SK_PASS;
	sk = bpf_map_lookup_elem(inner, &zero);
	if (sk) {
		bpf_sk_assign(ctx, sk, 0);
		bpf_sk_release(sk);
	}
	return SK_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
