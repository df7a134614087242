/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* How a table is searched: hashes, places and masks, the same for the BPF program and for the builder.
 *
 * Where the bindings of a family and protocol are few, a list has them all, the first that matches first, and is compared
 * line by line. Where they are some thousands, an index tells which short list has those that an address and a port can
 * meet. Neither is needed: whoever changes bindings first says that there is none, then changes the entries, then writes
 * what differs into lines that nobody reads, and says so in one store. A list that would be too long is left out.
 *
 * Otherwise an address is looked up by candidates for the length of its prefix, from the longest to the shortest:
 *
 * 1. Levels tell the candidates. A level is an array of bitmaps, by the first bits of an address: which lengths of
 *    prefixes exist below, and at the first level also which prefixes are above. The first level is indexed directly,
 *    the others by a hash, also of the protocol and of the port (one for each single port, one for all ranges), where two may
 *    share a bitmap; so a bit too many may be set, never one too few. One more array of bitmaps, by protocol and port, has
 *    the lengths of prefixes with that port. Where there are few bindings or few lengths, none of these is there, and all
 *    lengths are candidates.
 * 2. A blocked Bloom filter, one word a test, takes most candidates that are none, with the port where a prefix has few.
 * 3. Buckets of one line hold the entries: 4 for IPv4, 2 for IPv6. What stands in an entry's key never changes while the
 *    table lives; its value does, in one store.
 *
 * A prefix that is not shorter than the family's anchor has the line of the filter and the bucket that the anchor's bits of
 * its address choose: so one line of each answers for all such lengths, and is being read before it is known for which.
 * Where that bucket is full, and for shorter prefixes, the whole prefix chooses the bucket, and where this is full, the next
 * lines have the rest.
 */
#ifndef PYSKL_TABLE_H
#define PYSKL_TABLE_H

#include "abi.h"

#define TABLE_HEAD 0
#define TABLE_FAMILY 1
#define TABLE_ANY 3    /* the values of 0.0.0.0/0 and ::/0, for TCP and UDP each */
#define TABLE_LEVELS 6  /* after the first */
#define TABLE_FEW 4     /* lines of a list of all bindings, from line 4 on for each family and protocol */
#define TABLE_LISTED 8  /* lines of any list of bindings, at most */
#define TABLE_PROBES 24 /* lines after the first one that an entry may be in */
#define TABLE_PORTS 2  /* single ports on a prefix that the filter knows one by one */

struct table_line {
	__u64 words[PYSKL_LINE / 8];
};

/* The first word of an IPv4 entry, the third of an IPv6 one; never 0. */
#define TABLE_KEY(length, protocol) ((__u64)1 << 63 | (__u64)(protocol) << 40 | (__u64)(length) << 32)

/* The second or fourth word: an interval of ports and the label, or where the list of intervals is. 0: unbound. */
#define TABLE_LIST ((__u64)1 << 63)
#define TABLE_VALUE(first, last, label) ((__u64)(label) << 32 | (__u64)(last) << 16 | (first))

/* A list of intervals: its first word has the number of those that are disjoint and sorted, for the search, and the
 * number of bindings that they were made of, which follow. Each is like a value. */
#define LIST_SEARCHED(word) ((__u32)(word))
#define LIST_BINDINGS(word) ((__u32)((word) >> 32))

/* A list of bindings, the first that matches first. An entry is an address, with how many of its bits do not count, and a
 * value, which is 0 or has a mark where the list ends. Of IPv6 these are two numbers, halved where they are used, for all 64
 * may not count and no shift is by 64. */
#define FEW_LINE(kind) (4 + (kind) * TABLE_FEW)
#define FEW_KEY4(address, spare) ((__u64)(spare) << 32 | (address))
#define FEW_KEY6(length, spare_hi, spare_lo) ((length) | (spare_hi) << 8 | (spare_lo) << 16)
#define FEW_LAST ((__u64)1 << 63)
#define FEW_LABEL(value) ((__u32)((value) >> 32) & 0x7fffffff)

/* The first key of a list of all bindings says where it is, if it is not there: in another line, nowhere, or in place of
 * its first value there is an index of lists: by some bits of an address, and by ports. */
#define FEW_ELSEWHERE(key) ((key) >> 38)
#define FEW_NOWHERE 1
#define FEW_INDEXED 2
#define FEW_INDEX(line, shift, mask) ((__u64)(mask) << 40 | (__u64)(shift) << 32 | (line))
#define FEW_CLASSES 8

static inline __attribute__((always_inline)) __u32 table_class(__u32 port)
{
	return (port * 40503 & 0xffff) >> 13;
}

/* The list's place in an index. A shift of more than 63 is of the second word. */
static inline __attribute__((always_inline)) __u32 table_indexed(__u64 index, __u64 hi, __u64 lo, __u32 port)
{
	__u64 bits = index >> 32 & 64 ? lo : hi;

	return (bits >> (index >> 32 & 63) & index >> 40) * FEW_CLASSES + table_class(port);
}

static inline __attribute__((always_inline)) __u64 table_shift(__u64 bits, __u32 spare)
{
	return bits >> (spare >> 1 & 63) >> ((spare + 1) >> 1 & 63);
}

/* A level: its first line, the number of its bitmaps, and the bits of an address that do not count for it. */
#define LEVEL(line, count, shift) ((__u64)(shift) << 56 | (__u64)(count) << 32 | (line))
#define LEVEL_LINE(level) ((__u32)(level))
#define LEVEL_COUNT(level) ((__u32)((level) >> 32) & 0xffffff)
#define LEVEL_SHIFT(level) ((__u32)((level) >> 56))

/* What a level's hash has beside the bits of an address, of which the lowest 4 are not among them. */
#define TABLE_LEVEL_KEY(level, ports) ((level) << 1 | (ports))
#define TABLE_PORT(protocol, port) (((__u64)(port) + 1) << 32 | (protocol))
#define TABLE_RANGES(protocol) (protocol)

/* The bit of a length in bitmaps: two lengths of IPv6 share one. Doubled, they are like the words of struct pyskl_family. */
#define TABLE_BIT(family, length) ((family) ? (128 - (length)) / 2 : 32 - (length))

static inline __attribute__((always_inline)) __u64 table_doubled(__u32 bits)
{
	__u64 x = bits;

	x = (x | x << 16) & 0x0000ffff0000ffff;
	x = (x | x << 8) & 0x00ff00ff00ff00ff;
	x = (x | x << 4) & 0x0f0f0f0f0f0f0f0f;
	x = (x | x << 2) & 0x3333333333333333;
	x = (x | x << 1) & 0x5555555555555555;
	return x | x << 1;
}

/* The bitmaps by port, and where they begin: after the line of the levels. */
#define TABLE_BY_PORT 512
#define TABLE_PORTS_LINE(levels) ((levels) + 1)

static inline __attribute__((always_inline)) __u32 table_by_port(__u32 protocol, __u32 port)
{
	return protocol << 8 | ((port ^ port >> 8) & 255);
}

#define TABLE_C1 0x9e3779b97f4a7c15ULL
#define TABLE_C2 0xd6e8feb86659fd93ULL
#define TABLE_C3 0xff51afd7ed558ccdULL

static inline __attribute__((always_inline)) __u64 table_hash4(__u64 seed, __u64 key)
{
	__u64 x = (key ^ seed) * TABLE_C1;

	x ^= x >> 32;
	x *= TABLE_C2;
	return x ^ x >> 32;
}

static inline __attribute__((always_inline)) __u64 table_hash6(__u64 seed, __u64 hi, __u64 lo, __u64 key)
{
	__u64 x = (hi ^ seed) * TABLE_C1;

	x ^= x >> 32;
	return table_hash4(x ^ lo * TABLE_C3, key);
}

/* The hash for all prefixes of a protocol that begin with the anchor's bits. */
static inline __attribute__((always_inline)) __u64 table_hash_anchor(__u64 seed, __u64 bits, __u32 protocol)
{
	return table_hash4(seed, bits << 1 | protocol);
}

/* A number below `count` from 32 bits of a hash. */
static inline __attribute__((always_inline)) __u32 table_place(__u64 hash, __u32 count)
{
	return (hash & 0xffffffff) * count >> 32;
}

/* The filter's word of a prefix within its line, and the bits in it: of the prefix, or of one port on it. */
static inline __attribute__((always_inline)) __u32 table_filter_word(__u64 hash)
{
	return hash & 7;
}

static inline __attribute__((always_inline)) __u64 table_filter_bits(__u64 hash)
{
	__u64 x = hash * TABLE_C3;

	return 1ULL << (x >> 58) | 1ULL << (x >> 52 & 63) | 1ULL << (x >> 46 & 63);
}

static inline __attribute__((always_inline)) __u64 table_filter_port(__u64 hash, __u32 port)
{
	return table_filter_bits(hash ^ (port + 1) * TABLE_C1);
}

static inline __attribute__((always_inline)) __u32 table_lowest(__u64 bits, const __u8 *positions)
{
	return positions[(bits & -bits) * 0x03f79d71b4cb0a89ULL >> 58];
}

#define TABLE_POSITIONS \
	{ 0, 1, 48, 2, 57, 49, 28, 3, 61, 58, 50, 42, 38, 29, 17, 4, 62, 55, 59, 36, 53, 51, 43, 22, 45, 39, 33, 30, \
	  24, 18, 12, 5, 63, 47, 56, 27, 60, 41, 37, 16, 54, 35, 52, 21, 44, 32, 23, 11, 46, 26, 40, 15, 34, 20, 31, \
	  10, 25, 14, 19, 9, 13, 8, 7, 6 }

#endif
