// Random numbers, bit for bit those of kernels/cpu/random.py: a thread makes what one block of Philox gives.
//
// Normal numbers are made with additions, products, quotients and square roots alone, each rounded by
// itself: by name, since the compiler would fuse the operators to what a CPU does not compute.
#include <elements.cuh>
#include <indices.cuh>
#include <philox.cuh>

// A stream's seed and the number of the first block that nobody has drawn: by value, or in the device's
// memory at `live`, where a captured launch reads them anew each time it is replayed.
struct Stream {
    uint64_t seed, first;
};

DEVICE Words draw(const Stream& given, const Stream* live, long long block) {
    const Stream& stream = live ? *live : given;
    const uint64_t number = stream.first + uint64_t(block);
    return philox({{uint32_t(number), uint32_t(number >> 32), 0, 0}}, stream.seed);
}

// Stores a block's COUNT elements at its place in out, without those beyond `count`.
template <typename T, int COUNT>
DEVICE void store(T* out, long long count, long long block, const Pack<T, COUNT>& made) {
    const long long first = block * COUNT;
    if (first + COUNT <= count) {  // out is an array's first element, which is aligned
        *reinterpret_cast<Pack<T, COUNT>*>(out + first) = made;
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        if (first + i < count) out[first + i] = made.values[i];
    }
}

// The words of 32 or 64 bits that a block has for numbers computed in Real, which are half as many doubles.
template <typename Real> struct Source;
template <> struct Source<float> {
    static constexpr int COUNT = 4;
    uint32_t words[COUNT];
    DEVICE explicit Source(const Words& drawn) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) words[i] = drawn.words[i];
    }
};
template <> struct Source<double> {
    static constexpr int COUNT = 2;
    uint64_t words[COUNT];
    DEVICE explicit Source(const Words& drawn) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            words[i] = uint64_t(drawn.words[2 * i + 1]) << 32 | drawn.words[2 * i];
        }
    }
};

// ---- numbers from [0, 1): as many bits as T has below 1 ----------------------------------------------

template <typename T> DEVICE float fraction(uint32_t word);
template <> DEVICE float fraction<float>(uint32_t word) { return float(int(word >> 8)) * 0x1p-24f; }
template <> DEVICE float fraction<float16>(uint32_t word) { return float(int(word >> 21)) * 0x1p-11f; }
template <> DEVICE float fraction<bfloat16>(uint32_t word) { return float(int(word >> 24)) * 0x1p-8f; }
template <typename T> DEVICE double fraction(uint64_t word) { return double((long long)(word >> 11)) * 0x1p-53; }

template <typename T>
__global__ void uniform(T* out, long long count, const __grid_constant__ Stream stream, const Stream* live) {
    typedef Source<typename Accumulator<T>::type> From;
    const long long block = thread_number();
    if (block * From::COUNT >= count) return;
    const From source(draw(stream, live, block));
    Pack<T, From::COUNT> made;
#pragma unroll
    for (int i = 0; i < From::COUNT; ++i) made.values[i] = from_float<T>(fraction<T>(source.words[i]));
    store(out, count, block, made);
}

// ---- the normal distribution: see the CPU's side for where the numbers are from -----------------------

DEVICE float plus(float a, float b) { return __fadd_rn(a, b); }
DEVICE double plus(double a, double b) { return __dadd_rn(a, b); }
DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
DEVICE double times(double a, double b) { return __dmul_rn(a, b); }
DEVICE float over(float a, float b) { return __fdiv_rn(a, b); }
DEVICE double over(double a, double b) { return __ddiv_rn(a, b); }
DEVICE float root(float x) { return __fsqrt_rn(x); }
DEVICE double root(double x) { return __dsqrt_rn(x); }

template <typename Real> struct Constants;
template <> struct Constants<float> {
    static constexpr float LOG[] = {0.66666662693f, 0.40000972152f, 0.28498786688f, 0.24279078841f};
    static constexpr float SINE[] = {-1.6666654611e-1f, 8.3321608736e-3f, -1.9515295891e-4f};
    static constexpr float COSINE[] = {4.166664568298827e-2f, -1.388731625493765e-3f, 2.443315711809948e-5f};
    static constexpr float LOG2_HIGH = 6.9313812256e-01f, LOG2_LOW = 9.0580006145e-06f;
};
template <> struct Constants<double> {
    static constexpr double LOG[] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                                     2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                                     1.479819860511658591e-01};
    static constexpr double SINE[] = {-1.66666666666666324348e-01, 8.33333333332248946124e-03,
                                      -1.98412698298579493134e-04, 2.75573137070700676789e-06,
                                      -2.50507602534068634195e-08, 1.58969099521155010221e-10};
    static constexpr double COSINE[] = {4.16666666666666019037e-02,  -1.38888888888741095749e-03,
                                        2.48015872894767294178e-05,  -2.75573143513906633035e-07,
                                        2.08757232129817482790e-09,  -1.13596475577881948265e-11};
    static constexpr double LOG2_HIGH = 6.93147180369123816490e-01, LOG2_LOW = 1.90821492927058770002e-10;
};

// coefficients[0] + z * (coefficients[1] + z * (...))
template <typename Real, int COUNT>
DEVICE Real polynomial(const Real (&coefficients)[COUNT], Real z) {
    Real sum = coefficients[COUNT - 1];
#pragma unroll
    for (int i = COUNT - 2; i >= 0; --i) sum = plus(coefficients[i], times(z, sum));
    return sum;
}

// u, which a word makes from (0, 1], as 2^exponent * (1 + f), 1 + f from sqrt(1/2) to sqrt(2).
template <typename Real> struct Split { Real exponent, f; };

DEVICE Split<float> split(uint32_t word) {
    const float u = plus(times(float(int(word >> 1)), 0x1p-31f), 0x1p-32f);
    const int bits = __float_as_int(u) + (0x3f800000 - 0x3f3504f3);
    return {float((bits >> 23) - 127), plus(__int_as_float((bits & 0x7fffff) + 0x3f3504f3), -1.0f)};
}

DEVICE Split<double> split(uint64_t word) {
    constexpr long long ROOT_OF_HALF = 0x3fe6a09ell << 32;
    const double u = plus(times(double((long long)(word >> 11)), 0x1p-53), 0x1p-54);
    const long long bits = __double_as_longlong(u) + ((0x3ff00000ll << 32) - ROOT_OF_HALF);
    return {double((bits >> 52) - 1023),
            plus(__longlong_as_double((bits & 0xfffffffffffffll) + ROOT_OF_HALF), -1.0)};
}

// The root of -2 log(u).
template <typename Real, typename Word>
DEVICE Real radius(Word word) {
    typedef Constants<Real> C;
    const Split<Real> u = split(word);
    const Real s = over(u.f, plus(Real(2), u.f)), z = times(s, s);
    const Real half = times(times(Real(0.5), u.f), u.f);
    const Real tail = plus(times(s, plus(half, times(z, polynomial(C::LOG, z)))), times(u.exponent, C::LOG2_LOW));
    const Real log = plus(times(u.exponent, C::LOG2_HIGH), -plus(plus(half, -tail), -u.f));
    return root(times(Real(-2), log));
}

// Two bits of a word choose a quarter turn, the others an angle from -pi / 4 to pi / 4.
DEVICE int quarter(uint32_t word) { return int(word >> 30); }
DEVICE int quarter(uint64_t word) { return int(word >> 62); }
DEVICE float angle(uint32_t word) { return times(float(int(word << 2)), 3.14159265358979323846f * 0x1p-33f); }
DEVICE double angle(uint64_t word) {
    return times(double((long long)(word << 2)), 3.14159265358979323846 * 0x1p-65);
}

template <typename Real, typename Word>
DEVICE void make_point(Word word, Word turn, Real (&point)[2]) {
    typedef Constants<Real> C;
    const Real r = radius<Real>(word), t = angle(turn), z = times(t, t);
    const Real sine = plus(t, times(t, times(z, polynomial(C::SINE, z))));
    const Real cosine = plus(plus(Real(1), -times(Real(0.5), z)), times(times(z, z), polynomial(C::COSINE, z)));
    const int turns = quarter(turn);
    const Real x = turns & 1 ? sine : cosine, y = turns & 1 ? cosine : sine;
    point[0] = times(r, (turns + 1) & 2 ? -x : x);
    point[1] = times(r, turns & 2 ? -y : y);
}

template <typename T>
__global__ void normal(T* out, long long count, const __grid_constant__ Stream stream, const Stream* live) {
    typedef typename Accumulator<T>::type Real;
    typedef Source<Real> From;
    const long long block = thread_number();
    if (block * From::COUNT >= count) return;
    const From source(draw(stream, live, block));
    Pack<T, From::COUNT> made;
#pragma unroll
    for (int i = 0; i < From::COUNT; i += 2) {
        Real point[2];
        make_point(source.words[i], source.words[i + 1], point);
        made.values[i] = from_float<T>(point[0]);
        made.values[i + 1] = from_float<T>(point[1]);
    }
    store(out, count, block, made);
}

// ---- integers and truth ---------------------------------------------------------------------------------

// low + floor(word * span / 2^64); a span of 0 stands for 2^64, which takes words as they are.
__global__ void integers(long long* out, long long count, long long low, uint64_t span,
                         const __grid_constant__ Stream stream, const Stream* live) {
    typedef Source<double> From;
    const long long block = thread_number();
    if (block * From::COUNT >= count) return;
    const From source(draw(stream, live, block));
    Pack<long long, From::COUNT> made;
#pragma unroll
    for (int i = 0; i < From::COUNT; ++i) {
        const uint64_t above = span ? __umul64hi(source.words[i], span) : source.words[i];
        made.values[i] = (long long)(uint64_t(low) + above);  // without a sign, so that it may wrap around
    }
    store(out, count, block, made);
}

// True where a word of 32 bits is below threshold, which is from 0 to 2^32.
__global__ void bernoulli(bool* out, long long count, uint64_t threshold, const __grid_constant__ Stream stream,
                          const Stream* live) {
    const long long block = thread_number();
    if (block * 4 >= count) return;
    const Words drawn = draw(stream, live, block);
    Pack<bool, 4> made;
#pragma unroll
    for (int i = 0; i < 4; ++i) made.values[i] = drawn.words[i] < threshold;
    store(out, count, block, made);
}
