"""Every SHA-256 kernel against FIPS 180-4's vectors and against hashlib: sizes, cuts, alignments, midstates."""

import hashlib
import os
import random
import subprocess
from array import array
from pathlib import Path

import numpy as np
import pytest

from fastcas.errors import FastCASError, KernelUnavailable, UsageError
from fastcas.hashing import Sha256, chunk_pass, digest_many, kernel_name, kernels, self_test, sha256
from fastcas.metadata import SHA256_IV

ROOT = Path(__file__).resolve().parents[2]
KERNELS = kernels()
INTERESTING_SIZES = [
    0, 1, 2, 3, 31, 55, 56, 57, 63, 64, 65, 119, 120, 121, 127, 128, 129, 191, 192, 1000, 2047, 2048, 4096, 10_007,
]  # fmt: skip
DATA = random.Random(20240607).randbytes(70_000)

# NIST: example values of FIPS 180-4, and the additional test vectors of the example-values page (0xbd, 0xc98c8e55).
VECTORS = [
    (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    (b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
     "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"),
    (b"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
     "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"),
    (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    (bytes.fromhex("bd"), "68325720aabd7c82f30f554b313d0570c95accbb7dc4b5aae11204c08ffe732b"),
    (bytes.fromhex("c98c8e55"), "7abc22c0ae5af26ce93dbb94433a0e0b2e119d014f8e7f65bd56c61ccccd9504"),
]  # fmt: skip


def expected(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def test_kernels_generic_is_always_there():
    assert KERNELS[0] == "generic"
    assert kernel_name() in KERNELS


def test_self_test_of_every_kernel_passes(kernel):
    self_test(kernel)


@pytest.mark.parametrize(("message", "digest"), VECTORS, ids=lambda value: str(len(value)))
def test_sha256_published_vector_matches(kernel, message, digest):
    assert sha256(message, kernel=kernel).hex() == digest
    assert Sha256(kernel=kernel).update(message).digest().hex() == digest


@pytest.mark.parametrize("size", INTERESTING_SIZES)
def test_sha256_every_size_and_alignment_equals_hashlib(kernel, size):
    for shift in range(64):
        data = memoryview(DATA)[shift : shift + size]
        assert sha256(data, kernel=kernel) == expected(data), f"shift {shift}"


@pytest.mark.parametrize("size", [65, 128, 200, 321])
def test_update_every_cut_equals_one_piece(kernel, size):
    data = DATA[:size]
    for cut in range(size + 1):
        assert Sha256(kernel=kernel).update(data[:cut]).update(data[cut:]).digest() == expected(data), f"cut {cut}"


def test_update_byte_by_byte_equals_one_piece(kernel):
    state = Sha256(kernel=kernel)
    for i in range(300):
        assert state.digest() == expected(DATA[:i])
        state.update(DATA[i : i + 1])
    assert state.length == 300


def test_digest_leaves_the_state_and_copy_is_independent(kernel):
    state = Sha256(kernel=kernel).update(DATA[:100])
    twin = state.copy()
    twin.update(b"more")
    assert state.digest() == state.digest() == expected(DATA[:100])
    assert twin.digest() == expected(DATA[:100] + b"more")
    assert (twin.kernel, twin.length) == (kernel, 104)


def test_midstate_resumed_on_any_kernel_equals_whole_message(kernel):
    for n_blocks in (0, 1, 2, 3, 50):
        head = 64 * n_blocks
        midstate = Sha256(kernel=kernel).update(DATA[:head]).midstate()
        for other in KERNELS:
            for tail in (0, 1, 63, 64, 5000):
                resumed = Sha256(midstate, head, kernel=other).update(DATA[head : head + tail])
                assert resumed.digest() == expected(DATA[: head + tail]), f"{other}: {head} + {tail}"


def test_midstate_at_the_start_is_the_initial_value(kernel):
    assert Sha256(kernel=kernel).midstate() == SHA256_IV


def test_midstate_inside_a_block_raises():
    with pytest.raises(UsageError, match="multiple of 64 B fed, got 3 B"):
        Sha256().update(b"abc").midstate()


@pytest.mark.parametrize(
    ("midstate", "length", "match"),
    [(b"", 0, "32 B"), (bytes(31), 64, "32 B"), (bytes(33), 64, "32 B"), (bytes(32), 1, "multiple of 64"),
     (bytes(32), -64, "multiple of 64"), (bytes(32), 1 << 61, "multiple of 64"), (None, 64, "without a midstate")],
)  # fmt: skip
def test_sha256_bad_midstate_raises(midstate, length, match):
    with pytest.raises(UsageError, match=match):
        Sha256(midstate, length)


def test_sha256_length_limit_is_kept():
    state = Sha256(bytes(32), (1 << 61) - 64)
    with pytest.raises(UsageError, match="nothing was fed"):
        state.update(bytes(64))
    assert state.update(bytes(63)).length == (1 << 61) - 1


@pytest.mark.parametrize("size", [0, 64, 128, 640, 65_536])
def test_chunk_pass_equals_digest_and_chain(kernel, size):
    for shift in (0, 1, 7):
        before = Sha256().update(DATA[:128])
        chunk = memoryview(DATA)[shift : shift + size]
        digest, chain = chunk_pass(chunk, before.midstate(), kernel=kernel)
        assert digest == expected(chunk)
        assert chain == before.update(chunk).midstate()


@pytest.mark.parametrize(("data", "chain"), [(bytes(63), bytes(32)), (bytes(64), bytes(31)), (b"", b"")])
def test_chunk_pass_wrong_length_raises(data, chain):
    with pytest.raises(UsageError):
        chunk_pass(data, chain)


def test_digest_many_mixed_lengths_equal_hashlib(kernel):
    rng = random.Random(7)
    for count in (0, 1, 2, 3, 4, 9, 100):
        messages = [DATA[(at := rng.randrange(1000)) : at + rng.choice(INTERESTING_SIZES)] for _ in range(count)]
        assert digest_many(messages, kernel=kernel) == [expected(m) for m in messages]


@pytest.mark.parametrize("size", INTERESTING_SIZES)
def test_digest_many_every_alignment_equals_hashlib(kernel, size):
    messages = [memoryview(DATA)[shift : shift + size] for shift in range(64)]
    assert digest_many(messages, kernel=kernel) == [expected(m) for m in messages]


@pytest.mark.parametrize("size", [0, 64, 300])
def test_digest_many_every_count_fills_lanes_and_leaves_some_idle(kernel, size):
    """Counts around 2, 8 and 16 lanes, with all messages ending at once."""
    for count in range(50):
        messages = [DATA[i : i + size] for i in range(count)]
        assert digest_many(messages, kernel=kernel) == [expected(m) for m in messages], f"{count} messages"


@pytest.mark.parametrize("size", [256, 1000, 20_000])
def test_digest_many_equal_messages_of_other_bytes_equal_hashlib(kernel, size):
    """Counts around the six from which lanes pay, ten streams, and lanes and streams that end together."""
    for count in (5, 6, 7, 9, 10, 11, 15, 16, 17, 26):
        messages = [memoryview(DATA)[i : i + size] for i in range(count)]
        assert digest_many(messages, kernel=kernel) == [expected(m) for m in messages], f"{count} messages"


@pytest.mark.parametrize("n_long", [1, 2, 3, 7, 8, 9, 12, 17])
def test_digest_many_long_messages_among_short_ones_equal_hashlib(kernel, n_long):
    """Long ones outlast the rest: they end in twos and alone, wherever they stand in the list."""
    rng = random.Random(n_long)
    sizes = [rng.randrange(20_000, 60_000) for _ in range(n_long)] + [rng.randrange(200) for _ in range(40)]
    for _ in range(3):
        messages = [DATA[:size] for size in sizes]
        assert digest_many(messages, kernel=kernel) == [expected(m) for m in messages], sizes
        rng.shuffle(sizes)


def test_digest_many_every_pair_of_sizes_equals_hashlib(kernel):
    sizes = [0, 1, 55, 56, 63, 64, 65, 128, 1000]
    for a in sizes:
        for b in sizes:
            messages = [DATA[:a], DATA[1 : 1 + b]]
            assert digest_many(messages, kernel=kernel) == [expected(m) for m in messages], f"{a}, {b}"


def test_digest_many_takes_a_generator_and_releases_every_buffer_on_failure():
    held = bytearray(b"abc")
    with pytest.raises(TypeError):
        digest_many(iter([held, "not bytes"]))
    held += b"still resizable"
    assert digest_many(part for part in (b"a", b"b")) == [expected(b"a"), expected(b"b")]


@pytest.mark.parametrize(
    "buffer",
    [bytearray(b"12345678"), memoryview(b"12345678"), array("Q", [1, 2, 3]), np.arange(100, dtype=np.uint32)],
    ids=lambda value: type(value).__name__,
)
def test_sha256_takes_any_contiguous_buffer(buffer):
    assert sha256(buffer) == Sha256().update(buffer).digest() == digest_many([buffer])[0] == expected(bytes(buffer))


def test_sha256_refuses_what_is_no_contiguous_buffer():
    with pytest.raises(TypeError):
        sha256("text")
    with pytest.raises(BufferError):
        sha256(memoryview(bytes(10))[::2])


def test_demand_for_an_unknown_kernel_raises_and_names_the_known():
    for call in (lambda: Sha256(kernel="md5"), lambda: sha256(b"", kernel="a\0b"), lambda: digest_many([], kernel="")):
        with pytest.raises(KernelUnavailable, match="unknown, expected one of generic") as caught:
            call()
        assert isinstance(caught.value, FastCASError)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("flags", [["-O3"], ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]])
def test_update_many_equals_single_updates_on_every_kernel(tmp_path, flags):
    binary = tmp_path / "update_many"
    sources = [*ROOT.glob("csrc/sha256/*.c"), *ROOT.glob("csrc/common/*.c")]
    subprocess.run(
        ["cc", "-std=c11", "-D_GNU_SOURCE", "-g", *flags, "-Icsrc", "tests/native/sha256_update_many.c",
         *map(str, sources), "-o", str(binary)],
        check=True, cwd=ROOT,
    )  # fmt: skip
    seed = os.environ.get("FASTCAS_TEST_SEED", "1")
    done = subprocess.run([str(binary), seed], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    *lines, last = done.stdout.splitlines()
    assert last == "ok"
    assert [line.split()[0] for line in lines] == KERNELS
