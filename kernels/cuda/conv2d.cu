// 2-D convolution, and its gradient by the input, as matrix products over pixels and channels: no columns are
// built, the loader of operand a gathers them from the image (an implicit matrix product).
//
// Both passes are one form. A target pixel (i, j) sums, over taps (a, b) and source channels,
//     weight(tap, channel, column) * source(i * scale_y + origin_y + a * tap_y, j * scale_x + origin_x + b * tap_x)
// where positions outside of the source count as 0.
//   Forward: source x, target out, scale = stride, origin = -padding, tap step = dilation.
//   Gradient by input: source grad, target grad by x. A pixel h of x is read by the tap r of window p where
//     p * stride = h + padding - r * dilation. The pixels of one residue of h + padding modulo stride are read by
//     the same taps, every dilation / gcd(dilation, stride)-th window: each residue class is a part of its own.
// Arrays are channels-last: pixels (N, H, W, channels), weights (K, R, S, C / groups).
#include <indices.cuh>
#include <tile.cuh>
#include <window.cuh>

// Target pixels that are read by the same taps. Offsets and steps are in elements.
struct Part {
    int first_block;  // of ROWS pixels
    int pixels;
    Divisor plane, line;  // pixels of an image, of a line
    int taps_y, taps_x;
    int origin_y, origin_x;
    int advance_y, advance_x, advance_channels;  // from a slab to the next, in taps and channels
    int advance_panel;                           // and, after the last tap, in channels: 0, or those of a slab
    int slabs;
    int first_tap;  // of the weight
    int first_target;
};

struct Problem {
    int height, width;   // of the source
    int pixel;           // channels of the source: from one pixel to the next
    int channels;        // that a group reads
    int padded_channels; // depth from one tap to the next
    int scale_y, scale_x;
    int step_y, step_x;  // from tap to tap, in source pixels
    int target_plane, target_line, target_pixel;  // from one target pixel of a part to the next
    int target_channels;
    int columns;  // channels of the target that a group computes
    Divisor column_blocks;
    int weight_depth;                  // forward: elements of a column's weights
    int weight_line;                   // from one source channel (forward and of relaid weights: column) to the next
    int weight_group;                  // from one group to the next
    int weight_step_y, weight_step_x;  // from tap to tap
};

constexpr int MAXIMUM_PARTS = 16;

struct ForwardProblem {
    Problem problem;
    Part part;
};

struct GradientProblem {
    Problem problem;
    int parts;
    Part part[MAXIMUM_PARTS];
};

struct WindowProblem {
    Problem problem;
    Part part;
    Window window;
};

// ---- rows of the tile: pixels ------------------------------------------------------------------------------

// Of a target pixel: the source element at its first tap, and the taps that fall inside of the source (bit a:
// lines, bit 16 + b: columns).
struct alignas(8) Row {
    int source;
    uint32_t taps;
};

constexpr int MAXIMUM_TAPS = 15;  // along an axis: bit 15 says that a tap does not exist

DEVICE uint32_t taps_inside(int position, int step, int taps, int size) {
    uint32_t inside = 0;
    for (int tap = 0; tap < taps; ++tap, position += step) inside |= uint32_t(uint32_t(position) < uint32_t(size)) << tap;
    return inside;
}

// What the threads of a block look up about the rows of its tile, in shared memory.
template <int ROWS>
struct RowTable {
    Row rows[ROWS];
    int targets[ROWS];  // the target element, -1 past the last pixel

    // Fill the table for the pixels from first_pixel on.
    DEVICE void fill(const Problem& problem, const Part& part, int first_pixel) {
        for (int row = threadIdx.x; row < ROWS; row += blockDim.x) {
            const int pixel = first_pixel + row;
            const int image = divide(pixel, part.plane);
            const int rest = pixel - image * part.plane.divisor;
            const int i = divide(rest, part.line);
            const int j = rest - i * part.line.divisor;
            const int y = i * problem.scale_y + part.origin_y;
            const int x = j * problem.scale_x + part.origin_x;
            const uint32_t taps = taps_inside(y, problem.step_y, part.taps_y, problem.height) |
                                  taps_inside(x, problem.step_x, part.taps_x, problem.width) << 16;
            const bool exists = pixel < part.pixels;
            rows[row] = {((image * problem.height + y) * problem.width + x) * problem.pixel, exists ? taps : 0};
            targets[row] = exists ? part.first_target + image * problem.target_plane + i * problem.target_line +
                                        j * problem.target_pixel
                                  : -1;
        }
        __syncthreads();
    }
};

// The same of a tile that has a window. Shared memory has room for window.rows sources.
template <int ROWS>
struct WindowTable {
    int targets[ROWS];  // the target element, -1 for a gap and past the last pixel
    int sources[1];     // of a row of the window the source element, -1 for zeros

    DEVICE void fill(const WindowProblem& given, int first_row) {
        const Problem& problem = given.problem;
        const Part& part = given.part;
        const Window& window = given.window;
        const int rows = max(ROWS, window.rows);
        for (int row = threadIdx.x; row < rows; row += blockDim.x) {
            const int pixel = first_row + row;
            const int image = divide(pixel, part.plane);
            const int rest = pixel - image * part.plane.divisor;
            const int i = divide(rest, part.line);
            const int j = rest - i * part.line.divisor;
            const int y = i - window.top, x = j - window.left;
            const bool exists = pixel < part.pixels;
            const bool inside = uint32_t(y) < uint32_t(problem.height) && uint32_t(x) < uint32_t(problem.width);
            const int source = ((image * problem.height + y) * problem.width + x) * problem.pixel;
            if (row < window.rows) sources[row] = exists && inside ? source : -1;
            const int target = image * problem.target_plane + i * problem.target_line + j * problem.target_pixel;
            if (row < ROWS) targets[row] = exists && i < window.height && j < window.width ? target : -1;
        }
        __syncthreads();
    }
};

// ---- loaders ----------------------------------------------------------------------------------------------

// The depth is taps times channels. Where a slab's are channels of one tap, the next slab is of the next tap, and all
// taps come before the next channels: what they read overlaps. Few channels fill slabs with
// several taps: from tap to tap then, as weights lie.

// Operand a: for each row, all taps of its pixel, of each tap padded_channels channels.
template <typename Slab>
struct PixelLoader {
    typedef typename Slab::T T;
    // Rows looked up together; fewer for tall slabs of float32, beside which fragments of a fill the registers.
    static constexpr int MOST_AHEAD = Slab::LINES == 256 && sizeof(T) == 4 ? 2 : 4;
    static constexpr int READ_AHEAD = Slab::COUNT < MOST_AHEAD ? Slab::COUNT : MOST_AHEAD;
    const Row* const rows;
    int a = 0, b = 0, channel;  // where this thread's chunk of the next slab starts
    const T* tap;               // the same in the source, less what row it is
    const Problem& problem;
    const Part& part;

    DEVICE PixelLoader(const T* source, const Row* rows, const Problem& problem, const Part& part)
        : rows(rows), problem(problem), part(part) {
        channel = Slab::chunk() * CHUNK<T>;
        while (channel >= problem.padded_channels) {
            channel -= problem.padded_channels;
            if (++b == part.taps_x) {
                b = 0;
                ++a;
            }
        }
        tap = source + distance(a, b, channel);
    }

    DEVICE void copy(unsigned char* slab) {
        const int line = channel < problem.channels && a < MAXIMUM_TAPS ? a : MAXIMUM_TAPS;
        const uint32_t needed = 1u << line | 0x10000u << b;
#pragma unroll
        for (int first = 0; first < Slab::COUNT; first += READ_AHEAD) {
            Row read[READ_AHEAD];
#pragma unroll
            for (int i = 0; i < READ_AHEAD; ++i) read[i] = rows[Slab::row(first + i)];
#pragma unroll
            for (int i = 0; i < READ_AHEAD; ++i) {
                const bool inside = (read[i].taps & needed) == needed;
                copy_async<CHUNK_BYTES>(Slab::destination(slab, first + i), tap + read[i].source, inside);
            }
        }
        int moved = distance(part.advance_y, part.advance_x, part.advance_channels);
        channel += part.advance_channels;
        b += part.advance_x;
        if (channel >= problem.padded_channels) {
            channel -= problem.padded_channels;
            ++b;
            moved += distance(0, 1, -problem.padded_channels);
        }
        a += part.advance_y;
        if (b >= part.taps_x) {
            b -= part.taps_x;
            ++a;
            moved += distance(1, -part.taps_x, 0);
        }
        if (part.advance_panel && a == part.taps_y) {
            a = 0;
            channel += part.advance_panel;
            moved += distance(-part.taps_y, 0, part.advance_panel);
        }
        tap += moved;
    }

private:
    // Elements of the source from one tap and channel to another.
    DEVICE int distance(int lines, int columns, int channels) const {
        return (lines * problem.step_y * problem.width + columns * problem.step_x) * problem.pixel + channels;
    }
};

// Operand b of the forward pass: the weights of a column by tap and channel, in the order of the slabs.
template <typename Slab>
struct ColumnLoader {
    typedef typename Slab::T T;
    MatrixLoader<Slab> matrix;  // of one panel of channels, if depths are in panels
    const Problem& problem;
    const Part& part;

    DEVICE ColumnLoader(const T* weight, int first_column, const Problem& problem, const Part& part)
        : matrix(weight, first_column, problem.columns, problem.weight_depth,
                 part.advance_panel ? panel_depth(part) : problem.weight_depth),
          problem(problem), part(part) {}

    DEVICE void copy(unsigned char* slab) {
        matrix.copy(slab);
        if (!part.advance_panel) return;
        matrix.address += problem.padded_channels - SLAB_DEPTH<T>;
        if (matrix.depth_left + Slab::depth(0) > 0) return;  // the same in all threads
        matrix.depth_left += panel_depth(part);
        matrix.address += SLAB_DEPTH<T> - problem.weight_depth;
    }

private:
    static DEVICE int panel_depth(const Part& part) { return part.taps_y * part.taps_x * SLAB_DEPTH<T>; }
};

// Operand b of the gradient and of tiles with windows: by source channel and column, as the gradient's weights lie or,
// DEPTHWISE, by column, tap and source channel (see relay_weight). A slab is of one tap.
template <typename Slab>
struct TapLoader {
    typedef typename Slab::T T;
    MatrixLoader<Slab> matrix;  // of one tap
    int a = 0, b = 0;
    const Problem& problem;
    const Part& part;

    DEVICE TapLoader(const T* weight, int first_column, const Problem& problem, const Part& part)
        : matrix(weight, first_column, problem.columns, problem.weight_line, problem.channels), problem(problem),
          part(part) {}

    DEVICE void copy(unsigned char* slab) {
        matrix.copy(slab);
        const long long panel = SLAB_DEPTH<T> * (long long)(Slab::LAYOUT == Layout::DEPTHWISE ? 1 : problem.weight_line);
        matrix.depth_left += SLAB_DEPTH<T>;
        matrix.address += problem.weight_step_x - panel;
        if (++b < part.taps_x) return;
        b = 0;
        matrix.address += problem.weight_step_y - part.taps_x * problem.weight_step_x;
        if (++a < part.taps_y) return;
        a = 0;
        matrix.depth_left -= SLAB_DEPTH<T>;
        matrix.address += panel - part.taps_y * problem.weight_step_y;
    }
};

// The window's rows of the next SLAB_DEPTH channels.
template <typename T>
struct WindowLoader {
    const T* source;
    const int* const sources;
    const int rows;
    int channels_left;

    DEVICE void copy(unsigned char* window) {
        const int chunk = threadIdx.x % 8, first = threadIdx.x / 8;  // row % 8 == first % 8: blocks are of 8n rows
        unsigned char* destination = window + first * SLAB_BYTES + (chunk ^ first % 8) * CHUNK_BYTES;
        const bool exists = chunk * CHUNK<T> < channels_left;
        const int step = blockDim.x / 8;
#pragma unroll 4
        for (int row = first; row < rows; row += step, destination += step * SLAB_BYTES) {
            const int pixel = sources[row];
            const bool valid = exists && pixel >= 0;
            copy_async<CHUNK_BYTES>(destination, source + (valid ? pixel + chunk * CHUNK<T> : 0), valid);
        }
        source += SLAB_DEPTH<T>;
        channels_left -= SLAB_DEPTH<T>;
    }
};

// ---- what happens to the sums -----------------------------------------------------------------------------

// Store a run of neighbouring columns, in chunks of 16 bytes; columns past the last chunk are left out.
template <typename T>
DEVICE void store_run(T* target, const float (&values)[8], int columns_left) {
#pragma unroll
    for (int chunk = 0; chunk < 8 / CHUNK<T>; ++chunk) {
        Pack<T, CHUNK<T>> pack;
#pragma unroll
        for (int v = 0; v < CHUNK<T>; ++v) pack.values[v] = from_float<T>(values[chunk * CHUNK<T> + v]);
        if (chunk * CHUNK<T> < columns_left) {
            *reinterpret_cast<Pack<T, CHUNK<T>>*>(target + chunk * CHUNK<T>) = pack;
        }
    }
}

template <typename T>
DEVICE void add_run(float (&values)[8], const T* source, int columns_left) {
#pragma unroll
    for (int chunk = 0; chunk < 8 / CHUNK<T>; ++chunk) {
        if (chunk * CHUNK<T> < columns_left) {
            const auto pack = *reinterpret_cast<const Pack<T, CHUNK<T>>*>(source + chunk * CHUNK<T>);
#pragma unroll
            for (int v = 0; v < CHUNK<T>; ++v) values[chunk * CHUNK<T> + v] += to_float(pack.values[v]);
        }
    }
}

// Comparisons with NaN are false: it stays.
DEVICE float relu_of(float value) { return value < 0 ? 0 : value; }

template <typename T>
DEVICE float read_bias(const void* bias, bool is_float, int channel) {
    return is_float ? static_cast<const float*>(bias)[channel] : to_float(static_cast<const T*>(bias)[channel]);
}

// Sum values over the 8 lanes that share lane % 4; lane 4g + t gets the sum of values[g].
DEVICE float sum_over_rows(const float (&values)[8]) {
    const int lane = threadIdx.x % 32;
    float four[4], two[2];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
        const bool upper = lane & 16;
        const float received = __shfl_xor_sync(0xffffffffu, upper ? values[v] : values[v + 4], 16);
        four[v] = (upper ? values[v + 4] : values[v]) + received;
    }
#pragma unroll
    for (int v = 0; v < 2; ++v) {
        const bool upper = lane & 8;
        const float received = __shfl_xor_sync(0xffffffffu, upper ? four[v] : four[v + 2], 8);
        two[v] = (upper ? four[v + 2] : four[v]) + received;
    }
    const bool upper = lane & 4;
    return (upper ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, upper ? two[0] : two[1], 4);
}

struct Moments {
    float mean, deviations;  // deviations: the sum of the squared ones
    float count;
};

// Bit 2 * i + half says that row_of(i, half) of the thread has a target.
template <typename Tile>
DEVICE uint32_t rows_present(const int* targets) {
    uint32_t present = 0;
#pragma unroll
    for (int i = 0; i < Tile::DOWN; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            present |= uint32_t(targets[Tile::row_of(i, half)] >= 0) << (2 * i + half);
        }
    }
    return present;
}

// Call visit(value, v, valid) for the sums of column v of the thread's runs in a block; valid: the row is present.
template <typename Tile, typename Visit>
DEVICE void for_each_sum(const Tile& tile, int block, uint32_t present, Visit visit) {
#pragma unroll
    for (int i = 0; i < Tile::DOWN; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float values[8];
            tile.get_run(i, half, block, values);
            const bool valid = present >> (2 * i + half) & 1;
#pragma unroll
            for (int v = 0; v < 8; ++v) visit(values[v], v, valid);
        }
    }
}

// Mean, deviations and count of each column over the rows that have a target, by way of those of each warp's rows:
// deviations are taken from a mean, so nothing cancels. Thread t < COLUMNS returns those of column t.
template <typename Tile>
DEVICE Moments column_moments(const Tile& tile, Moments* shared, const int* targets) {
    const int lane = Tile::lane(), warp_down = threadIdx.x / 32 / Tile::WARPS_ACROSS;
    const uint32_t present = rows_present<Tile>(targets);
    float count = __popc(present);  // of the rows of a column that the 8 lanes have which share lane % 4
    for (int bit = 4; bit < 32; bit *= 2) count += __shfl_xor_sync(0xffffffffu, count, bit);
    const float reciprocal = 1.0f / fmaxf(count, 1.0f);
#pragma unroll
    for (int block = 0; block < Tile::BLOCKS; ++block) {
        float totals[8] = {}, squares[8] = {}, means[8];
        for_each_sum(tile, block, present, [&](float value, int v, bool valid) {
            totals[v] += valid ? value : 0.0f;
        });
        const float mean = sum_over_rows(totals) * reciprocal;
#pragma unroll
        for (int v = 0; v < 8; ++v) means[v] = __shfl_sync(0xffffffffu, mean, v * 4 + lane % 4);
        for_each_sum(tile, block, present, [&](float value, int v, bool valid) {
            const float deviation = valid ? value - means[v] : 0.0f;
            squares[v] = fmaf(deviation, deviation, squares[v]);
        });
        const float deviations = sum_over_rows(squares);
        shared[warp_down * Tile::COLUMNS + Tile::column_of(block) + lane / 4] = {mean, deviations, count};
    }
    __syncthreads();
    Moments merged = {0, 0, 0};
    if (threadIdx.x >= Tile::COLUMNS) return merged;
    for (int warp = 0; warp < Tile::WARPS_DOWN; ++warp) {
        const Moments own = shared[warp * Tile::COLUMNS + threadIdx.x];
        merged.mean += own.count * own.mean;
        merged.count += own.count;
    }
    merged.mean /= fmaxf(merged.count, 1.0f);
    for (int warp = 0; warp < Tile::WARPS_DOWN; ++warp) {
        const Moments own = shared[warp * Tile::COLUMNS + threadIdx.x];
        const float difference = own.mean - merged.mean;
        merged.deviations += own.deviations + own.count * difference * difference;
    }
    return merged;
}

// Warpgroups multiply where a warp's part is wider than tall: their warps have all of the tile's columns.
template <int WARP_ROWS, int WARP_COLUMNS> constexpr bool BY_WARPGROUPS = WARP_ROWS < WARP_COLUMNS;

// Blocks that a multiprocessor holds at a time: registers suffice for so many, and shared memory not for more.
template <int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS>
constexpr int RESIDENT_BLOCKS = ROWS * COLUMNS > 128 * 128  ? 1
                                : ROWS * COLUMNS == 64 * 64 ? 4
                                : ROWS == 128 && COLUMNS == 64 && BY_WARPGROUPS<WARP_ROWS, WARP_COLUMNS> ? 3
                                                                                                         : 2;

// ---- kernels ----------------------------------------------------------------------------------------------

// Where a block works: column blocks follow one another, so that those of the same pixels run together.
template <typename Tile>
struct Place {
    int row_block, first_column, group;

    DEVICE explicit Place(const Problem& problem)
        : row_block(divide(blockIdx.x, problem.column_blocks)),
          first_column((blockIdx.x - row_block * problem.column_blocks.divisor) * Tile::COLUMNS), group(blockIdx.y) {}
};

// The tile of a convolution.
template <typename T, int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS, int STAGES, Layout LAYOUT_B,
          bool WARPGROUPS_MULTIPLY = BY_WARPGROUPS<WARP_ROWS, WARP_COLUMNS>>
struct TileFor {
    typedef Tile<T, ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS, STAGES, Layout::DEPTHWISE, LAYOUT_B> Type;
};
template <typename T, int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS, int STAGES, Layout LAYOUT_B>
struct TileFor<T, ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS, STAGES, LAYOUT_B, true> {
    static_assert(WARP_COLUMNS == COLUMNS);
    typedef WarpgroupTile<T, ROWS, COLUMNS, WARP_ROWS, STAGES, LAYOUT_B> Type;
};

// How the gradient reads weights: as they lie, but warpgroups have float32 depthwise.
template <typename T, int WARP_ROWS, int WARP_COLUMNS>
constexpr Layout WEIGHT_LAYOUT =
    BY_WARPGROUPS<WARP_ROWS, WARP_COLUMNS> && sizeof(T) == 4 ? Layout::DEPTHWISE : Layout::CROSSWISE;

// What a forward kernel makes of its sums.
template <typename T>
struct ForwardResult {
    const void* bias;
    bool bias_is_float;
    const T* residual;
    bool relu;
    T* out;
    float* partials;

    // Store the sums of rows whose targets are given: channels from first_channel + first_column on, the group's
    // first and the tile's.
    template <typename Tile>
    DEVICE void store(const Tile& tile, const int* targets, const Problem& problem, int first_channel,
                      int first_column) const {
#pragma unroll
        for (int block = 0; block < Tile::BLOCKS; ++block) {
            const int column = first_column + Tile::column_of(block);
            const int columns_left = problem.columns - column;
            float shift[8];
#pragma unroll
            for (int v = 0; v < 8; ++v) {
                const bool given = bias && v < columns_left;
                shift[v] = given ? read_bias<T>(bias, bias_is_float, first_channel + column + v) : 0.0f;
            }
            tile.for_each_run(block, [&](int row, float(&values)[8]) {
                const int pixel = targets[row];
                if (pixel < 0) return;
                const int target = pixel + first_channel + column;
#pragma unroll
                for (int v = 0; v < 8; ++v) values[v] += shift[v];
                if (residual) add_run(values, residual + target, columns_left);
#pragma unroll
                for (int v = 0; v < 8; ++v) values[v] = relu ? relu_of(values[v]) : values[v];
                store_run(out + target, values, columns_left);
            });
        }
    }

    // Store mean, deviations and count of the sums to partials; shared memory may be overwritten.
    template <typename Tile>
    DEVICE void store_moments(const Tile& tile, const int* targets, unsigned char* shared, const Problem& problem,
                              const Place<Tile>& place) const {
        __syncthreads();  // other warps have read their last slab
        const Moments moments = column_moments(tile, reinterpret_cast<Moments*>(shared), targets);
        const int column = place.first_column + threadIdx.x;
        if (threadIdx.x < Tile::COLUMNS && column < problem.columns) {
            const int channel = place.group * problem.columns + column;
            float* const target = partials + (long long)place.row_block * 3 * problem.target_channels + channel;
            target[0] = moments.mean;
            target[problem.target_channels] = moments.deviations;
            target[2 * problem.target_channels] = moments.count;
        }
    }
};

// out (N, P, Q, K) = x (N, H, W, C) * weight (K, R, S, C / groups) + bias (K) + residual (N, P, Q, K), the last
// two null or given, bias as float32 or in T. relu: negative results become 0.
// MOMENTS: each block writes mean, deviations and count of its pixels, by channel, to partials (row blocks, 3, K), of
// the sums before bias, residual, relu and rounding to T.
template <typename T, int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS, int STAGES, bool MOMENTS>
__global__ void __launch_bounds__(ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * 32,
                                  RESIDENT_BLOCKS<ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS>)
conv2d_forward(const T* __restrict__ x, const T* __restrict__ weight, const void* __restrict__ bias,
               long long bias_is_float, const T* __restrict__ residual, long long relu, T* __restrict__ out,
               float* __restrict__ partials, const __grid_constant__ ForwardProblem given) {
    typedef typename TileFor<T, ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS, STAGES, Layout::DEPTHWISE>::Type ConvTile;
    const Problem& problem = given.problem;
    const Part& part = given.part;
    unsigned char* const shared = dynamic_shared_memory<unsigned char>();
    RowTable<ROWS>& table = *reinterpret_cast<RowTable<ROWS>*>(shared + ConvTile::SHARED_BYTES);
    const Place<ConvTile> place(problem);
    table.fill(problem, part, place.row_block * ROWS);

    PixelLoader<typename ConvTile::SlabA> pixels(x + place.group * problem.channels, table.rows, problem, part);
    const int first_channel = place.group * problem.columns;  // of the group
    ColumnLoader<typename ConvTile::SlabB> weights(weight + (long long)first_channel * problem.weight_depth,
                                                   place.first_column, problem, part);
    ConvTile tile;
    tile.compute(shared, pixels, weights, part.slabs);

    const ForwardResult<T> result = {bias, bias_is_float != 0, residual, relu != 0, out, partials};
    result.store(tile, table.targets, problem, first_channel, place.first_column);
    if constexpr (MOMENTS) result.store_moments(tile, table.targets, shared, problem, place);
}

// The same for a stride of 1, from windows of x.
template <typename T, int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS, int STAGES, bool MOMENTS>
__global__ void __launch_bounds__(ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * 32,
                                  RESIDENT_BLOCKS<ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS>)
conv2d_forward_window(const T* __restrict__ x, const T* __restrict__ weight, const void* __restrict__ bias,
                      long long bias_is_float, const T* __restrict__ residual, long long relu, T* __restrict__ out,
                      float* __restrict__ partials, const __grid_constant__ WindowProblem given) {
    typedef WindowTile<T, ROWS, COLUMNS, WARP_ROWS, STAGES, Layout::DEPTHWISE> ConvTile;
    const Problem& problem = given.problem;
    unsigned char* const shared = dynamic_shared_memory<unsigned char>();
    auto& table = *reinterpret_cast<WindowTable<ROWS>*>(shared + ConvTile::shared_bytes(given.window));
    const Place<ConvTile> place(problem);
    table.fill(given, place.row_block * ROWS);

    WindowLoader<T> pixels = {x + place.group * problem.channels, table.sources, given.window.rows,
                              problem.channels};
    const int first_channel = place.group * problem.columns;  // of the group
    TapLoader<typename ConvTile::SlabB> weights(weight + (long long)place.group * problem.weight_group,
                                                place.first_column, problem, given.part);
    ConvTile tile;
    tile.compute(shared, pixels, weights, given.window, given.part.taps_y, given.part.taps_x);

    const ForwardResult<T> result = {bias, bias_is_float != 0, residual, relu != 0, out, partials};
    result.store(tile, table.targets, problem, first_channel, place.first_column);
    if constexpr (MOMENTS) result.store_moments(tile, table.targets, shared, problem, place);
}

// Store the gradient of rows whose targets are given, + onto where it is not null.
template <typename T, typename Tile>
DEVICE void store_gradient(const Tile& tile, const int* targets, const T* onto, T* out, const Problem& problem,
                           const Place<Tile>& place) {
#pragma unroll
    for (int block = 0; block < Tile::BLOCKS; ++block) {
        const int column = place.first_column + Tile::column_of(block);
        tile.for_each_run(block, [&](int row, float(&values)[8]) {
            const int pixel = targets[row];
            if (pixel < 0) return;
            const int target = pixel + place.group * problem.columns + column;
            if (onto) add_run(values, onto + target, problem.columns - column);
            store_run(out + target, values, problem.columns - column);
        });
    }
}

// out (N, H, W, C) = the gradient of the above by x, for grad (N, P, Q, K), + onto (N, H, W, C), null or given.
template <typename T, int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS, int STAGES>
__global__ void __launch_bounds__(ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * 32,
                                  RESIDENT_BLOCKS<ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS>)
conv2d_grad_input(const T* __restrict__ grad, const T* __restrict__ weight, const T* __restrict__ onto,
                  T* __restrict__ out, const __grid_constant__ GradientProblem given) {
    typedef typename TileFor<T, ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS, STAGES,
                             WEIGHT_LAYOUT<T, WARP_ROWS, WARP_COLUMNS>>::Type ConvTile;
    const Problem& problem = given.problem;
    unsigned char* const shared = dynamic_shared_memory<unsigned char>();
    RowTable<ROWS>& table = *reinterpret_cast<RowTable<ROWS>*>(shared + ConvTile::SHARED_BYTES);
    const Place<ConvTile> place(problem);
    int number = 0;
    while (number + 1 < given.parts && place.row_block >= given.part[number + 1].first_block) ++number;
    const Part& part = given.part[number];
    table.fill(problem, part, (place.row_block - part.first_block) * ROWS);

    PixelLoader<typename ConvTile::SlabA> pixels(grad + place.group * problem.channels, table.rows, problem, part);
    TapLoader<typename ConvTile::SlabB> weights(
        weight + (long long)place.group * problem.weight_group + part.first_tap,
        place.first_column, problem, part);
    ConvTile tile;
    tile.compute(shared, pixels, weights, part.slabs);
    store_gradient(tile, table.targets, onto, out, problem, place);
}

// The same for a stride of 1, from windows of grad.
template <typename T, int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS, int STAGES>
__global__ void __launch_bounds__(ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * 32,
                                  RESIDENT_BLOCKS<ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS>)
conv2d_grad_input_window(const T* __restrict__ grad, const T* __restrict__ weight, const T* __restrict__ onto,
                         T* __restrict__ out, const __grid_constant__ WindowProblem given) {
    typedef WindowTile<T, ROWS, COLUMNS, WARP_ROWS, STAGES, WEIGHT_LAYOUT<T, WARP_ROWS, WARP_COLUMNS>> ConvTile;
    const Problem& problem = given.problem;
    unsigned char* const shared = dynamic_shared_memory<unsigned char>();
    auto& table = *reinterpret_cast<WindowTable<ROWS>*>(shared + ConvTile::shared_bytes(given.window));
    const Place<ConvTile> place(problem);
    table.fill(given, place.row_block * ROWS);

    WindowLoader<T> pixels = {grad + place.group * problem.channels, table.sources, given.window.rows,
                              problem.channels};
    TapLoader<typename ConvTile::SlabB> weights(weight + (long long)place.group * problem.weight_group,
                                                place.first_column, problem, given.part);
    ConvTile tile;
    tile.compute(shared, pixels, weights, given.window, given.part.taps_y, given.part.taps_x);
    store_gradient(tile, table.targets, onto, out, problem, place);
}

// ---- moments of blocks to moments of all -------------------------------------------------------------------

// Weighted sums of many moments: in float64, where sum(square) - sum^2 / count loses nothing that float32 had.
struct Sums {
    double sum, square;
};

constexpr int MERGE_CHANNELS = 32, MERGE_ROWS = 16;  // threads of a block

// Add up all rows' sums of a column of threads, in their order.
DEVICE Sums sum_of_column(Sums own) {
    __shared__ Sums shared[MERGE_ROWS][MERGE_CHANNELS];
    shared[threadIdx.y][threadIdx.x] = own;
    __syncthreads();
    Sums total = {0, 0};
    if (threadIdx.y == 0) {
        for (int row = 0; row < MERGE_ROWS; ++row) {
            total.sum += shared[row][threadIdx.x].sum;
            total.square += shared[row][threadIdx.x].square;
        }
    }
    return total;
}

// The sums of this thread's share of the blocks first <= block < last. partials (blocks, 3, channels).
DEVICE Sums sum_of_blocks(const float* partials, int channel, int channels, int first, int last) {
    Sums sums = {0, 0};
#pragma unroll 4
    for (int block = first + threadIdx.y; block < last; block += MERGE_ROWS) {
        const float* const of_block = partials + (long long)block * 3 * channels + channel;
        const double mean = of_block[0], deviations = of_block[channels], count = of_block[2 * channels];
        sums.sum += count * mean;
        sums.square += deviations + count * mean * mean;
    }
    return sums;
}

DEVICE void finish(Sums sums, long long rows, double* mean, double* variance) {
    const double center = sums.sum / rows;
    *mean = center;
    *variance = fmax(sums.square / rows - center * center, 0.0);
}

// partials (blocks, 3, channels) to moments (2, channels). Grid: (channels / MERGE_CHANNELS).
__global__ void __launch_bounds__(MERGE_CHANNELS* MERGE_ROWS)
merge_moments(const float* __restrict__ partials, double* __restrict__ moments, long long channels,
              long long blocks, long long pixels) {
    const int channel = blockIdx.x * MERGE_CHANNELS + threadIdx.x;
    Sums sums = {0, 0};
    if (channel < channels) sums = sum_of_blocks(partials, channel, channels, 0, blocks);
    sums = sum_of_column(sums);
    if (threadIdx.y == 0 && channel < channels) finish(sums, pixels, moments + channel, moments + channels + channel);
}

// The same in two steps, for many blocks: first slices of blocks_per_slice blocks to slices (slices, channels).
// Grid: (channels / MERGE_CHANNELS, slices).
__global__ void __launch_bounds__(MERGE_CHANNELS* MERGE_ROWS)
sum_moments(const float* __restrict__ partials, double* __restrict__ slices, long long channels, long long blocks,
            long long blocks_per_slice) {
    const int channel = blockIdx.x * MERGE_CHANNELS + threadIdx.x;
    const int first = int(blockIdx.y * blocks_per_slice);
    const int last = int(min(first + blocks_per_slice, blocks));
    Sums sums = {0, 0};
    if (channel < channels) sums = sum_of_blocks(partials, channel, channels, first, last);
    sums = sum_of_column(sums);
    if (threadIdx.y == 0 && channel < channels) {
        slices[((long long)blockIdx.y * 2) * channels + channel] = sums.sum;
        slices[((long long)blockIdx.y * 2 + 1) * channels + channel] = sums.square;
    }
}

// Then slices (slices, 2, channels) to moments (2, channels). Grid: (channels / MERGE_CHANNELS).
__global__ void __launch_bounds__(MERGE_CHANNELS* MERGE_ROWS)
merge_slices(const double* __restrict__ slices, double* __restrict__ moments, long long channels,
             long long count, long long rows) {
    const int channel = blockIdx.x * MERGE_CHANNELS + threadIdx.x;
    Sums sums = {0, 0};
    for (int slice = threadIdx.y; channel < channels && slice < count; slice += MERGE_ROWS) {
        sums.sum += slices[((long long)slice * 2) * channels + channel];
        sums.square += slices[((long long)slice * 2 + 1) * channels + channel];
    }
    sums = sum_of_column(sums);
    if (threadIdx.y == 0 && channel < channels) finish(sums, rows, moments + channel, moments + channels + channel);
}

// ---- weights for warpgroups ----------------------------------------------------------------------------------

DEVICE float as_tf32(float value) {
    return __uint_as_float(round_to_tf32(__float_as_uint(value)) & 0xffffe000u);
}

// out = weight rounded to tf32.
__global__ void round_weight(const float* __restrict__ weight, float* __restrict__ out, long long size) {
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index < size) out[index] = as_tf32(weight[index]);
}

constexpr int RELAY_TILE = 32, RELAY_LINES = 8;

// out (groups, C / groups, taps, K / groups) = weight (groups, K / groups, taps, C / groups), rounded to tf32.
// Grid: (C / groups / RELAY_TILE, K / groups / RELAY_TILE, groups * taps), block: (RELAY_TILE, RELAY_LINES).
__global__ void relay_weight(const float* __restrict__ weight, float* __restrict__ out, long long taps,
                             long long sources, long long columns) {
    __shared__ float tile[RELAY_TILE][RELAY_TILE + 1];
    const long long group = blockIdx.z / taps, tap = blockIdx.z % taps;
    const long long first_column = (long long)blockIdx.x * RELAY_TILE, first_source = (long long)blockIdx.y * RELAY_TILE;
    for (int i = threadIdx.y; i < RELAY_TILE; i += RELAY_LINES) {
        const long long source = first_source + i, column = first_column + threadIdx.x;
        if (source < sources && column < columns) {
            tile[i][threadIdx.x] = as_tf32(weight[((group * sources + source) * taps + tap) * columns + column]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.y; i < RELAY_TILE; i += RELAY_LINES) {
        const long long column = first_column + i, source = first_source + threadIdx.x;
        if (source < sources && column < columns) {
            out[((group * columns + column) * taps + tap) * sources + source] = tile[threadIdx.x][i];
        }
    }
}
