/* SPDX-License-Identifier: BSD-2-Clause */
/* Prefixes from text, as Python's ipaddress takes them (an address and nothing, a length, or for IPv4 a mask; no host
 * bits, no scope). The text is lines of it, so that a file of half a million bindings is read in one call. */

#include <errno.h>
#include <stdint.h>
#include <string.h>

#include "abi.h"

/* Both give where they ended, or NULL. */
static const char *parse_ipv4(const char *at, const char *end, uint32_t *address)
{
	int octet;

	*address = 0;
	for (octet = 0; octet < 4; octet++) {
		const char *start;
		uint32_t value = 0;

		if (octet && (at == end || *at++ != '.'))
			return NULL;
		for (start = at; at < end && *at >= '0' && *at <= '9' && at - start < 3; at++)
			value = value * 10 + (*at - '0');
		if (at == start || value > 255 || (*start == '0' && at - start > 1))
			return NULL;
		*address = *address << 8 | value;
	}
	return at;
}

static const char *parse_group(const char *at, const char *end, uint32_t *value)
{
	const char *start = at;

	for (*value = 0; at < end && at - start < 4; at++) {
		uint32_t digit = *at >= '0' && *at <= '9' ? *at - '0' :
				 *at >= 'a' && *at <= 'f' ? *at - 'a' + 10 :
				 *at >= 'A' && *at <= 'F' ? *at - 'A' + 10 : 16;

		if (digit == 16)
			break;
		*value = *value << 4 | digit;
	}
	return at > start ? at : NULL;
}

static int parse_ipv6(const char *at, const char *end, uint64_t *hi, uint64_t *lo)
{
	uint32_t groups[8], value;
	int count = 0, gap = -1, i; /* gap: how many groups stand before the "::" */

	if (end - at >= 2 && at[0] == ':' && at[1] == ':') {
		gap = 0;
		at += 2;
	}
	while (at < end) {
		const char *start = at;

		at = count < 8 ? parse_group(at, end, &value) : NULL;
		if (!at)
			return 0;
		if (at < end && *at == '.') {
			if (count > 6 || parse_ipv4(start, end, &value) != end)
				return 0;
			groups[count++] = value >> 16;
			groups[count++] = value & 0xffff;
			break;
		}
		groups[count++] = value;
		if (at == end)
			break;
		if (*at++ != ':' || at == end)
			return 0;
		if (*at == ':') {
			if (gap >= 0)
				return 0;
			gap = count;
			at++;
		}
	}
	if (gap < 0 ? count != 8 : count > 7)
		return 0;
	*hi = *lo = 0;
	for (i = 0; i < count; i++) {
		int place = gap < 0 || i < gap ? i : 8 - count + i;

		*(place < 4 ? hi : lo) |= (uint64_t)groups[i] << (48 - place % 4 * 16);
	}
	return 1;
}

/* What stands behind the slash: a length, or for IPv4 its mask, of the network's bits or of the others. -1: neither. */
static int parse_length(const char *at, const char *end, int family)
{
	const char *start = at;
	uint32_t mask;
	int length = 0;

	for (; at < end && *at >= '0' && *at <= '9'; at++)
		length = length > 128 ? length : length * 10 + (*at - '0');
	if (at == end)
		return at > start && length <= (family ? 128 : 32) ? length : -1;
	if (family || parse_ipv4(start, end, &mask) != end)
		return -1;
	for (length = 0; length <= 32; length++)
		if (mask == (uint32_t)(0xffffffffULL << (32 - length)))
			return length;
	for (length = 0; length <= 32; length++)
		if (mask == (uint32_t)(0xffffffffULL >> length))
			return length;
	return -1;
}

/* The bits of a word beyond the first `length` of all, which are `before` the word. */
static uint64_t host_bits(int length, int before)
{
	length -= before;
	return length <= 0 ? ~0ULL : length >= 64 ? 0 : ~0ULL >> length;
}

static int parse_prefix(const char *at, const char *end, struct pyskl_binding *out)
{
	const char *slash = memchr(at, '/', end - at), *stop = slash ? slash : end;
	uint64_t hi, lo = 0;
	int length;

	out->family = memchr(at, ':', stop - at) != NULL;
	if (out->family) {
		if (!parse_ipv6(at, stop, &hi, &lo))
			return 0;
	} else {
		uint32_t address;

		if (parse_ipv4(at, stop, &address) != stop)
			return 0;
		hi = (uint64_t)address << 32;
	}
	length = slash ? parse_length(slash + 1, end, out->family) : out->family ? 128 : 32;
	if (length < 0 || hi & host_bits(length, 0) || lo & host_bits(length, 64))
		return 0;
	out->hi = hi;
	out->lo = lo;
	out->length = length;
	return 1;
}

/* Give bindings their prefixes, one a line. A binding whose mark is n shares its line with the n that follow; marks are
 * 0 afterwards. -EINVAL: a line has no prefix, or there are more or fewer lines. */
int pyskl_parse_prefixes(const char *text, size_t size, struct pyskl_binding *out, int64_t count)
{
	const char *at = text, *end = text + size;
	int64_t i = 0;

	while (i < count) {
		const char *stop = at ? memchr(at, '\n', end - at) : NULL;
		struct pyskl_binding *first = &out[i++];

		if (!at || !parse_prefix(at, stop ? stop : end, first))
			return -EINVAL;
		for (; first->mark && i < count; first->mark--, i++) {
			out[i].hi = first->hi;
			out[i].lo = first->lo;
			out[i].length = first->length;
			out[i].family = first->family;
		}
		at = stop ? stop + 1 : NULL;
	}
	return count && at ? -EINVAL : 0;
}
