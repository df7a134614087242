/* SPDX-License-Identifier: BSD-2-Clause */
/* Build a table of bindings in memory, change it in place, and read it back: the other side of bpf/table.h. The memory is
 * that of a map which a program may be searching meanwhile. */

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "table.h"

/* --- bindings ----------------------------------------------------------------------------------------------------- */

#define COMPARE(a, b) if ((a) != (b)) return (a) < (b) ? -1 : 1

static int same_prefix(const struct pyskl_binding *a, const struct pyskl_binding *b)
{
	return a->hi == b->hi && a->lo == b->lo && a->length == b->length && a->family == b->family &&
	       a->protocol == b->protocol;
}

static int by_place(const void *first, const void *second)
{
	const struct pyskl_binding *a = first, *b = second;

	COMPARE(a->family, b->family);
	COMPARE(a->protocol, b->protocol);
	COMPARE(a->hi, b->hi);
	COMPARE(a->lo, b->lo);
	COMPARE(a->length, b->length);
	COMPARE(a->first, b->first);
	COMPARE(b->last, a->last);
	COMPARE(a->label, b->label);
	return 0;
}

/* Of equal length and port range, the order means nothing, and is the same each time. */
static int by_precedence(const void *first, const void *second)
{
	const struct pyskl_binding *a = first, *b = second;

	COMPARE(b->length, a->length);
	COMPARE(a->last - a->first, b->last - b->first);
	COMPARE(a->family, b->family);
	COMPARE(a->hi, b->hi);
	COMPARE(a->lo, b->lo);
	COMPARE(a->protocol, b->protocol);
	COMPARE(a->first, b->first);
	COMPARE(a->label, b->label);
	return 0;
}

void pyskl_bindings_by_precedence(struct pyskl_binding *bindings, int64_t count)
{
	qsort(bindings, count, sizeof(*bindings), by_precedence);
}

#define MANY 65536 /* bindings, for which buckets are worth their memory */

/* Sort by place: first into buckets by the beginning of an address, which is most of the work, then each of these. */
static int sort_by_place(struct pyskl_binding *bindings, int64_t count)
{
	enum { BITS = 16, BUCKETS = 4 << BITS };
	struct pyskl_binding *sorted = malloc(count * sizeof(*sorted));
	int64_t *ends = calloc(BUCKETS, sizeof(*ends)), i, end = 0, start = 0;

#define BUCKET(of) (((of).family * 2u + (of).protocol) << BITS | (of).hi >> (64 - BITS))
	if (!sorted || !ends) {
		free(sorted);
		free(ends);
		return -ENOMEM;
	}
	for (i = 0; i < count; i++)
		ends[BUCKET(bindings[i])]++;
	for (i = 0; i < BUCKETS; i++) {
		int64_t size = ends[i];

		ends[i] = end;
		end += size;
	}
	for (i = 0; i < count; i++)
		sorted[ends[BUCKET(bindings[i])]++] = bindings[i];
	for (i = 0; i < BUCKETS; start = ends[i++])
		if (ends[i] - start > 1)
			qsort(&sorted[start], ends[i] - start, sizeof(*sorted), by_place);
#undef BUCKET
	memcpy(bindings, sorted, count * sizeof(*sorted));
	free(sorted);
	free(ends);
	return 0;
}

/* Sort bindings by family, protocol, prefix and ports, drop those that are there twice, and look for two that contradict
 * each other. How many are left; or -1, and which two. */
int64_t pyskl_bindings_prepare(struct pyskl_binding *bindings, int64_t count, int64_t *conflict)
{
	int64_t i, kept = 0, depth = 0;
	int64_t *open = malloc((count + 1) * sizeof(*open)); /* the intervals around the one that is looked at */

	if (!open)
		return -ENOMEM;
	for (i = 1; i < count; i++)
		if (by_place(&bindings[i - 1], &bindings[i]) > 0)
			break;
	if (i < count && count < MANY) {
		qsort(bindings, count, sizeof(*bindings), by_place);
	} else if (i < count && sort_by_place(bindings, count)) {
		free(open);
		return -ENOMEM;
	}
	for (i = 0; i < count; i++) {
		const struct pyskl_binding *this = &bindings[i];

		if (kept && same_prefix(this, &bindings[kept - 1])) {
			while (depth && bindings[open[depth - 1]].last < this->first)
				depth--;
		} else {
			depth = 0;
		}
		if (depth) {
			const struct pyskl_binding *outer = &bindings[open[depth - 1]];
			int equal = outer->first == this->first && outer->last == this->last;

			if (equal && outer->label == this->label)
				continue;
			if (equal || outer->last < this->last) {
				conflict[0] = open[depth - 1];
				conflict[1] = i;
				free(open);
				return -1;
			}
		}
		bindings[kept] = *this;
		open[depth++] = kept++;
	}
	free(open);
	return kept;
}

/* Mark with 1 what is in one of two prepared lists alone. How many are in both. */
int64_t pyskl_bindings_diff(struct pyskl_binding *old, int64_t old_count, struct pyskl_binding *new, int64_t new_count)
{
	int64_t i = 0, j = 0, both = 0;

	while (i < old_count || j < new_count) {
		int order = i == old_count ? 1 : j == new_count ? -1 : by_place(&old[i], &new[j]);

		if (order < 0) {
			old[i++].mark = 1;
		} else if (order > 0) {
			new[j++].mark = 1;
		} else {
			old[i++].mark = new[j++].mark = 0;
			both++;
		}
	}
	return both;
}

/* Move what is marked to the front. How many they are. */
int64_t pyskl_bindings_marked(struct pyskl_binding *bindings, int64_t count)
{
	int64_t i, kept = 0;

	for (i = 0; i < count; i++) {
		if (!bindings[i].mark)
			continue;
		bindings[kept] = bindings[i];
		bindings[kept++].mark = 0;
	}
	return kept;
}

/* Give each binding the label that stands for its number; how many bindings each label has is added to `uses`. */
void pyskl_bindings_relabel(struct pyskl_binding *bindings, int64_t count, const uint32_t *labels, uint32_t *uses)
{
	int64_t i;

	for (i = 0; i < count; i++) {
		if (labels)
			bindings[i].label = labels[bindings[i].label];
		if (uses)
			uses[bindings[i].label]++;
	}
}

/* --- the shape of a table ----------------------------------------------------------------------------------------- */

struct pyskl_plan {
	uint32_t lines;
	uint32_t labels;
	uint32_t lists, lists_end;
	uint32_t room[2];
	struct pyskl_family families[2];
	struct pyskl_levels levels[2];
};

static const uint32_t per_line[2] = { 4, 2 };     /* entries in a bucket */
static const uint32_t bitmaps[2] = { 16, 8 };     /* of a level, in a line */
static const uint32_t longest[2] = { 32, 128 };

#define FEW 8          /* entries that no first level and no filter are made for */
#define LISTED 64      /* entries, up to which the list of all bindings is tried */
#define INDEXED 8192   /* bindings of a family and protocol, up to which an index is tried */
#define FURTHEST (1u << 26) /* line that can be told as that of a list of all bindings */
#define INDEX_PLACES (INDEXED / 8)
#define SAMPLED 512    /* of them, about, by which it is chosen what the index looks at */
#define STALE 64       /* changes after which a table that had one is to be built anew */
#define LISTS 128      /* lines for the lists of ports and of all bindings that changes make */
#define FILTER_BITS 8  /* for an entry */
#define SAMPLES 64
#define PORTS 65537   /* single ones, and ranges */
#define SCANNED 256  /* prefixes below a sample that are looked at before all lengths are taken to be there */
#define LEVEL_COST 1 /* of reading a level, beside a test of the filter */
#define TEST_COST 2

static uint64_t bit_of(const struct pyskl_binding *of)
{
	return 1ULL << TABLE_BIT(of->family, of->length);
}

/* The bits of an address that a level looks at. */
static void cut(uint64_t *hi, uint64_t *lo, uint32_t length)
{
	if (length <= 64) {
		*lo = 0;
		*hi = length ? *hi & ~0ULL << (64 - length) : 0;
	} else if (length < 128) {
		*lo &= ~0ULL << (128 - length);
	}
}

static int below(const struct pyskl_binding *binding, uint64_t hi, uint64_t lo, uint32_t length)
{
	uint64_t top = binding->hi, bottom = binding->lo;

	cut(&top, &bottom, length);
	return top == hi && bottom == lo;
}

/* What a level tells apart by ports: the single one of a binding, or 0 for a range. */
static uint32_t port_told(const struct pyskl_binding *of)
{
	return of->first == of->last ? of->first + 1u : 0;
}

/* Which lengths there are among the bindings of a run (of one family and protocol) below a prefix, with the ports of one. */
static uint64_t lengths_below(const struct pyskl_binding *run, int64_t count, uint64_t hi, uint64_t lo, uint32_t length,
			      const struct pyskl_binding *like, uint64_t all)
{
	int64_t low = 0, high = count, i;
	uint64_t found = 0;

	cut(&hi, &lo, length);
	while (low < high) {
		int64_t middle = (low + high) / 2;
		const struct pyskl_binding *it = &run[middle];

		if (it->hi < hi || (it->hi == hi && it->lo < lo))
			low = middle + 1;
		else
			high = middle;
	}
	for (i = low; i < count && below(&run[i], hi, lo, length); i++) {
		if (i - low == SCANNED)
			return all;
		if (run[i].length > length && port_told(&run[i]) == port_told(like))
			found |= bit_of(&run[i]);
	}
	return found;
}

/* The bits of lengths for which a level says nothing. */
static uint64_t bits_above(uint32_t family, uint32_t length)
{
	return ~0ULL << TABLE_BIT(family, length);
}

/* Choose the levels after the first, one after the other: each time that which leaves the fewest candidates before the
 * right one, while it saves more than it costs. */
static void choose_levels(const struct pyskl_binding *bindings, int64_t count, int64_t udp, uint32_t family,
			  uint32_t first, uint64_t all, uint32_t *chosen)
{
	static const uint32_t step = 4;
	uint64_t candidates[SAMPLES], (*at)[32] = malloc(sizeof(*at) * SAMPLES);
	uint32_t length, level, samples = count < SAMPLES ? count : SAMPLES, s;
	uint64_t best = 0, cost;

	memset(chosen, 0, TABLE_LEVELS * sizeof(*chosen));
	if (!at || __builtin_popcountll(all) <= 2)
		goto out;
	for (s = 0; s < samples; s++) {
		const struct pyskl_binding *it = &bindings[count * s / samples];
		const struct pyskl_binding *run = it < bindings + udp ? bindings : bindings + udp; /* of its protocol */
		int64_t of_run = it < bindings + udp ? udp : count - udp;
		uint64_t hi = it->hi, lo = it->lo; /* any address of its prefix */
		uint64_t longer = it->length ? bit_of(it) - 1 : ~0ULL;

		if (it->length < 64)
			hi |= s * TABLE_C1 >> it->length;
		if (it->length < 128)
			lo |= s * TABLE_C2 >> (it->length > 64 ? it->length - 64 : 0);
		for (length = first; length < longest[family]; length += step)
			at[s][length / step] = lengths_below(run, of_run, hi, lo, length, it, all) & longer;
		candidates[s] = at[s][first / step];
		best += TEST_COST * __builtin_popcountll(candidates[s]);
	}
	for (level = 0; level < TABLE_LEVELS; level++) {
		uint32_t winner = 0;

		for (length = first + step; length < longest[family]; length += step) {
			cost = LEVEL_COST * samples;
			for (s = 0; s < samples; s++)
				cost += TEST_COST *
					__builtin_popcountll(candidates[s] & (at[s][length / step] | bits_above(family, length)));
			if (cost < best) {
				best = cost;
				winner = length;
			}
		}
		if (!winner)
			break;
		best -= LEVEL_COST * samples;
		chosen[level] = winner;
		for (s = 0; s < samples; s++)
			candidates[s] &= at[s][winner / step] | bits_above(family, winner);
	}
	for (s = 1; s < TABLE_LEVELS; s++) /* shallow ones first */
		for (level = 0; level + 1 < TABLE_LEVELS; level++)
			if (chosen[level + 1] && chosen[level] > chosen[level + 1]) {
				uint32_t other = chosen[level];

				chosen[level] = chosen[level + 1];
				chosen[level + 1] = other;
			}
out:
	free(at);
}

static int64_t after_group(const struct pyskl_binding *bindings, int64_t i, int64_t count)
{
	int64_t next = i + 1;

	while (next < count && same_prefix(&bindings[i], &bindings[next]))
		next++;
	return next;
}

/* Choose the anchor: as short as it can be while nearly all prefixes that have one in common fit into a bucket. */
static uint32_t choose_anchor(const struct pyskl_binding *bindings, int64_t count, int64_t udp, uint32_t family)
{
	uint32_t low = 1, high = family ? 64 : 32; /* of an IPv6 address the first word alone */

	while (low <= high) {
		uint32_t middle = (low + high) / 2;
		int64_t i, run = 0, all = 0, crowded = 0;
		const struct pyskl_binding *last = NULL;

		for (i = 0; i < count; i++) {
			const struct pyskl_binding *it = &bindings[i];

			if (it->length < middle || (last && same_prefix(last, it)))
				continue;
			if (!last || i == udp || (last->hi ^ it->hi) >> (64 - middle))
				run = 0;
			all++;
			crowded += ++run > per_line[family];
			last = it;
		}
		if (crowded > all / 32)
			low = middle + 1;
		else
			high = middle - 1;
	}
	return low > (family ? 64 : 32) ? longest[family] + 1 : low;
}

static uint64_t list_lines(uint64_t intervals)
{
	return intervals < 2 ? 0 : (1 + 2 * intervals + intervals + 7) / 8; /* n nested intervals make up to 2n - 1 */
}

/* How many bitmaps a level needs: one for each beginning of so many bits that longer prefixes have, and port. `seen` has
 * a number for each port. */
static uint64_t count_nodes(const struct pyskl_binding *bindings, int64_t count, int64_t udp, uint32_t length,
			    uint32_t *seen)
{
	uint64_t nodes = 0, hi = 0, lo = 0;
	uint32_t run = 0;
	int64_t i;

	memset(seen, 0, PORTS * sizeof(*seen));
	for (i = 0; i < count; i++) {
		if (bindings[i].length <= length)
			continue;
		if (!run || i == udp || !below(&bindings[i], hi, lo, length)) {
			hi = bindings[i].hi;
			lo = bindings[i].lo;
			cut(&hi, &lo, length);
			run++;
		}
		nodes += seen[port_told(&bindings[i])] != run;
		seen[port_told(&bindings[i])] = run;
	}
	nodes += nodes / 2 + 16;
	return nodes < 0xffffff ? nodes : 0xffffff;
}

/* How many bits of an address an index has for so many bindings. */
static uint32_t index_bits(int64_t count)
{
	uint32_t bits = 4;

	while (8 << bits < count)
		bits++;
	return bits;
}

static uint32_t index_lines(int64_t count)
{
	return FEW_CLASSES << index_bits(count) >> 4;
}

/* Say how large a table of prepared bindings is and where its parts are. `spare` sixteenths are left for changes. */
int pyskl_table_plan(const struct pyskl_binding *bindings, int64_t count, uint32_t labels, uint32_t spare,
		     struct pyskl_plan *plan)
{
	int64_t start[5], i, next;
	uint64_t lines = FEW_LINE(4) + (labels + 7) / 8, lists = 0;
	uint32_t *seen = malloc(PORTS * sizeof(*seen));
	uint32_t family, level;

	if (!seen)
		return -ENOMEM;
	memset(plan, 0, sizeof(*plan));
	plan->labels = labels;
	for (i = family = 0; family < 4; family++) {
		start[family] = i;
		while (i < count && bindings[i].family * 2u + bindings[i].protocol == family)
			i++;
	}
	start[4] = count;
	for (i = 0; i < 4; i++)
		if (start[i + 1] - start[i] <= INDEXED)
			lists += (start[i + 1] - start[i] > TABLE_FEW) * 18 * index_lines(start[i + 1] - start[i]);
	for (family = 0; family < 2; family++) {
		const struct pyskl_binding *of_family = bindings + start[family * 2];
		int64_t n = start[family * 2 + 2] - start[family * 2], udp = start[family * 2 + 1] - start[family * 2];
		struct pyskl_family *it = &plan->families[family];
		uint32_t bits, chosen[TABLE_LEVELS];
		uint64_t entries = 0, room;
		uint64_t all = 0;

		for (i = 0; i < n; i = next) {
			next = after_group(of_family, i, n);
			lists += list_lines(next - i);
			if (!of_family[i].length)
				continue;
			entries++;
			all |= bit_of(&of_family[i]);
		}
		room = entries + entries * spare / 16 + 64;
		if (entries > FEW) {
			bits = entries < 64 ? 6 : entries < 1024 ? 8 : entries < (family ? 65536 : 16384) ? 12 : 16;
			if (family && bits > 14 && entries < 262144)
				bits = 14; /* 256 kB, which a cache keeps */
			it->first = lines;
			it->first_shift = (family ? 64 : 32) - bits;
			lines += ((1u << bits) + bitmaps[family] - 1) / bitmaps[family];
		}
		if (__builtin_popcountll(all) > 2) {
			it->levels = lines;
			lines = TABLE_PORTS_LINE(lines) + TABLE_BY_PORT / bitmaps[family];
			choose_levels(of_family, n, udp, family, it->first ? bits : 0, all, chosen);
			for (level = 0; level < TABLE_LEVELS && chosen[level]; level++) {
				uint64_t nodes = count_nodes(of_family, n, udp, chosen[level], seen);

				plan->levels[family].levels[level] = LEVEL(lines, nodes, longest[family] - chosen[level]);
				lines += (nodes + bitmaps[family] - 1) / bitmaps[family];
			}
		}
		plan->room[family] = room;
		if (entries > FEW) {
			it->filter = lines;
			it->filter_count = room * FILTER_BITS / 512 + 1;
			lines += it->filter_count;
		}
		it->buckets = lines;
		it->bucket_count = room * 2 / per_line[family] + 1;
		lines += it->bucket_count + TABLE_PROBES + 1;
		it->anchor = choose_anchor(of_family, n, udp, family);
		if (lines > UINT32_MAX / 2)
			break;
	}
	free(seen);
	lists += lists * spare / 16 + LISTS;
	plan->lists = lines;
	lines += lists;
	if (lines > UINT32_MAX / 2)
		return -E2BIG;
	plan->lists_end = plan->lines = lines;
	return 0;
}

/* --- one prefix --------------------------------------------------------------------------------------------------- */

static struct pyskl_head *head_of(void *memory)
{
	return memory;
}

static struct pyskl_family *family_of(void *memory, uint32_t family)
{
	return (void *)((struct table_line *)memory + TABLE_FAMILY + family);
}

static uint64_t *words_at(void *memory, uint32_t line)
{
	return (uint64_t *)((struct table_line *)memory + line)->words;
}

static void publish(uint64_t *word, uint64_t value)
{
	__atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static uint64_t read_word(const uint64_t *word)
{
	return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

/* The first word of an entry's key: what stands for it in the table, with the address of IPv4 in it. */
static uint64_t key_of(const struct pyskl_binding *of)
{
	uint64_t key = TABLE_KEY(of->length, of->protocol);

	return of->family ? key : key | of->hi >> 32;
}

static uint64_t hash_of(const struct pyskl_family *family, const struct pyskl_binding *of)
{
	return of->family ? table_hash6(family->seed, of->hi, of->lo, key_of(of)) : table_hash4(family->seed, key_of(of));
}

/* The hash that says where a prefix is looked for at first. */
static uint64_t home_of(const struct pyskl_family *family, const struct pyskl_binding *of)
{
	uint64_t bits = of->family ? of->hi >> (-family->anchor & 63) : of->hi >> 32 >> (-family->anchor & 31);

	return of->length < family->anchor ? hash_of(family, of) : table_hash_anchor(family->seed, bits, of->protocol);
}

/* The value word of a prefix's entry. Where it has none: NULL, and where a new entry would begin, or NULL for nowhere. */
static uint64_t *entry_of(void *memory, const struct pyskl_binding *of, uint64_t **vacant)
{
	struct pyskl_family *family = family_of(memory, of->family);
	uint32_t size = of->family ? 4 : 2, step, i;
	uint64_t key = key_of(of), own = hash_of(family, of), home = home_of(family, of);
	uint32_t further = family->buckets + table_place(own, family->bucket_count) + (home == own);

	*vacant = NULL;
	if (!of->length)
		return words_at(memory, TABLE_ANY) + of->family * 2 + of->protocol;
	for (step = 0; step <= TABLE_PROBES; step++) {
		uint32_t line = step ? further + step - 1 : family->buckets + table_place(home, family->bucket_count);
		uint64_t *word = words_at(memory, line);

		for (i = 0; i < 8; i += size) {
			uint64_t found = read_word(&word[i + size - 2]);

			if (!found) {
				*vacant = &word[i];
				return NULL;
			}
			if (found == key && (!of->family || (word[i] == of->hi && word[i + 1] == of->lo)))
				return &word[i + size - 1];
		}
	}
	return NULL;
}

/* Set the bit of a prefix's length in a bitmap. */
static void set_bit(void *memory, uint32_t first, uint32_t place, const struct pyskl_binding *of)
{
	uint64_t *words = words_at(memory, first);

	if (of->family)
		__atomic_fetch_or(&words[place], bit_of(of), __ATOMIC_RELAXED);
	else
		__atomic_fetch_or((uint32_t *)words + place, (uint32_t)bit_of(of), __ATOMIC_RELAXED);
}

/* Make a prefix a candidate for so many ports. */
static void announce_ports(void *memory, uint32_t line, const struct pyskl_binding *of)
{
	uint32_t port, first = of->first, last = of->last;

	if (last - first > 255) {
		first = 0; /* of each 256 ports there is one for each bitmap */
		last = 255;
	}
	for (port = first; port <= last; port++)
		set_bit(memory, line, table_by_port(of->protocol, port), of);
}

/* Make the prefix of some bindings a candidate wherever it is one. */
static void announce(void *memory, const struct pyskl_binding *group, int64_t count)
{
	struct pyskl_family *family = family_of(memory, group->family);
	uint32_t length = group->length, bit = longest[group->family] - length, i;
	struct pyskl_levels *levels;
	int64_t each;

	__atomic_fetch_or(&family->lengths[bit / 64], 1ULL << bit % 64, __ATOMIC_RELAXED);
	if (family->first) {
		uint32_t bits = (group->family ? 64 : 32) - family->first_shift, place = group->hi >> (64 - bits);

		for (i = 0; i < (length < bits ? 1u << (bits - length) : 1); i++)
			set_bit(memory, family->first, place + i, group);
	}
	if (!family->levels)
		return;
	levels = (void *)words_at(memory, family->levels);
	for (each = 0; each < count; each++) {
		uint64_t ports = TABLE_RANGES(group->protocol);

		announce_ports(memory, TABLE_PORTS_LINE(family->levels), &group[each]);
		if (port_told(&group[each]))
			ports = TABLE_PORT(group->protocol, group[each].first);
		else
			__atomic_fetch_or(&family->ranges, bit_of(group), __ATOMIC_RELAXED);
		for (i = 0; i < TABLE_LEVELS && levels->levels[i]; i++) {
			uint64_t level = levels->levels[i], hi = group->hi, lo = group->lo, hash;
			uint32_t bits = longest[group->family] - LEVEL_SHIFT(level);

			if (length <= bits)
				continue;
			cut(&hi, &lo, bits);
			hash = group->family ? table_hash6(family->seed, hi, lo, TABLE_LEVEL_KEY(i, ports)) :
					       table_hash4(family->seed, hi >> 32 | TABLE_LEVEL_KEY(i, ports));
			set_bit(memory, LEVEL_LINE(level), table_place(hash, LEVEL_COUNT(level)), group);
		}
	}
}

/* Let a prefix's ports through the filter. */
static void admit(void *memory, const struct pyskl_binding *group, int64_t count)
{
	struct pyskl_family *family = family_of(memory, group->family);
	uint64_t hash = hash_of(family, group), bits = 0, *word;
	int64_t i;

	if (!family->filter_count)
		return;

	for (i = 0; i < count; i++) {
		if (count > TABLE_PORTS || group[i].first != group[i].last) {
			bits = table_filter_bits(hash);
			break;
		}
		bits |= table_filter_port(hash, group[i].first);
	}
	word = words_at(memory, family->filter + table_place(home_of(family, group) >> 32, family->filter_count)) +
	       table_filter_word(hash);
	__atomic_fetch_or(word, bits, __ATOMIC_RELAXED);
}

/* Write a list of intervals, from the bindings of one prefix, which are sorted and nested. */
static int write_list(uint64_t *words, const struct pyskl_binding *group, int64_t count)
{
	int64_t i, depth = 0, searched = 0, next = 0; /* the first port that no interval has yet */
	const struct pyskl_binding **open = malloc(count * sizeof(*open));

	if (!open)
		return -ENOMEM;

	for (i = 0; i <= count; i++) {
		int64_t first = i < count ? group[i].first : INT32_MAX;

		while (depth && open[depth - 1]->last < first) {
			const struct pyskl_binding *inner = open[--depth];

			if (next <= inner->last)
				words[++searched] = TABLE_VALUE(next, inner->last, inner->label);
			next = inner->last + 1;
		}
		if (i == count)
			break;
		if (depth && next < first)
			words[++searched] = TABLE_VALUE(next, first - 1, open[depth - 1]->label);
		next = first;
		open[depth++] = &group[i];
	}
	free(open);
	for (i = 0; i < count; i++)
		words[1 + searched + i] = TABLE_VALUE(group[i].first, group[i].last, group[i].label);
	words[0] = (uint64_t)count << 32 | searched;
	return 0;
}

static int set_prefix(void *memory, const struct pyskl_binding *group, int64_t count)
{
	struct pyskl_head *head = head_of(memory);
	struct pyskl_family *family = family_of(memory, group->family);
	uint64_t *vacant, *entry = entry_of(memory, group, &vacant), value = 0, lines = list_lines(count);

	if (!entry && !count)
		return 0;
	if ((!entry && (!vacant || head->used[group->family] >= head->room[group->family])) ||
	    head->lists + lines > head->lists_end)
		return -ENOSPC;
	if (lines) {
		uint32_t last = 0;
		int64_t i;
		int failed = write_list(words_at(memory, head->lists), group, count);

		if (failed)
			return failed;
		for (i = 0; i < count; i++)
			last = group[i].last > last ? group[i].last : last;
		value = TABLE_LIST | TABLE_VALUE(group->first, last, (uint64_t)head->lists);
		head->lists += lines;
	} else if (count) {
		value = TABLE_VALUE(group->first, group->last, group->label);
	}
	if (count && group->length) {
		announce(memory, group, count);
		admit(memory, group, count);
	} else if (count) {
		family->shortest = 1;
	}
	if (entry) {
		publish(entry, value);
	} else if (group->family) {
		vacant[0] = group->hi;
		vacant[1] = group->lo;
		vacant[3] = value;
		head->used[1]++;
		publish(&vacant[2], key_of(group));
	} else {
		vacant[1] = value;
		head->used[0]++;
		publish(&vacant[0], key_of(group));
	}
	return 0;
}

struct reader {
	struct pyskl_binding *out;
	int64_t room, count;
	uint32_t *uses;
};

static void put(struct reader *reader, const struct pyskl_binding *prefix, uint64_t value)
{
	if (reader->count < reader->room) {
		struct pyskl_binding *out = &reader->out[reader->count];

		*out = *prefix;
		out->first = value;
		out->last = value >> 16;
		out->label = value >> 32;
	}
	if (reader->uses)
		reader->uses[value >> 32]++;
	reader->count++;
}

static void put_all(struct reader *reader, void *memory, const struct pyskl_binding *prefix, uint64_t value)
{
	uint64_t *list, i;

	if (!(value & TABLE_LIST)) {
		if (value >> 32)
			put(reader, prefix, value);
		return;
	}
	list = words_at(memory, (value & ~TABLE_LIST) >> 32);
	for (i = 0; i < LIST_BINDINGS(list[0]); i++)
		put(reader, prefix, list[1 + LIST_SEARCHED(list[0]) + i]);
}

/* All bindings of a family and protocol. */
static void scan(void *memory, uint32_t family, uint32_t protocol, struct reader *reader)
{
	struct pyskl_family *it = family_of(memory, family);
	uint64_t size = family ? 4 : 2, *word = words_at(memory, it->buckets);
	uint64_t *end = words_at(memory, it->buckets + it->bucket_count + TABLE_PROBES + 1);
	struct pyskl_binding prefix = { .family = family, .protocol = protocol };

	put_all(reader, memory, &prefix, read_word(words_at(memory, TABLE_ANY) + family * 2 + protocol));
	for (; word < end; word += size) {
		uint64_t key = read_word(&word[size - 2]);

		if (!key || (key >> 40 & 1) != protocol)
			continue;
		prefix.length = key >> 32;
		prefix.hi = family ? word[0] : key << 32;
		prefix.lo = family ? word[1] : 0;
		put_all(reader, memory, &prefix, read_word(&word[size - 1]));
	}
}

/* Where the list of all bindings of a family and protocol is told. */
static uint64_t *few_key(void *memory, uint32_t family, uint32_t protocol)
{
	return words_at(memory, FEW_LINE(family * 2 + protocol));
}

static void tell_list(uint64_t *key, uint64_t list)
{
	publish(key, (*key & ((1ULL << 38) - 1)) | list << 38);
}

/* Write some bindings of a family, the first that matches first. How many lines they have. */
static uint32_t write_bindings(uint64_t *words, const struct pyskl_binding *found, int64_t count)
{
	int64_t i, size = count ? per_line[found->family] : 1;

	for (i = 0; i < count; i++) {
		const struct pyskl_binding *it = &found[i];
		uint64_t length = it->length;

		*words++ = !it->family ? FEW_KEY4(it->hi >> 32, 32 - length) :
					 FEW_KEY6(length, length < 64 ? 64 - length : 0, length > 64 ? 128 - length : 64);
		*words++ = TABLE_VALUE(it->first, it->last, it->label) | (i + 1 == count ? FEW_LAST : 0);
		if (it->family) {
			*words++ = it->hi;
			*words++ = it->lo;
		}
	}
	return count ? (count + size - 1) / size : 1;
}

/* Where the bindings of a family and protocol are few, list them all in some lines, of which all is 0. How many lines it
 * has; 0: they are not few. */
static uint32_t write_few(void *memory, uint32_t family, uint32_t protocol, uint64_t *words)
{
	struct pyskl_binding found[TABLE_FEW * 4];
	struct reader reader = { found, TABLE_FEW * per_line[family], 0, NULL };

	if (head_of(memory)->used[family] > LISTED)
		return 0;
	scan(memory, family, protocol, &reader);
	if (reader.count > reader.room)
		return 0;
	pyskl_bindings_by_precedence(found, reader.count);
	return write_bindings(words, found, reader.count);
}

/* Some of the bits of a prefix, after the first ones, and in `known` which of them it has. */
static uint32_t bits_after(const struct pyskl_binding *of, uint32_t after, uint32_t bits, uint32_t *known)
{
	uint64_t word = after < 64 ? of->hi : of->lo;
	uint32_t mask = (1u << bits) - 1, has = of->length <= after ? 0 : of->length - after;

	*known = has < bits ? mask & ~(mask >> has) : mask;
	return word >> (64 - after % 64 - bits) & mask;
}

/* After how many bits of an address those are that tell bindings apart best. */
static uint32_t choose_index(const struct pyskl_binding *run, int64_t count, uint32_t bits)
{
	uint32_t after, best = 0, known, place;
	uint64_t lowest = UINT64_MAX;
	int64_t i, step = 1 + count / SAMPLED;

	for (after = 0; after + bits <= longest[run->family]; after++) {
		int32_t in[INDEX_PLACES + 1] = { 0 }, here = 0; /* more or fewer than in the place before */
		uint64_t cost = 0;

		if (after % 64 + bits > 64)
			continue;
		for (i = 0; i < count; i += step) {
			place = bits_after(&run[i], after, bits, &known);
			in[place]++;
			in[place + ((1u << bits) - known)]--;
		}
		for (place = 0; place < 1u << bits; place++) {
			here += in[place];
			cost += (uint64_t)here * here;
		}
		if (cost < lowest) {
			lowest = cost;
			best = after;
		}
	}
	return best;
}

/* Whether a binding has a port of a class. */
static int in_class(const struct pyskl_binding *of, uint32_t class)
{
	uint32_t port;

	for (port = of->first; port <= of->last; port++)
		if (table_class(port) == class)
			return 1;
	return 0;
}

/* Make an index of the bindings of a family and protocol. What would have too many in its list is searched elsewhere. */
static int write_index(void *memory, const struct pyskl_binding *run, int64_t count)
{
	struct pyskl_head *head = head_of(memory);
	uint32_t family = run->family, most = TABLE_LISTED * per_line[family], bits = index_bits(count), places = 1u << bits;
	uint32_t index = head->lists, after, place, class, known, shift;
	struct pyskl_binding *sorted = malloc(count * sizeof(*sorted)), (*in)[TABLE_LISTED * 4] = malloc(places * sizeof(*in));
	uint32_t *lists = (uint32_t *)words_at(memory, index), length[INDEX_PLACES];
	int64_t i;
	int failed = -ENOMEM;

	if (!sorted || !in)
		goto out;
	failed = 0;
	if (index + index_lines(count) > head->lists_end)
		goto out;
	head->lists += index_lines(count);
	memcpy(sorted, run, count * sizeof(*sorted));
	pyskl_bindings_by_precedence(sorted, count);
	after = choose_index(sorted, count, bits);
	for (class = 0; class < FEW_CLASSES; class++) {
		memset(length, 0, sizeof(length));
		for (i = 0; i < count; i++) {
			if (!in_class(&sorted[i], class))
				continue;
			place = bits_after(&sorted[i], after, bits, &known);
			for (shift = place + places - known; place < shift; place++) {
				if (length[place] < most)
					in[place][length[place]] = sorted[i];
				length[place]++;
			}
		}
		for (place = 0; place < places; place++) {
			uint32_t *list = &lists[place * FEW_CLASSES + class];

			*list = FEW_NOWHERE;
			if (length[place] > most || head->lists + TABLE_LISTED > head->lists_end)
				continue;
			*list = length[place] ? head->lists : 0;
			if (length[place])
				head->lists += write_bindings(words_at(memory, head->lists), in[place], length[place]);
		}
	}
	shift = family ? 64 - after % 64 - bits + (after < 64 ? 0 : 64) : 32 - after - bits;
	few_key(memory, family, run->protocol)[1] = FEW_INDEX(index, shift, places - 1);
	tell_list(few_key(memory, family, run->protocol), FEW_INDEXED);
out:
	free(sorted);
	free(in);
	return failed;
}

/* Read what write_bindings() wrote. */
static uint32_t read_bindings(const uint64_t *words, uint32_t family, uint32_t protocol, struct pyskl_binding *out)
{
	uint32_t count = 0, size = family ? 4 : 2;
	uint64_t value = 0;

	while (!(value & FEW_LAST)) {
		struct pyskl_binding *it = &out[count++];

		value = words[1];
		*it = (struct pyskl_binding){ .family = family, .protocol = protocol, .label = FEW_LABEL(value) };
		it->first = value;
		it->last = value >> 16;
		it->length = family ? words[0] & 255 : 32 - (words[0] >> 32 & 63);
		it->hi = family ? words[2] : words[0] << 32;
		it->lo = family ? words[3] : 0;
		words += size;
	}
	return count;
}

/* Let the lists of an index, which is not looked at now, have just these bindings of a prefix. */
static int update_index(void *memory, const struct pyskl_binding *group, int64_t count)
{
	uint64_t index = few_key(memory, group->family, group->protocol)[1];
	uint32_t places = (index >> 40) + 1, bits = __builtin_ctz(places), shift = index >> 32 & 127, known, place, end, class;
	uint32_t after = group->family ? 64 - shift % 64 - bits + (shift < 64 ? 0 : 64) : 32 - shift - bits;
	uint32_t *lists = (uint32_t *)words_at(memory, (uint32_t)index), most = TABLE_LISTED * per_line[group->family];
	struct pyskl_head *head = head_of(memory);

	place = bits_after(group, after, bits, &known);
	for (end = place + places - known; place < end; place++)
		for (class = 0; class < FEW_CLASSES; class++) {
			struct pyskl_binding found[2 * TABLE_LISTED * 4];
			uint32_t *list = &lists[place * FEW_CLASSES + class], old = 0, kept = 0, now, i;
			int64_t n;

			if (*list == FEW_NOWHERE)
				continue;
			if (*list)
				old = read_bindings(words_at(memory, *list), group->family, group->protocol, found);
			for (i = 0; i < old; i++)
				if (!same_prefix(&found[i], group))
					found[kept++] = found[i];
			for (now = kept, n = 0; n < count && now <= most; n++)
				if (in_class(&group[n], class))
					found[now++] = group[n];
			if (old == kept && now == kept)
				continue;
			if (head->lists + TABLE_LISTED > head->lists_end)
				return -ENOSPC;
			pyskl_bindings_by_precedence(found, now);
			i = head->lists;
			if (now && now <= most)
				head->lists += write_bindings(words_at(memory, i), found, now);
			__atomic_store_n(list, now > most ? FEW_NOWHERE : now ? i : 0, __ATOMIC_RELEASE);
		}
	return 0;
}

/* --- a whole table ------------------------------------------------------------------------------------------------ */

/* Fill memory, of which all is 0. -EAGAIN: an entry found no place; try another seed. */
int pyskl_table_fill(void *memory, const struct pyskl_plan *plan, const struct pyskl_binding *bindings, int64_t count,
		     uint64_t seed, uint64_t number)
{
	struct pyskl_head *head = head_of(memory);
	uint32_t family, kind;
	int64_t i, next;

	head->number = number;
	head->lines = plan->lines;
	head->policies = FEW_LINE(4);
	head->labels = plan->labels;
	head->lists = plan->lists;
	head->lists_end = plan->lists_end;
	for (family = 0; family < 2; family++) {
		struct pyskl_family *it = family_of(memory, family);

		head->room[family] = plan->room[family];
		*it = plan->families[family];
		it->seed = seed;
		if (it->levels)
			memcpy(words_at(memory, it->levels), &plan->levels[family], sizeof(plan->levels[family]));
	}
	for (i = 0; i < count; i = next) {
		next = after_group(bindings, i, count);
		int failed = set_prefix(memory, &bindings[i], next - i);

		if (failed)
			return failed == -ENOSPC ? -EAGAIN : failed;
	}
	for (i = kind = 0; kind < 4; i = next, kind++) {
		for (next = i; next < count && bindings[next].family * 2u + bindings[next].protocol == kind;)
			next++;
		if (write_few(memory, kind / 2, kind % 2, words_at(memory, FEW_LINE(kind))))
			continue;
		tell_list(few_key(memory, kind / 2, kind % 2), FEW_NOWHERE);
		if (next - i && next - i <= INDEXED && write_index(memory, &bindings[i], next - i))
			return -ENOMEM;
	}
	return 0;
}

/* Let one prefix have just these bindings, which are prepared; with none, `group` names the prefix all the same. Whoever
 * looks it up finds what it had or what it has, nothing else, wherever this is interrupted: while the list of all bindings
 * is not there, the entries are searched, which change by one store. -ENOSPC: build a new table. */
int pyskl_table_set(void *memory, const struct pyskl_binding *group, int64_t count)
{
	struct pyskl_head *head = head_of(memory);
	uint64_t *list = few_key(memory, group->family, group->protocol);
	uint32_t where = FEW_ELSEWHERE(*list), lines = 0;
	int is_small = head->used[0] + head->used[1] <= 4 * INDEXED; /* and built soon */
	int failed;

	if (is_small && (head->stale > STALE || (where != FEW_NOWHERE &&
						 head->lists + list_lines(count) + TABLE_FEW > head->lists_end)))
		return -ENOSPC;
	head->stale += where == FEW_INDEXED || head->stale;
	tell_list(list, FEW_NOWHERE);
	failed = set_prefix(memory, group, count);
	if (where == FEW_INDEXED) {
		if (failed || !update_index(memory, group, count)) {
			head->stale = 0;
			tell_list(list, FEW_INDEXED);
		}
	} else if (head->lists + TABLE_FEW <= head->lists_end && head->lists < FURTHEST) {
		memset(words_at(memory, head->lists), 0, TABLE_FEW * PYSKL_LINE);
		lines = write_few(memory, group->family, group->protocol, words_at(memory, head->lists));
	}
	if (lines) {
		head->lists += lines;
		tell_list(list, head->lists - lines);
	}
	if (!failed)
		publish((uint64_t *)&head->edits, head->edits + 1);
	return failed;
}

/* The bindings of the prefix that a binding names: how many there are, of which `room` are written. */
int64_t pyskl_table_get(void *memory, const struct pyskl_binding *of, struct pyskl_binding *out, int64_t room)
{
	struct pyskl_binding prefix = *of;
	struct reader reader = { out, room, 0, NULL };
	uint64_t *vacant, *entry = entry_of(memory, of, &vacant);

	prefix.mark = prefix.unused = 0;
	if (entry)
		put_all(&reader, memory, &prefix, read_word(entry));
	return reader.count;
}

/* All bindings, in no order: how many there are, of which `room` are written; how many each label has, to `uses`. */
int64_t pyskl_table_scan(void *memory, struct pyskl_binding *out, int64_t room, uint32_t *uses)
{
	struct reader reader = { out, room, 0, uses };
	uint32_t kind;

	for (kind = 0; kind < 4; kind++)
		scan(memory, kind / 2, kind % 2, &reader);
	return reader.count;
}

/* The place of a label's policy in the memory of a table. */
static uint64_t *policy_at(void *memory, uint32_t label)
{
	return words_at(memory, head_of(memory)->policies) + label;
}

uint64_t pyskl_table_policy(void *memory, uint32_t label)
{
	return read_word(policy_at(memory, label));
}

void pyskl_table_set_policy(void *memory, uint32_t label, uint64_t policy)
{
	publish(policy_at(memory, label), policy);
	publish((uint64_t *)&head_of(memory)->edits, head_of(memory)->edits + 1);
}
