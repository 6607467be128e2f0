"""Random numbers: Philox's published words, the same bits on every device and any number of threads."""

from typing import Any

import numba
import numpy as np
import pytest
from scipy import stats

import gradengine
from gradengine import kernels
from gradengine.devices import import_cupy, to_device
from gradengine.kernels.cpu import random as cpu
from gradengine.kernels.cuda.launch import kernel

BFLOAT16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
FLOATS = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]
compiled: Any = numba.njit
SEED = 0x299F31D0A4093822

# Counter, key and words, of the file kat_vectors of Random123
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]

# Every filler with its arguments and dtypes
FILLS = {
    "uniform": ((), FLOATS),
    "normal": ((), FLOATS),
    "integers": ((-5, 12), [np.dtype(np.int64)]),
    "integers of all kinds": ((-(2**63), 2**63), [np.dtype(np.int64)]),
    "bernoulli": ((0.3,), [np.dtype(np.bool_)]),
}
EMPTY = np.empty  # what Numba knows; the emulator puts its own function in its place
CASES = [(name, dtype) for name, (_, dtypes) in FILLS.items() for dtype in dtypes]


class stream:  # noqa: N801 - called like a function
    """Reserves the blocks of a stream from `first` on; how many it gave each time is in .taken."""

    def __init__(self, seed=SEED, first=0):
        self.seed, self.first = seed, first
        self.taken = []

    def __call__(self, blocks):
        first = (self.first + sum(self.taken)) % 2**64
        self.taken.append(blocks)
        return self.seed, first


def fill(name, out, take):
    getattr(kernels, f"random_{name.split()[0]}")(out, *FILLS[name][0], take)
    return out


def on_cpu(name, shape, dtype, take):
    """Fill an array with the CPU's kernels, also where NumPy's arrays are sent to emulated ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "place", lambda array: "cpu")
        patch.setattr(np, "empty", EMPTY)
        return fill(name, np.empty(shape, dtype), take)


@pytest.fixture(params=["emulated", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    if request.param == "emulated":
        request.getfixturevalue("emulated_cuda")
        return np
    return import_cupy()


# ---- Philox ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_words(counter, key, words):
    given = [np.uint64(word) for word in (*counter, *key)]
    assert [int(word) for word in cpu.philox(*given)] == words
    assert [int(word) for word in compiled(cpu.philox.py_func)(*given)] == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_words_on_cuda(counter, key, words, xp, tmp_path):
    source = tmp_path / "words.cu"
    source.write_text(
        """
        #include <philox.cuh>
        __global__ void words(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
            if (threadIdx.x) return;
            const Words made = philox({{counter[0], counter[1], counter[2], counter[3]}},
                                      uint64_t(key[1]) << 32 | key[0]);
            for (int i = 0; i < 4; ++i) out[i] = made.words[i];
        }
        """
    )
    out = xp.empty(4, np.uint32)
    given = (xp.asarray(np.array(counter, np.uint32)), xp.asarray(np.array(key, np.uint32)))
    kernel(str(source), "words")((1,), (32,), (*given, out))
    assert to_device(out, "cpu").tolist() == words


def test_a_stream_is_philox_of_its_block_numbers():
    words = fill("integers of all kinds", np.empty(7, np.int64), stream(first=2**32 - 1))
    given = [np.uint64(SEED & 0xFFFFFFFF), np.uint64(SEED >> 32)]
    expected = []
    for block in range(2**32 - 1, 2**32 + 3):  # the number's upper half counts as well
        counter = [np.uint64(word) for word in (block % 2**32, block >> 32, 0, 0)]
        made = [int(word) for word in cpu.philox(*counter, *given)]
        expected += [made[0] | made[1] << 32, made[2] | made[3] << 32]
    # low is -2^63
    assert [int(word) + 2**63 for word in words] == expected[:7]
    assert fill("integers", np.empty(7, np.int64), stream(first=2**32 - 1)).tolist() == [
        -5 + (word * 17 >> 64) for word in expected[:7]
    ]
    drawn = fill("uniform", np.empty(4), stream(first=2**32 - 1))
    assert drawn.tolist() == [(word >> 11) * 2.0**-53 for word in expected[:4]]
    drawn = fill("uniform", np.empty(2, np.float32), stream(first=2**32 - 1))
    assert drawn.tolist() == [
        (word >> 8) * 2.0**-24 for word in (expected[0] % 2**32, expected[0] >> 32)
    ]


# ---- the same bits everywhere ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_cuda_draws_the_bits_of_the_cpu(name, dtype, xp):
    for shape in ((), (1,), (3,), (4,), (5, 7), (3, 4, 2051)):  # packs and what is left over
        taken = stream(first=2**64 - 3), stream(first=2**64 - 3)
        expected = on_cpu(name, shape, dtype, taken[0])
        found = to_device(fill(name, xp.empty(shape, dtype), taken[1]), "cpu")
        assert found.tobytes() == expected.tobytes()
        per_block = 2 if dtype.itemsize == 8 else 4
        assert taken[0].taken == taken[1].taken == [-(-expected.size // per_block)]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_numbers_do_not_depend_on_threads_nor_on_how_many_are_drawn(name, dtype, monkeypatch):
    size = 5 * 4 * cpu.BLOCKS + 3
    expected = fill(name, np.empty(size, dtype), stream())
    assert fill(name, np.empty(9, dtype), stream()).tobytes() == expected[:9].tobytes()
    for threads in (1, 2, 4, 7):  # workers run one after the other where there are fewer threads
        monkeypatch.setattr(cpu, "get_num_threads", lambda threads=threads: threads)
        assert fill(name, np.empty(size, dtype), stream()).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_a_stream_goes_on(name, dtype):
    take = stream()
    both = [fill(name, np.empty(16, dtype), take) for _ in range(2)]
    whole = fill(name, np.empty(32, dtype), stream())
    assert np.concatenate(both).tobytes() == whole.tobytes()


def test_nothing_is_drawn_for_no_elements(xp):
    take = stream()
    for name, dtype in CASES:
        fill(name, xp.empty((3, 0), dtype), take)
    assert take.taken == []


# ---- distributions -------------------------------------------------------------------------------------
# Fixed seeds: these pass or fail always. Chances of failing were below 1 in 1000 before they were run.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_uniform_distribution(seed, dtype):
    x = fill("uniform", np.empty(200_000, dtype), stream(seed)).astype(np.float64)
    assert 0 <= x.min() < 1e-4
    assert 1 - 1e-4 < x.max() < 1
    assert stats.kstest(x, "uniform").pvalue > 1e-3
    pairs, *_ = np.histogram2d(x[::2], x[1::2], bins=16, range=[[0, 1]] * 2)
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_normal_distribution(seed, dtype):
    x = fill("normal", np.empty(200_000, dtype), stream(seed)).astype(np.float64)
    assert stats.kstest(x, "norm").pvalue > 1e-3
    error = 1 / np.sqrt(x.size)  # of a mean; moments of a normal number: 0, 1, 0, 3
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs((x**power).mean() - moment) < 3.5 * error * np.sqrt(variance)
    assert abs((x[::2] * x[1::2]).mean()) < 3.5 * error * np.sqrt(2)  # of one point of the plane
    assert abs((x[::2] ** 2 * x[1::2] ** 2).mean() - 1) < 3.5 * error * 4
    assert 4 < np.abs(x).max() < 6.7


@pytest.mark.parametrize(("dtype", "ulps"), [(np.float32, 4), (np.float64, 4)])
def test_normal_numbers_are_box_and_mullers(dtype, ulps):
    # The formula in more digits: float32's numbers in float64, float64's in long double
    wide = np.float64 if dtype == np.float32 else np.longdouble
    bits = 32 if dtype == np.float32 else 64
    found = fill("normal", np.empty(20_000, dtype), stream())
    words = fill("integers of all kinds", np.empty(20_000 * bits // 64, np.int64), stream())
    words = (words.view(np.uint64) + np.uint64(2**63)).view(f"u{bits // 8}")
    kept = 31 if dtype == np.float32 else 53
    u = (words[::2] >> (bits - kept)).astype(dtype) * dtype(2.0**-kept) + dtype(2.0 ** -(kept + 1))
    turns = words[1::2].astype(wide) / wide(2.0**bits)
    # A quarter's angles lie around the multiple of pi / 2, not behind it
    quarter = np.floor(turns * 4)
    inside = turns * 4 - quarter
    angle = (quarter + np.where(inside >= 0.5, inside - 1, inside)) * np.arccos(wide(-1)) / 2
    radius = np.sqrt(-2 * np.log(u.astype(wide)))
    for place, expected in enumerate((radius * np.cos(angle), radius * np.sin(angle))):
        # Of the radius: near an axis the other coordinate is small, and its error that of the angle
        error = np.abs(found[place::2].astype(wide) - expected)
        assert (error <= ulps * np.finfo(dtype).eps / 2 * radius).all()


def test_rare_words_make_finite_normal_numbers():
    for word in (0, 1, 2**32 - 1, 2**31, 0xB504F333):
        for make, bits in ((cpu._point32, 32), (cpu._point64, 64)):
            kind = {32: np.uint32, 64: np.uint64}[bits]
            given = kind(word), kind(word << (bits - 32))
            for point in (make(*given), compiled(make.py_func)(*given)):
                assert np.isfinite(point).all()


def test_integers_are_even():
    for low, high in ((0, 2), (-3, 4), (10, 1010)):
        out = np.empty(100_000, np.int64)
        kernels.random_integers(out, low, high, stream())
        counts = np.bincount(out - low, minlength=high - low)
        assert len(counts) == high - low
        assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.0, 2.0**-32, 0.3, 0.5, 1 - 2.0**-32, 1.0])
def test_truth_has_its_probability(probability, xp):
    out = xp.empty(50_000, np.bool_)
    kernels.random_bernoulli(out, probability, stream())
    share = float(to_device(out, "cpu").mean())
    assert abs(share - probability) <= 3.5 * np.sqrt(probability * (1 - probability) / 50_000)


def test_uniform_numbers_of_16_bits_are_the_leading_bits_of_longer_ones():
    long = fill("uniform", np.empty(1000, np.float32), stream())
    for dtype, steps in ((np.float16, 2**11), (BFLOAT16, 2**8)):
        short = fill("uniform", np.empty(1000, dtype), stream()).astype(np.float32)
        np.testing.assert_array_equal(short, np.floor(long * steps) / steps)


def test_the_number_of_threads_may_be_set():
    before = gradengine.get_num_threads()
    expected = fill("normal", np.empty(10_000, np.float32), stream())
    try:
        gradengine.set_num_threads(1)
        found = fill("normal", np.empty(10_000, np.float32), stream())
    finally:
        gradengine.set_num_threads(before)
    np.testing.assert_array_equal(found, expected)
