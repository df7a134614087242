// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* A map that asks to be pinned by its name. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, __u32);
} pyskl_pinned SEC(".maps");

SEC("sk_lookup")
int pass(struct bpf_sk_lookup *ctx)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&pyskl_pinned, &zero) ? SK_PASS : SK_DROP;
}

char _license[] SEC("license") = "Dual BSD/GPL";
