/* A program that asks for something in the kernel's own BTF (CO-RE). */
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

SEC("sk_lookup")
int core(struct bpf_sk_lookup *ctx)
{
	return bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_sk_assign) ? SK_PASS : SK_DROP;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
