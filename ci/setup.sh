# shellcheck shell=bash
# Sourced by the other scripts: installs what is missing, builds the wheel, and installs it into .build/venv.
# Afterwards the shell is at the top of the checkout, $PYTHON is the environment's interpreter and $WHEEL the wheel.
# What was done before is kept as long as what it was made from is the same.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '\033[1m== %s\033[0m\n' "$*"; }

install_packages() {
    [ $# -eq 0 ] && return
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "error: missing, and installed by root on Debian alone: $*" >&2
        exit 1
    fi
    say "apt-get install $*"
    apt-get update -qq
    without_services apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# Run apt-get so that no package starts a service of its own, now or at boot: invoke-rc.d(8), systemd.preset(5).
without_services() {
    local status=0 policy=/usr/sbin/policy-rc.d preset=/etc/systemd/system-preset/00-pyskl-ci.preset made=()
    if [ ! -e "$policy" ]; then
        made+=("$policy")
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    mkdir -p "${preset%/*}"
    made+=("$preset")
    echo 'disable *' >"$preset"
    DEBIAN_FRONTEND=noninteractive "$@" || status=$?
    rm -f "${made[@]}"
    return "$status"
}

# The packages of commands that are not there, each as command:package.
install_commands() {
    local pair missing=()
    for pair; do
        PATH=$PATH:/usr/sbin command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    install_packages "${missing[@]}"
}

# Packages by a file that each has, so that nothing is asked of apt where all are there.
install_missing() {
    local missing=()
    while read -r file package; do
        compgen -G "$file" >/dev/null || missing+=("$package")
    done <<'FILES'
/usr/bin/clang clang
/usr/bin/llvm-objcopy llvm
/usr/bin/cc gcc
/usr/include/stdio.h libc6-dev
/usr/include/bpf/libbpf.h libbpf-dev
/usr/include/linux/bpf.h linux-libc-dev
/usr/sbin/ip iproute2
/usr/bin/setpriv util-linux
/usr/bin/python3 python3
/usr/lib/python3*/ensurepip python3-venv
/usr/include/python3*/Python.h python3-dev
FILES
    install_packages "${missing[@]}"
}

# Everything that the wheel is made from, as one hash.
source_hash() {
    { python3 --version; cat pyproject.toml build_ffi.py LICENSE README.md; find bpf pyskl -name '*.[chp]*' \
        -not -path '*/__pycache__/*' -type f | LC_ALL=C sort | xargs cat; } | sha256sum | cut -c1-16
}

# The interpreter of a version of CPython, in PATH or pyenv's.
interpreter() {
    PYENV_VERSION=$(ls "${PYENV_ROOT:-$HOME/.pyenv}/versions" 2>/dev/null | grep -m1 "^$1\.") \
        "python$1" -c 'import sys; print(sys.executable)' 2>/dev/null
}

# The tests' objects, for where there is no compiler.
compile_test_objects() {
    local source object
    export PYSKL_TEST_OBJECTS=$PWD/.build/objects
    mkdir -p "$PYSKL_TEST_OBJECTS"
    for source in tests/bpf/*.bpf.c; do
        object=$PYSKL_TEST_OBJECTS/$(basename "$source" .c).o
        [ "$object" -nt "$source" ] || clang -O2 -g -Wall -Werror -target bpf "-I/usr/include/$(uname -m)-linux-gnu" \
            -c "$source" -o "$object"
    done
}

install_missing
mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
PYTHON=$PWD/.build/venv/bin/python
# One of another interpreter, or that was left half-made, is made anew, and what is installed into it.
which_python='import pip, sys; print(sys.version)'
if [ "$("$PYTHON" -Ic "$which_python" 2>/dev/null)" != "$(python3 -Ic "${which_python/pip, /}")" ]; then
    say "making .build/venv"
    rm -rf .build/venv .build/wheel
    python3 -m venv .build/venv
fi
hash=$(source_hash)
if [ ! -e ".build/wheel/$hash" ]; then
    say "building the wheel"
    rm -rf build .build/wheel
    "$PYTHON" -m pip -q wheel --no-deps -w .build/wheel .
    rm -rf build pyskl.egg-info
    "$PYTHON" -m pip -q install --force-reinstall .build/wheel/*.whl
    touch ".build/wheel/$hash"
fi
WHEEL=$(echo "$PWD"/.build/wheel/*.whl)
export PYTHON WHEEL
