// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0
/* An sk_reuseport program: the member of the group that a constant says, or a drop. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

const volatile __u32 member = 0;
const volatile __u32 verdict = SK_PASS;

struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, 8);
	__type(key, __u32);
	__type(value, __u64);
} members SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} runs SEC(".maps");

SEC("sk_reuseport")
int pick(struct sk_reuseport_md *ctx)
{
	__u32 zero = 0, key = member;
	__u64 *n = bpf_map_lookup_elem(&runs, &zero);

	if (n)
		__sync_fetch_and_add(n, 1);
	if (verdict == SK_PASS)
		bpf_sk_select_reuseport(ctx, &members, &key, 0);
	return verdict;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
