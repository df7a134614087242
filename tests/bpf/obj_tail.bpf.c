// A program that hands over to whatever stands in slot 0 of its program array, else passes.
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 2);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} next SEC(".maps");

SEC("sk_lookup")
int jump(struct bpf_sk_lookup *ctx)
{
	bpf_tail_call(ctx, &next, 0);
	return SK_PASS;
}

char LICENSE[] SEC("license") = "GPL";
