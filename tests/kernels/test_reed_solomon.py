"""Reed–Solomon: the format's matrix, every pattern of losses, buffers that are reused, inputs that are wrong."""

import random
from functools import reduce
from itertools import combinations

import numpy as np
import pytest

from fastcas.errors import TooFewShards, UsageError
from fastcas.parity import ReedSolomon, kernels
from fastcas.parity.matrix import cauchy
from tests.kernels.test_gf256 import TABLE

SHAPES = [(2, 1), (4, 2), (6, 3), (8, 3), (10, 4)]
SIZES = [0, 1, 2, 63, 64, 65, 127, 128, 129, 1000, 70_001]


@pytest.fixture(params=kernels())
def kernel(request):
    return request.param


def shards_of(k: int, size: int, seed: int = 1) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(size) for _ in range(k)]


def inverse_of(value: int) -> int:
    return next(x for x in range(256) if TABLE[value][x] == 1)


def oracle(k: int, m: int, data: list[bytes]) -> list[bytes]:
    """The format's definition, slowly: parity i = sum over j of data j / ((k + i) xor j)."""
    arrays = [np.frombuffer(shard, dtype=np.uint8) for shard in data]
    return [
        reduce(np.bitwise_xor, (TABLE[inverse_of((k + i) ^ j)][arrays[j]] for j in range(k))).tobytes()
        for i in range(m)
    ]


@pytest.mark.parametrize(("k", "m"), [*SHAPES, (1, 1), (1, 5), (16, 9), (20, 17), (200, 55), (254, 1), (1, 254)])
def test_encode_equals_the_definition_of_the_format(kernel, k, m):
    data = shards_of(k, 200)
    assert ReedSolomon(k, m, kernel=kernel).encode(data) == oracle(k, m, data)


@pytest.mark.parametrize("size", SIZES)
def test_encode_and_reconstruct_every_size(kernel, size):
    rs, data = ReedSolomon(4, 2, kernel=kernel), shards_of(4, size)
    whole = data + rs.encode(data)
    assert whole[4:] == oracle(4, 2, data)
    assert rs.reconstruct([None, whole[1], None, *whole[3:]]) == whole


def test_matrix_golden_values_are_the_format():
    """Written out once from 1 / ((k + i) xor j) over 0x11d; a change here breaks every stored parity chunk."""
    assert cauchy(4, 2).tolist() == [[71, 167, 122, 186], [167, 71, 186, 122]]
    assert cauchy(2, 1).tolist() == [[142, 244]]
    assert ReedSolomon(2, 1).encode([b"\x01\x00\xff", b"\x00\x01\xff"]) == [bytes([142, 244, TABLE[142 ^ 244][255]])]


@pytest.mark.parametrize(("k", "m"), SHAPES)
def test_reconstruct_every_pattern_of_losses_gives_every_shard_back(kernel, k, m):
    rs = ReedSolomon(k, m, kernel=kernel)
    data = shards_of(k, 67)
    whole = [*data, *rs.encode(data)]
    for n_lost in range(m + 1):
        for lost in combinations(range(k + m), n_lost):
            holes = [None if i in lost else shard for i, shard in enumerate(whole)]
            assert rs.reconstruct(holes) == whole, f"lost {lost}"


@pytest.mark.parametrize(("k", "m"), [(200, 55), (254, 1), (1, 254), (100, 64)])
def test_reconstruct_wide_codes_with_every_loss_they_bear(k, m):
    rs, rng = ReedSolomon(k, m), random.Random(k)
    data = shards_of(k, 33)
    whole = [*data, *rs.encode(data)]
    for _ in range(5):
        lost = set(rng.sample(range(k + m), m))
        assert rs.reconstruct([None if i in lost else shard for i, shard in enumerate(whole)]) == whole


def test_reconstruct_without_losses_returns_what_was_given():
    whole = shards_of(3, 10)
    assert all(a is b for a, b in zip(ReedSolomon(2, 1).reconstruct(whole), whole, strict=True))


def test_encode_into_given_buffers_returns_and_reuses_them(kernel):
    rs = ReedSolomon(4, 2, kernel=kernel)
    out = [bytearray(b"\xff" * 100), memoryview(bytearray(100))]
    for seed in range(3):
        data = shards_of(4, 100, seed)
        result = rs.encode(data, out)
        assert result[0] is out[0]
        assert result[1] is out[1]
        assert [bytes(shard) for shard in result] == oracle(4, 2, data)


def test_encode_takes_arrays_and_views():
    data = np.frombuffer(b"".join(shards_of(4, 64)), dtype=np.uint64).reshape(4, 8)
    out = np.zeros((2, 64), dtype=np.uint8)
    ReedSolomon(4, 2).encode(list(data), list(out))
    assert [row.tobytes() for row in out] == oracle(4, 2, [row.tobytes() for row in data])


def test_reconstruct_into_given_buffers_writes_only_the_lost_slots():
    rs = ReedSolomon(4, 2)
    data = shards_of(4, 50)
    whole = [*data, *rs.encode(data)]
    out = [bytearray(b"\x77" * 50) for _ in range(6)]
    result = rs.reconstruct([whole[0], None, *whole[2:5], None], out)
    assert result == whole
    assert result[1] is out[1]
    assert result[5] is out[5]
    assert all(result[i] is whole[i] for i in (0, 2, 3, 4))
    assert all(out[i] == b"\x77" * 50 for i in (0, 2, 3, 4))


def test_reconstruct_slot_without_a_buffer_gets_a_new_one():
    rs = ReedSolomon(2, 1)
    data = shards_of(2, 9)
    whole = [*data, *rs.encode(data)]
    assert rs.reconstruct([None, *whole[1:]], [None, None, None]) == whole


@pytest.mark.parametrize(("k", "m"), SHAPES)
def test_reconstruct_too_few_shards_raises_and_writes_nothing(k, m):
    out = [bytearray(8) for _ in range(k + m)]
    shards = [b"\x01" * 8] * (k - 1) + [None] * (m + 1)
    with pytest.raises(TooFewShards, match=f"expected at least {k} shards, got {k - 1}"):
        ReedSolomon(k, m).reconstruct(shards, out)
    assert all(buffer == bytes(8) for buffer in out)


@pytest.mark.parametrize(("k", "m"), [(0, 1), (1, 0), (-1, 3), (255, 1), (200, 56), (1, 255), (10**30, 1)])
def test_code_out_of_range_raises(k, m):
    with pytest.raises(UsageError, match="parity: expected"):
        ReedSolomon(k, m)


def test_code_that_is_no_number_raises():
    with pytest.raises(TypeError):
        ReedSolomon(2.5, 1)


@pytest.mark.parametrize(
    ("data", "out", "match"),
    [
        ([b"a"], None, "data: expected 2 shards, got 1"),
        ([b"a"] * 3, None, "data: expected 2 shards, got 3"),
        ([b"a", b"bb"], None, "input 1: expected 1 B as input 0, got 2 B"),
        ([b"a", None], None, "input 1: expected a contiguous buffer, got NoneType"),
        ([b"a", "b"], None, "input 1: expected a contiguous buffer, got str"),
        ([b"a", memoryview(b"abcd")[::4]], [bytearray(2)], "output 0: expected 1 B as input 0, got 2 B"),
        ([b"ab", memoryview(b"abcd")[::2]], None, "input 1: expected a contiguous buffer, got memoryview"),
        ([b"a", b"b"], [], "out: expected 1 shards, got 0"),
        ([b"a", b"b"], [bytearray(1), bytearray(1)], "out: expected 1 shards, got 2"),
        ([b"a", b"b"], [bytearray(2)], "output 0: expected 1 B as input 0, got 2 B"),
        ([b"a", b"b"], [b"c"], "output 0: expected a writable contiguous buffer, got bytes"),
    ],
)
def test_encode_wrong_input_raises(data, out, match):
    with pytest.raises(UsageError, match=match):
        ReedSolomon(2, 1).encode(data, out)


def test_encode_overlap_raises_and_changes_nothing():
    memory = bytearray(range(40))
    view = memoryview(memory)
    rs = ReedSolomon(2, 2)
    for a, b in ((19, 30), (5, 30), (9, 30), (20, 29)):
        with pytest.raises(UsageError, match="overlaps another buffer"):
            rs.encode([view[0:10], view[10:20]], [view[a : a + 10], view[b : b + 10]])
    assert memory == bytearray(range(40))
    rs.encode([view[0:10], view[10:20]], [view[20:30], view[30:40]])


@pytest.mark.parametrize(
    ("shards", "out", "match"),
    [
        ([b"a", b"b"], None, "shards: expected 3 slots, got 2"),
        ([b"a", b"b", b"c", b"d"], None, "shards: expected 3 slots, got 4"),
        ([b"a", None, b"c"], [None], "out: expected 3 slots, got 1"),
        ([b"a", None, b"cc"], None, r"shards\[2\]: expected 1 B as shard 0, got 2 B"),
        ([b"a", b"b", b"cc"], None, r"shards\[2\]: expected 1 B as shard 0, got 2 B"),
        ([b"a", None, 3], None, r"shards\[2\]: expected a buffer or None, got int"),
        ([b"a", None, b"c"], [None, b"x", None], "output 0: expected a writable"),
        ([b"a", None, b"c"], [None, bytearray(2), None], "output 0: expected 1 B"),
    ],
)
def test_reconstruct_wrong_input_raises(shards, out, match):
    with pytest.raises(UsageError, match=match):
        ReedSolomon(2, 1).reconstruct(shards, out)


def test_failed_calls_hold_no_buffer():
    data = [bytearray(4), bytearray(4)]
    with pytest.raises(UsageError):
        ReedSolomon(2, 1).encode(data, [bytearray(5)])
    with pytest.raises(UsageError):
        ReedSolomon(2, 1).reconstruct([data[0], None, bytearray(5)])
    for buffer in data:
        buffer += b"still resizable"
