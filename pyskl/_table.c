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
static const uint32_t bitmaps[2] = { 16, 4 };     /* of a level, in a line */
static const uint32_t longest[2] = { 32, 128 };

#define FEW 8          /* entries that no first level is made for, and whose filter is one word */
#define FILTER_BITS 12 /* for an entry */
#define SAMPLES 64
#define SCANNED 256  /* prefixes below a sample that are looked at before all lengths are taken to be there */
#define LEVEL_COST 1 /* of reading a level, in tests of the filter */

struct bits {
	uint64_t longer, shorter; /* as in the levels of IPv6 */
};

static struct bits bit_of(uint32_t family, uint32_t length)
{
	uint32_t bit = longest[family] - length;

	return bit < 64 ? (struct bits){ 1ULL << bit, 0 } : (struct bits){ 0, 1ULL << (bit - 64) };
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

/* Which lengths there are among the bindings of a run (of one family and protocol) below a prefix. */
static struct bits lengths_below(const struct pyskl_binding *run, int64_t count, uint64_t hi, uint64_t lo,
				 uint32_t length, struct bits all)
{
	int64_t low = 0, high = count, i;
	struct bits found = { 0, 0 };

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
		struct bits bit = bit_of(run[i].family, run[i].length);

		if (i - low == SCANNED)
			return all;
		if (run[i].length > length) {
			found.longer |= bit.longer;
			found.shorter |= bit.shorter;
		}
	}
	return found;
}

static struct bits mask_below(uint32_t family, uint32_t length)
{
	uint32_t bits = longest[family] - length;

	if (bits > 64)
		return (struct bits){ ~0ULL, bits == 128 ? ~0ULL : (1ULL << (bits - 64)) - 1 };
	return (struct bits){ bits == 64 ? ~0ULL : (1ULL << bits) - 1, 0 };
}

/* Choose the levels after the first, one after the other: each time that which leaves the fewest candidates to what is
 * near to bindings, while it saves more than it costs. */
static void choose_levels(const struct pyskl_binding *bindings, int64_t count, int64_t udp, uint32_t family,
			  uint32_t first, struct bits all, uint32_t *chosen)
{
	static const int step = 4;
	struct bits candidates[SAMPLES], (*at)[32] = malloc(sizeof(*at) * SAMPLES);
	uint32_t length, level, samples = count < SAMPLES ? count : SAMPLES, s;
	uint64_t best = 0, cost, lengths = __builtin_popcountll(all.longer) + __builtin_popcountll(all.shorter);

	memset(chosen, 0, TABLE_LEVELS * sizeof(*chosen));
	if (!at || lengths <= 2)
		goto out;
	for (s = 0; s < samples; s++) {
		const struct pyskl_binding *it = &bindings[count * s / samples];
		const struct pyskl_binding *run = it < bindings + udp ? bindings : bindings + udp; /* of its protocol */
		int64_t of_run = it < bindings + udp ? udp : count - udp;
		uint64_t hi = it->hi, lo = it->lo;

		if (it->length > 64)
			lo ^= 1ULL << (128 - it->length);
		else if (it->length)
			hi ^= 1ULL << (64 - it->length);
		for (length = first; length < longest[family]; length += step) {
			at[s][length / step] = lengths_below(run, of_run, hi, lo, length, all);
		}
		candidates[s] = at[s][first / step];
		best += __builtin_popcountll(candidates[s].longer) + __builtin_popcountll(candidates[s].shorter);
	}
	for (level = 0; level < TABLE_LEVELS; level++) {
		uint32_t winner = 0;

		for (length = first + step; length < longest[family]; length += step) {
			struct bits mask = mask_below(family, length);

			cost = LEVEL_COST * samples;
			for (s = 0; s < samples; s++) {
				struct bits *here = &at[s][length / step];

				cost += __builtin_popcountll(candidates[s].longer & (here->longer | ~mask.longer)) +
					__builtin_popcountll(candidates[s].shorter & (here->shorter | ~mask.shorter));
			}
			if (cost < best) {
				best = cost;
				winner = length;
			}
		}
		if (!winner)
			break;
		best -= LEVEL_COST * samples;
		chosen[level] = winner;
		for (s = 0; s < samples; s++) {
			struct bits mask = mask_below(family, winner);

			candidates[s].longer &= at[s][winner / step].longer | ~mask.longer;
			candidates[s].shorter &= at[s][winner / step].shorter | ~mask.shorter;
		}
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

/* How many bitmaps a level needs: one for each beginning of so many bits that longer prefixes have. */
static uint64_t count_nodes(const struct pyskl_binding *bindings, int64_t count, int64_t udp, uint32_t length)
{
	uint64_t nodes = 0, hi = 0, lo = 0;
	int64_t i;

	for (i = 0; i < count; i++) {
		if (bindings[i].length <= length || (nodes && i != udp && below(&bindings[i], hi, lo, length)))
			continue;
		hi = bindings[i].hi;
		lo = bindings[i].lo;
		cut(&hi, &lo, length);
		nodes++;
	}
	nodes += nodes / 2 + 16;
	return nodes < 0xffffff ? nodes : 0xffffff;
}

/* Say how large a table of prepared bindings is and where its parts are. `spare` sixteenths are left for changes. */
int pyskl_table_plan(const struct pyskl_binding *bindings, int64_t count, uint32_t labels, uint32_t spare,
		     struct pyskl_plan *plan)
{
	int64_t start[5], i, next;
	uint64_t lines = 4 + (labels + 7) / 8, lists = 0;
	uint32_t family, level;

	memset(plan, 0, sizeof(*plan));
	plan->labels = labels;
	for (i = family = 0; family < 4; family++) {
		start[family] = i;
		while (i < count && bindings[i].family * 2u + bindings[i].protocol == family)
			i++;
	}
	start[4] = count;
	for (family = 0; family < 2; family++) {
		const struct pyskl_binding *of_family = bindings + start[family * 2];
		int64_t n = start[family * 2 + 2] - start[family * 2], udp = start[family * 2 + 1] - start[family * 2];
		struct pyskl_family *it = &plan->families[family];
		uint32_t bits, chosen[TABLE_LEVELS];
		uint64_t entries = 0, room;
		struct bits all = { 0, 0 };

		for (i = 0; i < n; i = next) {
			struct bits bit = bit_of(family, of_family[i].length);

			next = after_group(of_family, i, n);
			lists += list_lines(next - i);
			if (!of_family[i].length)
				continue;
			entries++;
			all.longer |= bit.longer;
			all.shorter |= bit.shorter;
		}
		room = entries + entries * spare / 16 + 64;
		if (entries > FEW) {
			bits = entries < 64 ? 6 : entries < 1024 ? 8 : entries < (family ? 65536 : 16384) ? 12 : 16;
			it->first = lines;
			it->first_shift = (family ? 64 : 32) - bits;
			lines += ((1u << bits) + bitmaps[family] - 1) / bitmaps[family];
		}
		if (__builtin_popcountll(all.longer) + __builtin_popcountll(all.shorter) > 2) {
			it->levels = lines;
			lines = TABLE_PORTS_LINE(lines) + TABLE_BY_PORT / bitmaps[family];
			choose_levels(of_family, n, udp, family, it->first ? bits : 0, all, chosen);
			for (level = 0; level < TABLE_LEVELS && chosen[level]; level++) {
				uint64_t nodes = count_nodes(of_family, n, udp, chosen[level]);

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
			return -E2BIG;
	}
	lists += lists * spare / 16 + 32;
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

static void set_bits(void *memory, uint32_t first, uint32_t family, uint32_t place, uint32_t length)
{
	struct bits bit = bit_of(family, length);

	if (family) {
		uint64_t *words = words_at(memory, first) + 2 * (uint64_t)place;

		__atomic_fetch_or(&words[0], bit.longer, __ATOMIC_RELAXED);
		__atomic_fetch_or(&words[1], bit.shorter, __ATOMIC_RELAXED);
	} else {
		uint32_t *words = (uint32_t *)words_at(memory, first);

		__atomic_fetch_or(&words[place], (uint32_t)bit.longer, __ATOMIC_RELAXED);
	}
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
		set_bits(memory, line, of->family, table_by_port(of->protocol, port), of->length);
}

/* Make the prefix of some bindings a candidate wherever it is one. */
static void announce(void *memory, const struct pyskl_binding *group, int64_t count)
{
	struct pyskl_family *family = family_of(memory, group->family);
	uint32_t length = group->length, i;
	struct pyskl_levels *levels;
	struct bits bit = bit_of(group->family, length);

	__atomic_fetch_or(&family->lengths[0], bit.longer, __ATOMIC_RELAXED);
	__atomic_fetch_or(&family->lengths[1], bit.shorter, __ATOMIC_RELAXED);
	if (family->first) {
		uint32_t bits = (group->family ? 64 : 32) - family->first_shift, place = group->hi >> (64 - bits);

		for (i = 0; i < (length < bits ? 1u << (bits - length) : 1); i++)
			set_bits(memory, family->first, group->family, place + i, length);
	}
	if (!family->levels)
		return;
	levels = (void *)words_at(memory, family->levels);
	for (i = 0; i < count; i++)
		announce_ports(memory, TABLE_PORTS_LINE(family->levels), &group[i]);
	for (i = 0; i < TABLE_LEVELS && levels->levels[i]; i++) {
		uint64_t level = levels->levels[i], hi = group->hi, lo = group->lo, hash;
		uint32_t bits = longest[group->family] - LEVEL_SHIFT(level);

		if (length <= bits)
			continue;
		cut(&hi, &lo, bits);
		hash = group->family ? table_hash6(family->seed, hi, lo, TABLE_LEVEL_KEY(i, group->protocol)) :
				       table_hash4(family->seed, hi >> 32 | TABLE_LEVEL_KEY(i, group->protocol));
		set_bits(memory, LEVEL_LINE(level), group->family, table_place(hash, LEVEL_COUNT(level)), length);
	}
}

/* Let a prefix's ports through the filter. */
static void admit(void *memory, const struct pyskl_binding *group, int64_t count)
{
	struct pyskl_family *family = family_of(memory, group->family);
	uint64_t hash = hash_of(family, group), bits = 0, *word = (uint64_t *)&family->few;
	int64_t i;

	for (i = 0; i < count; i++) {
		if (count > TABLE_PORTS || group[i].first != group[i].last) {
			bits = table_filter_bits(hash);
			break;
		}
		bits |= table_filter_port(hash, group[i].first);
	}
	if (family->filter_count)
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

/* Let one prefix have just these bindings, which are prepared; with none, `group` names the prefix all the same. Whoever
 * looks it up finds what it had or what it has, nothing else, wherever this is interrupted. -ENOSPC: build a new table. */
int pyskl_table_set(void *memory, const struct pyskl_binding *group, int64_t count)
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
	publish((uint64_t *)&head->edits, head->edits + 1);
	return 0;
}

/* --- a whole table ------------------------------------------------------------------------------------------------ */

/* Fill memory, of which all is 0. -EAGAIN: an entry found no place; try another seed. */
int pyskl_table_fill(void *memory, const struct pyskl_plan *plan, const struct pyskl_binding *bindings, int64_t count,
		     uint64_t seed, uint64_t number)
{
	struct pyskl_head *head = head_of(memory);
	uint32_t family;
	int64_t i, next;

	head->number = number;
	head->lines = plan->lines;
	head->policies = 4;
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
		int failed = pyskl_table_set(memory, &bindings[i], next - i);

		if (failed)
			return failed == -ENOSPC ? -EAGAIN : failed;
	}
	head->edits = 0;
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
	uint32_t family, protocol;

	for (family = 0; family < 2; family++) {
		struct pyskl_family *it = family_of(memory, family);
		uint64_t size = family ? 4 : 2, *word = words_at(memory, it->buckets);
		uint64_t *end = words_at(memory, it->buckets + it->bucket_count + TABLE_PROBES + 1);
		struct pyskl_binding prefix = { .family = family };

		for (protocol = 0; protocol < 2; protocol++) {
			prefix.protocol = protocol;
			put_all(&reader, memory, &prefix, read_word(words_at(memory, TABLE_ANY) + family * 2 + protocol));
		}
		for (; word < end; word += size) {
			uint64_t key = read_word(&word[size - 2]);

			if (!key)
				continue;
			prefix.length = key >> 32;
			prefix.protocol = key >> 40 & 1;
			prefix.hi = family ? word[0] : key << 32;
			prefix.lo = family ? word[1] : 0;
			put_all(&reader, memory, &prefix, read_word(&word[size - 1]));
		}
	}
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
