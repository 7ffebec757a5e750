#!/usr/bin/env bash
# Install the Debian tools that the tests (or the benches) drive, where they are missing. Usage: install_tools.sh test|bench|fuzz
set -euo pipefail
case "${1:-test}" in
    test)  tools="curl:curl wget:wget aria2c:aria2 strace:strace nginx:nginx-light gcc:gcc openssl:openssl ip:iproute2 mount:mount mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs" ;;
    bench) tools="curl:curl nginx:nginx-light aria2c:aria2 gcc:gcc openssl:openssl slowhttptest:slowhttptest casync:casync rsync:rsync" ;;
    fuzz)  tools="clang:clang llvm-symbolizer-14:llvm-14" ;;
    *)     echo "usage: install_tools.sh test|bench|fuzz" >&2; exit 2 ;;
esac
missing=()
for pair in $tools; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair##*:}")
done
if [ "${1:-}" = fuzz ] && ! ls /usr/lib/llvm-*/lib/clang/*/lib/linux/libclang_rt.fuzzer-*.a >/dev/null 2>&1; then
    missing+=(libclang-rt-14-dev)
fi
if [ "${1:-}" = bench ] && [ ! -e /usr/include/isa-l.h ]; then
    missing+=(libisal-dev)
fi
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "install_tools.sh: please install: ${missing[*]}" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q >/dev/null
apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null
