"""pass_files against hashlib: one or two files in one pass, of any two lengths, with every kernel."""

import errno
import hashlib
import os
import random

import pytest

from fastcas.errors import UsageError
from fastcas.hashing import Sha256, kernels
from fastcas.limits import CHUNK_SIZE_MAX, CHUNKS_MAX
from fastcas.store._pass import CHANGED_WHILE, STOPPED, Tally, pass_files

DATA = random.Random(7).randbytes(64 * 1024)
UNIT = 1024


@pytest.fixture(params=kernels())
def kernel(request):
    return request.param


@pytest.fixture
def opened(tmp_path):
    """Return a function that makes a file and returns a descriptor, which the fixture closes."""
    fds = []

    def make(data):
        path = tmp_path / str(len(fds))
        path.write_bytes(data)
        fds.append(os.open(path, os.O_RDONLY))
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


def expected(data: bytes, unit: int) -> tuple[bytes, bytes, bytes]:
    hashes = b"".join(hashlib.sha256(data[at : at + unit]).digest() for at in range(0, len(data), unit))
    ends = range(unit, len(data) + 1, unit)
    chains = b"".join(Sha256(kernel="generic").update(data[:end]).midstate() for end in ends)
    return hashes, chains, hashlib.sha256(data).digest()


@pytest.mark.parametrize("unit", [64, 192, 256, UNIT])
@pytest.mark.parametrize("width", [1, 3, 4, 9])
def test_two_files_of_any_lengths_equal_hashlib(kernel, opened, unit, width):
    rng = random.Random(unit * width)
    lengths = [1, unit - 1, unit, unit + 1, 4 * unit, 5 * unit, 8 * unit + 3, 13 * unit, 31 * unit + 1]
    for _ in range(12):
        a, b = (DATA[at : at + rng.choice(lengths)] for at in (rng.randrange(1000), rng.randrange(1000)))
        buffer = bytearray(2 * width * unit + rng.randrange(unit))
        tally = Tally()
        done = pass_files([opened(a), opened(b)], [len(a), len(b)], unit, buffer, tally, kernel=kernel)
        assert done == ([expected(a, unit), expected(b, unit)], 0, 2, 0), f"{len(a)} and {len(b)} B"
        assert tally.n_bytes == len(a) + len(b)


@pytest.mark.parametrize("n_chunks", [0, 1, 7, 8, 9, 20])
@pytest.mark.parametrize("odd", [0, 1, 1000])
@pytest.mark.parametrize("room", [UNIT, 8 * UNIT, 11 * UNIT + 5, 64 * UNIT])
def test_one_file_equals_hashlib_whatever_the_buffer(kernel, opened, n_chunks, odd, room):
    data = DATA[: n_chunks * UNIT + odd]
    if data:
        done = pass_files([opened(data)], [len(data)], UNIT, bytearray(room), Tally(), kernel=kernel)
        assert done == ([expected(data, UNIT)], 0, 1, 0)


@pytest.mark.parametrize("short", [0, 1])
@pytest.mark.parametrize("missing", [1, 3 * UNIT, 6 * UNIT])
def test_file_that_ends_early_is_named_with_its_end(opened, short, missing):
    fds = [opened(DATA[: 6 * UNIT - (missing if i == short else 0)]) for i in range(2)]
    got = 6 * UNIT - missing
    assert pass_files(fds, [6 * UNIT] * 2, UNIT, bytearray(4 * UNIT), Tally()) == ([], CHANGED_WHILE, short, got)
    assert pass_files(fds[short:][:1], [6 * UNIT], UNIT, bytearray(UNIT), Tally()) == ([], CHANGED_WHILE, 0, got)


def test_read_error_is_its_errno(opened, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    good = opened(DATA[: 2 * UNIT])
    assert pass_files([good, folder], [2 * UNIT] * 2, UNIT, bytearray(2 * UNIT), Tally())[:3] == ([], errno.EISDIR, 1)
    os.close(folder)


def test_stopped_tally_ends_it_before_the_first_read(opened):
    tally = Tally()
    tally.add(5)
    tally.stop()
    assert pass_files([opened(DATA)], [len(DATA)], UNIT, bytearray(UNIT), tally) == ([], STOPPED, 0, 0)
    assert tally.n_bytes == 5


@pytest.mark.parametrize(
    ("sizes", "unit", "room", "message"),
    [([], 64, 64, "expected one or two"), ([1, 1, 1], 64, 999, "expected one or two"), ([0], 64, 64, "file of 0 B"),
     ([64 * CHUNKS_MAX + 1], 64, 64, "expected 1 to"), ([-1], 64, 64, "file of -1 B"),
     ([64], 100, 100, "chunk size: expected a multiple"), ([64], 0, 64, "chunk size"),
     ([64], CHUNK_SIZE_MAX + 64, 64, "chunk size"), ([64], 64, 63, "buffer of 63 B"),
     ([64, 64], 64, 127, "room for 2")],
)  # fmt: skip
def test_wrong_argument_raises_before_anything_is_read(sizes, unit, room, message):
    with pytest.raises(UsageError, match=message):
        pass_files([-1] * len(sizes), sizes, unit, bytearray(room), Tally())


def test_unknown_kernel_and_missing_size_raise():
    with pytest.raises(UsageError, match="nonsense"):
        pass_files([-1], [64], 64, bytearray(64), Tally(), kernel="nonsense")
    with pytest.raises(UsageError, match="each with its size"):
        pass_files([-1], [], 64, bytearray(64), Tally())
