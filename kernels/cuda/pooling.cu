// 2-D pools of channels-last images. A thread makes COUNT neighbouring channels of one pixel; sums run in
// one order, whatever else the device does. Short names: p, q output row and column; r, s tap of a window.
#include <elements.cuh>

// One axis of the windows. Window w reads w * stride - before + tap * dilation for each tap < kernel.
struct Axis {
    int size;     // of the input
    int out;      // windows
    int kernel;   // taps of a window
    int stride;
    int dilation;
    int before;   // padding on the near side
    int padding;  // padding on both sides
};

struct Pool {
    double divisor;  // of every average, or 0: what a window holds
    Axis rows, columns;
    int channels;
    int counts_padding;
};

// Neighbouring columns of a window whose loads are under way at the same time.
constexpr int AT_ONCE = 3;
// Threads of a block that adds up one window.
constexpr int WINDOW_THREADS = 256;

// ---- one axis ----------------------------------------------------------------------------------------

// x / by, neither negative. Dividing by a number that the compiler does not know takes twenty instructions;
// most of these are powers of two.
DEVICE int divide(int x, int by) { return (by & (by - 1)) == 0 ? x >> (31 - __clz(by)) : x / by; }

DEVICE int divide_up(int x, int by) { return divide(x + by - 1, by); }

// Those taps of a window that read the input, not padding: tap reads start + tap * dilation.
struct Taps {
    int start, begin, end;

    DEVICE Taps(const Axis& axis, int window) {
        start = window * axis.stride - axis.before;
        begin = start < 0 ? divide_up(-start, axis.dilation) : 0;
        end = min(axis.kernel, divide_up(max(axis.size - start, 0), axis.dilation));
    }
};

// The windows that may read a position: with gaps between the taps, those of them that `holds` confirms.
struct Windows {
    int padded, begin, end;

    DEVICE Windows(const Axis& axis, int position) {
        padded = position + axis.before;
        const int reach = padded - (axis.kernel - 1) * axis.dilation;
        begin = reach > 0 ? divide_up(reach, axis.stride) : 0;
        end = min(axis.out, divide(padded, axis.stride) + 1);
    }

    DEVICE bool holds(const Axis& axis, int window) const {
        return axis.dilation == 1 || (padded - window * axis.stride) % axis.dilation == 0;
    }
};

// How many positions of a window count in its average. Padding may, what ceil_mode adds to it does not.
DEVICE int counted(const Axis& axis, int window, bool counts_padding) {
    if (counts_padding) {
        const int start = window * axis.stride;
        return min(start + axis.kernel, axis.size + axis.padding) - start;
    }
    const Taps taps(axis, window);
    return taps.end - taps.begin;
}

// ---- both axes ---------------------------------------------------------------------------------------

template <typename Sum>
DEVICE Sum divisor_of(const Pool& pool, int p, int q) {
    if (pool.divisor != 0) return Sum(pool.divisor);
    return Sum(counted(pool.rows, p, pool.counts_padding)) *
           Sum(counted(pool.columns, q, pool.counts_padding));
}

// What this thread makes of an array (N, height, width, C): COUNT channels from `channel` on. Blocks do
// not reach from one row of pixels into the next.
template <int COUNT>
struct Place {
    int image, row, column, channel;
    bool inside;

    DEVICE Place(int height, int width, int channels) {
        const int packs = channels / COUNT;
        const int blocks = (width * packs + blockDim.x - 1) / blockDim.x;  // of one row
        const int line = blockIdx.x / blocks;
        const int item = (blockIdx.x - line * blocks) * blockDim.x + threadIdx.x;
        inside = item < width * packs;
        image = line / height;
        row = line - image * height;
        column = divide(item, packs);
        channel = (item - column * packs) * COUNT;
    }

    // Where the image starts, and this thread's pixel, in arrays of so many pixels an image.
    template <typename T>
    DEVICE T* in_image(T* array, int pixels, int channels) const {
        return array + (long long)(image)*pixels * channels + channel;
    }
};

// COUNT neighbours, by accesses of at most 16 bytes.
template <typename T, int COUNT>
struct Access {
    static constexpr int PART = COUNT * sizeof(T) > 16 ? 16 / sizeof(T) : COUNT;

    DEVICE static void load(T (&values)[COUNT], const T* from) {
#pragma unroll
        for (int part = 0; part < COUNT; part += PART) {
            const auto pack = *reinterpret_cast<const Pack<T, PART>*>(from + part);
#pragma unroll
            for (int i = 0; i < PART; ++i) values[part + i] = pack.values[i];
        }
    }

    DEVICE static void store(T* to, const T (&values)[COUNT]) {
#pragma unroll
        for (int part = 0; part < COUNT; part += PART) {
            Pack<T, PART> pack;
#pragma unroll
            for (int i = 0; i < PART; ++i) pack.values[i] = values[part + i];
            *reinterpret_cast<Pack<T, PART>*>(to + part) = pack;
        }
    }
};

template <typename T, int COUNT, typename Sum>
DEVICE void store_rounded(T* to, const Sum (&sums)[COUNT]) {
    T values[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = from_float<T>(sums[i]);
    Access<T, COUNT>::store(to, values);
}

// Calls visit(values, h * W + w) for each pixel of the input that window (p, q) reads, by rows.
template <typename T, int COUNT, typename Visit>
DEVICE void visit_window(const T* image, const Pool& pool, int p, int q, Visit visit) {
    const Taps rows(pool.rows, p), columns(pool.columns, q);
    for (int r = rows.begin; r < rows.end; ++r) {
        const int line = (rows.start + r * pool.rows.dilation) * pool.columns.size + columns.start;
        for (int s = columns.begin; s < columns.end; s += AT_ONCE) {
            T values[AT_ONCE][COUNT];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int position = line + (s + i) * pool.columns.dilation;
                if (s + i < columns.end) {
                    Access<T, COUNT>::load(values[i], image + (long long)(position)*pool.channels);
                }
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                if (s + i < columns.end) visit(values[i], line + (s + i) * pool.columns.dilation);
            }
        }
    }
}

// ---- largest -----------------------------------------------------------------------------------------

// x (N, H, W, C); out and positions (N, P, Q, C).
template <typename T, int COUNT>
__global__ void max_pool2d(const T* x, T* out, int* positions, Pool pool) {
    typedef typename Accumulator<T>::type Value;
    const Place<COUNT> place(pool.rows.out, pool.columns.out, pool.channels);
    if (!place.inside) return;
    const Taps rows(pool.rows, place.row), columns(pool.columns, place.column);
    const int first = (rows.start + rows.begin * pool.rows.dilation) * pool.columns.size +
                      columns.start + columns.begin * pool.columns.dilation;
    Value best[COUNT];
    int winners[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        best[i] = -Value(__uint_as_float(0x7f800000u));  // where all are -infinity the first one wins
        winners[i] = first;
    }
    const T* image = place.in_image(x, pool.rows.size * pool.columns.size, pool.channels);
    visit_window<T, COUNT>(
        image, pool, place.row, place.column, [&](const T(&values)[COUNT], int position) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                const Value value = to_float(values[i]);
                const bool wins = value > best[i] || value != value;  // the last NaN, as in PyTorch
                best[i] = wins ? value : best[i];
                winners[i] = wins ? position : winners[i];
            }
        });
    const int windows = pool.rows.out * pool.columns.out;
    const long long pixel = (long long)(place.row * pool.columns.out + place.column) * pool.channels;
    store_rounded<T, COUNT>(place.in_image(out, windows, pool.channels) + pixel, best);
    Access<int, COUNT>::store(place.in_image(positions, windows, pool.channels) + pixel, winners);
}

// grad and positions (N, P, Q, C), grad_input (N, H, W, C). Each pixel looks for itself in the windows that
// read it: no two threads add to one place.
template <typename T, int COUNT>
__global__ void max_pool2d_scatter(const T* grad, const int* positions, T* grad_input, Pool pool) {
    typedef typename Accumulator<T>::type Sum;
    const Place<COUNT> place(pool.rows.size, pool.columns.size, pool.channels);
    if (!place.inside) return;
    const int windows = pool.rows.out * pool.columns.out;
    const T* grads = place.in_image(grad, windows, pool.channels);
    const int* winners = place.in_image(positions, windows, pool.channels);
    const int position = place.row * pool.columns.size + place.column;
    const Windows rows(pool.rows, place.row), columns(pool.columns, place.column);
    Sum sums[COUNT] = {};
    for (int p = rows.begin; p < rows.end; ++p) {
        if (!rows.holds(pool.rows, p)) continue;
        for (int q = columns.begin; q < columns.end; ++q) {
            if (!columns.holds(pool.columns, q)) continue;
            const long long window = (long long)(p * pool.columns.out + q) * pool.channels;
            int found[COUNT];
            T values[COUNT];
            Access<int, COUNT>::load(found, winners + window);
            Access<T, COUNT>::load(values, grads + window);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                if (found[i] == position) sums[i] += to_float(values[i]);
            }
        }
    }
    T* pixel = place.in_image(grad_input, pool.rows.size * pool.columns.size, pool.channels);
    store_rounded<T, COUNT>(pixel + (long long)(position)*pool.channels, sums);
}

// x (N, H, W, C), positions and out (N, P, Q, C). A position outside the plane takes 0.
template <typename T, int COUNT>
__global__ void max_pool2d_gather(const T* x, const int* positions, T* out, Pool pool) {
    const Place<COUNT> place(pool.rows.out, pool.columns.out, pool.channels);
    if (!place.inside) return;
    const int windows = pool.rows.out * pool.columns.out;
    const int pixels = pool.rows.size * pool.columns.size;
    const long long window = (long long)(place.row * pool.columns.out + place.column) * pool.channels;
    const T* image = place.in_image(x, pixels, pool.channels);
    int found[COUNT];
    Access<int, COUNT>::load(found, place.in_image(positions, windows, pool.channels) + window);
    T values[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const bool inside = found[i] >= 0 && found[i] < pixels;
        values[i] = inside ? image[(long long)(found[i]) * pool.channels + i] : from_float<T>(0);
    }
    Access<T, COUNT>::store(place.in_image(out, windows, pool.channels) + window, values);
}

// ---- average -----------------------------------------------------------------------------------------

// x (N, H, W, C), out (N, P, Q, C): for windows of a few pixels.
template <typename T, int COUNT>
__global__ void avg_pool2d(const T* x, T* out, Pool pool) {
    typedef typename Accumulator<T>::type Sum;
    const Place<COUNT> place(pool.rows.out, pool.columns.out, pool.channels);
    if (!place.inside) return;
    Sum sums[COUNT] = {};
    const T* image = place.in_image(x, pool.rows.size * pool.columns.size, pool.channels);
    visit_window<T, COUNT>(
        image, pool, place.row, place.column, [&](const T(&values)[COUNT], int) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) sums[i] += to_float(values[i]);
        });
    const Sum divisor = divisor_of<Sum>(pool, place.row, place.column);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sums[i] /= divisor;
    T* target = place.in_image(out, pool.rows.out * pool.columns.out, pool.channels);
    store_rounded<T, COUNT>(
        target + (long long)(place.row * pool.columns.out + place.column) * pool.channels, sums);
}

// x (N, H, W, C), out (N, P, Q, C): for windows of many pixels, the whole plane above all. A block adds up
// one window of blockDim.x packs of channels: threads of one threadIdx.y every blockDim.y-th pixel, then
// their sums in a tree, which keeps the digits of a sum of many terms.
template <typename T, int COUNT>
__global__ void __launch_bounds__(WINDOW_THREADS) avg_pool2d_large(const T* x, T* out, Pool pool) {
    typedef typename Accumulator<T>::type Sum;
    __shared__ Sum partial[COUNT][WINDOW_THREADS];
    const int windows = pool.rows.out * pool.columns.out;
    const int image = blockIdx.x / windows;
    const int p = (blockIdx.x - image * windows) / pool.columns.out;
    const int q = blockIdx.x - image * windows - p * pool.columns.out;
    const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * COUNT;
    const bool inside = channel < pool.channels;
    const Taps rows(pool.rows, p), columns(pool.columns, q);
    const int width = columns.end - columns.begin, pixels = (rows.end - rows.begin) * width;
    const T* plane = x + (long long)(image)*pool.rows.size * pool.columns.size * pool.channels + channel;
    Sum sums[COUNT] = {};
    for (int pixel = threadIdx.y; inside && pixel < pixels; pixel += blockDim.y) {
        const int line = pixel / width;
        const int h = rows.start + (rows.begin + line) * pool.rows.dilation;
        const int w = columns.start + (columns.begin + pixel - line * width) * pool.columns.dilation;
        T values[COUNT];
        Access<T, COUNT>::load(values, plane + (long long)(h * pool.columns.size + w) * pool.channels);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[i] += to_float(values[i]);
    }
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int half = blockDim.y / 2; half > 0; half /= 2) {  // blockDim.y is a power of two
#pragma unroll
        for (int i = 0; i < COUNT; ++i) partial[i][thread] = sums[i];
        __syncthreads();
        if (threadIdx.y < half) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) sums[i] += partial[i][thread + half * blockDim.x];
        }
        __syncthreads();
    }
    if (threadIdx.y != 0 || !inside) return;
    const Sum divisor = divisor_of<Sum>(pool, p, q);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sums[i] /= divisor;
    store_rounded<T, COUNT>(out + (long long)(blockIdx.x) * pool.channels + channel, sums);
}

// grad (N, P, Q, C), grad_input (N, H, W, C).
template <typename T, int COUNT>
__global__ void avg_pool2d_grad(const T* grad, T* grad_input, Pool pool) {
    typedef typename Accumulator<T>::type Sum;
    const Place<COUNT> place(pool.rows.size, pool.columns.size, pool.channels);
    if (!place.inside) return;
    const T* grads = place.in_image(grad, pool.rows.out * pool.columns.out, pool.channels);
    const Windows rows(pool.rows, place.row), columns(pool.columns, place.column);
    Sum sums[COUNT] = {};
    for (int p = rows.begin; p < rows.end; ++p) {
        if (!rows.holds(pool.rows, p)) continue;
        for (int q = columns.begin; q < columns.end; ++q) {
            if (!columns.holds(pool.columns, q)) continue;
            const Sum divisor = divisor_of<Sum>(pool, p, q);
            T values[COUNT];
            Access<T, COUNT>::load(
                values, grads + (long long)(p * pool.columns.out + q) * pool.channels);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) sums[i] += to_float(values[i]) / divisor;
        }
    }
    const int position = place.row * pool.columns.size + place.column;
    T* pixel = place.in_image(grad_input, pool.rows.size * pool.columns.size, pool.channels);
    store_rounded<T, COUNT>(pixel + (long long)(position)*pool.channels, sums);
}
