// Arrays copied into other memory layouts and element types. Planes are what a channel has of an image.
#include <elements.cuh>
#include <indices.cuh>

// double becomes a 16-bit type by way of float, rounded twice.
template <typename To, typename From>
DEVICE To convert(From value) {
    return from_float<To>(typename Accumulator<To>::type(to_float(value)));
}

// ---- images ------------------------------------------------------------------------------------------

// Elements from one image, channel, row or column of x (N, C, H, W) to the next.
struct Strides {
    long long image, channel, row, column;
};

// x (N, C, H, W) in any memory, out (N, H, W, COUNT): a thread makes all channels of a pixel, those that x
// does not have as zeros. COUNT is a power of two.
template <typename From, typename To, int COUNT>
__global__ void pack_pixels(const From* x, To* out, Strides strides, long long channels,
                            long long height, long long width, long long pixels) {
    const long long pixel = thread_number();
    if (pixel >= pixels) return;
    const long long line = quotient(pixel, width), image = quotient(line, height);
    const From* source = x + image * strides.image + (line - image * height) * strides.row +
                         (pixel - line * width) * strides.column;
    Pack<To, COUNT> pack;
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
        pack.values[c] = c < channels ? convert<To>(source[c * strides.channel]) : from_float<To>(0);
    }
    *reinterpret_cast<Pack<To, COUNT>*>(out + pixel * COUNT) = pack;
}

// x (N, C, H, W) in any memory, out (N, H, W, padded): a thread makes one element.
template <typename From, typename To>
__global__ void gather_pixels(const From* x, To* out, Strides strides, long long channels,
                              long long height, long long width, long long padded, long long size) {
    const long long element = thread_number();
    if (element >= size) return;
    const long long pixel = quotient(element, padded), channel = element - pixel * padded;
    const long long line = quotient(pixel, width), image = quotient(line, height);
    const From* source = x + image * strides.image + (line - image * height) * strides.row +
                         (pixel - line * width) * strides.column + channel * strides.channel;
    out[element] = channel < channels ? convert<To>(*source) : from_float<To>(0);
}

constexpr int TILE = 32;

// x (images, rows, columns), out (images, columns, padded): each matrix transposed, its new columns filled
// up with zeros. A block of TILE x LINES threads moves a tile through shared memory, so that both sides are
// accessed along their rows.
template <typename From, typename To>
__global__ void transpose_matrices(const From* x, To* out, long long images, long long rows,
                                   long long columns, long long padded) {
    __shared__ typename Accumulator<From>::type tile[TILE][TILE + 1];  // + 1: no two in one bank
    const long long across = (columns + TILE - 1) / TILE;
    const long long first_row = quotient(blockIdx.x, across) * TILE;
    const long long first_column = (blockIdx.x - first_row / TILE * across) * TILE;
    for (long long image = blockIdx.y; image < images; image += gridDim.y) {
        const From* source = x + image * rows * columns;
        To* target = out + image * columns * padded;
        for (int i = threadIdx.y; i < TILE; i += blockDim.y) {
            const long long row = first_row + i, column = first_column + threadIdx.x;
            const bool inside = row < rows && column < columns;
            tile[i][threadIdx.x] = inside ? to_float(source[row * columns + column]) : 0;
        }
        __syncthreads();
        for (int i = threadIdx.y; i < TILE; i += blockDim.y) {
            const long long row = first_row + threadIdx.x, column = first_column + i;
            if (row < padded && column < columns) {
                target[column * padded + row] =
                    from_float<To>(typename Accumulator<To>::type(tile[threadIdx.x][i]));
            }
        }
        __syncthreads();
    }
}

// ---- many arrays at once -----------------------------------------------------------------------------

constexpr int MOST_ARRAYS = 96;  // their table is an argument of the kernel, which has 4096 bytes
constexpr int CAST_THREADS = 256;
constexpr int CAST_PACKS = 4;  // of a thread, each of 16 bytes of the larger type

struct CastTable {
    uint64_t from[MOST_ARRAYS];  // addresses
    uint64_t to[MOST_ARRAYS];
    long long sizes[MOST_ARRAYS];
    int first_blocks[MOST_ARRAYS];  // the number of the first block of each array
    int arrays;
};

// Converts arrays in the order of memory. A block makes CAST_THREADS * CAST_PACKS packs of one array.
template <typename From, typename To>
__global__ void __launch_bounds__(CAST_THREADS) cast_arrays(const CastTable table) {
    constexpr int COUNT = 16 / (sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To));
    int array = 0, end = table.arrays;
    while (end - array > 1) {  // the last array whose first block is not after this one
        const int middle = (array + end) / 2;
        (table.first_blocks[middle] <= int(blockIdx.x) ? array : end) = middle;
    }
    const From* from = reinterpret_cast<const From*>(table.from[array]);
    To* to = reinterpret_cast<To*>(table.to[array]);
    const long long size = table.sizes[array];
    const bool packed = is_aligned(from) && is_aligned(to);
    const long long block = blockIdx.x - table.first_blocks[array];
#pragma unroll
    for (int pack = 0; pack < CAST_PACKS; ++pack) {
        const long long first = ((block * CAST_PACKS + pack) * CAST_THREADS + threadIdx.x) * COUNT;
        if (packed && first + COUNT <= size) {
            const auto values = *reinterpret_cast<const Pack<From, COUNT>*>(from + first);
            Pack<To, COUNT> converted;
#pragma unroll
            for (int i = 0; i < COUNT; ++i) converted.values[i] = convert<To>(values.values[i]);
            *reinterpret_cast<Pack<To, COUNT>*>(to + first) = converted;
        } else {
            for (long long i = first; i < min(first + COUNT, size); ++i) to[i] = convert<To>(from[i]);
        }
    }
}
