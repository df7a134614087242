/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* What the programs of a dispatcher and user space share: the maps' contents. build_ffi.py reads this file too, so it
 * holds plain declarations alone. Whoever changes what is here changes PYSKL_ABI. Numbers are in the machine's order.
 */
#ifndef PYSKL_ABI_H
#define PYSKL_ABI_H

#define PYSKL_ABI 2

/* Four groups of sockets to a label: for each family (0: IPv4, 1: IPv6) and protocol (0: TCP, 1: UDP). */
#define PYSKL_GROUPS 4
#define PYSKL_SLOTS 64

/* A binding as it goes into the table's builder and comes out of it. An IPv4 address stands at the top of `hi`. */
struct pyskl_binding {
	__u64 hi, lo;       /* the prefix; bits beyond its length are 0 */
	__u32 label;        /* its number; 0: none */
	__u16 first, last;  /* ports, both included */
	__u8 length;        /* of the prefix, in bits */
	__u8 family;        /* 0: IPv4, 1: IPv6 */
	__u8 protocol;      /* 0: TCP, 1: UDP */
	__u8 unused;
	__u32 mark;         /* of the builder's own */
};

/* --- the table: one map, an array of 64-byte lines ---------------------------------------------------------------- */

#define PYSKL_LINE 64

/* Line 0. */
struct pyskl_head {
	__u64 edits;        /* single changes made in place, counted when each is done */
	__u64 number;       /* of this table: each that replaces another has a higher one */
	__u32 lines;        /* in the whole map */
	__u32 policies;     /* the first line of the labels' policies, 8 to a line, by number of the label */
	__u32 labels;       /* how many these are */
	__u32 lists;        /* the first line that no list has used yet */
	__u32 lists_end;
	__u32 stale;        /* changes since there is no index any more, or 0 */
	__u32 used[2];      /* entries that were ever filled, for IPv4 and IPv6; they are not used again */
	__u32 room[2];      /* how many may be, before the table is to be built anew */
};

/* Lines 1 and 2: IPv4 and IPv6. */
struct pyskl_family {
	__u64 seed;
	__u64 lengths[2];   /* which are in use: bit 0 is the longest; a second word of IPv6 has those from 64 down */
	__u64 ranges;       /* the lengths of prefixes with ranges of ports: like a bitmap of a level, see table.h */
	__u32 first;        /* the first level's first line, or 0; the bits of an address that do not count for it */
	__u32 first_shift;
	__u32 buckets;      /* first line */
	__u32 bucket_count;
	__u32 filter;       /* first line */
	__u32 filter_count; /* 0: there is none */
	__u32 levels;       /* the line of the further levels, or 0 */
	__u16 anchor;       /* in IPv6 it is at most 64 bits long, or longer than any prefix */
	__u16 shortest;     /* whether the prefix of no length is bound: line 3 has what it leads to */
};

/* The further levels of a family, see table.h; the bitmaps by port are in the lines after it. */
struct pyskl_levels {
	__u64 levels[6];
	__u64 unused[2];
};

/* One policy, in one word: what a client gets while the label has no live socket; when its flows began to be remembered
 * (a number of struct pyskl_state); and the seconds of silence for which one is. */
#define PYSKL_RESET 0
#define PYSKL_HOLD 1
#define PYSKL_FALLTHROUGH 2
struct pyskl_policy {
	__u16 on_missing;
	__u16 epoch;
	__u32 udp_sticky;
};

/* --- the other maps ----------------------------------------------------------------------------------------------- */

struct pyskl_state {
	__u64 abi;
	__u64 seed;         /* spreads flows over slots */
	__u64 netns_cookie; /* of the namespace that the dispatcher is for; 0 where the kernel does not tell it */
	__u64 names;        /* changes of the labels' names */
	__u64 sticky;       /* how often labels began to remember flows; 0: none ever did */
	__u64 tracing;      /* a bit for each trace that wants events */
	__u64 full_speed;   /* whether the program was loaded with CAP_PERFMON */
	__u64 netns_inode;  /* of the namespace; another may get it when that is gone */
};

struct pyskl_name {
	__u8 length;
	__u8 text[255];     /* UTF-8 */
};

/* By number of a label: the number of each group, or 0. */
struct pyskl_label {
	__u32 group[PYSKL_GROUPS];
};

/* By number of a label: where one socket takes all flows of a kind, its key in the sockmap, else 0. A short cut past label
 * and group, which is taken away before these change. */
struct pyskl_alone {
	__u32 key[PYSKL_GROUPS];
};

/* By number of a group. The socket of a slot is under 64 * group + slot in the sockmap. */
struct pyskl_group {
	__u64 filled;       /* the slots that a socket was registered in */
	__u64 dual;         /* those that take IPv4 too */
};

/* What was registered in a slot, by its place in the sockmap; kept when the socket dies. */
struct pyskl_registered {
	__u64 cookie;
	__u8 address[16];   /* that it is bound to; of IPv4, the first 4 */
	__u32 scope;
	__u16 port;
	__u8 family;        /* 0: IPv4, 1: IPv6 */
	__u8 unused;
};

/* By number of a label, for each CPU. */
struct pyskl_counters {
	__u64 events[2 * PYSKL_GROUPS]; /* a socket was selected, then no socket was there */
};

#define PYSKL_UNBOUND 0
#define PYSKL_SELECTED 1
#define PYSKL_STICKY 2
#define PYSKL_SIBLING 3
#define PYSKL_HELD 4
#define PYSKL_PASSED 5
#define PYSKL_REFUSED 6

/* What was decided for one look-up. */
struct pyskl_decision {
	__u32 reason;
	__u32 label;
	__u32 length;       /* of the prefix that matched */
	__s32 slot;         /* less than 0: none */
	__u32 named;        /* whether the label has a name */
	__u32 unused;
};

/* A UDP flow, in network byte order but for the local port, which is in the machine's, as in struct bpf_sk_lookup. */
struct pyskl_flow {
	__u32 remote[4];
	__u32 local[4];
	__u32 remote_port;
	__u32 local_port;
};

/* Where a flow went last. */
struct pyskl_stay {
	__u64 cookie;
	__u64 seen;         /* nanoseconds of CLOCK_MONOTONIC */
	__u32 label;
	__u32 epoch;
};

/* Which events a trace wants. */
#define PYSKL_TRACES 8
struct pyskl_filter {
	__u32 label;        /* 0: any */
	__u32 pid;          /* of the process that reads them */
	__u64 started;      /* when that began, as /proc/PID/stat tells it */
};

struct pyskl_event {
	__u64 time;         /* nanoseconds of CLOCK_MONOTONIC */
	struct pyskl_flow flow;
	__u32 kind;         /* family and protocol */
	__u32 label;
	__u32 reason;
	__s32 slot;
};

#endif
