// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0
/* What the verifier refuses: a return value that is neither SK_DROP nor SK_PASS. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("sk_lookup")
int neither(struct bpf_sk_lookup *ctx)
{
	return 2;
}

/* … a wide read of a narrow field beyond its own bytes. */
SEC("sk_lookup")
int beyond(struct bpf_sk_lookup *ctx)
{
	return *(volatile __u64 *)((void *)ctx + 8) ? SK_PASS : SK_DROP;
}

/* … and a write to the context. */
SEC("sk_lookup")
int writes(struct bpf_sk_lookup *ctx)
{
	ctx->local_port = 80;
	return SK_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
