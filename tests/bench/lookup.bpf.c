// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* What lookup.py compares: the dispatcher's own decision, with what bounds it from below and what it is to beat. Each
 * draws its question from an array in turn, so that one test run of many repeats asks a new one each time. */
#include "dispatcher.bpf.c"

struct question {
	__u64 hi, lo; /* an IPv4 address is in lo */
	__u32 v6, protocol, port, unused;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct question);
} questions SEC(".maps");

/* Which questions: from `first` on, as many as `mask`, all ones, has room for. */
struct {
	__u32 first, mask, asked;
} draws;

/* A trie's key: all ports of a prefix are its port 0. IPv4 is v4-mapped. */
struct prefix {
	__u32 length;
	__u8 protocol;
	__u16 port;
	__u32 address[4];
} __attribute__((packed));

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct prefix);
	__uint(value_size, 2 * sizeof(__u32)); /* the length of its prefix, and its socket's key */
} trie SEC(".maps");

static __always_inline struct question *draw(void)
{
	__u32 index = draws.first + (draws.asked++ & draws.mask);

	return bpf_map_lookup_elem(&questions, &index);
}

static __always_inline int select_and_count(struct bpf_sk_lookup *ctx, __u32 key)
{
	__u32 number = key / PYSKL_SLOTS;
	struct key at;
	struct pyskl_counters *count = bpf_map_lookup_elem(&counters, &number);

	if (!select(ctx, &at, &sockets, key, 0))
		return SK_DROP;
	if (count)
		count->events[0]++;
	return SK_PASS;
}

/* The key of the first socket that lookup.py registers. */
#define FIRST (PYSKL_GROUPS * PYSKL_SLOTS)

/* The cost of asking. */
SEC("sk_lookup")
int nothing(struct bpf_sk_lookup *ctx)
{
	return draw() ? SK_PASS : SK_DROP;
}

/* A socket is selected and counted: nothing is searched. */
SEC("sk_lookup")
int socket_alone(struct bpf_sk_lookup *ctx)
{
	struct question *q = draw();

	return q ? select_and_count(ctx, FIRST) : SK_DROP;
}

/* The same after one line of memory, which has the socket's key: no table can take less. */
SEC("sk_lookup")
int one_line(struct bpf_sk_lookup *ctx)
{
	struct question *q = draw();
	struct table_line *found;
	struct pyskl_head *head;
	void *table;
	__u64 none;
	struct key at;

	table = look_up(&tables, &at, 0);
	if (!q || !table)
		return SK_DROP;
	head = look_up(table, &at, TABLE_HEAD);
	if (!head)
		return SK_DROP;
	found = look_up(table, &at, table_place(table_hash6(0, q->hi, q->lo, q->port), head->lines));
	if (!found)
		return SK_DROP;
	none = 0;
	barrier_var(none);
	return select_and_count(ctx, FIRST + (found->words[0] & none));
}

/* Two look-ups in a trie, for the port and for all ports; the longer prefix wins. */
static __always_inline int refer(struct bpf_sk_lookup *ctx, struct prefix *key)
{
	__u32 *of_port, *of_all;

	key->length = 8 * (sizeof(*key) - sizeof(key->length));
	of_port = bpf_map_lookup_elem(&trie, key);
	key->port = 0;
	of_all = bpf_map_lookup_elem(&trie, key);
	if (!of_port || (of_all && of_all[0] > of_port[0]))
		of_port = of_all;
	return of_port ? select_and_count(ctx, of_port[1]) : SK_PASS;
}

SEC("sk_lookup")
int reference(struct bpf_sk_lookup *ctx)
{
	struct question *q = draw();
	struct prefix key = {};

	if (!q)
		return SK_DROP;
	key.protocol = q->protocol ? IPPROTO_UDP : IPPROTO_TCP;
	key.port = q->port;
	key.address[0] = bpf_htonl(q->hi >> 32);
	key.address[1] = bpf_htonl(q->hi);
	key.address[2] = q->v6 ? bpf_htonl(q->lo >> 32) : bpf_htonl(0xffff);
	key.address[3] = bpf_htonl(q->lo);
	return refer(ctx, &key);
}

/* The same for what comes over IPv6, for traffic.py. */
SEC("sk_lookup")
int reference_attached(struct bpf_sk_lookup *ctx)
{
	struct prefix key = { .protocol = ctx->protocol, .port = ctx->local_port };

	for (int i = 0; i < 4; i++)
		key.address[i] = ctx->local_ip6[i];
	return refer(ctx, &key);
}

SEC("sk_lookup")
int dispatcher(struct bpf_sk_lookup *ctx)
{
	struct question *q = draw();
	struct key at;
	__u64 hi, lo;
	__u32 kind;

	if (!q)
		return SK_DROP;
	kind = q->v6 * 2 + q->protocol;
	hi = read_once(&q->hi);
	lo = read_once(&q->lo);
	return decide(ctx, &at, FOUND(find(&at, kind, kind & 2 ? hi : lo, lo, q->port), kind), NULL);
}
