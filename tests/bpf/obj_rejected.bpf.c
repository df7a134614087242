// Programs that compile and that no verifier takes, each for its own reason; the last one is fine.
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, __u64);
} sockets SEC(".maps");

SEC("sk_lookup")
int leaks_socket(struct bpf_sk_lookup *ctx)
{
	__u32 slot = 0;
	struct bpf_sock *sk = bpf_map_lookup_elem(&sockets, &slot);

	if (sk)
		bpf_sk_assign(ctx, sk, 0);
	return SK_PASS;
}

SEC("sk_lookup")
int unchecked_null(struct bpf_sk_lookup *ctx)
{
	__u32 slot = 0;
	struct bpf_sock *sk = bpf_map_lookup_elem(&sockets, &slot);

	bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return SK_PASS;
}

SEC("sk_lookup")
int beyond_context(struct bpf_sk_lookup *ctx)
{
	return *(volatile __u32 *)((void *)ctx + 4096) ? SK_PASS : SK_DROP;
}

SEC("sk_lookup")
int bad_verdict(struct bpf_sk_lookup *ctx)
{
	return 7;
}

SEC("sk_lookup")
int endless(struct bpf_sk_lookup *ctx)
{
	volatile __u32 i = 0;

	while (1)
		i++;
	return SK_PASS;
}

// Its log is longer than any buffer of the first guess.
SEC("sk_lookup")
int long_log(struct bpf_sk_lookup *ctx)
{
	volatile __u32 sum = 0;

	for (int i = 0; i < 4000; i++)
		sum += i;
	return *(volatile __u32 *)((void *)ctx + 4096) + sum ? SK_PASS : SK_DROP;
}

SEC("sk_lookup")
int fine(struct bpf_sk_lookup *ctx)
{
	return SK_PASS;
}

char LICENSE[] SEC("license") = "GPL";
