"""ChunkHasher against hashlib: every hash of a file from one pass, however the file is cut into buffers."""

import hashlib
import random
import sys
import threading

import pytest

from fastcas.errors import UsageError
from fastcas.hashing import ChunkHasher, Sha256, chunk_pass, chunk_passes, kernels
from fastcas.limits import CHUNK_SIZE_MAX, CHUNKS_MAX
from fastcas.metadata import EMPTY_SHA256, Manifest

DATA = random.Random(99).randbytes(5000)


@pytest.fixture(params=kernels())
def kernel(request):
    return request.param


def expected(data: bytes, chunk_size: int) -> tuple[bytes, bytes, bytes, int]:
    chunks = [data[i : i + chunk_size] for i in range(0, len(data), chunk_size)]
    borders = range(chunk_size, chunk_size * len(chunks), chunk_size)
    midstates = b"".join(Sha256(kernel="generic").update(data[:border]).midstate() for border in borders)
    hashes = b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)
    return hashes, midstates, hashlib.sha256(data).digest(), len(data)


@pytest.mark.parametrize("chunk_size", [64, 128, 192, 1024])
@pytest.mark.parametrize("n_chunks", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("odd", [-65, -64, -1, 0, 1, 63])
def test_finish_every_size_equals_hashlib(kernel, chunk_size, n_chunks, odd):
    data = DATA[: max(n_chunks * chunk_size + odd, 0)]
    assert ChunkHasher(chunk_size, kernel=kernel).update(data).finish() == expected(data, chunk_size)


@pytest.mark.parametrize("step", [1, 7, 63, 64, 65, 127, 128, 129, 300, 4999])
def test_update_any_buffer_size_equals_one_piece(kernel, step):
    hasher = ChunkHasher(128, kernel=kernel)
    for i in range(0, len(DATA), step):
        hasher.update(DATA[i : i + step])
        assert hasher.size == min(i + step, len(DATA))
        assert hasher.n_chunks == -(-hasher.size // 128)
    assert hasher.finish() == expected(DATA, 128)


def test_update_random_cuts_with_empty_buffers_equals_one_piece(kernel):
    rng = random.Random(4)
    for _ in range(30):
        hasher, at = ChunkHasher(256, kernel=kernel), 0
        while at < len(DATA):
            take = rng.choice([0, 1, rng.randrange(64), rng.randrange(1500)])
            hasher.update(memoryview(DATA)[at : at + take])
            at += take
        assert hasher.finish() == expected(DATA, 256)


@pytest.mark.parametrize("chunk_size", [448, 512, 1024, 1536])
def test_update_eight_chunks_and_more_at_once_equals_hashlib(kernel, chunk_size):
    """Chunks go side by side from eight on, if their size is a multiple of 512, wherever the buffer begins."""
    data = random.Random(chunk_size).randbytes(18 * chunk_size)
    for n_chunks in (7, 8, 9, 15, 16, 17):
        for odd in (0, 1, 64):
            whole = data[: n_chunks * chunk_size + odd]
            assert ChunkHasher(chunk_size, kernel=kernel).update(whole).finish() == expected(whole, chunk_size)
            view = memoryview(whole)
            for first in (64, chunk_size, chunk_size + 1):
                hasher = ChunkHasher(chunk_size, kernel=kernel).update(view[:first]).update(view[first:])
                assert hasher.finish() == expected(whole, chunk_size), f"{n_chunks} chunks and {odd} B after {first} B"


@pytest.mark.parametrize("chunk_size", [64, 512])
@pytest.mark.parametrize("n_chunks", [0, 1, 8, 11])
def test_chunk_passes_equals_chunk_pass_over_each(kernel, chunk_size, n_chunks):
    before = Sha256().update(DATA[:128])
    data = memoryview(DATA * 2)[3 : 3 + n_chunks * chunk_size]
    keys, chains, chain = [], [], before.midstate()
    for at in range(0, len(data), chunk_size):
        key, chain = chunk_pass(data[at : at + chunk_size], chain, kernel="generic")
        keys.append(key)
        chains.append(chain)
    assert chunk_passes(data, chunk_size, before.midstate(), kernel=kernel) == (b"".join(keys), b"".join(chains))


@pytest.mark.parametrize(
    ("size", "chunk_size", "chain", "message"),
    [(512, 512, bytes(31), "chain: expected 32 B, got 31 B"), (513, 512, bytes(32), "multiple of 512 B, got 513 B"),
     (64, 100, bytes(32), "chunk size: expected a multiple of 64"), (64, 0, bytes(32), "chunk size: expected"),
     (64, CHUNK_SIZE_MAX + 64, bytes(32), "chunk size: expected"), (64, 1 << 70, bytes(32), "chunk size: expected")],
)  # fmt: skip
def test_chunk_passes_wrong_length_raises(size, chunk_size, chain, message):
    with pytest.raises(UsageError, match=message):
        chunk_passes(bytes(size), chunk_size, chain)


def test_finish_of_nothing_is_the_hash_of_nothing(kernel):
    assert ChunkHasher(64, kernel=kernel).finish() == (b"", b"", EMPTY_SHA256, 0)
    assert ChunkHasher(64, kernel=kernel).update(b"").finish() == (b"", b"", EMPTY_SHA256, 0)


def test_finish_result_makes_a_manifest():
    data = DATA * 20
    hashes, midstates, file_hash, size = ChunkHasher(16_384).update(data).finish()
    manifest = Manifest(file_hash, size, 16_384, hashes, midstates)
    last = manifest.n_chunks - 1
    start = last * 16_384
    assert Sha256(manifest.chain_before(last), start).update(data[start:]).digest() == file_hash


def test_finished_hasher_refuses_further_use():
    hasher = ChunkHasher(64)
    hasher.finish()
    with pytest.raises(UsageError, match="already finished"):
        hasher.update(b"x")
    with pytest.raises(UsageError, match="already finished"):
        hasher.finish()


@pytest.mark.parametrize("chunk_size", [0, -64, 1, 63, 65, 100, CHUNK_SIZE_MAX + 64, 1 << 70])
def test_chunk_size_out_of_range_raises(chunk_size):
    with pytest.raises(UsageError, match="chunk size"):
        ChunkHasher(chunk_size)


def test_update_beyond_the_chunk_limit_raises_and_feeds_nothing():
    hasher = ChunkHasher(64).update(bytes(64 * CHUNKS_MAX))
    assert hasher.n_chunks == CHUNKS_MAX
    with pytest.raises(UsageError, match="more than 200000 chunks"):
        hasher.update(b"x")
    hashes, midstates, file_hash, size = hasher.finish()
    assert (len(hashes), len(midstates), size) == (32 * CHUNKS_MAX, 32 * (CHUNKS_MAX - 1), 64 * CHUNKS_MAX)
    assert file_hash == hashlib.sha256(bytes(64 * CHUNKS_MAX)).digest()


def test_one_object_in_two_threads_is_refused_or_serial_never_wrong():
    """A second thread's call is either before, after, or refused: the bytes that were accepted are what is hashed."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        state, block, refused = Sha256(), bytes(1 << 20), []

        def feed():
            for _ in range(20):
                try:
                    state.update(block)
                except UsageError:
                    refused.append(1)

        threads = [threading.Thread(target=feed) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert state.length == (60 - len(refused)) << 20
    assert state.digest() == hashlib.sha256(bytes(state.length)).digest()
