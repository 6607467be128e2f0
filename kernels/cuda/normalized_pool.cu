// Batch normalization, ReLU and a max pool of 3 x 3 windows with stride 2 and padding 1, in one pass: what follows
// the first convolution of a residual network, whose images are its largest arrays. The normalized images are
// never written. Arrays are channels-last; p, q are row and column of a window, r, s those of a tap of it.
//
// Of each window's largest pixel the forward pass keeps its tap, 3 * r + s, and its value in x. As no more than
// these pixels have a gradient, its sums need not read x, and every other pixel finds out by the taps.
#include <normalization.cuh>

constexpr int SIDE = 3;                 // of a window
constexpr int WINDOW_THREADS = 224;     // of a block that makes windows: rows of 7, 14, 28, ... leave none idle
#if __CUDA_ARCH__ >= 1000  // see resident(); two of these blocks have 144 registers for a thread, which suffice
constexpr int WINDOW_BLOCKS = 1;
#else
constexpr int WINDOW_BLOCKS = 2;  // that a multiprocessor shall hold
#endif
constexpr unsigned char BLOCKED = 255;  // a tap that no pixel has: relu let nothing through

struct Images {
    int count, height, width, out_height, out_width;

    DEVICE long long pixels() const { return (long long)(count) * height * width; }
};

// The first element of a thread's pack in image `image` of an array of so many pixels an image.
template <typename T, int WIDTH>
DEVICE T* in_image(T* array, int image, int pixels, const Column<WIDTH>& column) {
    return array + (long long)(image) * pixels * column.channels + column.channel;
}

template <typename T, int WIDTH>
DEVICE Pack<T, WIDTH> load_pack(const T* from) {
    return *reinterpret_cast<const Pack<T, WIDTH>*>(from);
}

template <typename T, int WIDTH>
DEVICE void store_pack(T* to, const Pack<T, WIDTH>& pack) {
    *reinterpret_cast<Pack<T, WIDTH>*>(to) = pack;
}

// Calls visit(image, p, q) for the windows of a thread. Blocks of one blockIdx.x take rows of windows by turns, a
// thread every blockDim.y-th window of a row; UP, from the last row on.
template <bool UP, int WIDTH, typename Visit>
DEVICE void for_each_window(const Images& images, const Column<WIDTH>& column, Visit visit) {
    if (!column.inside) return;
    const int rows = images.count * images.out_height;
    for (int index = blockIdx.y; index < rows; index += gridDim.y) {
        const int row = UP ? rows - 1 - index : index;
        const int image = row / images.out_height;
        for (int q = threadIdx.y; q < images.out_width; q += blockDim.y) {
            visit(image, row - image * images.out_height, q);
        }
    }
}

// ---- forward -------------------------------------------------------------------------------------------------

DEVICE float with_sign_of(float scale, float x) {
    return __uint_as_float(__float_as_uint(x) ^ (__float_as_uint(scale) & 0x80000000u));
}
DEVICE double with_sign_of(double scale, double x) { return scale < 0 ? -x : x; }

// A window's pixels that normalization makes the largest: those of the largest x or, where scale is negative, of
// the smallest; the first of equal ones, of nan the last.
template <typename T, int WIDTH>
struct Peak {
    Sum<T> keys[WIDTH];  // x, or -x where scale is negative
    int taps[WIDTH];

    DEVICE void find(const Images& images, const T* image, int p, int q, const Sum<T> (&scale)[WIDTH], int channels) {
        Pack<T, WIDTH> packs[SIDE][SIDE];
        bool holds[SIDE][SIDE];
#pragma unroll
        for (int r = 0; r < SIDE; ++r) {
#pragma unroll
            for (int s = 0; s < SIDE; ++s) {
                const int h = 2 * p - 1 + r, w = 2 * q - 1 + s;
                holds[r][s] = unsigned(h) < unsigned(images.height) && unsigned(w) < unsigned(images.width);
                if (holds[r][s]) packs[r][s] = load_pack<T, WIDTH>(image + (h * images.width + w) * channels);
            }
        }
        bool empty = true;
#pragma unroll
        for (int r = 0; r < SIDE; ++r) {
#pragma unroll
            for (int s = 0; s < SIDE; ++s) {
                if (!holds[r][s]) continue;
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) {
                    const Sum<T> key = with_sign_of(scale[i], to_float(packs[r][s].values[i]));
                    const bool wins = empty || key > keys[i] || key != key;
                    keys[i] = wins ? key : keys[i];
                    taps[i] = wins ? SIDE * r + s : taps[i];
                }
                empty = false;
            }
        }
    }
};

template <typename T>
DEVICE T relu_rounded(Sum<T> value) {
    return from_float<T>(value < 0 ? 0 : value);  // nan passes
}

// x (N, H, W, C); out, peaks and taps (N, P, Q, C). Vectors are those of batch_norm_apply.
template <typename T, typename P, typename Moment, int WIDTH>
__global__ void __launch_bounds__(WINDOW_THREADS, WINDOW_BLOCKS)
batch_norm_max_pool(const T* x, T* out, T* peaks, unsigned char* taps, const Moment* mean, const Moment* var,
                    Sum<T>* kept_mean, const P* weight, const P* bias, Sum<T>* inv_std, P* running_mean,
                    P* running_var, long long* batches, Images images, long long channels, double eps,
                    double momentum) {
    const Column<WIDTH> column(images.pixels(), channels);
    Affine<Sum<T>, WIDTH> affine;
    Sum<T> variance[WIDTH];
    load_vector(affine.center, mean, column, Sum<T>(0));
    load_vector(variance, var, column, Sum<T>(0));
    const Statistics<Sum<T>, P> statistics{kept_mean, inv_std, running_mean, running_var, batches, momentum};
    normalize(affine, variance, weight, bias, eps, statistics, column);
    for_each_window<true>(images, column, [&](int image, int p, int q) {
        Peak<T, WIDTH> peak;
        const T* plane = in_image(x, image, images.height * images.width, column);
        peak.find(images, plane, p, q, affine.scale, column.channels);
        Pack<T, WIDTH> values, largest;
        Pack<unsigned char, WIDTH> winners;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            const Sum<T> value = with_sign_of(affine.scale[i], peak.keys[i]);
            values.values[i] = from_float<T>(value);  // exact
            largest.values[i] = relu_rounded<T>(affine.of(value, i));
            winners.values[i] = to_float(largest.values[i]) != 0 ? peak.taps[i] : BLOCKED;
        }
        const int windows = images.out_height * images.out_width;
        const int offset = (p * images.out_width + q) * column.channels;
        store_pack(in_image(out, image, windows, column) + offset, largest);
        store_pack(in_image(peaks, image, windows, column) + offset, values);
        store_pack(in_image(taps, image, windows, column) + offset, winners);
    });
}

// ---- backward ------------------------------------------------------------------------------------------------

// Leave a block's sums of grad (rows, channels), behind relu, in parts (gridDim.y, channels): rows are windows.
template <typename T, typename P, int WIDTH>
__global__ void __launch_bounds__(THREADS, resident(WIDTH))
batch_norm_max_pool_grad_sums(const T* grad, const T* peaks, const Sum<T>* mean, const Sum<T>* inv_std,
                              const P* weight, const P* bias, GradSums<Sum<T>>* parts, long long rows,
                              long long channels) {
    constexpr int AT_ONCE = 2;
    __shared__ GradSums<Sum<T>> shared[WIDTH][THREADS];
    const Column<WIDTH> column(rows, channels);
    Affine<Sum<T>, WIDTH> affine;
    Sum<T> scale[WIDTH];
    load_vector(affine.center, mean, column, Sum<T>(0));
    load_vector(affine.scale, weight, column, Sum<T>(1));
    load_vector(affine.shift, bias, column, Sum<T>(0));
    load_vector(scale, inv_std, column, Sum<T>(0));
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) affine.scale[i] *= scale[i];
    GradSums<Sum<T>> sums[WIDTH] = {};
    for_each_share<AT_ONCE, true>(column, [&](const auto& share) {
        Pack<T, WIDTH> grads[AT_ONCE], packs[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (!share.has(k)) continue;
            grads[k] = share.load(grad, k);
            packs[k] = share.load(peaks, k);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (!share.has(k)) continue;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                const Sum<T> value = to_float(packs[k].values[i]);
                if (to_float(relu_rounded<T>(affine.of(value, i))) == 0) continue;
                sums[i].add(to_float(grads[k].values[i]), value - affine.center[i]);
            }
        }
    });
    merge_rows(sums, shared);
    if (threadIdx.y != 0 || !column.inside) return;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) parts[blockIdx.y * channels + column.channel + i] = sums[i];
}

// The gradients of 2 x 2 pixels, (2p, 2q) to (2p + 1, 2q + 1): windows (p, q) to (p + 1, q + 1) are those that read
// them. grad and taps (N, P, Q, C), x and grad_x (N, H, W, C), sums (2, C) those of batch_norm_grad_merge.
template <typename T, typename P, int WIDTH>
__global__ void __launch_bounds__(WINDOW_THREADS, WINDOW_BLOCKS)
batch_norm_max_pool_grad_apply(const T* grad, const unsigned char* taps, const T* x, const P* weight,
                               const Sum<T>* mean, const Sum<T>* inv_std, const Sum<T>* sums, T* grad_x,
                               Images images, long long channels) {
    const Column<WIDTH> column(images.pixels(), channels);
    GradAffine<T, WIDTH> affine;
    Sum<T> total[WIDTH], grad_weight[WIDTH], scale[WIDTH];
    load_vector(affine.center, mean, column, Sum<T>(0));
    load_vector(scale, inv_std, column, Sum<T>(0));
    load_vector(total, sums, column, Sum<T>(0));
    load_vector(grad_weight, sums + channels, column, Sum<T>(0));
    affine.set(total, grad_weight, scale, weight, column);
    for_each_window<false>(images, column, [&](int image, int p, int q) {
        const int windows = images.out_height * images.out_width, pixels = images.height * images.width;
        const T* grads = in_image(grad, image, windows, column);
        const unsigned char* winners = in_image(taps, image, windows, column);
        const T* plane = in_image(x, image, pixels, column);
        Pack<T, WIDTH> given[2][2], packs[2][2];
        Pack<unsigned char, WIDTH> won[2][2];
        bool holds[2][2];  // pixels
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int h = 2 * p + i, w = 2 * q + j;
                holds[i][j] = h < images.height && w < images.width;
                if (holds[i][j]) packs[i][j] = load_pack<T, WIDTH>(plane + (h * images.width + w) * column.channels);
                const bool exists = p + i < images.out_height && q + j < images.out_width;
                const int window = ((p + i) * images.out_width + q + j) * column.channels;
#pragma unroll
                for (int c = 0; c < WIDTH; ++c) won[i][j].values[c] = BLOCKED;
                if (!exists) continue;
                given[i][j] = load_pack<T, WIDTH>(grads + window);
                won[i][j] = load_pack<unsigned char, WIDTH>(winners + window);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (!holds[i][j]) continue;
#pragma unroll
                for (int c = 0; c < WIDTH; ++c) {
                    Sum<T> passed = 0;
#pragma unroll
                    for (int u = 0; u <= i; ++u) {
#pragma unroll
                        for (int v = 0; v <= j; ++v) {
                            // the pixel's tap in window (p + u, q + v): row i + 1 - 2u, column j + 1 - 2v
                            const int tap = SIDE * (i + 1 - 2 * u) + (j + 1 - 2 * v);
                            if (won[u][v].values[c] == tap) passed += to_float(given[u][v].values[c]);
                        }
                    }
                    packs[i][j].values[c] = from_float<T>(affine.of(passed, to_float(packs[i][j].values[c]), c));
                }
                const long long pixel = (long long)((2 * p + i) * images.width + 2 * q + j) * column.channels;
                store_pack(in_image(grad_x, image, pixels, column) + pixel, packs[i][j]);
            }
        }
    });
}
