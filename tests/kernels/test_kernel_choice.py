"""A kernel named in the environment is a demand: it works, or the import fails with one of three reasons."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fastcas import hashing, parity
from fastcas.errors import KernelUnavailable
from fastcas.hashing import _sha256
from fastcas.parity import _gf256

ROOT = Path(__file__).parents[2]
ROOMS = {
    "hashing": ("FASTCAS_SHA256_KERNEL", hashing, _sha256, "FCAS_NO_SHA256_SIMD",
                ["generic", "avx2_x8", "shani", "avx512_x16", "shani_x2", "shani_x10"]),
    "parity": ("FASTCAS_GF256_KERNEL", parity, _gf256, "FCAS_NO_GF256_SIMD", ["generic", "ssse3", "avx2", "gfni"]),
}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.endswith("_KERNEL")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture(params=ROOMS)
def room(request):
    return request.param


@pytest.mark.slow
def test_environment_demand_for_a_supported_kernel_is_obeyed(room):
    variable, module, *_ = ROOMS[room]
    for name in module.kernels():
        done = run_python(f"import fastcas.{room} as m; m.self_test(); print(m.kernel_name())", **{variable: name})
        assert done.stdout.split() == [name], done.stderr


def test_environment_empty_means_the_default(room):
    variable = ROOMS[room][0]
    done = run_python(f"import fastcas.{room} as m; print(m.kernel_name() == m.kernels()[-1])", **{variable: ""})
    assert done.stdout.split() == ["True"], done.stderr


def test_environment_unknown_name_fails_the_import(room):
    variable = ROOMS[room][0]
    done = run_python(f"import fastcas.{room}", **{variable: "fastest"})
    assert done.returncode == 1
    assert f"KernelUnavailable: {variable}" in done.stderr
    assert "'fastest': unknown, expected one of generic" in done.stderr


def test_demand_without_cpu_support_raises(room):
    _, module, native, _, names = ROOMS[room]
    before = module.kernels()
    native._mask_cpu(0)
    try:
        assert module.kernels() == ["generic"]
        for name in set(before) & set(names[1:]):
            with pytest.raises(KernelUnavailable, match=f"'{name}': no cpu support"):
                module.self_test(name)
        module.self_test("generic")
    finally:
        native._mask_cpu(2**32 - 1)
    assert module.kernels() == before


SSSE3, SSE41, SHANI, AVX2, GFNI, AVX512 = (1 << bit for bit in range(6))  # csrc/common/cpu.h
SHA256_NEEDS = {"avx2_x8": AVX2, "shani": SHANI | SSE41 | SSSE3}
SHA256_NEEDS |= dict.fromkeys(("avx512_x16", "shani_x10"), AVX512 | SHA256_NEEDS["shani"])


def sha256_default(cpu: int) -> str:
    """What the rule of csrc/README.md gives."""
    if not SHA256_NEEDS["shani"] & ~cpu:
        return "shani_x10" if cpu & AVX512 else "shani_x2"
    return "avx2_x8" if cpu & AVX2 else "generic"


def test_sha256_default_of_every_cpu_follows_the_rule():
    for cpu in range(1 << 6):
        assert _sha256._default_for(cpu) == sha256_default(cpu), f"features {cpu:#b}"


def test_sha256_every_mask_leaves_the_kernels_that_need_no_more():
    """On the best CPU each lesser one: what is offered, that it passes its self test, and what is refused."""
    everything = hashing.kernels()
    try:
        for cpu in range(1 << 6):
            _sha256._mask_cpu(cpu)
            needs = {name: SHA256_NEEDS.get(name, SHA256_NEEDS["shani"]) for name in everything[1:]}
            assert hashing.kernels() == ["generic", *(name for name in needs if not needs[name] & ~cpu)]
            for name in hashing.kernels():
                hashing.self_test(name)
                assert hashing.digest_many([b"abc"] * 20, kernel=name) == [hashing.sha256(b"abc")] * 20
            for name in set(everything) - set(hashing.kernels()):
                with pytest.raises(KernelUnavailable, match=f"'{name}': no cpu support"):
                    hashing.digest_many([b"abc"], kernel=name)
    finally:
        _sha256._mask_cpu(2**32 - 1)
    assert hashing.kernels() == everything


@pytest.mark.slow
def test_environment_demand_for_a_kernel_that_was_not_built_fails_the_import(room, tmp_path):
    """The binding again, as a compiler without the instruction sets builds it."""
    variable, _, native, macro, names = ROOMS[room]
    c_room = native.__name__.rsplit("_", 1)[1]
    generated, library = tmp_path / "binding.c", tmp_path / "binding.so"
    pyx = f"fastcas/{room}/_{c_room}.pyx"
    module = f"fastcas.{room}._{c_room}"
    subprocess.run(
        [sys.executable, "-m", "cython", "-3", "--module-name", module, "-o", str(generated), pyx],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    sources = [str(path) for folder in ("common", c_room) for path in sorted((ROOT / "csrc" / folder).glob("*.c"))]
    subprocess.run(
        ["gcc", "-std=c11", "-D_GNU_SOURCE", "-O0", "-w", "-shared", "-fPIC", f"-D{macro}", f"-I{ROOT / 'csrc'}",
         f"-I{sysconfig.get_path('include')}", str(generated), *sources, "-o", str(library)],
        check=True, capture_output=True,
    )  # fmt: skip
    load = f"""
import importlib.util, sys
from importlib.machinery import ExtensionFileLoader
name = {module!r}
loader = ExtensionFileLoader(name, {str(library)!r})
spec = importlib.util.spec_from_file_location(name, loader=loader)
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
loader.exec_module(module)
module.self_test()
print(module.kernels())
"""
    assert run_python(load).stdout.strip() == "['generic']"
    for name in names[1:]:
        done = run_python(load, **{variable: name})
        assert f"KernelUnavailable: {variable}" in done.stderr
        assert f"'{name}': not built by this compiler" in done.stderr
