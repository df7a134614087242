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
	__type(value, struct pyskl_alone);
} alone SEC(".maps");

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

/* What a function gives that is called within a loop: Linux 5.10 does not take a jump to right after such a call. */
#define AFTER_CALL(call) ({ __u64 given = (call); asm volatile("%0 = %0" : "+r"(given)); given; })

static const __u8 positions[64] = TABLE_POSITIONS;

/* Where on their stack functions have the keys of all look-ups: without CAP_PERFMON the CPU waits after the first write to a
 * place, and after each to one that the verifier follows, which are those on a boundary of 8. */
struct key {
	__u32 unused, number;
} __attribute__((aligned(8)));

static __always_inline void *look_up(void *map, struct key *at, __u32 number)
{
	barrier_var(at); /* or what is unused is left out */
	at->number = number;
	return bpf_map_lookup_elem(map, &at->number);
}

static __always_inline __u64 word_of(void *table, struct key *at, __u32 first, __u32 word)
{
	struct table_line *line = look_up(table, at, first + word / 8);

	return line ? line->words[word & 7] : 0;
}

/* A step of a search in a list that is sorted by where its intervals begin: how far to go, of `step`, to the last one that
 * begins at the port or before it. `beyond` is less than 0 past the end of the list. */
static __always_inline __u32 advance(__u64 value, __u32 port, __s64 beyond, __u32 step)
{
	beyond |= (__s64)port - (__s64)(value & 0xffff);
	barrier_var(beyond);
	return step & ~(__u32)(beyond >> 63);
}

/* What the list of a prefix has for a port.
 *
 * For a process without CAP_PERFMON the verifier is harder to satisfy, since it follows what a CPU might speculate: two
 * paths may not reach one addition to a pointer with different bounds, so some numbers are made unknown to it; and the
 * states of all branches add up, so some are arithmetic. Functions that are not static it looks at once, for any
 * arguments. */
__noinline __u32 search_list(__u32 list, __u32 port)
{
	struct key at;
	__u32 position, count, i;
	struct table_line *line;
	void *table;
	__u64 value;

	table = look_up(&tables, &at, 0);
	if (!table)
		return 0;
	line = look_up(table, &at, list);
	if (!line)
		return 0;
	count = LIST_SEARCHED(line->words[0]);
	position = line->words[0] >> 61; /* 0, but not to the verifier; see below */
	if (count < 8) { /* as most are: all in this line */
#pragma unroll
		for (i = 4; i; i >>= 1) {
			position += advance(line->words[(position + i) & 7], port, (__s64)count - (__s64)(position + i), i);
			barrier_var(position);
		}
		value = line->words[position & 7];
		return position && port <= (value >> 16 & 0xffff) ? value >> 32 : 0;
	}
#pragma unroll
	for (i = 0; i < 17; i++) {
		__u32 step = 1 << 16 >> i;
		__s64 beyond = (__s64)count - (__s64)(position + step), probe;

		barrier_var(beyond);
		probe = beyond >> 63;
		barrier_var(probe);
		probe = position + step + (beyond & probe); /* the last one, where it is beyond that */
		line = look_up(table, &at, list + ((__u32)probe >> 3));
		if (!line)
			return 0;
		position += advance(line->words[probe & 7], port, beyond, step);
		barrier_var(position);
	}
	line = look_up(table, &at, list + position / 8);
	if (!line)
		return 0;
	value = line->words[position & 7];
	return position && port <= (value >> 16 & 0xffff) ? value >> 32 : 0;
}

/* Less than 0 where an interval of ports does not have a port. */
static __always_inline __s64 is_outside(__u64 value, __u32 port)
{
	return ((__s64)port - (__s64)(value & 0xffff)) | ((__s64)(value >> 16 & 0xffff) - (__s64)port);
}

/* What an interval of ports, or a list of them, has for a port. */
static __always_inline __u32 label_at(__u64 value, __u32 port)
{
	__s64 outside = is_outside(value, port);

	barrier_var(outside); /* a comparison of the port would leave the verifier a state for each outcome */
	if (outside < 0)
		return 0;
	return value & TABLE_LIST ? search_list((value & ~TABLE_LIST) >> 32, port) : value >> 32;
}

/* Whether the filter lets a prefix and a port through. */
static __always_inline bool passes(void *table, struct key *at, const struct pyskl_family *family, __u64 home, __u64 hash,
				   __u32 port)
{
	struct table_line *line;
	__u64 word, bits;

	if (!family->filter_count)
		return true;
	line = look_up(table, at, family->filter + table_place(home >> 32, family->filter_count));
	if (!line)
		return false;
	word = line->words[table_filter_word(hash)];
	bits = table_filter_port(hash, port);
	if ((word & bits) == bits)
		return true;
	bits = table_filter_bits(hash);
	return (word & bits) == bits;
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

/* Go on after the first line: in those after `place`. */
__noinline __u64 probe4(__u32 place, __u64 key)
{
	struct key at;
	void *table = look_up(&tables, &at, 0);
	__u64 value = 0;
	__u32 i;

	if (!table)
		return 0;
#pragma unroll
	for (i = 1; i <= TABLE_PROBES; i++) {
		struct table_line *line = look_up(table, &at, place + i);

		if (!line || in4(line, key, &value))
			break;
	}
	return value;
}

/* The label of an entry of IPv6 for a port, or 0: in one line, or in those after `further` (<< 32 in `places`). It is all
 * here, for with more branches in its loop the verifier of 5.10 has too many to come back to. */
__noinline __u32 probe6(__u64 places, __u64 hi, __u64 lo, __u64 key, __u32 port)
{
	struct table_line *line;
	__u64 value = 0;
	void *table;
	__u32 i;
	struct key at;

	table = look_up(&tables, &at, 0);
	if (!table)
		return 0;
#pragma unroll
	for (i = 0; i <= TABLE_PROBES; i++) {
		line = look_up(table, &at, i ? (places >> 32) + i : places);
		if (!line)
			return 0;
		if (in6(line, hi, lo, key, &value))
			break;
	}
	return label_at(value, port);
}

/* All bits or none: whether a prefix is shorter than the anchor, and its own hash says where it is. */
static __always_inline __u64 on_its_own(__u32 length, const struct pyskl_family *family)
{
	__s64 own = (__s64)length - (__s64)family->anchor;

	barrier_var(own); /* or it would be a branch, see above */
	return own >> 63;
}

/* The hash that says where a prefix is looked for at first. A branch, which the CPU foresees: so it reads the anchor's line
 * while it does not know yet for which lengths. */
static __always_inline __u64 home_of(__u64 own, __u64 hash, __u64 anchor)
{
	return own ? hash : anchor;
}

/* After which line to go on: in the prefix's own bucket, or after it where it was the first. */
static __always_inline __u32 further(const struct pyskl_family *family, __u64 hash, __u64 own)
{
	return family->buckets + table_place(hash, family->bucket_count) + (own & 1) - 1;
}

/* The label of the prefix that has no length, for a family and protocol. */
static __always_inline __u32 label_of_any(void *table, struct key *at, __u32 kind, __u32 port)
{
	return label_at(word_of(table, at, TABLE_ANY, kind & 3), port);
}

/* Whether nothing is left of the difference between two addresses, and an interval has a port. */
static __always_inline bool matches(__u64 difference, __u64 value, __u32 port)
{
	difference |= is_outside(value, port) >> 63;
	barrier_var(difference);
	return !difference;
}

/* Search the list of all bindings that begins in a line: label and length (<< 32), or 0. */
__noinline __u64 few4(__u32 list, __u32 address, __u32 port)
{
	struct table_line *line;
	void *table;
	__u32 i;
	struct key at;

	table = look_up(&tables, &at, 0);
	if (!table)
		return 0;
#pragma unroll
	for (i = 0; i < TABLE_LISTED * 4; i++) {
		__u64 key, value;
		__u32 spare;

		if (!(i & 3)) {
			line = look_up(table, &at, list + i / 4);
			if (!line)
				return 0;
		}
		key = line->words[(i & 3) * 2];
		value = line->words[(i & 3) * 2 + 1];
		spare = key >> 32 & 63;
		if (matches((__u64)((__u32)key ^ address) >> spare, value, port))
			return FEW_LABEL(value) | (__u64)(32 - spare) << 32;
		if ((__s64)value <= 0)
			return 0;
	}
	return 0;
}

__noinline __u64 few6(__u32 list, __u64 hi, __u64 lo, __u32 port)
{
	struct table_line *line;
	void *table;
	__u32 i;
	struct key at;

	table = look_up(&tables, &at, 0);
	if (!table)
		return 0;
#pragma unroll
	for (i = 0; i < TABLE_LISTED * 2; i++) {
		__u64 key, value;

		if (!(i & 1)) {
			line = look_up(table, &at, list + i / 2);
			if (!line)
				return 0;
		}
		key = line->words[(i & 1) * 4];
		value = line->words[(i & 1) * 4 + 1];
		if (matches(table_shift(line->words[(i & 1) * 4 + 2] ^ hi, key >> 8 & 255) |
			    table_shift(line->words[(i & 1) * 4 + 3] ^ lo, key >> 16 & 255), value, port))
			return FEW_LABEL(value) | (key & 255) << 32;
		if ((__s64)value <= 0)
			return 0;
	}
	return 0;
}

/* Of some candidates, those that the further levels leave for a port, or for ranges. */
__noinline __u32 narrow4(__u32 address, __u64 ports, __u32 candidates)
{
	struct pyskl_family *family;
	struct pyskl_levels *levels;
	struct table_line *line;
	struct key at;
	__u32 i, j;
	void *table;
	__u64 seed;

	table = look_up(&tables, &at, 0);
	if (!table)
		return 0;
	family = look_up(table, &at, TABLE_FAMILY);
	if (!family)
		return 0;
	seed = family->seed;
	levels = look_up(table, &at, family->levels);
	if (!levels)
		return 0;
#pragma unroll
	for (j = 0; j < TABLE_LEVELS; j++) {
		__u64 level = levels->levels[j], above = -1ULL << (LEVEL_SHIFT(level) & 31);

		if (!level || !(candidates & ~above))
			break;
		i = table_place(table_hash4(seed, (address & above) | TABLE_LEVEL_KEY(j, ports)), LEVEL_COUNT(level));
		line = look_up(table, &at, LEVEL_LINE(level) + i / 16);
		if (!line)
			return 0;
		candidates &= ((__u32 *)line)[i & 15] | above;
	}
	return candidates;
}

/* Label and length (<< 32) of the binding of an IPv4 address, in the machine's order, and a port; or 0. */
__noinline __u64 find4(__u32 address, __u32 protocol, __u32 port)
{
	struct pyskl_family *family;
	struct table_line *line;
	__u32 i, candidates;
	struct key at;
	__u64 all_bits, beside;
	void *table;

	table = look_up(&tables, &at, 0);
	if (!table)
		return 0;
	family = look_up(table, &at, TABLE_FAMILY);
	if (!family)
		return 0;
	candidates = family->lengths[0];
	if (family->first) {
		i = address >> (family->first_shift & 31);
		line = look_up(table, &at, family->first + i / 16);
		if (!line)
			return 0;
		candidates = ((__u32 *)line)[i & 15];
	}
	if (candidates && family->levels) {
		i = table_by_port(protocol & 1, port);
		line = look_up(table, &at, TABLE_PORTS_LINE(family->levels) + i / 16);
		if (!line)
			return 0;
		candidates &= ((__u32 *)line)[i & 15];
		if (candidates & (candidates - 1)) {
			__u32 of_ranges = candidates & family->ranges;

			candidates = narrow4(address, TABLE_PORT(protocol, port), candidates);
			if (of_ranges)
				candidates |= narrow4(address, TABLE_RANGES(protocol), of_ranges);
		}
	}
	beside = table_hash_anchor(family->seed, address >> (-(__u32)family->anchor & 31), protocol);
	all_bits = TABLE_KEY(0, protocol) | address;
	ROUNDS(i, 32) {
		__u64 key, hash, home, own, value = 0;
		__u32 bit, label;

		if (!candidates)
			break;
		bit = table_lowest(candidates, positions) & 31;
		candidates &= candidates - 1;
		key = (all_bits & -1ULL << bit) + ((__u64)(32 - bit) << 32);
		hash = table_hash4(family->seed, key);
		own = on_its_own(32 - bit, family);
		home = home_of(own, hash, beside);
		if (!passes(table, &at, family, home, hash, port))
			continue;
		line = look_up(table, &at, family->buckets + table_place(home, family->bucket_count));
		if (!line)
			return 0;
		if (!in4(line, key, &value))
			value = AFTER_CALL(probe4(further(family, hash, own), key));
		label = label_at(value, port);
		if (label)
			return label | (__u64)(32 - bit) << 32;
	}
	return family->shortest ? label_of_any(table, &at, protocol, port) : 0;
}

/* The same for IPv6. */
__noinline __u64 narrow6(__u64 hi, __u64 lo, __u64 ports, __u64 candidates)
{
	struct pyskl_family *family;
	struct pyskl_levels *levels;
	struct table_line *line;
	struct key at;
	__u32 i, j;
	void *table;
	__u64 seed;

	table = look_up(&tables, &at, 0);
	if (!table)
		return 0;
	family = look_up(table, &at, TABLE_FAMILY + 1);
	if (!family)
		return 0;
	seed = family->seed;
	levels = look_up(table, &at, family->levels);
	if (!levels)
		return 0;
#pragma unroll
	for (j = 0; j < TABLE_LEVELS; j++) {
		__u64 level = levels->levels[j], above = -1ULL << (LEVEL_SHIFT(level) >> 1 & 63);
		__u64 cut = -1ULL << (LEVEL_SHIFT(level) & 63);
		__s64 within = (__s64)LEVEL_SHIFT(level) - 64; /* within the second word, of the first all counts */

		barrier_var(within);
		within >>= 63;
		if (!level || !(candidates & ~above))
			break;
		i = table_place(table_hash6(seed, hi & (within | cut), lo & within & cut, TABLE_LEVEL_KEY(j, ports)),
				LEVEL_COUNT(level));
		line = look_up(table, &at, LEVEL_LINE(level) + i / 8);
		if (!line)
			return 0;
		candidates &= line->words[i & 7] | above;
	}
	return candidates;
}

/* Look among the candidates of one word. */
static __always_inline __u64 search6(void *table, struct key *at, const struct pyskl_family *family, __u64 hi, __u64 lo,
				     __u32 protocol, __u32 port, __u64 candidates, bool shorter)
{
	__u64 beside = table_hash_anchor(family->seed, hi >> (-(__u32)family->anchor & 63), protocol);
	__u32 i;

	ROUNDS(i, 64) {
		__u64 top, bottom, key, hash, home, own, places;
		__u32 bit, label, length;

		if (!candidates)
			break;
		bit = table_lowest(candidates, positions) & 63;
		candidates &= candidates - 1;
		length = (shorter ? 64 : 128) - bit;
		top = shorter ? hi & -1ULL << bit : hi;
		bottom = shorter ? 0 : lo & -1ULL << bit;
		key = TABLE_KEY(length, protocol);
		hash = table_hash6(family->seed, top, bottom, key);
		own = on_its_own(length, family);
		home = home_of(own, hash, beside);
		if (!passes(table, at, family, home, hash, port))
			continue;
		places = (__u64)further(family, hash, own) << 32 | (family->buckets + table_place(home, family->bucket_count));
		label = probe6(places, top, bottom, key, port);
		if (label)
			return label | (__u64)length << 32;
	}
	return 0;
}

__noinline __u64 find6(__u64 hi, __u64 lo, __u32 protocol, __u32 port)
{
	__u64 candidates = -1, longer, shorter, found = 0;
	struct pyskl_family *family;
	struct table_line *line;
	struct key at;
	void *table;
	__u32 i;

	table = look_up(&tables, &at, 0);
	if (!table)
		return 0;
	family = look_up(table, &at, TABLE_FAMILY + 1);
	if (!family)
		return 0;
	if (family->first) {
		i = hi >> (family->first_shift & 63);
		line = look_up(table, &at, family->first + i / 8);
		if (!line)
			return 0;
		candidates = line->words[i & 7];
	}
	if (candidates && family->levels) {
		i = table_by_port(protocol & 1, port);
		line = look_up(table, &at, TABLE_PORTS_LINE(family->levels) + i / 8);
		if (!line)
			return 0;
		candidates &= line->words[i & 7];
		if (candidates & (candidates - 1)) {
			__u64 of_ranges = candidates & family->ranges;

			candidates = narrow6(hi, lo, TABLE_PORT(protocol, port), candidates);
			if (of_ranges)
				candidates |= narrow6(hi, lo, TABLE_RANGES(protocol), of_ranges);
		}
	}
	longer = table_doubled(candidates) & family->lengths[0];
	if (longer)
		found = search6(table, &at, family, hi, lo, protocol, port, longer, false);
	if (found)
		return found;
	shorter = table_doubled(candidates >> 32) & family->lengths[1];
	if (shorter)
		found = search6(table, &at, family, hi, lo, protocol, port, shorter, true);
	if (found)
		return found;
	return family->shortest ? label_of_any(table, &at, 2 + protocol, port) : 0;
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

static __always_inline bool select(struct bpf_sk_lookup *ctx, struct key *at, void *map, __u32 key, __u64 flags)
{
	struct bpf_sock *sk = look_up(map, at, key);
	long refused;

	if (!sk)
		return false;
	refused = bpf_sk_assign(ctx, sk, flags);
	bpf_sk_release(sk);
	return !refused;
}

/* What takes the context the verifier looks at once, too, but in Linux 5.10, where it follows each call of it: store.py. */

/* Select the flow's socket among the slots of a group, passing over those whose socket has died. Less than 0: none. */
__noinline int select_slot(struct bpf_sk_lookup *ctx, __u32 group, __u64 slots, __u64 flow, __u64 flags)
{
	__u32 i, slot;
	struct key at;

	ROUNDS(i, PYSKL_SLOTS) {
		if (!slots)
			break;
		slot = choose(slots, flow) & (PYSKL_SLOTS - 1);
		if (select(ctx, &at, &sockets, group * PYSKL_SLOTS + slot, flags))
			return slot;
		slots &= ~((__u64)1 << slot);
	}
	return -1;
}

__noinline int select_sibling(struct bpf_sk_lookup *ctx, __u32 group, __u64 flags)
{
	__u32 i;
	struct key at;

	ROUNDS(i, PYSKL_SLOTS)
		if (select(ctx, &at, &siblings, group * PYSKL_SLOTS + i, flags))
			return i;
	return -1;
}

__noinline int park(struct bpf_sk_lookup *ctx, __u32 kind)
{
	__u32 i;
	struct key at;

	ROUNDS(i, PYSKL_SLOTS)
		if (select(ctx, &at, &parking, i * PYSKL_GROUPS + kind, BPF_SK_LOOKUP_F_NO_REUSEPORT))
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
	struct pyskl_head *head;
	struct table_line *line;
	void *table;
	struct key at;

	table = look_up(&tables, &at, 0);
	if (!table)
		return 0;
	head = look_up(table, &at, TABLE_HEAD);
	if (!head || label >= head->labels)
		return 0;
	line = look_up(table, &at, head->policies + label / 8);
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

#define CHOICE(reason, slot) ((__u64)(reason) << 32 | (__u32)(slot))

/* Select one of the sockets of a label for a family and protocol. The reason and the slot, which is -1 for none. */
__noinline __u64 select_among(struct bpf_sk_lookup *ctx, __u32 number, __u32 kind, __u32 explains)
{
	__u64 flow = 0, policy, slots, label_epoch = 0, flags = explains ? BPF_SK_LOOKUP_F_NO_REUSEPORT : 0;
	struct pyskl_group *group;
	struct pyskl_label *label;
	struct pyskl_state *shared;
	struct key at;
	__u32 index;
	int slot = -1;

	kind &= 3;
	label = look_up(&labels, &at, number);
	shared = look_up(&state, &at, 0);
	if (!label || !shared)
		return CHOICE(PYSKL_PASSED, -1);
	if (kind & 1 && shared->sticky) {
		policy = policy_of(number);
		if (policy >> 32) { /* udp_sticky; without it all of this costs one comparison */
			label_epoch = (policy & 0xffff0000) << 16 | (explains ? (__u64)1 << 48 : 0) | number;
			if (stay(ctx, number, policy, explains))
				return CHOICE(PYSKL_STICKY, 0);
		}
	}
	index = label->group[kind];
	group = look_up(&groups, &at, index);
	if (group && group->filled) {
		slots = group->filled;
		if (slots & (slots - 1))
			flow = flow_of(ctx, shared->seed);
		slot = label_epoch ? settle(ctx, slots, index, flow, label_epoch) :
				     select_slot(ctx, index, slots, flow, flags);
	}
	if (slot < 0 && !(kind & 2)) { /* a socket of both families is registered as one of IPv6 */
		index = label->group[kind | 2];
		group = look_up(&groups, &at, index);
		if (group && group->filled & group->dual) {
			slots = group->filled & group->dual;
			flow = flow_of(ctx, shared->seed);
			slot = label_epoch ? settle(ctx, slots, index, flow, label_epoch) :
					     select_slot(ctx, index, slots, flow, flags);
		}
	}
	if (slot >= 0)
		return CHOICE(PYSKL_SELECTED, slot);
	index = label->group[kind];
	if (index)
		slot = select_sibling(ctx, index, flags);
	index = label->group[kind | 2];
	if (slot < 0 && index && !(kind & 2))
		slot = select_sibling(ctx, index, flags);
	if (slot >= 0)
		return CHOICE(PYSKL_SIBLING, slot);
	switch (policy_of(number) & 0xffff) {
	case PYSKL_FALLTHROUGH:
		return CHOICE(PYSKL_PASSED, -1);
	case PYSKL_HOLD:
		return CHOICE(park(ctx, kind) >= 0 ? PYSKL_HELD : PYSKL_REFUSED, -1);
	default:
		return CHOICE(PYSKL_REFUSED, -1);
	}
}

/* What was found, and for which family and protocol: label, length and kind. Added, for so the verifier knows none of the
 * bits of the kind, see search_list(). */
#define FOUND(found, kind) ((found) + ((__u64)(kind) << 48))

/* Which list there is for an address and a port: its first line; 0: none; or nowhere. */
static __always_inline __u32 list_for(void *table, struct key *at, __u32 kind, __u64 hi, __u64 lo, __u32 port)
{
	struct table_line *line = look_up(table, at, FEW_LINE(kind & 3));
	__u32 list, i;
	__u64 index;

	if (!line)
		return 0;
	list = FEW_ELSEWHERE(line->words[0]);
	if (!list)
		return FEW_LINE(kind & 3);
	if (list != FEW_INDEXED)
		return list;
	index = line->words[1];
	i = table_indexed(index, hi, lo, port);
	line = look_up(table, at, index + i / 16);
	barrier_var(i); /* or the mask comes before a sum, through which 5.10's verifier follows no bounds */
	return line ? ((__u32 *)line)[i & 15] : 0;
}

/* Search for the binding of an address and a port. An IPv4 address is in `hi`. */
static __always_inline __u64 find(struct key *at, __u32 kind, __u64 hi, __u64 lo, __u32 port)
{
	__u32 list;
	void *table;

	table = look_up(&tables, at, 0);
	if (!table)
		return 0;
	list = list_for(table, at, kind, hi, lo, port);
	if (!list)
		return 0;
	if (kind & 2)
		return list == FEW_NOWHERE ? find6(hi, lo, kind & 1, port) : few6(list, hi, lo, port);
	return list == FEW_NOWHERE ? find4(hi, kind & 1, port) : few4(list, hi, port);
}

/* The number of a look-up's family and protocol among a label's groups. */
static __always_inline __u32 kind_of(const struct bpf_sk_lookup *ctx)
{
	return (ctx->family != AF_INET) * 2 + (ctx->protocol == IPPROTO_UDP);
}

/* The same, for what is asked. */
static __always_inline __u64 find_for(const struct bpf_sk_lookup *ctx, struct key *at)
{
	__u32 kind = kind_of(ctx);

	if (kind & 2)
		return FOUND(find(at, kind, (__u64)bpf_ntohl(ctx->local_ip6[0]) << 32 | bpf_ntohl(ctx->local_ip6[1]),
				  (__u64)bpf_ntohl(ctx->local_ip6[2]) << 32 | bpf_ntohl(ctx->local_ip6[3]),
				  ctx->local_port), kind);
	return FOUND(find(at, kind, bpf_ntohl(ctx->local_ip4), 0, ctx->local_port), kind);
}

/* Whether a flow may be one that stays. */
static __always_inline bool may_stay(struct key *at, __u32 kind)
{
	struct pyskl_state *shared;

	if (!(kind & 1))
		return false;
	shared = look_up(&state, at, 0);
	return !shared || shared->sticky;
}

/* Select the socket for what was found. What was decided is written where `decision` points, if it is not NULL. Few
 * variables live here across calls: without CAP_PERFMON the CPU waits after each that goes to the stack. */
static __always_inline int decide(struct bpf_sk_lookup *ctx, struct key *at, __u64 found, struct pyskl_decision *decision)
{
	struct pyskl_counters *count;
	struct pyskl_state *shared;
	struct pyskl_alone *only;
	__u64 choice, event;
	__u32 key;

	if (!(__u32)found) {
		if (decision)
			decision->reason = PYSKL_UNBOUND;
		return SK_PASS;
	}
	barrier_var(found);
	only = look_up(&alone, at, found);
	if (!only)
		return SK_PASS;
	key = only->key[found >> 48 & 3];
	if (key && !may_stay(at, found >> 48) &&
	    select(ctx, at, &sockets, key, decision ? BPF_SK_LOOKUP_F_NO_REUSEPORT : 0))
		choice = CHOICE(PYSKL_SELECTED, key & (PYSKL_SLOTS - 1));
	else
		choice = select_among(ctx, found, found >> 48, !!decision);
	choice += found >> 50 << 31; /* adds 0, unknown to the verifier, as in search_list() */
	if (decision) {
		decision->reason = choice >> 32;
		decision->label = found;
		decision->length = found >> 32 & 0xffff;
		decision->slot = choice;
	} else {
		shared = look_up(&state, at, 0);
		if (shared && shared->tracing)
			trace(ctx, shared->tracing, (found >> 48 & 3) << 32 | (__u32)found, choice >> 32, choice);
		count = look_up(&counters, at, found);
		event = (found >> 48 & 3) + (choice >> 31 & 1) * PYSKL_GROUPS;
		barrier_var(event); /* or the mask is left out, and 5.10's verifier follows no bounds through the sum */
		if (count)
			count->events[event & 7]++;
	}
	return choice >> 32 == PYSKL_REFUSED ? SK_DROP : SK_PASS;
}

SEC("sk_lookup")
int dispatch(struct bpf_sk_lookup *ctx)
{
	struct key at;

	return decide(ctx, &at, find_for(ctx, &at), NULL);
}

SEC("sk_lookup")
int explain(struct bpf_sk_lookup *ctx)
{
	struct key at;
	struct pyskl_decision *decision = look_up(&explained, &at, 0);
	int verdict;

	if (!decision)
		return SK_PASS;
	verdict = decide(ctx, &at, find_for(ctx, &at), decision);
	decision->named = !!look_up(&names, &at, decision->label); /* and so the program holds this map like the others */
	return verdict;
}

char _license[] SEC("license") = "Dual BSD/GPL";
