// Rows of matrices, each made by THREADS threads: a warp, which knows no barrier, or a whole block.
#pragma once
#include <elements.cuh>
#include <indices.cuh>

constexpr int WARP = 32;

// This thread's row, and its place among the threads of the row.
template <int THREADS>
struct Team {
    long long row;
    int thread;

    DEVICE Team() {
        row = (long long)(blockIdx.x) * (blockDim.x / THREADS) + threadIdx.x / THREADS;
        thread = threadIdx.x % THREADS;
    }
};

// Combines one value of each thread of a row; all of them get the result, always in the same order.
template <int THREADS, typename Value, typename Combine>
DEVICE Value combine_row(Value value, Combine combine) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    if constexpr (THREADS > WARP) {
        __shared__ Value of_warps[THREADS / WARP];
        __syncthreads();  // what an earlier call left here has been read
        if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
        __syncthreads();
        value = of_warps[0];
        for (int warp = 1; warp < THREADS / WARP; ++warp) value = combine(value, of_warps[warp]);
    }
    return value;
}

template <int THREADS, typename Value>
DEVICE Value row_sum(Value value) {
    return combine_row<THREADS>(value, [](Value a, Value b) { return a + b; });
}

// Calls visit(i, x[i], y[i]) for this thread's elements of a row, 16 bytes at once where both rows allow.
template <int THREADS, typename T, typename Visit>
DEVICE void for_row(const T* x, const T* y, long long length, int thread, Visit visit) {
    constexpr int WIDTH = 16 / sizeof(T);
    typedef Pack<T, WIDTH> Elements;
    const long long packs = is_aligned(x) && is_aligned(y) ? length / WIDTH : 0;
    for (long long pack = thread; pack < packs; pack += THREADS) {
        const Elements xs = reinterpret_cast<const Elements*>(x)[pack];
        const Elements ys = reinterpret_cast<const Elements*>(y)[pack];
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) visit(pack * WIDTH + i, to_float(xs.values[i]), to_float(ys.values[i]));
    }
    for (long long i = packs * WIDTH + thread; i < length; i += THREADS) visit(i, to_float(x[i]), to_float(y[i]));
}

template <int THREADS, typename T, typename Visit>
DEVICE void for_row(const T* x, long long length, int thread, Visit visit) {
    for_row<THREADS>(x, x, length, thread, [&](long long i, auto value, auto) { visit(i, value); });
}

// Fills this thread's elements of a row `out` with formula(i, x[i], y[i]).
template <int THREADS, typename T, typename Formula>
DEVICE void fill_row(T* out, const T* x, const T* y, long long length, int thread, Formula formula) {
    constexpr int WIDTH = 16 / sizeof(T);
    typedef Pack<T, WIDTH> Elements;
    const bool aligned = is_aligned(x) && is_aligned(y) && is_aligned(out);
    const long long packs = aligned ? length / WIDTH : 0;
    for (long long pack = thread; pack < packs; pack += THREADS) {
        Elements xs = reinterpret_cast<const Elements*>(x)[pack];
        const Elements ys = reinterpret_cast<const Elements*>(y)[pack];
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            T& value = xs.values[i];
            value = from_float<T>(formula(pack * WIDTH + i, to_float(value), to_float(ys.values[i])));
        }
        reinterpret_cast<Elements*>(out)[pack] = xs;
    }
    for (long long i = packs * WIDTH + thread; i < length; i += THREADS) {
        out[i] = from_float<T>(formula(i, to_float(x[i]), to_float(y[i])));
    }
}

template <int THREADS, typename T, typename Formula>
DEVICE void fill_row(T* out, const T* x, long long length, int thread, Formula formula) {
    fill_row<THREADS>(out, x, x, length, thread, [&](long long i, auto value, auto) { return formula(i, value); });
}

DEVICE float exponential(float x) { return expf(x); }
DEVICE double exponential(double x) { return exp(x); }
DEVICE float logarithm(float x) { return logf(x); }
DEVICE double logarithm(double x) { return log(x); }
