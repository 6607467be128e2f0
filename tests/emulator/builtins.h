// The words of CUDA C++ that need no header: put before every device source, so that g++ understands it.
#pragma once
#include "runtime.h"

#include <math.h>

extern "C" int printf(const char*, ...);

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another: this is the running block's
#define __constant__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__

#define threadIdx (emulator::current->index)
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
constexpr int warpSize = 32;

// ---- short vectors --------------------------------------------------------------------------------------

#define EMULATOR_VECTORS(type, name, align2, align4)                                                   \
    struct name##1 { type x; };                                                                       \
    struct alignas(align2) name##2 { type x, y; };                                                    \
    struct name##3 { type x, y, z; };                                                                 \
    struct alignas(align4) name##4 { type x, y, z, w; };                                              \
    EMULATOR_MAKE_VECTORS(type, name)

#define EMULATOR_MAKE_VECTORS(type, name)                                                              \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                  \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                       \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

EMULATOR_VECTORS(signed char, char, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(short, short, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(double, double, 16, 16)
EMULATOR_VECTORS(long long, longlong, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16)
struct uint1 { unsigned x; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
EMULATOR_MAKE_VECTORS(unsigned, uint)  // uint3 is threadIdx's type: runtime.h has it

// ---- threads that wait for each other -------------------------------------------------------------------

using EmulatorSite = emulator::Site;

inline void __syncthreads(EmulatorSite site = EmulatorSite::here()) { emulator::synchronize_block(site); }

inline int __syncthreads_count(int predicate, EmulatorSite site = EmulatorSite::here()) {
    return emulator::count_block(predicate != 0, site);
}
inline int __syncthreads_or(int predicate, EmulatorSite site = EmulatorSite::here()) {
    return emulator::count_block(predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, EmulatorSite site = EmulatorSite::here()) {
    return emulator::count_block(predicate == 0, site) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, EmulatorSite site = EmulatorSite::here()) {
    emulator::synchronize_warp(mask, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EmulatorSite site = EmulatorSite::here()) {
    return emulator::ballot(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, EmulatorSite site = EmulatorSite::here()) {
    return emulator::ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EmulatorSite site = EmulatorSite::here()) {
    return emulator::ballot(mask, predicate != 0, site) == mask;
}

namespace emulator {

// A lane reads its own value where `source` leaves its segment of `width` lanes.
template <typename T>
T shuffle_within(unsigned mask, T value, int source, int width, Site site) {
    static_assert(__is_trivially_copyable(T) && sizeof(T) <= 8);
    const int first = current->lane / width * width;
    if (source < first || source >= first + width) source = current->lane;
    shuffle(mask, &value, sizeof(T), source, site);
    return value;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EmulatorSite site = EmulatorSite::here()) {
    const int first = emulator::current->lane / width * width;
    return emulator::shuffle_within(mask, value, first + (source & (width - 1)), width, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 EmulatorSite site = EmulatorSite::here()) {
    return emulator::shuffle_within(mask, value, emulator::current->lane - int(delta), width, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   EmulatorSite site = EmulatorSite::here()) {
    return emulator::shuffle_within(mask, value, emulator::current->lane + int(delta), width, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  EmulatorSite site = EmulatorSite::here()) {
    return emulator::shuffle_within(mask, value, emulator::current->lane ^ lanes, width, site);
}

// ---- memory ---------------------------------------------------------------------------------------------

inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T> T __ldg(const T* pointer) { return *pointer; }
template <typename T> T __ldcg(const T* pointer) { return *pointer; }
template <typename T> T __ldcs(const T* pointer) { return *pointer; }
template <typename T> T __ldca(const T* pointer) { return *pointer; }
template <typename T, typename U> void __stcg(T* pointer, U value) { *pointer = value; }
template <typename T, typename U> void __stcs(T* pointer, U value) { *pointer = value; }
template <typename T, typename U> void __stwt(T* pointer, U value) { *pointer = value; }

// Fibers change places at barriers only: whatever stands between two of them is atomic already.
namespace emulator {
template <typename T, typename Change>
__attribute__((no_sanitize_thread, noinline)) T exchange(T* pointer, Change change) {
    if (EMULATOR_WATCHED) watch_atomic(pointer, sizeof(T), __builtin_return_address(0));
    const T old = *pointer;
    *pointer = change(old);
    return old;
}
template <typename T> struct Same { typedef T type; };
template <typename T> using Argument = typename Same<T>::type;  // converts, and deduces nothing
}  // namespace emulator

// Cycles of an emulated multiprocessor: looking at the clock takes one.
inline long long clock64() {
    static thread_local long long cycles = 0;
    return ++cycles;
}

template <typename T> __forceinline__ T atomicAdd(T* pointer, emulator::Argument<T> value) {
    return emulator::exchange(pointer, [=](T old) { return T(old + value); });
}
template <typename T> __forceinline__ T atomicSub(T* pointer, emulator::Argument<T> value) {
    return emulator::exchange(pointer, [=](T old) { return T(old - value); });
}
template <typename T> __forceinline__ T atomicMax(T* pointer, emulator::Argument<T> value) {
    return emulator::exchange(pointer, [=](T old) { return old < value ? value : old; });
}
template <typename T> __forceinline__ T atomicMin(T* pointer, emulator::Argument<T> value) {
    return emulator::exchange(pointer, [=](T old) { return value < old ? value : old; });
}
template <typename T> __forceinline__ T atomicOr(T* pointer, emulator::Argument<T> value) {
    return emulator::exchange(pointer, [=](T old) { return T(old | value); });
}
template <typename T> __forceinline__ T atomicAnd(T* pointer, emulator::Argument<T> value) {
    return emulator::exchange(pointer, [=](T old) { return T(old & value); });
}
template <typename T> __forceinline__ T atomicXor(T* pointer, emulator::Argument<T> value) {
    return emulator::exchange(pointer, [=](T old) { return T(old ^ value); });
}
template <typename T> __forceinline__ T atomicExch(T* pointer, emulator::Argument<T> value) {
    return emulator::exchange(pointer, [=](T) { return value; });
}
template <typename T> __forceinline__ T atomicCAS(T* pointer, emulator::Argument<T> compare, emulator::Argument<T> value) {
    return emulator::exchange(pointer, [=](T old) { return old == compare ? value : old; });
}
__forceinline__ unsigned atomicInc(unsigned* pointer, unsigned last) {
    return emulator::exchange(pointer, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}

// ---- numbers --------------------------------------------------------------------------------------------

namespace emulator {
template <typename To, typename From>
To same_bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    __builtin_memcpy(&result, &value, sizeof value);
    return result;
}
}  // namespace emulator

inline float __uint_as_float(unsigned bits) { return emulator::same_bits<float>(bits); }
inline float __int_as_float(int bits) { return emulator::same_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulator::same_bits<unsigned>(value); }
inline int __float_as_int(float value) { return emulator::same_bits<int>(value); }
inline double __longlong_as_double(long long bits) { return emulator::same_bits<double>(bits); }
inline long long __double_as_longlong(double value) { return emulator::same_bits<long long>(value); }

#define EMULATOR_MIN_MAX(type)                                    \
    inline type min(type a, type b) { return b < a ? b : a; }     \
    inline type max(type a, type b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
// As on the device, of a number and NaN these give the number.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float __frsqrt_rn(float x) { return float(1.0 / sqrt(double(x))); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
// Volatile: the compiler must not fuse what these keep apart.
inline float __fadd_rn(float a, float b) { volatile float sum = a + b; return sum; }
inline float __fsub_rn(float a, float b) { volatile float difference = a - b; return difference; }
inline float __fmul_rn(float a, float b) { volatile float product = a * b; return product; }
inline double __dadd_rn(double a, double b) { volatile double sum = a + b; return sum; }
inline double __dmul_rn(double a, double b) { volatile double product = a * b; return product; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return int(rintf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline float __int2float_rn(int x) { return float(x); }

[[noreturn]] inline void __trap(EmulatorSite site = EmulatorSite::here()) {
    emulator::fail(site, "__trap");
}
