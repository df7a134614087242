// Two sk_lookup programs that answer differently, and nothing else: which one ran is the verdict.
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("sk_lookup")
int yes(struct bpf_sk_lookup *ctx)
{
	return SK_PASS;
}

SEC("sk_lookup")
int no(struct bpf_sk_lookup *ctx)
{
	return SK_DROP;
}

char LICENSE[] SEC("license") = "GPL";
