// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0
/* A look-up that has found its socket, and takes its time to say so. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define TIME 300000000 /* ns */

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} found SEC(".maps");

static long is_over(__u32 index, void *end)
{
	return bpf_ktime_get_ns() >= *(__u64 *)end;
}

SEC("sk_lookup")
int slow(struct bpf_sk_lookup *ctx)
{
	__u32 zero = 0;
	struct bpf_sock *sk = bpf_map_lookup_elem(&sockets, &zero);
	__u64 *times = bpf_map_lookup_elem(&found, &zero), end = bpf_ktime_get_ns() + TIME;

	if (sk) {
		bpf_sk_assign(ctx, sk, 0);
		bpf_sk_release(sk);
	}
	if (times && !__sync_fetch_and_add(times, 1)) /* the first one alone */
		bpf_loop(1 << 23, is_over, &end, 0);
	return SK_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
