/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * One source for two loaders.
 *
 * libbpf loads objects that clang compiled ahead of time: maps are BTF maps in
 * the ".maps" section, constants are a struct in .rodata that the loader fills
 * before the load. bcc 0.26 compiles at load time and takes neither: its maps
 * are structs in sections of other names, its constants are -D options. Programs
 * therefore say DEFINE_*, MAP() and constant() and nothing else.
 *
 * A constant is known to the verifier, so it never looks into a branch that a
 * constant closes: a helper that this kernel lacks may stand there, and one
 * object serves every kernel.
 */
#ifndef PYAMBIENT_COMPAT_H
#define PYAMBIENT_COMPAT_H

#ifdef PYAMBIENT_BCC

#include <uapi/linux/bpf.h>
#include <uapi/linux/in.h>

#undef READ	/* of the kernel's own headers, which bcc includes; segment.h has another */

#define SEC(name)
#define barrier_var(var) asm volatile("" : "=r"(var) : "0"(var))

/*
 * bcc rewrites table.method() into a helper call, but not within a macro. So a
 * map is named by the number that bcc rewrites as well: -1 for the first map
 * that is declared, -2 for the second, and so on.
 */
enum { maps_before = __COUNTER__ };
#define NUMBERED(name) enum { name##_number = maps_before - __COUNTER__ }
#define MAP(name) ((void *)bpf_pseudo_fd(1, name##_number))

#define DEFINE_TABLE(name, section_name, key_type, value_type, entries, map_flags)	\
	NUMBERED(name);								\
	struct name##_table_t {							\
		key_type key;							\
		value_type leaf;						\
		u32 max_entries;						\
		u32 flags;							\
	};									\
	__attribute__((section("maps/" section_name)))				\
	struct name##_table_t name = { .max_entries = (entries), .flags = (map_flags) }; \
	BPF_ANNOTATE_KV_PAIR(name, key_type, value_type)

#define DEFINE_HASH(name, key_type, value_type, entries) \
	DEFINE_TABLE(name, "hash", key_type, value_type, entries, BPF_F_NO_PREALLOC)
#define DEFINE_LRU_HASH(name, key_type, value_type, entries) \
	DEFINE_TABLE(name, "lru_hash", key_type, value_type, entries, 0)
#define DEFINE_SOCKHASH(name, key_type, entries) \
	DEFINE_TABLE(name, "sockhash", key_type, __u64, entries, 0)
#define DEFINE_ARRAY(name, value_type, entries) \
	DEFINE_TABLE(name, "array", int, value_type, entries, 0)
#define DEFINE_PERCPU_ARRAY(name, value_type, entries) \
	DEFINE_TABLE(name, "percpu_array", int, value_type, entries, 0)
#define DEFINE_SK_STORAGE(name, value_type, clone) \
	DEFINE_TABLE(name, "sk_storage", int, value_type, 0, BPF_F_NO_PREALLOC | (clone))
#define DEFINE_MAPPED_ARRAY(name, value_type, entries) \
	DEFINE_TABLE(name, "array", int, value_type, entries, BPF_F_MMAPABLE)
#define DEFINE_ARRAY_OF_RINGS(name, entries, bytes)				\
	DEFINE_TABLE(name##_inner, "ringbuf", int, int, bytes, 0);		\
	DEFINE_TABLE(name, "array_of_maps$" #name "_inner", int, int, entries, 0)
#define DEFINE_HASH_OF_MAPS(name, key_type, entries, kind, inner_key, inner_value,	\
			    inner_entries, inner_flags)				\
	DEFINE_TABLE(name##_inner, kind, inner_key, inner_value, inner_entries, inner_flags); \
	DEFINE_TABLE(name, "hash_of_maps$" #name "_inner", key_type, int, entries,	\
		     BPF_F_NO_PREALLOC)
#define OF_TRIES	"lpm_trie"
#define OF_HASHES	"hash"

#define constant(name) PYAMBIENT_##name
#define DEFINE_CONSTANTS

/* bcc writes the license section itself, from this. */
#define BPF_LICENSE Dual BSD/GPL
#define DEFINE_LICENSE

#else /* libbpf */

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#define DEFINE_HASH(name, key_type, value_type, entries)	\
	struct {						\
		__uint(type, BPF_MAP_TYPE_HASH);		\
		__uint(map_flags, BPF_F_NO_PREALLOC);		\
		__uint(max_entries, entries);			\
		__type(key, key_type);				\
		__type(value, value_type);			\
	} name SEC(".maps")

#define DEFINE_LRU_HASH(name, key_type, value_type, entries)	\
	struct {						\
		__uint(type, BPF_MAP_TYPE_LRU_HASH);		\
		__uint(max_entries, entries);			\
		__type(key, key_type);				\
		__type(value, value_type);			\
	} name SEC(".maps")

#define DEFINE_SOCKHASH(name, key_type, entries)		\
	struct {						\
		__uint(type, BPF_MAP_TYPE_SOCKHASH);		\
		__uint(max_entries, entries);			\
		__type(key, key_type);				\
		__type(value, __u64);				\
	} name SEC(".maps")

#define DEFINE_ARRAY(name, value_type, entries)			\
	struct {						\
		__uint(type, BPF_MAP_TYPE_ARRAY);		\
		__uint(max_entries, entries);			\
		__type(key, __u32);				\
		__type(value, value_type);			\
	} name SEC(".maps")

#define DEFINE_MAPPED_ARRAY(name, value_type, entries)		\
	struct {						\
		__uint(type, BPF_MAP_TYPE_ARRAY);		\
		__uint(map_flags, BPF_F_MMAPABLE);		\
		__uint(max_entries, entries);			\
		__type(key, __u32);				\
		__type(value, value_type);			\
	} name SEC(".maps")

#define DEFINE_PERCPU_ARRAY(name, value_type, entries)		\
	struct {						\
		__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);	\
		__uint(max_entries, entries);			\
		__type(key, __u32);				\
		__type(value, value_type);			\
	} name SEC(".maps")

#define DEFINE_SK_STORAGE(name, value_type, clone)			\
	struct {							\
		__uint(type, BPF_MAP_TYPE_SK_STORAGE);			\
		__uint(map_flags, BPF_F_NO_PREALLOC | (clone));		\
		__type(key, int);					\
		__type(value, value_type);				\
	} name SEC(".maps")

/*
 * The maps in it are made by user space, one for each key; all are of this shape.
 * Sizes, not types: clang leaves out what is behind a second pointer.
 */
#define OF_TRIES	BPF_MAP_TYPE_LPM_TRIE
#define OF_HASHES	BPF_MAP_TYPE_HASH
#define DEFINE_HASH_OF_MAPS(name, key_type, entries, kind, inner_key, inner_value, \
			    inner_entries, inner_flags)			\
	struct name##_inner {						\
		__uint(type, kind);					\
		__uint(map_flags, inner_flags);				\
		__uint(max_entries, inner_entries);			\
		__uint(key_size, sizeof(inner_key));			\
		__uint(value_size, sizeof(inner_value));		\
	};								\
	struct {							\
		__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);		\
		__uint(map_flags, BPF_F_NO_PREALLOC);			\
		__uint(max_entries, entries);				\
		__type(key, key_type);					\
		__array(values, struct name##_inner);			\
	} name SEC(".maps")

/* The rings are made by user space, one for each place; all are of this size. */
#define DEFINE_ARRAY_OF_RINGS(name, entries, bytes)			\
	struct name##_inner {						\
		__uint(type, BPF_MAP_TYPE_RINGBUF);			\
		__uint(max_entries, bytes);				\
	};								\
	struct {							\
		__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);		\
		__uint(max_entries, entries);				\
		__type(key, __u32);					\
		__array(values, struct name##_inner);			\
	} name SEC(".maps")

#define MAP(name) ((void *)&(name))

#define constant(name) (constants.name)
#define DEFINE_CONSTANTS volatile const struct constants constants = {}
#define DEFINE_LICENSE char _license[] SEC("license") = "Dual BSD/GPL"

#endif

#define map_lookup(name, key) bpf_map_lookup_elem(MAP(name), (void *)(key))
#define map_update(name, key, value) \
	bpf_map_update_elem(MAP(name), (void *)(key), (void *)(value), BPF_ANY)
#define map_insert(name, key, value) \
	bpf_map_update_elem(MAP(name), (void *)(key), (void *)(value), BPF_NOEXIST)
#define map_delete(name, key) bpf_map_delete_elem(MAP(name), (void *)(key))
#define storage_get(name, sk, flags) bpf_sk_storage_get(MAP(name), (void *)(sk), 0, flags)

/* Filled in before the load: pyambient/intercept/loader.py knows this layout. */
struct constants {
	__u64 netns;			/* cookie of the pod that this instance serves */
	__u64 node;			/* cookie of the node's own network namespace */
	__u32 has_ingress_ifindex;	/* sk_lookup can read it: Linux 5.17 */
	__u32 has_set_retval;		/* a hook can choose its errno: Linux 5.18 */
	__u32 is_ethernet;		/* packets of this device have an Ethernet header */
	__u32 counts_only;		/* the guard counts what it would drop, and lets it pass */
	__u32 sign;			/* what the guard leaves in skb->hash for the node's, or 0 */
};

#endif
