// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* Send what arrives for one IPv4 and one IPv6 prefix, and a range of ports, to the sockets of a map; whatever else
 * arrives goes on as if this program were not there. An empty slot passes too. */
#include <linux/bpf.h>
#include <linux/in.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* Addresses in network byte order. The lengths that stand here are of no prefix, and match nothing. */
const volatile __u8 prefix4[4] = {};
const volatile __u32 prefix4_len = 33;
const volatile __u8 prefix6[16] = {};
const volatile __u32 prefix6_len = 129;
const volatile __u16 port_min = 1;
const volatile __u16 port_max = 65535;

enum slot { TCP4, UDP4, TCP6, UDP6, SLOTS };

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, __u64);
} sockets SEC(".maps");

/* Whether the first `length` bits of a word are those of the prefix's four bytes; 32 for any more, none for none. */
static __always_inline bool word_matches(__u32 word, const volatile __u8 *prefix, int length)
{
	__u32 wanted = (__u32)prefix[0] << 24 | prefix[1] << 16 | prefix[2] << 8 | prefix[3];

	if (length <= 0)
		return true;
	return length >= 32 ? word == wanted : !((word ^ wanted) >> (32 - length));
}

static __always_inline bool is_ours(const struct bpf_sk_lookup *ctx, bool v4)
{
	if (ctx->local_port < port_min || ctx->local_port > port_max)
		return false;
	if (v4)
		return prefix4_len <= 32 && word_matches(bpf_ntohl(ctx->local_ip4), prefix4, prefix4_len);
	return prefix6_len <= 128 &&
	       word_matches(bpf_ntohl(ctx->local_ip6[0]), prefix6, prefix6_len) &&
	       word_matches(bpf_ntohl(ctx->local_ip6[1]), prefix6 + 4, prefix6_len - 32) &&
	       word_matches(bpf_ntohl(ctx->local_ip6[2]), prefix6 + 8, prefix6_len - 64) &&
	       word_matches(bpf_ntohl(ctx->local_ip6[3]), prefix6 + 12, prefix6_len - 96);
}

SEC("sk_lookup")
int redirect(struct bpf_sk_lookup *ctx)
{
	bool v4 = ctx->family == 2; /* AF_INET */
	__u32 slot = (v4 ? TCP4 : TCP6) + (ctx->protocol == IPPROTO_UDP);
	struct bpf_sock *sk;

	if (!is_ours(ctx, v4))
		return SK_PASS;
	sk = bpf_map_lookup_elem(&sockets, &slot);
	if (sk) {
		bpf_sk_assign(ctx, sk, 0);
		bpf_sk_release(sk);
	}
	return SK_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
