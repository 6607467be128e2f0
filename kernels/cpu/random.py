"""Random numbers from the blocks of a Philox stream, which threads make in any order.

They are those of `kernels/cuda/random.cu`, bit for bit: both add, multiply, divide and take square roots,
each rounded to nearest, in the same order, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gradengine.kernels.cpu.launch import kernel_part, own_range, parallel_kernel
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.layout import Array

# Blocks of one piece of work, whose words stay in the L1 cache; a block has four words of 32 bits.
BLOCKS = 128

Take = Callable[[], tuple[int, int]]  # gives a stream's seed and the number of the first block

F32, F64, I32, I64, U32, U64 = np.float32, np.float64, np.int32, np.int64, np.uint32, np.uint64


_FLOAT16, _FLOAT32, _FLOAT64 = map(np.dtype, (np.float16, F32, F64))


def uniform(out: Array, take: Take) -> None:
    dtype = out.dtype
    if dtype == _FLOAT64:
        _launch(_uniform64, out, 2, take)
        return
    # As many bits as the dtype has below 1: rounding more to it could give 1
    bits = 24 if dtype == _FLOAT32 else 11 if dtype == _FLOAT16 else 8
    wide = out if dtype == _FLOAT32 else np.empty(out.shape, F32)
    _launch(_uniform32, wide, 4, take, 32 - bits, 0.5**bits)
    if wide is not out:
        out[...] = wide


def normal(out: Array, take: Take) -> None:
    if out.dtype == _FLOAT64:
        _launch(_normal64, out, 2, take)
        return
    wide = out if out.dtype == _FLOAT32 else np.empty(out.shape, F32)
    _launch(_normal32, wide, 4, take)
    if wide is not out:
        out[...] = wide


def integers(out: Array, low: int, span: int, take: Take) -> None:
    _launch(_integers, out, 2, take, low, _signed(span))


def bernoulli(out: Array, threshold: int, take: Take) -> None:
    _launch(_bernoulli, out, 4, take, threshold)


def _launch(kernel: Any, out: Array, per_block: int, take: Take, *numbers: float) -> None:
    """Fill out, of which a block makes `per_block` elements, on as many threads as there are pieces."""
    seed, first = take()
    size = out.size
    few = size <= BLOCKS * per_block
    workers = 1 if few else min(get_num_threads(), -(-size // (BLOCKS * per_block)))
    kernel(workers, out.reshape(-1), _signed(seed), _signed(first), *numbers)


def _signed(word: int) -> int:
    """Give the int64 that has the bits of a word of 64 bits, which Numba takes sooner than a uint64."""
    return word if word < 1 << 63 else word - (1 << 64)


# ---- Philox ----------------------------------------------------------------------------------------


@kernel_part
def philox(c0, c1, c2, c3, k0, k1):
    """Give the four words that Philox 4x32-10 makes of a counter, four words, and a key, two words.

    Words are kept in uint64, of which vectors have products. Salmon et al., SC 2011.
    """
    low = U64(0xFFFFFFFF)
    for _ in range(10):
        product0, product2 = c0 * U64(0xD2511F53), c2 * U64(0xCD9E8D57)
        c0, c1 = (product2 >> U64(32)) ^ c1 ^ k0, product2 & low
        c2, c3 = (product0 >> U64(32)) ^ c3 ^ k1, product0 & low
        k0, k1 = (k0 + U64(0x9E3779B9)) & low, (k1 + U64(0xBB67AE85)) & low
    return c0, c1, c2, c3


@kernel_part
def _make_words(seed, first, words):
    """Fill words (4 * BLOCKS,), uint32, with blocks of the stream from the number `first` on."""
    low = U64(0xFFFFFFFF)
    k0, k1 = seed & low, seed >> U64(32)
    for i in range(BLOCKS):  # LLVM makes vectors of this where the number is known
        block = first + U64(i)
        w0, w1, w2, w3 = philox(block & low, block >> U64(32), U64(0), U64(0), k0, k1)
        words[4 * i] = w0
        words[4 * i + 1] = w1
        words[4 * i + 2] = w2
        words[4 * i + 3] = w3


@kernel_part
def _own_pieces(worker, workers, out, per_block):
    """Return the worker's own pieces of out, of which a block makes `per_block` elements."""
    piece = BLOCKS * per_block
    return own_range(worker, workers, (len(out) + piece - 1) // piece)


# ---- normal distribution ---------------------------------------------------------------------------
# Box and Muller, Annals of Mathematical Statistics 29 (1958): of a point at a random angle whose distance
# from 0 is the root of -2 log(u), the two coordinates are independent. The polynomials are those of Sun's
# fdlibm and, for float32, of FreeBSD's logf and Moshier's Cephes.


@kernel_part
def _log_tail32(z):
    """Give (log((1 + s) / (1 - s)) / s - 2) for z = s^2, |s| < 0.172."""
    p = F32(0.28498786688) + z * F32(0.24279078841)
    p = F32(0.66666662693) + z * (F32(0.40000972152) + z * p)
    return z * p


@kernel_part
def _log_tail64(z):
    p = F64(1.531383769920937332e-01) + z * F64(1.479819860511658591e-01)
    p = F64(2.222219843214978396e-01) + z * (F64(1.818357216161805012e-01) + z * p)
    p = F64(3.999999999940941908e-01) + z * (F64(2.857142874366239149e-01) + z * p)
    return z * (F64(6.666666666666735130e-01) + z * p)


@kernel_part
def _sine_tail32(z):
    """Give (sin(t) - t) / t^3 for z = t^2, |t| <= pi / 4."""
    p = F32(8.3321608736e-3) + z * F32(-1.9515295891e-4)
    return F32(-1.6666654611e-1) + z * p


@kernel_part
def _sine_tail64(z):
    p = F64(-2.50507602534068634195e-08) + z * F64(1.58969099521155010221e-10)
    p = F64(-1.98412698298579493134e-04) + z * (F64(2.75573137070700676789e-06) + z * p)
    return F64(-1.66666666666666324348e-01) + z * (F64(8.33333333332248946124e-03) + z * p)


@kernel_part
def _cosine_tail32(z):
    """Give (cos(t) - 1 + t^2 / 2) / t^4 for z = t^2, |t| <= pi / 4."""
    p = F32(-1.388731625493765e-3) + z * F32(2.443315711809948e-5)
    return F32(4.166664568298827e-2) + z * p


@kernel_part
def _cosine_tail64(z):
    p = F64(2.08757232129817482790e-09) + z * F64(-1.13596475577881948265e-11)
    p = F64(2.48015872894767294178e-05) + z * (F64(-2.75573143513906633035e-07) + z * p)
    return F64(4.16666666666666019037e-02) + z * (F64(-1.38888888888741095749e-03) + z * p)


@kernel_part
def _radius32(word):
    """Give the root of -2 log(u), u of (0, 1] being made of a word of 32 bits."""
    u = F32(I32(word >> U32(1))) * F32(2**-31) + F32(2**-32)
    # u = 2^exponent * (1 + f), 1 + f from sqrt(1/2) to sqrt(2)
    bits = I32(F32(u).view(I32) + I32(0x3F800000 - 0x3F3504F3))
    exponent = F32(I32(I32(bits >> I32(23)) - I32(127)))
    f = I32((bits & I32(0x7FFFFF)) + I32(0x3F3504F3)).view(F32) - F32(1)
    s = f / (F32(2) + f)
    half = F32(0.5) * f * f
    tail = s * (half + _log_tail32(s * s)) + exponent * F32(9.0580006145e-06)
    log = exponent * F32(6.9313812256e-01) - ((half - tail) - f)
    return np.sqrt(F32(-2) * log)


@kernel_part
def _radius64(word):
    u = F64(I64(word >> U64(11))) * F64(2**-53) + F64(2**-54)
    bits = F64(u).view(I64) + I64((0x3FF00000 - 0x3FE6A09E) << 32)
    exponent = F64((bits >> I64(52)) - I64(1023))
    f = I64((bits & I64(0xFFFFFFFFFFFFF)) + I64(0x3FE6A09E << 32)).view(F64) - F64(1)
    s = f / (F64(2) + f)
    half = F64(0.5) * f * f
    tail = s * (half + _log_tail64(s * s)) + exponent * F64(1.90821492927058770002e-10)
    log = exponent * F64(6.93147180369123816490e-01) - ((half - tail) - f)
    return np.sqrt(F64(-2) * log)


@kernel_part
def _turned(quarter, sine, cosine):
    """Give cosine and sine of an angle that is so many quarter turns larger."""
    x = sine if quarter & 1 else cosine
    y = cosine if quarter & 1 else sine
    x = -x if (quarter + 1) & 2 else x
    y = -y if quarter & 2 else y
    return x, y


@kernel_part
def _point32(word, turn):
    """Give two independent numbers of the normal distribution for two words of 32 bits."""
    radius = _radius32(word)
    # Two bits choose a quarter turn, the others an angle from -pi / 4 to pi / 4
    t = F32(I32(turn << U32(2))) * F32(np.pi * 2**-33)
    z = t * t
    sine = t + t * (z * _sine_tail32(z))
    cosine = (F32(1) - F32(0.5) * z) + (z * z) * _cosine_tail32(z)
    x, y = _turned(I32(turn >> U32(30)), sine, cosine)
    return radius * x, radius * y


@kernel_part
def _make_points32(count, words, points):
    """Fill points (2 * count,) with independent pairs, each made of two words."""
    for i in range(count):
        points[2 * i], points[2 * i + 1] = _point32(words[2 * i], words[2 * i + 1])


@kernel_part
def _point64(word, turn):
    radius = _radius64(word)
    t = F64(I64(turn << U64(2))) * F64(np.pi * 2**-65)
    z = t * t
    sine = t + t * (z * _sine_tail64(z))
    cosine = (F64(1) - F64(0.5) * z) + (z * z) * _cosine_tail64(z)
    x, y = _turned(I64(turn >> U64(62)), sine, cosine)
    return radius * x, radius * y


@kernel_part
def _make_points64(count, words, points):
    for i in range(count):
        points[2 * i], points[2 * i + 1] = _point64(words[2 * i], words[2 * i + 1])


# ---- kernels -----------------------------------------------------------------------------------------
# Element i of a piece is made of its word i, two normal numbers of two words. A word is one of the four of
# a block, for dtypes of 64 bits two of them, the first the lower half.


@parallel_kernel
def _uniform32(worker, workers, out, seed, first, shift, unit):
    words = np.empty(4 * BLOCKS, U32)
    for piece in _own_pieces(worker, workers, out, 4):
        _make_words(U64(seed), U64(first) + U64(piece * BLOCKS), words)
        target = out[piece * BLOCKS * 4 : (piece + 1) * BLOCKS * 4]
        for i in range(len(target)):
            target[i] = F32(I32(words[i] >> U32(shift))) * F32(unit)


@parallel_kernel
def _uniform64(worker, workers, out, seed, first):
    words = np.empty(2 * BLOCKS, U64)
    for piece in _own_pieces(worker, workers, out, 2):
        _make_words(U64(seed), U64(first) + U64(piece * BLOCKS), words.view(U32))
        target = out[piece * BLOCKS * 2 : (piece + 1) * BLOCKS * 2]
        for i in range(len(target)):
            target[i] = F64(I64(words[i] >> U64(11))) * F64(2**-53)


@parallel_kernel
def _normal32(worker, workers, out, seed, first):
    words = np.empty(4 * BLOCKS, U32)
    points = np.empty(4 * BLOCKS, F32)
    for piece in _own_pieces(worker, workers, out, 4):
        _make_words(U64(seed), U64(first) + U64(piece * BLOCKS), words)
        target = out[piece * BLOCKS * 4 : (piece + 1) * BLOCKS * 4]
        _make_points32((len(target) + 1) // 2, words, points)
        for i in range(len(target)):
            target[i] = points[i]


@parallel_kernel
def _normal64(worker, workers, out, seed, first):
    words = np.empty(2 * BLOCKS, U64)
    points = np.empty(2 * BLOCKS, F64)
    for piece in _own_pieces(worker, workers, out, 2):
        _make_words(U64(seed), U64(first) + U64(piece * BLOCKS), words.view(U32))
        target = out[piece * BLOCKS * 2 : (piece + 1) * BLOCKS * 2]
        _make_points64((len(target) + 1) // 2, words, points)
        for i in range(len(target)):
            target[i] = points[i]


@parallel_kernel
def _bernoulli(worker, workers, out, seed, first, threshold):
    """True where a word of 32 bits is below threshold, which is from 0 to 2^32."""
    words = np.empty(4 * BLOCKS, U32)
    for piece in _own_pieces(worker, workers, out, 4):
        _make_words(U64(seed), U64(first) + U64(piece * BLOCKS), words)
        target = out[piece * BLOCKS * 4 : (piece + 1) * BLOCKS * 4]
        for i in range(len(target)):
            target[i] = U64(words[i]) < U64(threshold)


@parallel_kernel
def _integers(worker, workers, out, seed, first, low, span):
    """low + floor(word * span / 2^64); a span of 0 stands for 2^64, which takes words as they are."""
    half = U64(0xFFFFFFFF)
    below, above = U64(span) & half, U64(span) >> U64(32)
    words = np.empty(2 * BLOCKS, U64)
    for piece in _own_pieces(worker, workers, out, 2):
        _make_words(U64(seed), U64(first) + U64(piece * BLOCKS), words.view(U32))
        target = out[piece * BLOCKS * 2 : (piece + 1) * BLOCKS * 2]
        for i in range(len(target)):
            # The upper half of a product of 128 bits, by products of halves
            lower, upper = words[i] & half, words[i] >> U64(32)
            middle = upper * below + (lower * below >> U64(32))
            rest = lower * above + (middle & half)
            product = upper * above + (middle >> U64(32)) + (rest >> U64(32))
            target[i] = low + I64(product if span else words[i])
