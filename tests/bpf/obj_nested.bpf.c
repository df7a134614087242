// Sockets in sockmaps in an array of maps: which table is in force is one slot of the outer map.
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

struct table {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} blue SEC(".maps"), green SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct table);
} active SEC(".maps") = {
	.values = { [0] = &blue },
};

SEC("sk_lookup")
int nested(struct bpf_sk_lookup *ctx)
{
	__u32 zero = 0;
	struct bpf_sock *sk;
	void *table = bpf_map_lookup_elem(&active, &zero);

	if (!table)
		return SK_DROP;
	sk = bpf_map_lookup_elem(table, &zero);
	if (!sk)
		return SK_DROP;
	bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
	bpf_sk_release(sk);
	return SK_PASS;
}

char LICENSE[] SEC("license") = "GPL";
