// A map of every type that pyskl has a class for, maps in maps among them, and no program.
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#define MAP(NAME, TYPE, ENTRIES, KEY, VALUE, FLAGS)                                                \
	struct {                                                                                   \
		__uint(type, BPF_MAP_TYPE_##TYPE);                                                 \
		__uint(max_entries, ENTRIES);                                                      \
		__uint(key_size, KEY);                                                             \
		__uint(value_size, VALUE);                                                         \
		__uint(map_flags, FLAGS);                                                          \
	} NAME SEC(".maps")

MAP(hash, HASH, 16, 4, 8, 0);
MAP(lru_hash, LRU_HASH, 16, 4, 8, 0);
MAP(percpu_hash, PERCPU_HASH, 16, 4, 8, 0);
MAP(lru_percpu_hash, LRU_PERCPU_HASH, 16, 4, 8, 0);
MAP(array, ARRAY, 16, 4, 8, 0);
MAP(percpu_array, PERCPU_ARRAY, 16, 4, 8, 0);
MAP(lpm_trie, LPM_TRIE, 16, 8, 8, BPF_F_NO_PREALLOC);
MAP(prog_array, PROG_ARRAY, 16, 4, 4, 0);
MAP(sockmap, SOCKMAP, 16, 4, 8, 0);
MAP(sockhash, SOCKHASH, 16, 4, 8, 0);
MAP(reuseport_sockarray, REUSEPORT_SOCKARRAY, 16, 4, 8, 0);
MAP(queue, QUEUE, 16, 0, 8, 0);

struct inner_sockmap {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, __u64);
} blue SEC(".maps"), green SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 4);
	__type(key, __u32);
	__array(values, struct inner_sockmap);
} array_of_maps SEC(".maps") = {
	.values = { [1] = &blue, [3] = &green },
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(max_entries, 4);
	__type(key, __u32);
	__array(values, struct inner_sockmap);
} hash_of_maps SEC(".maps");

char LICENSE[] SEC("license") = "GPL";
