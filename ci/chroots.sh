# shellcheck shell=bash
# Sourced by the scripts that need clean systems, after setup.sh: chroots of Debian's suites, and commands inside them.
install_commands mmdebstrap:mmdebstrap unshare:util-linux
chroots=$PWD/.build/chroots
mkdir -p "$chroots"

# A folder with a new chroot of a suite, with what else it is to have; made once, and unpacked each time.
chroot_of() {
    local archive=$chroots/$1${2:+-build}.tar folder=$chroots/$1${2:+-build}
    [ -e "$archive" ] || mmdebstrap -q --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
        ${2:+--include="$2"} "$1" "$archive" 2>/dev/null
    rm -rf "$folder"
    mkdir "$folder"
    tar -xf "$archive" -C "$folder" --exclude='./dev/*'
    echo "$folder"
}

# A shell script inside a chroot, with a /proc, /sys and /dev that go when it ends. What tests count is the whole machine's:
# they take turns, whichever root they have.
inside() {
    unshare --mount --fork --kill-child bash -c '
        mount --bind "$0" "$0"
        mount -t proc proc "$0/proc"
        mount --rbind /sys "$0/sys"
        mount --bind /dev "$0/dev"
        touch /tmp/pyskl-tests.lock "$0/tmp/pyskl-tests.lock"
        mount --bind /tmp/pyskl-tests.lock "$0/tmp/pyskl-tests.lock"
        exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
            chroot "$0" bash -euo pipefail -c "$1"' "$@"
}
