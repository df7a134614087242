// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0
/* A program without a map. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("sk_lookup")
int alone(struct bpf_sk_lookup *ctx)
{
	return SK_DROP;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
