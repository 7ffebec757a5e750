#!/usr/bin/env bash
# Fuzz with libFuzzer, ASan and UBSan: each target for FUZZ_SECONDS (default 3600), one after the other. New inputs go
# to build/fuzz/corpus (kept between runs), findings to build/fuzz/findings; exit status 1 when there is one.
# A finding is replayed with build/fuzz/fuzz_TARGET FILE. Needs clang with libFuzzer (Debian: clang libclang-rt-14-dev).
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds="${FUZZ_SECONDS:-3600}"
out=build/fuzz
mkdir -p "$out/findings"
flags=(-std=c11 -D_GNU_SOURCE -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Wall -Wextra
       -Wconversion -Wshadow -Wstrict-prototypes -Werror -Icsrc)
wrap=-Wl,--wrap=accept4,--wrap=recv,--wrap=send,--wrap=sendmsg,--wrap=sendfile
clang "${flags[@]}" tests/fuzz/fuzz_request.c csrc/http/parser.c -o "$out/fuzz_request"
clang "${flags[@]}" tests/fuzz/fuzz_connection.c csrc/http/parser.c csrc/engine/*.c csrc/table/*.c csrc/common/*.c \
    "$wrap" -o "$out/fuzz_connection"
status=0
for target in request connection; do
    mkdir -p "$out/corpus/$target"
    echo "fuzzing $target for $seconds s"
    "$out/fuzz_$target" -max_total_time="$seconds" -timeout=10 -print_final_stats=1 -verbosity=0 \
        -dict=tests/fuzz/request.dict -artifact_prefix="$out/findings/$target-" \
        "$out/corpus/$target" "tests/fuzz/corpus/$target" || status=1
done
exit "$status"
