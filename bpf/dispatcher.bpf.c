// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* Decide for all bindings of a dispatcher which socket gets a new connection or a datagram: find the binding in the
 * table (table.h), the label's sockets, and among these the flow's. One decision, two programs: `dispatch` is attached,
 * and `explain` leaves in a map what it decided, for a test run. */
#include <linux/bpf.h>
#include <linux/in.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "table.h"

#ifndef barrier_var
#define barrier_var(variable) asm volatile("" : "+r"(variable))
#endif

#define AF_INET 2

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_ARRAY);
		__uint(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
		__uint(max_entries, 1);
		__uint(key_size, sizeof(__u32));
		__uint(value_size, sizeof(struct table_line));
	});
} tables SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pyskl_state);
} state SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pyskl_label);
} labels SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pyskl_group);
} groups SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} sockets SEC(".maps");

/* Members of SO_REUSEPORT groups, for when the registered one has died: under 64 * group + n. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} siblings SEC(".maps");

/* Sockets that drop whatever they get, for "hold": under 4 * keeper + family and protocol. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 4 * PYSKL_SLOTS);
	__type(key, __u32);
	__type(value, __u64);
} parking SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pyskl_counters);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pyskl_decision);
} explained SEC(".maps");

/* All UDP sockets that were registered and are still open, by cookie: where flows that stay go. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, __u64);
} stayers SEC(".maps");

/* UDP flows that stay: those that were seen once, and those that were seen again, which a flood of new ones can't push
 * out. Made when a label first wants them. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_LRU_HASH);
		__uint(max_entries, 1);
		__uint(key_size, sizeof(struct pyskl_flow));
		__uint(value_size, sizeof(struct pyskl_stay));
	});
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, PYSKL_TRACES);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_RINGBUF);
		__uint(max_entries, 1 << 16);
	});
} traces SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, PYSKL_TRACES);
	__type(key, __u32);
	__type(value, struct pyskl_filter);
} filters SEC(".maps");

/* For user space alone: what is in the sockmap, and the names of labels, by number. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pyskl_registered);
} registered SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pyskl_name);
} names SEC(".maps");

/* A loop of at most `count` rounds. In what the verifier speculates, too, the number comes back to 0 and ends it. */
#define ROUNDS(i, count) for (i = 0; i < (count); i = next_round(i))

static __always_inline __u32 next_round(__u32 i)
{
	i++;
	barrier_var(i);
	return i & 255;
}

static const __u8 positions[64] = TABLE_POSITIONS;

static __always_inline struct table_line *line_of(void *table, __u32 number)
{
	return bpf_map_lookup_elem(table, &number);
}

static __always_inline __u64 word_of(void *table, __u32 first, __u32 word)
{
	struct table_line *line = line_of(table, first + word / 8);

	return line ? line->words[word & 7] : 0;
}

/* What the list of a prefix has for a port.
 *
 * For a process without CAP_PERFMON the verifier is harder to satisfy, since it follows what a CPU might speculate: two
 * paths may not reach one addition to a pointer with different bounds, so some numbers are made unknown to it; and the
 * states of all branches add up, so some are arithmetic. Functions that are not static it looks at once, for any
 * arguments. */
__noinline __u32 search_list(__u32 list, __u32 port)
{
	const __u32 zero = 0;
	__u32 position, count, i;
	struct table_line *line;
	void *table;
	__u64 value;

	table = bpf_map_lookup_elem(&tables, &zero);
	if (!table)
		return 0;
	line = line_of(table, list);
	if (!line)
		return 0;
	count = LIST_SEARCHED(line->words[0]);
	position = line->words[0] >> 61; /* 0, but not to the verifier; see below */
#pragma unroll
	for (i = 0; i < 17; i++) { /* to the last that begins at the port or before it */
		__u32 step = 1 << 16 >> i;
		__s64 beyond = (__s64)count - (__s64)(position + step), probe;

		barrier_var(beyond);
		probe = beyond >> 63;
		barrier_var(probe);
		probe = position + step + (beyond & probe); /* the last one, where it is beyond that */
		line = line_of(table, list + ((__u32)probe >> 3));
		if (!line)
			return 0;
		value = line->words[probe & 7];
		beyond |= (__s64)port - (__s64)(value & 0xffff);
		barrier_var(beyond);
		position += step & ~(__u32)(beyond >> 63);
		barrier_var(position);
	}
	line = line_of(table, list + position / 8);
	if (!line)
		return 0;
	value = line->words[position & 7];
	return position && port <= (value >> 16 & 0xffff) ? value >> 32 : 0;
}

/* What an interval of ports, or a list of them, has for a port. */
static __always_inline __u32 label_at(__u64 value, __u32 port)
{
	__s64 outside = ((__s64)port - (__s64)(value & 0xffff)) | ((__s64)(value >> 16 & 0xffff) - (__s64)port);

	barrier_var(outside); /* a comparison of the port would leave the verifier a state for each outcome */
	if (outside < 0)
		return 0;
	return value & TABLE_LIST ? search_list((value & ~TABLE_LIST) >> 32, port) : value >> 32;
}

static __always_inline bool passes(void *table, const struct pyskl_family *family, __u64 hash, __u32 port)
{
	struct table_line *line = line_of(table, family->filter + table_place(hash >> 32, family->filter_count));
	__u64 bits, any = table_filter_bits(hash), exact = table_filter_port(hash, port);

	if (!line)
		return false;
	bits = line->words[table_filter_word(hash)];
	return (bits & any) == any || (bits & exact) == exact;
}

/* A word of a line, read here and nowhere else: without CAP_PERFMON no two paths may read through one instruction. */
static __always_inline __u64 read_once(const __u64 *word)
{
	__u64 value = *word;

	barrier_var(value);
	return value;
}

/* Look for an entry in a line. False: it is not there, and the next line may have it. */
static __always_inline bool in4(const struct table_line *line, __u64 key, __u64 *value)
{
	__u64 first = read_once(&line->words[1]), second = read_once(&line->words[3]);
	__u64 third = read_once(&line->words[5]), fourth = read_once(&line->words[7]);

	if (line->words[0] == key)
		*value = first;
	else if (line->words[2] == key)
		*value = second;
	else if (line->words[4] == key)
		*value = third;
	else if (line->words[6] == key)
		*value = fourth;
	else
		return !line->words[6];
	return true;
}

static __always_inline bool in6(const struct table_line *line, __u64 hi, __u64 lo, __u64 key, __u64 *value)
{
	__u64 first = read_once(&line->words[3]), second = read_once(&line->words[7]);

	if (line->words[2] == key && line->words[0] == hi && line->words[1] == lo)
		*value = first;
	else if (line->words[6] == key && line->words[4] == hi && line->words[5] == lo)
		*value = second;
	else
		return !line->words[6];
	return true;
}

/* Go on after a bucket's own line. */
__noinline __u64 probe4(__u32 place, __u64 key)
{
	const __u32 zero = 0;
	void *table = bpf_map_lookup_elem(&tables, &zero);
	__u64 value = 0;
	__u32 i;

	if (!table)
		return 0;
	for (i = 1; i < TABLE_PROBES; i = next_round(i)) {
		struct table_line *line = line_of(table, place + i);

		if (!line || in4(line, key, &value))
			break;
	}
	return value;
}

__noinline __u64 probe6(__u32 place, __u64 hi, __u64 lo, __u64 key)
{
	const __u32 zero = 0;
	void *table = bpf_map_lookup_elem(&tables, &zero);
	__u64 value = 0;
	__u32 i;

	if (!table)
		return 0;
	for (i = 1; i < TABLE_PROBES; i = next_round(i)) {
		struct table_line *line = line_of(table, place + i);

		if (!line || in6(line, hi, lo, key, &value))
			break;
	}
	return value;
}

/* The label of the prefix that has no length, for a family and protocol. */
static __always_inline __u32 label_of_any(void *table, __u32 kind, __u32 port)
{
	return label_at(word_of(table, TABLE_ANY, kind & 3), port);
}

/* Label and length (<< 32) of the binding of an IPv4 address, in the machine's order, and a port; or 0. */
__noinline __u64 find4(__u32 address, __u32 protocol, __u32 port)
{
	const __u32 zero = 0;
	struct pyskl_family *family;
	struct table_line *line;
	__u64 candidates, level;
	void *table;
	__u32 i, j;

	table = bpf_map_lookup_elem(&tables, &zero);
	if (!table)
		return 0;
	family = (void *)line_of(table, TABLE_FAMILY);
	if (!family || !family->bucket_count)
		return 0;
	level = family->levels[0];
	i = (__u64)address >> (32 - (LEVEL_BITS(level) & 31));
	line = line_of(table, LEVEL_LINE(level) + i / 16);
	if (!line)
		return 0;
	candidates = ((__u32 *)line)[i & 15];
#pragma unroll
	for (j = 1; j < 4; j++) {
		__u64 below;

		level = family->levels[j];
		if (!level)
			break;
		below = ((__u64)1 << (32 - (LEVEL_BITS(level) & 31))) - 1;
		if (!(candidates & below))
			break;
		i = table_place(table_hash4(family->seed, (__u64)address >> (32 - (LEVEL_BITS(level) & 31)) << 8 | j),
				LEVEL_COUNT(level));
		line = line_of(table, LEVEL_LINE(level) + i / 16);
		if (!line)
			return 0;
		candidates &= ((__u32 *)line)[i & 15] | ~below;
	}
	ROUNDS(i, 32) {
		__u32 bit, place, label = 0, length;
		__u64 key, hash, value = 0;

		if (!candidates)
			break;
		bit = table_lowest(candidates, positions) & 63;
		candidates &= candidates - 1;
		length = 32 - bit;
		key = TABLE_KEY(length, protocol) | (address & (__u32)(~0ULL << bit));
		hash = table_hash4(family->seed, key);
		if (!passes(table, family, hash, port))
			continue;
		place = family->buckets + table_place(hash, family->bucket_count);
		line = line_of(table, place);
		if (!line)
			return 0;
		if (!in4(line, key, &value))
			value = probe4(place, key);
		if (value)
			label = label_at(value, port);
		if (label)
			return label | (__u64)length << 32;
	}
	return family->shortest ? label_of_any(table, protocol, port) : 0;
}

/* The same for IPv6, whose address is in two words. */
__noinline __u64 find6(__u64 hi, __u64 lo, __u32 protocol, __u32 port)
{
	const __u32 zero = 0;
	struct pyskl_family *family;
	struct table_line *line;
	__u64 level, longer, shorter;
	void *table;
	__u32 i, j;

	table = bpf_map_lookup_elem(&tables, &zero);
	if (!table)
		return 0;
	family = (void *)line_of(table, TABLE_FAMILY + 1);
	if (!family || !family->bucket_count)
		return 0;
	level = family->levels[0];
	i = hi >> 1 >> (63 - (LEVEL_BITS(level) & 63));
	line = line_of(table, LEVEL_LINE(level) + i / 4);
	if (!line)
		return 0;
	longer = line->words[(i & 3) * 2];
	shorter = line->words[(i & 3) * 2 + 1];
#pragma unroll
	for (j = 1; j < 4; j++) {
		__u64 bits, below_longer, below_shorter, top, bottom;

		level = family->levels[j];
		if (!level)
			break;
		bits = LEVEL_BITS(level);
		if (bits >= 64) { /* below it are lengths of the first word alone */
			below_longer = ((__u64)1 << (-bits & 63)) - 1 | -(__u64)(bits == 64);
			below_shorter = 0;
			top = hi;
			bottom = lo & ~below_longer;
		} else {
			below_longer = -1;
			below_shorter = ((__u64)1 << (64 - bits & 63)) - 1;
			top = hi & ~below_shorter;
			bottom = 0;
		}
		if (!(longer & below_longer) && !(shorter & below_shorter))
			break;
		i = table_place(table_hash6(family->seed, top, bottom, bits), LEVEL_COUNT(level));
		line = line_of(table, LEVEL_LINE(level) + i / 4);
		if (!line)
			return 0;
		longer &= line->words[(i & 3) * 2] | ~below_longer;
		shorter &= line->words[(i & 3) * 2 + 1] | ~below_shorter;
	}
	ROUNDS(i, 128) {
		__u32 bit, place, label = 0, length;
		__u64 of_longer, top, bottom, key, hash, value = 0;

		if (!(longer | shorter))
			break;
		/* Whether it is one of the longer ones, all bits or none: with branches here the verifier would have more
		 * states than it takes without CAP_PERFMON. */
		of_longer = (__s64)(longer | -longer) >> 63;
		bit = table_lowest((longer & of_longer) | (shorter & ~of_longer), positions) & 63;
		longer &= longer - 1;
		shorter &= (shorter - 1) | of_longer;
		length = 64 - bit + (of_longer & 64);
		top = hi & (~0ULL << bit | of_longer);
		bottom = lo & ~0ULL << bit & of_longer;
		key = TABLE_KEY(length, protocol);
		hash = table_hash6(family->seed, top, bottom, key);
		if (!passes(table, family, hash, port))
			continue;
		place = family->buckets + table_place(hash, family->bucket_count);
		line = line_of(table, place);
		if (!line)
			return 0;
		if (!in6(line, top, bottom, key, &value))
			value = probe6(place, top, bottom, key);
		if (value)
			label = label_at(value, port);
		if (label)
			return label | (__u64)length << 32;
	}
	return family->shortest ? label_of_any(table, 2 + protocol, port) : 0;
}

static __always_inline __u64 mix(__u64 x)
{
	x *= TABLE_C1;
	x ^= x >> 32;
	x *= TABLE_C2;
	return x ^ x >> 32;
}

/* The flow's slot among those of a bitmap, which is not 0: that with the highest score (rendezvous hashing). */
__noinline __u32 choose(__u64 slots, __u64 flow)
{
	__u64 best = 0, score, better, found = 0;
	__u32 eight, i;

	if (!(slots & (slots - 1)))
		return table_lowest(slots, positions);
#pragma clang loop unroll(full)
	for (eight = 0; eight < PYSKL_SLOTS; eight += 8) {
		if (!(slots >> eight & 0xff))
			continue;
#pragma clang loop unroll(full)
		for (i = eight; i < eight + 8; i++) {
			score = mix(flow + (i + 1) * TABLE_C3) >> 1;
			better = (__s64)(best - score) >> 63 & -(slots >> i & 1);
			barrier_var(better);
			best = (score & better) | (best & ~better);
			found = (i & better) | (found & ~better);
		}
	}
	return found;
}

static __always_inline bool select(struct bpf_sk_lookup *ctx, void *map, __u32 key, __u64 flags)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(map, &key);
	long refused;

	if (!sk)
		return false;
	refused = bpf_sk_assign(ctx, sk, flags);
	bpf_sk_release(sk);
	return !refused;
}

/* Select the flow's socket among the slots of a group, passing over those whose socket has died. Less than 0: none. */
__noinline int select_slot(struct bpf_sk_lookup *ctx, __u32 group, __u64 slots, __u64 flow, __u64 flags)
{
	__u32 i, slot;

	ROUNDS(i, PYSKL_SLOTS) {
		if (!slots)
			break;
		slot = choose(slots, flow) & (PYSKL_SLOTS - 1);
		if (select(ctx, &sockets, group * PYSKL_SLOTS + slot, flags))
			return slot;
		slots &= ~((__u64)1 << slot);
	}
	return -1;
}

__noinline int select_sibling(struct bpf_sk_lookup *ctx, __u32 group, __u64 flags)
{
	__u32 i;

	ROUNDS(i, PYSKL_SLOTS)
		if (select(ctx, &siblings, group * PYSKL_SLOTS + i, flags))
			return i;
	return -1;
}

__noinline int park(struct bpf_sk_lookup *ctx, __u32 kind)
{
	__u32 i;

	ROUNDS(i, PYSKL_SLOTS)
		if (select(ctx, &parking, i * PYSKL_GROUPS + kind, BPF_SK_LOOKUP_F_NO_REUSEPORT))
			return i;
	return -1;
}

static __always_inline __u64 flow_of(const struct bpf_sk_lookup *ctx, __u64 seed)
{
	__u64 x = mix(seed ^ ((__u64)ctx->remote_port << 16 | ctx->local_port));

	if (ctx->family == AF_INET)
		return mix(x ^ ((__u64)ctx->remote_ip4 << 32 | ctx->local_ip4));
	x = mix(x ^ ((__u64)ctx->remote_ip6[0] << 32 | ctx->remote_ip6[1]));
	x = mix(x ^ ((__u64)ctx->remote_ip6[2] << 32 | ctx->remote_ip6[3]));
	x = mix(x ^ ((__u64)ctx->local_ip6[0] << 32 | ctx->local_ip6[1]));
	return mix(x ^ ((__u64)ctx->local_ip6[2] << 32 | ctx->local_ip6[3]));
}

/* The word of a label's policy. */
__noinline __u64 policy_of(__u32 label)
{
	const __u32 zero = 0;
	struct pyskl_head *head;
	struct table_line *line;
	void *table;

	table = bpf_map_lookup_elem(&tables, &zero);
	if (!table)
		return 0;
	head = (void *)line_of(table, TABLE_HEAD);
	if (!head || label >= head->labels)
		return 0;
	line = line_of(table, head->policies + label / 8);
	return line ? line->words[label & 7] : 0;
}

static __always_inline void flow_key(const struct bpf_sk_lookup *ctx, struct pyskl_flow *flow)
{
	__builtin_memset(flow, 0, sizeof(*flow));
	flow->remote_port = ctx->remote_port;
	flow->local_port = ctx->local_port;
	if (ctx->family == AF_INET) {
		flow->remote[0] = ctx->remote_ip4;
		flow->local[0] = ctx->local_ip4;
		return;
	}
	flow->remote[0] = ctx->remote_ip6[0];
	flow->remote[1] = ctx->remote_ip6[1];
	flow->remote[2] = ctx->remote_ip6[2];
	flow->remote[3] = ctx->remote_ip6[3];
	flow->local[0] = ctx->local_ip6[0];
	flow->local[1] = ctx->local_ip6[1];
	flow->local[2] = ctx->local_ip6[2];
	flow->local[3] = ctx->local_ip6[3];
}

static __always_inline bool select_stayer(struct bpf_sk_lookup *ctx, __u64 cookie)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(&stayers, &cookie);
	long refused;

	if (!sk)
		return false;
	refused = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
	bpf_sk_release(sk);
	return !refused;
}

/* Select the socket where a UDP flow went last. A test run leaves no trace: `explains`. */
__noinline int stay(struct bpf_sk_lookup *ctx, __u32 label, __u64 word, __u32 explains)
{
	const __u32 zero = 0, one = 1;
	struct pyskl_policy policy;
	void *once, *often;
	struct pyskl_flow flow;
	struct pyskl_stay *last, kept;
	__u64 now;
	bool again = true;

	__builtin_memcpy(&policy, &word, sizeof(policy));
	once = bpf_map_lookup_elem(&flows, &zero);
	often = bpf_map_lookup_elem(&flows, &one);
	if (!once || !often)
		return 0;
	flow_key(ctx, &flow);
	last = bpf_map_lookup_elem(often, &flow);
	if (!last) {
		again = false;
		last = bpf_map_lookup_elem(once, &flow);
		if (!last)
			return 0;
	}
	now = bpf_ktime_get_ns();
	kept = *last;
	if (kept.label != label || kept.epoch != policy.epoch || now - kept.seen > policy.udp_sticky * 1000000000ULL)
		return 0;
	if (!select_stayer(ctx, kept.cookie))
		return 0;
	if (explains)
		return 1;
	if (again) {
		last->seen = now;
	} else {
		kept.seen = now;
		bpf_map_update_elem(often, &flow, &kept, BPF_ANY);
		bpf_map_delete_elem(once, &flow);
	}
	return 1;
}

/* Select the socket of a flow that is new, by what was registered in its slot, and remember it: so the socket that is
 * remembered is the one that was selected, whatever is registered meanwhile. The slot, or less than 0. */
__noinline int settle(struct bpf_sk_lookup *ctx, __u64 slots, __u32 group, __u64 flow_hash, __u64 label_epoch)
{
	const __u32 zero = 0, one = 1;
	struct pyskl_registered *registration;
	struct pyskl_stay fresh = {};
	struct pyskl_flow flow;
	void *once, *often;
	__u32 i, slot, key;

	once = bpf_map_lookup_elem(&flows, &zero);
	often = bpf_map_lookup_elem(&flows, &one);
	if (!once || !often)
		return -1;
	ROUNDS(i, PYSKL_SLOTS) {
		if (!slots)
			return -1;
		slot = choose(slots, flow_hash) & (PYSKL_SLOTS - 1);
		key = group * PYSKL_SLOTS + slot;
		registration = bpf_map_lookup_elem(&registered, &key);
		if (registration && select_stayer(ctx, registration->cookie)) {
			fresh.cookie = registration->cookie;
			fresh.seen = bpf_ktime_get_ns();
			fresh.label = label_epoch;
			fresh.epoch = label_epoch >> 32;
			if (fresh.epoch < 1 << 16) { /* else a test run asks, which leaves no trace */
				flow_key(ctx, &flow);
				bpf_map_update_elem(once, &flow, &fresh, BPF_ANY);
				bpf_map_delete_elem(often, &flow);
			}
			return slot;
		}
		slots &= ~((__u64)1 << slot);
	}
	return -1;
}

/* Tell those who listen what was decided. */
__noinline int trace(struct bpf_sk_lookup *ctx, __u64 wanted, __u64 label_kind, __u32 reason, int slot)
{
	struct pyskl_event event = {};
	struct pyskl_filter *filter;
	void *ring;
	__u32 i, key;

	event.time = bpf_ktime_get_ns();
	flow_key(ctx, &event.flow);
	event.label = label_kind;
	event.kind = label_kind >> 32;
	event.reason = reason;
	event.slot = slot;
#pragma unroll
	for (i = 0; i < PYSKL_TRACES; i++) {
		if (!(wanted >> i & 1))
			continue;
		key = i;
		filter = bpf_map_lookup_elem(&filters, &key);
		if (!filter || (filter->label && filter->label != event.label))
			continue;
		ring = bpf_map_lookup_elem(&traces, &key);
		if (ring)
			bpf_ringbuf_output(ring, &event, sizeof(event), 0);
	}
	return 0;
}

/* Find the socket of a look-up and select it. What was decided is written where `decision` points, if it is not NULL. */
static __always_inline int decide(struct bpf_sk_lookup *ctx, struct pyskl_decision *decision, __u64 flags)
{
	const __u32 zero = 0;
	__u32 protocol = ctx->protocol == IPPROTO_UDP, v6 = ctx->family != AF_INET, kind = v6 * 2 + protocol;
	__u64 found, flow = 0, policy = 0, slots, label_epoch = 0;
	struct pyskl_counters *count;
	struct pyskl_group *group;
	struct pyskl_label *label;
	struct pyskl_state *shared;
	__u32 number, index, reason;
	int slot = -1;

	if (v6)
		found = find6((__u64)bpf_ntohl(ctx->local_ip6[0]) << 32 | bpf_ntohl(ctx->local_ip6[1]),
			      (__u64)bpf_ntohl(ctx->local_ip6[2]) << 32 | bpf_ntohl(ctx->local_ip6[3]),
			      protocol, ctx->local_port);
	else
		found = find4(bpf_ntohl(ctx->local_ip4), protocol, ctx->local_port);
	number = found;
	if (!number) {
		if (decision)
			decision->reason = PYSKL_UNBOUND;
		return SK_PASS;
	}
	kind = (kind + (found >> 48)) & 3; /* adds 0, unknown to the verifier, as in search_list() */
	label = bpf_map_lookup_elem(&labels, &number);
	shared = bpf_map_lookup_elem(&state, &zero);
	if (!label || !shared)
		return SK_PASS;
	if (protocol && shared->sticky) {
		policy = policy_of(number);
		if (policy >> 32) { /* udp_sticky; without it all of this costs one comparison */
			label_epoch = (policy & 0xffff0000) << 16 | (decision ? (__u64)1 << 48 : 0) | number;
			if (stay(ctx, number, policy, !!decision)) {
				reason = PYSKL_STICKY;
				slot = 0;
				goto decided;
			}
		}
	}
	reason = PYSKL_SELECTED;
	index = label->group[kind];
	group = bpf_map_lookup_elem(&groups, &index);
	if (group && group->filled) {
		slots = group->filled;
		if (slots & (slots - 1))
			flow = flow_of(ctx, shared->seed);
		slot = label_epoch ? settle(ctx, slots, index, flow, label_epoch) :
				     select_slot(ctx, index, slots, flow, flags);
	}
	if (slot < 0 && !v6) { /* a socket of both families is registered as one of IPv6 */
		index = label->group[kind | 2];
		group = bpf_map_lookup_elem(&groups, &index);
		if (group && group->filled & group->dual) {
			slots = group->filled & group->dual;
			flow = flow_of(ctx, shared->seed);
			slot = label_epoch ? settle(ctx, slots, index, flow, label_epoch) :
					     select_slot(ctx, index, slots, flow, flags);
		}
	}
	if (slot < 0) {
		reason = PYSKL_SIBLING;
		index = label->group[kind];
		if (index)
			slot = select_sibling(ctx, index, flags);
		index = label->group[kind | 2];
		if (slot < 0 && index && !v6)
			slot = select_sibling(ctx, index, flags);
	}
	if (slot < 0) {
		switch (policy_of(number) & 0xffff) {
		case PYSKL_FALLTHROUGH:
			reason = PYSKL_PASSED;
			break;
		case PYSKL_HOLD:
			reason = park(ctx, kind) >= 0 ? PYSKL_HELD : PYSKL_REFUSED;
			break;
		default:
			reason = PYSKL_REFUSED;
		}
	}
decided:
	if (decision) {
		decision->reason = reason;
		decision->label = number;
		decision->length = found >> 32;
		decision->slot = slot;
	} else {
		if (shared->tracing)
			trace(ctx, shared->tracing, (__u64)kind << 32 | number, reason, slot);
		count = bpf_map_lookup_elem(&counters, &number);
		if (count) {
			kind += (slot >> 31 & PYSKL_GROUPS) + (found >> 48 << 2);
			count->events[kind & 7]++;
		}
	}
	return reason == PYSKL_REFUSED ? SK_DROP : SK_PASS;
}

SEC("sk_lookup")
int dispatch(struct bpf_sk_lookup *ctx)
{
	return decide(ctx, NULL, 0);
}

SEC("sk_lookup")
int explain(struct bpf_sk_lookup *ctx)
{
	const __u32 zero = 0;
	struct pyskl_decision *decision = bpf_map_lookup_elem(&explained, &zero);

	return decision ? decide(ctx, decision, BPF_SK_LOOKUP_F_NO_REUSEPORT) : SK_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
