"""Reed-Solomon: our kernels against ISA-L, zfec and pyeclib, and against each other.

    python -m bench.kernels_gf256 [--rounds N]

ISA-L (Debian's libisal-dev) is measured by bench/isal_bench.c, which runs both sides in C in one process on the same
buffers with the same matrix, and compares their bytes. It takes AVX-512 where the CPU has it, but 2.30 knows no GFNI;
its AVX2 code is run beside it. zfec and pyeclib (PyPI, `make bench-tools`) are called as their users call them, from
Python: both make new buffers for each result, so ours is measured with new ones, too. GB are 10^9 bytes of data shards
per CPU second of one thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.interleaved import Runs, cpu_name, measure, table
from fastcas.parity import ReedSolomon, kernel_name, kernels

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 25
SHARD_SIZES = [64 << 10, 1 << 20]
OWN_CODES = [(4, 2), (10, 4), (16, 4), (20, 10)]
# (k, m, lost; 0 = encode), least ratio to ISA-L, stretch
ISAL_TARGETS = [
    ((10, 4, 0), 1.2, 1.5),
    ((4, 2, 0), 1.0, None),
    ((16, 4, 0), 1.0, None),
    ((20, 4, 0), 1.0, None),
    ((32, 8, 0), 1.0, None),
    ((10, 4, 4), 1.0, 1.2),
]
ZFEC_LEAST, PYECLIB_LEAST = 15.0, 8.0
TURN_S = 0.02


def build_isal_bench(folder: Path) -> Path:
    """Compile bench/isal_bench.c with our kernels and libisal."""
    program = folder / "isal_bench"
    sources = ["bench/isal_bench.c", "csrc/common/cpu.c", *(str(path) for path in sorted(ROOT.glob("csrc/gf256/*.c")))]
    subprocess.run(
        ["gcc", "-std=c11", "-D_GNU_SOURCE", "-O3", "-DNDEBUG", "-Wall", "-Wextra", "-Werror", "-Icsrc", *sources,
         "-lisal", "-o", str(program)],
        cwd=ROOT, check=True,
    )  # fmt: skip
    return program


def verdict(ratio: float, least: float, stretch: float | None = None) -> str:
    """Return the target and whether it was met."""
    beyond = "" if stretch is None else f", stretch {stretch:g}: {'met' if ratio >= stretch else 'missed'}"
    return f"target {least:g}: {'met' if ratio >= least else 'MISSED'}{beyond}"


def bench_isal(rounds: int) -> None:
    """Print every code of ISAL_TARGETS at both shard sizes."""
    tasks = [(*code, shard) for code, _, _ in ISAL_TARGETS for shard in SHARD_SIZES]
    with tempfile.TemporaryDirectory(prefix="fastcas-bench-") as folder:
        program = build_isal_bench(Path(folder))
        arguments = [str(number) for task in tasks for number in task]
        done = subprocess.run([program, str(rounds), *arguments], check=True, capture_output=True, text=True)
    ns: dict[tuple[int, ...], dict[str, float]] = {}
    dispatched = "unknown"
    for line in done.stdout.splitlines():
        fields = line.split()
        if fields[0] == "isal":
            dispatched = fields[1]
        else:
            ns.setdefault(tuple(map(int, fields[:4])), {})[fields[4]] = float(fields[5])
    ours = kernel_name()
    print(f"\nISA-L's ec_encode_data, dispatched to {dispatched}, in GB/s; warm outputs on both sides")
    print(f"  {'':24}{'ISA-L':>7}{'its avx2':>9}{'avx2':>7}{ours:>9}   {ours} : ISA-L    avx2 : its avx2")
    for (k, m, lost), least, stretch in ISAL_TARGETS:
        for shard in SHARD_SIZES:
            took = ns[(k, m, lost, shard)]
            speed = {name: k * shard / value for name, value in took.items()}
            what = f"{k}+{m}, {shard >> 10} KiB" + (f", {lost} lost" if lost else "")
            ratio = took["isal"] / took[ours]
            print(
                f"  {what:24}{speed['isal']:7.1f}{speed['isal_avx2']:9.1f}{speed['avx2']:7.1f}{speed[ours]:9.1f}"
                f"   {ratio:5.2f} ({verdict(ratio, least, stretch)})"
                f"   {took['isal_avx2'] / took['avx2']:5.2f}"
            )


def repeat(call: Callable[[], object], n: int) -> None:
    """Call n times."""
    for _ in range(n):
        call()


def n_calls_of(call: Callable[[], object]) -> int:
    """Return how many calls fill a turn of TURN_S, after which caches and clock are the contender's own."""
    call()
    start = time.thread_time()
    call()
    return int(TURN_S / max(time.thread_time() - start, 1e-6)) + 1


def bench_packages(k: int, m: int, shard: int, rounds: int) -> None:
    """Print encode() of zfec and of pyeclib's back ends beside ours."""
    try:
        import zfec
        from pyeclib.ec_iface import ECDriver
    except ImportError as exc:
        print(f"\nzfec and pyeclib: not measured, `make bench-tools` installs them ({exc})", file=sys.stderr)
        return
    whole = os.urandom(k * shard)
    data = tuple(whole[i * shard : (i + 1) * shard] for i in range(k))
    code, out = ReedSolomon(k, m), [bytearray(shard) for _ in range(m)]
    calls: Runs = {
        "ours, reused outputs": partial(code.encode, data, out),
        "ours, new outputs": partial(code.encode, data),
        "zfec": partial(zfec.Encoder(k, k + m).encode, data, tuple(range(k, k + m))),
    }
    for backend in ("isa_l_rs_cauchy", "isa_l_rs_vand", "liberasurecode_rs_vand"):
        calls[f"pyeclib {backend}"] = partial(ECDriver(k=k, m=m, ec_type=backend).encode, whole)
    repeats = {name: n_calls_of(call) for name, call in calls.items()}
    turns: Runs = {name: partial(repeat, call, repeats[name]) for name, call in calls.items()}
    seconds = {name: took / repeats[name] for name, took in measure(turns, rounds).items()}
    table(f"Encode from Python, {k}+{m}, shards of {shard >> 10} KiB", k * shard, seconds, "zfec")
    fastest = min(value for name, value in seconds.items() if name.startswith("pyeclib"))
    for name in ("ours, reused outputs", "ours, new outputs"):
        for other, other_s, least in (("zfec", seconds["zfec"], ZFEC_LEAST), ("pyeclib", fastest, PYECLIB_LEAST)):
            ratio = other_s / seconds[name]
            print(f"  {name} : {other:8} {ratio:6.1f} ({verdict(ratio, least)})")


def bench_own(k: int, m: int, shard: int, rounds: int) -> None:
    """Encode into buffers that are reused, into new ones, and rebuild as many shards as can be lost."""
    data = [os.urandom(shard) for _ in range(k)]
    out = [bytearray(shard) for _ in range(m)]
    n_lost = min(m, k)
    runs: Runs = {}
    for kernel in kernels():
        if kernel != "generic" or k * m * shard <= 4 << 20:  # beyond, it takes seconds and tells no more
            runs[kernel] = partial(ReedSolomon(k, m, kernel=kernel).encode, data, out)
    base = "avx2" if "avx2" in runs else next(iter(runs))
    code = ReedSolomon(k, m)
    whole = [*data, *code.encode(data)]
    runs[f"{code.kernel}, new buffers"] = partial(code.encode, data)
    runs[f"{code.kernel}, rebuild {n_lost} lost"] = partial(
        code.reconstruct, [*[None] * n_lost, *whole[n_lost:]], [*out[:n_lost], *[None] * (k + m - n_lost)]
    )
    table(f"Reed-Solomon {k}+{m}, shards of {shard >> 10} KiB", k * shard, measure(runs, rounds), base)


def bench_reed_solomon(rounds: int) -> None:
    """Print every Reed-Solomon table and target."""
    if "avx2" in kernels():
        bench_isal(rounds)
    else:
        print("\nISA-L: not measured, this CPU has no AVX2", file=sys.stderr)
    for shard in SHARD_SIZES:
        bench_packages(10, 4, shard, rounds)
    for k, m in OWN_CODES:
        for shard in SHARD_SIZES:
            bench_own(k, m, shard, rounds)


def main() -> None:
    """Print this half of bench.kernels alone."""
    parser = argparse.ArgumentParser(description="Reed-Solomon kernels on this machine.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds per table (default {ROUNDS})")
    rounds = parser.parse_args().rounds
    print(f"{cpu_name()}, {os.cpu_count()} CPUs; {time.strftime('%Y-%m-%d')}; medians of {rounds} interleaved rounds")
    print(f"gf256 {kernel_name()}")
    bench_reed_solomon(rounds)


if __name__ == "__main__":
    main()
