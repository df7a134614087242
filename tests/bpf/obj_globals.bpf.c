// Every size of global: the program copies its constants into .bss, so that a test run shows what it was given.
#include <linux/bpf.h>
#include <linux/types.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>

#define KEY 4

const volatile __u8 u8 = 1;
const volatile __u16 u16 = 2;
const volatile __u32 u32 = 3;
const volatile __u64 u64 = 4;
const volatile __s8 s8 = -1;
const volatile __s16 s16 = -2;
const volatile __s32 s32 = -3;
const volatile __s64 s64 = -4;
const volatile bool flag = false;
const volatile __u8 key[KEY] = "pysk";

__u32 fixed = 7;

struct {
	__u64 u64;
	__s64 s64;
	__u32 u32;
	__s32 s32;
	__u16 u16;
	__s16 s16;
	__u8 u8;
	__s8 s8;
	__u8 flag;
	__u8 key[KEY];
	__u32 fixed;
} seen;

SEC("sk_lookup")
int report(struct bpf_sk_lookup *ctx)
{
	seen.u8 = u8;
	seen.u16 = u16;
	seen.u32 = u32;
	seen.u64 = u64;
	seen.s8 = s8;
	seen.s16 = s16;
	seen.s32 = s32;
	seen.s64 = s64;
	seen.flag = flag;
	for (int i = 0; i < KEY; i++)
		seen.key[i] = key[i];
	seen.fixed = fixed;
	return flag ? SK_DROP : SK_PASS;
}

char LICENSE[] SEC("license") = "GPL";
