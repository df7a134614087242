# SPDX-License-Identifier: BSD-2-Clause
"""Build the extension module over libbpf, and the BPF objects that ship beside it.

CDEF declares what Python may call: libbpf's own functions, and those of pyskl/_*.c. Setuptools runs the two commands
at the end.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from cffi import FFI
from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
from setuptools.command.build_ext import build_ext as _build_ext

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
MULTIARCH = Path("/usr/include", sysconfig.get_config_var("MULTIARCH") or f"{os.uname().machine}-linux-gnu")
# Linux 5.10 takes no loop that is entered elsewhere than at its head, which block placement makes of some.
LAYOUT = ["-mcpu=v3", "-mllvm", "-disable-block-placement"]
CLANG = ["-O2", "-g", *LAYOUT, "-Wall", "-Werror", f"-I{MULTIARCH}", f"-ffile-prefix-map={HERE}=."]

# "..." leaves the layout of a struct to the compiler, which has the kernel's headers.
CDEF = """
void pyskl_init(void);
void pyskl_capture_begin(void);
char *pyskl_capture_end(size_t *size);
void free(void *memory);
int libbpf_strerror(int error, char *text, size_t size);
int libbpf_num_possible_cpus(void);

#define BPF_ANY ...
#define BPF_NOEXIST ...
#define BPF_EXIST ...
#define BPF_F_NO_PREALLOC ...
#define BPF_F_MMAPABLE ...
#define BPF_F_INNER_MAP ...
#define BPF_F_REPLACE ...
#define BPF_F_RDONLY ...
#define BPF_FUNC_loop ...
#define BPF_LINK_TYPE_NETNS ...
#define BPF_FS_MAGIC ...
#define CLONE_NEWNET ...

/* bpf(2), one command each. */
struct bpf_map_create_opts { size_t sz; uint32_t inner_map_fd; uint32_t map_flags; ...; };
int bpf_map_create(int type, const char *name, uint32_t key_size, uint32_t value_size, uint32_t max_entries,
                   const struct bpf_map_create_opts *opts);
struct bpf_prog_load_opts { size_t sz; int expected_attach_type; ...; };
int bpf_prog_load(int type, const char *name, const char *license, const void *insns, size_t insn_cnt,
                  const struct bpf_prog_load_opts *opts);
int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags);
int bpf_map_lookup_elem(int fd, const void *key, void *value);
int bpf_map_delete_elem(int fd, const void *key);
int bpf_map_get_next_key(int fd, const void *key, void *next_key);
int bpf_map_freeze(int fd);
struct bpf_map_batch_opts { size_t sz; uint64_t elem_flags; ...; };
int bpf_map_lookup_batch(int fd, void *in_batch, void *out_batch, void *keys, void *values, uint32_t *count,
                         const struct bpf_map_batch_opts *opts);
int bpf_map_update_batch(int fd, const void *keys, const void *values, uint32_t *count,
                         const struct bpf_map_batch_opts *opts);
int bpf_obj_pin(int fd, const char *path);
struct bpf_obj_get_opts { size_t sz; uint32_t file_flags; ...; };
int bpf_obj_get_opts(const char *path, const struct bpf_obj_get_opts *opts);
int bpf_obj_get_info_by_fd(int fd, void *info, uint32_t *info_len);
int bpf_link_create(int program, int target, int attach_type, const void *opts);
struct bpf_link_update_opts { size_t sz; uint32_t flags; uint32_t old_prog_fd; ...; };
int bpf_link_update(int link, int program, const struct bpf_link_update_opts *opts);
int bpf_link_detach(int link);
int bpf_link_get_next_id(uint32_t start, uint32_t *next);
int bpf_prog_get_fd_by_id(uint32_t id);
int bpf_map_get_fd_by_id(uint32_t id);
int bpf_link_get_fd_by_id(uint32_t id);
int bpf_prog_query(int target, int attach_type, uint32_t query_flags, uint32_t *attach_flags, uint32_t *ids,
                   uint32_t *count);

struct bpf_prog_info {
    uint32_t type; uint32_t id; uint8_t tag[8]; uint32_t jited_prog_len; uint32_t xlated_prog_len; uint64_t load_time;
    uint32_t created_by_uid; uint32_t nr_map_ids; uint64_t map_ids; char name[16]; uint32_t btf_id;
    uint64_t run_time_ns; uint64_t run_cnt; uint32_t verified_insns; ...;
};
struct bpf_map_info {
    uint32_t type; uint32_t id; uint32_t key_size; uint32_t value_size; uint32_t max_entries; uint32_t map_flags;
    char name[16]; ...;
};
struct pyskl_link_info { uint32_t type; uint32_t id; uint32_t prog_id; uint32_t netns_ino; uint32_t attach_type; };
int pyskl_link_info(int link, struct pyskl_link_info *info);

int libbpf_probe_bpf_map_type(int type, const void *opts);
int libbpf_probe_bpf_prog_type(int type, const void *opts);
int libbpf_probe_bpf_helper(int program_type, int helper, const void *opts);

/* An ELF object. */
struct bpf_object_open_opts { size_t sz; const char *object_name; ...; };
struct bpf_object *bpf_object__open_mem(const void *memory, size_t size, const struct bpf_object_open_opts *opts);
int bpf_object__load(struct bpf_object *object);
void bpf_object__close(struct bpf_object *object);
struct bpf_program *bpf_object__next_program(const struct bpf_object *object, struct bpf_program *after);
const char *bpf_program__name(const struct bpf_program *program);
int bpf_program__type(const struct bpf_program *program);
int bpf_program__fd(const struct bpf_program *program);
int bpf_program__set_autoload(struct bpf_program *program, bool autoload);
int bpf_program__set_log_level(struct bpf_program *program, uint32_t level);
struct bpf_map *bpf_object__next_map(const struct bpf_object *object, const struct bpf_map *after);
const char *bpf_map__name(const struct bpf_map *map);
int bpf_map__fd(const struct bpf_map *map);
int bpf_map__type(const struct bpf_map *map);
uint32_t bpf_map__key_size(const struct bpf_map *map);
uint32_t bpf_map__value_size(const struct bpf_map *map);
int bpf_map__set_max_entries(struct bpf_map *map, uint32_t entries);
int bpf_map__reuse_fd(struct bpf_map *map, int fd);
int bpf_map__set_pin_path(struct bpf_map *map, const char *path);
const void *bpf_map__initial_value(struct bpf_map *map, size_t *size);
int bpf_map__set_initial_value(struct bpf_map *map, const void *value, size_t size);
struct pyskl_variable {
    const char *name; const char *section; uint32_t offset; uint32_t size; int integer; int is_signed;
};
void pyskl_follow_calls(struct bpf_object *object);
int pyskl_variables(const struct bpf_object *object, struct pyskl_variable *found, int room);

int pyskl_socket_update(int map, const void *key, int socket, uint32_t value_size, uint64_t flags);
int pyskl_sockets_update(int map, const char *keys, uint32_t key_size, const int *sockets, uint32_t count,
                         uint32_t value_size, uint32_t *done);
int pyskl_test_run(int program, int protocol, int family, const void *local, uint16_t local_port, const void *remote,
                   uint16_t remote_port, int repeat, uint32_t *verdict, uint64_t *cookie, uint32_t *duration);
struct pyskl_socket_state { int domain; int type; int protocol; int listens; int reuseport; int port; int connected; };
int pyskl_socket_state(int socket, struct pyskl_socket_state *state);
int pyskl_dup(int fd);
int pyskl_pidfd_getfd(int pidfd, int fd);
int pyskl_setns(int fd);
int pyskl_unshare(void);
int pyskl_namespace_type(int fd);
int pyskl_socket_cookie(int socket, uint64_t *cookie);
int64_t pyskl_filesystem(const char *path);
int pyskl_grace_period(void);

/* pyskl/_prefixes.c */
int pyskl_parse_prefixes(const char *text, size_t size, struct pyskl_binding *out, int64_t count);

int pyskl_ring_read(void *consumer, const void *producer, const void *data, uint32_t size_of_ring, void *out,
                    uint32_t size, uint32_t room);

/* The table of a dispatcher: pyskl/_table.c. */
int64_t pyskl_bindings_prepare(struct pyskl_binding *bindings, int64_t count, int64_t *conflict);
void pyskl_bindings_by_precedence(struct pyskl_binding *bindings, int64_t count);
int64_t pyskl_bindings_diff(struct pyskl_binding *old, int64_t old_count, struct pyskl_binding *new, int64_t new_count);
int64_t pyskl_bindings_marked(struct pyskl_binding *bindings, int64_t count);
void pyskl_bindings_relabel(struct pyskl_binding *bindings, int64_t count, const uint32_t *labels, uint32_t *uses);
struct pyskl_plan { uint32_t lines; ...; };
int pyskl_table_plan(const struct pyskl_binding *bindings, int64_t count, uint32_t labels, uint32_t spare,
                     struct pyskl_plan *plan);
int pyskl_table_fill(void *memory, const struct pyskl_plan *plan, const struct pyskl_binding *bindings, int64_t count,
                     uint64_t seed, uint64_t number);
int pyskl_table_set(void *memory, const struct pyskl_binding *group, int64_t count);
int64_t pyskl_table_get(void *memory, const struct pyskl_binding *of, struct pyskl_binding *out, int64_t room);
int64_t pyskl_table_scan(void *memory, struct pyskl_binding *out, int64_t room, uint32_t *uses);
uint64_t pyskl_table_policy(void *memory, uint32_t label);
void pyskl_table_set_policy(void *memory, uint32_t label, uint64_t policy);

/* pyskl/_datagrams.c; pyskl/_sys.py reads and writes the structs as bytes. */
struct pyskl_received { ...; };
struct pyskl_outgoing { ...; };
struct pyskl_batch { unsigned truncated, coalesced; char *data; struct pyskl_received *received; ...; };
struct pyskl_batch *pyskl_batch_new(unsigned count, size_t size);
void pyskl_batch_free(struct pyskl_batch *batch);
int pyskl_batch_receive(struct pyskl_batch *batch, int socket, unsigned count, size_t size);
int64_t pyskl_send(const char *described, unsigned count, const char *data);
int pyskl_mute(int socket);
"""

# What the dispatcher's programs share with user space: bpf/abi.h without its include guard.
ABI = (
    "typedef int... __u64; typedef int... __u32; typedef int... __s32; typedef int... __u16; typedef int... __u8;\n"
    + "".join(
        line
        for line in (HERE / "bpf/abi.h").read_text().splitlines(keepends=True)
        if not line.startswith(("#ifndef", "#endif", "#define PYSKL_ABI_H"))
    )
)

STABLE_ABI = "cp310"  # every interpreter since runs the same file

# All that the build needs, whatever of it is missing: a package manager passes over what is there.
INSTALL = (
    "apt-get install gcc libc6-dev python3-dev clang llvm libbpf-dev "
    "(Fedora: dnf install gcc python3-devel clang llvm libbpf-devel)"
)
HEADERS = {
    "Python.h": "#include <Python.h>\n",
    "bpf/libbpf.h of libbpf 1.1 or later": """\
#include <bpf/libbpf.h>
#if LIBBPF_MAJOR_VERSION * 100 + LIBBPF_MINOR_VERSION < 101
#error older
#endif
""",
}


def check_needs() -> None:
    """End the build in one line that says what is missing, and what to install."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        sys.exit("error: pyskl is not for a free-threaded CPython, which has no stable ABI: use one with the GIL")
    compiler = os.environ.get("CC", "cc").split()
    missing = [tool for tool in (compiler[0], "clang", "llvm-objcopy") if not shutil.which(tool)]
    if not missing:
        flags = [f"-I{sysconfig.get_path('include')}", *os.environ.get("CFLAGS", "").split(), "-E", "-xc", "-"]
        for name, source in HEADERS.items():
            tried = subprocess.run([*compiler, *flags], input=source.encode(), capture_output=True, check=False)
            if tried.returncode:
                missing.append(name)
    if missing:
        sys.exit(f"error: pyskl can't be built without {', '.join(missing)}: {INSTALL}")


def byte_order() -> str:
    """Tell the byte order that the C compiler builds for, "little" or "big": a cross build's is not this machine's."""
    compiler = [
        *os.environ.get("CC", "cc").split(),
        *os.environ.get("CFLAGS", "").split(),
        "-dM",
        "-E",
        "-xc",
        os.devnull,
    ]
    macros = subprocess.run(compiler, capture_output=True, text=True, check=True).stdout
    return "big" if "__BYTE_ORDER__ __ORDER_BIG_ENDIAN__" in macros else "little"


def strip(built: Path, order: str) -> None:
    """Leave out of an object what debuggers read, and most of the source: six tenths of it, compressed."""
    parts = {name: built.with_suffix(name) for name in (".BTF", ".BTF.ext")}
    dump = (f"--dump-section={name}={path}" for name, path in parts.items())
    subprocess.run(["llvm-objcopy", "-g", *dump, built], check=True)
    kept = without_lines(*(path.read_bytes() for path in parts.values()), order)
    for path, data in zip(parts.values(), kept, strict=True):
        path.write_bytes(data)
    update = (f"--update-section={name}={path}" for name, path in parts.items())
    # The numbers that these would relocate are in place already: libbpf does not read them.
    unread = (f"--remove-section={name}" for name in (".rel.BTF", ".rel.BTF.ext", ".llvm_addrsig"))
    subprocess.run(["llvm-objcopy", *update, *unread, built], check=True)
    for path in parts.values():
        path.unlink()


def without_lines(btf: bytes, ext: bytes, order: str) -> tuple[bytes, bytes]:
    """Keep in .BTF and .BTF.ext but the first line of source of each function: the kernel asks for that one.

    The verifier's log and bpftool have it before the function's instructions.
    """
    words = struct.unpack(f"{order}{len(ext) // 4}I", ext)
    head = words[1] // 4
    places = zip(words[2:8:2], words[3:8:2], strict=True)
    functions, lines, relocations = (words[head + at // 4 : head + (at + size) // 4] for at, size in places)
    begins = {(section, record[0]) for section, records in sections(functions) for record in records}
    kept, texts, unused = [lines[0]], set(), set()
    for section, records in sections(lines):
        first = [record for record in records if (section, record[0]) in begins]
        kept += [section, len(first), *(word for record in first for word in record)]
        texts.update(record[2] for record in first)
        unused.update(record[2] for record in records)
    strings = bytearray(btf)
    start = sum(struct.unpack_from(f"{order}I8xI", btf, 4))
    for at in (start + text for text in unused - texts):
        end = strings.index(0, at)
        if not re.fullmatch(rb"[\w.:]*", strings[at:end]):  # else it may be a name, too
            strings[at:end] = bytes(end - at)  # the others stay where they are
    sizes = [4 * len(part) for part in (functions, kept, relocations)]
    places = (0, sizes[0], sizes[0], sizes[1], sizes[0] + sizes[1], sizes[2])
    new = (*words[:2], *places, *words[8:head], *functions, *kept, *relocations)
    return bytes(strings), struct.pack(f"{order}{len(new)}I", *new)


def sections(part: tuple[int, ...]) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """Give the records of a part of .BTF.ext, section by section."""
    size, at = part[0] // 4, 1
    while at < len(part):
        section, count = part[at : at + 2]
        at += 2
        yield section, [part[place : place + size] for place in range(at, at + count * size, size)]
        at += count * size


class build_ext(_build_ext):
    def get_source_files(self) -> list[str]:
        """Name what setuptools can't guess, so that the sdist is complete: what git has, or an unpacked sdist."""
        if (HERE / ".git").exists() and shutil.which("git"):
            listed = subprocess.run(["git", "ls-files", "-z"], cwd=HERE, capture_output=True, text=True, check=False)
            if not listed.returncode:
                return [name for name in listed.stdout.split("\0") if name and (HERE / name).is_file()]
        folders = (".ci", "bpf", "ci", "docs", "pyskl", "tests")
        files = (path for folder in folders for path in (HERE / folder).rglob("*") if path.is_file())
        kept = (path for path in files if path.suffix not in {".o", ".so", ".pyc"})
        return [".gitignore", "build_ffi.py", *sorted(str(path.relative_to(HERE)) for path in kept)]

    def finalize_options(self) -> None:
        super().finalize_options()
        for extension in self.extensions:
            extension.include_dirs.append(str(HERE / "bpf"))
            extension.py_limited_api = True
            extension.extra_compile_args += ["-g0", "-fvisibility=hidden"]
            if " -O" not in f" {os.environ.get('CFLAGS', '')}":
                extension.extra_compile_args.append("-O2")  # whatever the interpreter was built with

    def run(self) -> None:
        check_needs()
        super().run()
        order = byte_order()
        for source, built in self.bpf_objects():
            built.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["clang", *CLANG, "-target", f"bpfe{order[0]}", "-c", source, "-o", built], check=True)
            strip(built, "<" if order == "little" else ">")

    def build_extension(self, extension) -> None:
        emitted = Path(self.build_temp, "_libbpf.c")
        emitted.parent.mkdir(parents=True, exist_ok=True)
        ffi = FFI()
        ffi.cdef(ABI)
        ffi.cdef(CDEF)
        ffi.set_source(extension.name, "\n".join(source.read_text() for source in sorted(HERE.glob("pyskl/_*.c"))))
        ffi.emit_c_code(str(emitted))
        extension.sources = [str(emitted)]
        super().build_extension(extension)

    def bpf_objects(self) -> list[tuple[Path, Path]]:
        package = Path(self.get_ext_fullpath("pyskl._libbpf")).parent
        return [(source, package / "bpf" / f"{source.stem}.o") for source in sorted((HERE / "bpf").glob("*.bpf.c"))]

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), *(str(built) for _, built in self.bpf_objects())]


class bdist_wheel(_bdist_wheel):
    def finalize_options(self) -> None:
        self.py_limited_api = STABLE_ABI
        super().finalize_options()

    def run(self) -> None:
        """Build from nothing: setuptools would ship a module that an earlier build left and that is no more."""
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()
