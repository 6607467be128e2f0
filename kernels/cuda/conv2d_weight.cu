// The gradient of 2-D convolution by the weight, on tensor cores:
//     out(k, tap, c) = sum over output pixels of grad(pixel, k) * x(the pixel that the tap reads, c)
// a matrix product whose depth, all output pixels, is much larger than its result. Blocks therefore share the
// pixels in slices; each writes its sums in float32 to partials, which slices.cu adds up in a fixed order.
// Arrays are channels-last. Rows of the product are output channels k, columns are (tap, c).
//
//   window_grad_weight  stages patches of neighbouring pixels in shared memory and reads from there for all
//                       taps: every pixel of x comes from global memory about once, not once for each tap.
//   gather_grad_weight  is an ordinary tiled product whose loader gathers the pixels of each tap: for pointwise
//                       convolutions, groups, and few channels.
#include <pixels.cuh>
#include <tile.cuh>

// ---- windows on patches ------------------------------------------------------------------------------------

// A patch is images x rows x columns of output pixels, and the pixels of x that their taps read.
struct Window {
    int batch, height, width, channels;        // of x
    int out_height, out_width, out_channels;
    int kernel_width, taps;
    int stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
    int images, rows, columns;                 // of a patch
    int row_blocks, column_blocks, patches;    // that cover the output
    int source_rows, source_columns;           // of x, for one image of a patch
    int padded_pixels, source_pixels;          // of a patch: of the output, rounded up, and of x
    int stage_bytes;                           // of shared memory that a patch takes
    // Where shared memory has them, in pixels: columns that lie stride_x apart are adjacent, the columns of the
    // next residue follow phase_pitch on.
    int phase_pitch, row_pitch, image_pitch;
    int slice_patches;
};

// Row, column and image of a pixel within a patch; packed, 10 bits each.
struct Spot {
    int image, row, column;

    DEVICE Spot(int number, int rows, int columns) {
        column = number % columns;
        row = number / columns % rows;
        image = number / columns / rows;
    }
    DEVICE explicit Spot(int packed) : image(packed >> 20), row(packed >> 10 & 1023), column(packed & 1023) {}
    DEVICE int packed() const { return image << 20 | row << 10 | column; }
};

struct SourcePixel {
    int spot, element;  // element of x, from the patch's first pixel on
    int byte;           // in shared memory
};

struct TargetPixel {
    int spot, element;  // of grad; -1 past the patch's last pixel
    int byte;           // in shared memory, of the pixel of x that tap 0 reads
};

// `CHANNELS` channels of x and 64 of grad; a warp computes all 64 rows of GROUPS groups of 8 columns.
template <typename Element, int CHANNELS, int GROUPS>
struct WindowTile {
    typedef Element T;
    static constexpr int ROWS = 64, WARPS = 8, THREADS = WARPS * 32;
    static constexpr int TAPS = WARPS * GROUPS / (CHANNELS / 8);  // of a block, at most
    static constexpr int DEPTH = 32 / sizeof(T);  // pixels that one instruction takes
    static constexpr int DOWN = ROWS / 16;
#if __CUDA_ARCH__ >= 800
    static constexpr int BLOCKS = GROUPS <= 4 ? 2 : 1;  // that share a multiprocessor
#else
    static constexpr int BLOCKS = 1;
#endif
    // A pixel's channels, and what keeps those that are read together from sharing banks: of 16-bit elements
    // 8 pixels x 16 bytes (ldmatrix), of float32 4 pixels x 32 bytes.
    static constexpr int PAD = sizeof(T) == 2 ? 16 : 32;
    static constexpr int GRAD_PITCH = ROWS * sizeof(T) + PAD;
    static constexpr int X_PITCH = CHANNELS == 8 ? 8 * sizeof(T) : CHANNELS * sizeof(T) + PAD;

    const Window& window;
    unsigned char* const shared;  // two stages, then tables
    int first_row, first_channel, first_tap, tap_count;

    float sums[DOWN][GROUPS][4];

    DEVICE explicit WindowTile(const Window& window)
        : window(window), shared(dynamic_shared_memory<unsigned char>()) {
        const int row_blocks = (window.out_channels + ROWS - 1) / ROWS;
        const int channel_blocks = (window.channels + CHANNELS - 1) / CHANNELS;
        first_row = int(blockIdx.x) % row_blocks * ROWS;
        first_channel = int(blockIdx.x) / row_blocks % channel_blocks * CHANNELS;
        first_tap = int(blockIdx.x) / row_blocks / channel_blocks * TAPS;
        tap_count = min(window.taps - first_tap, TAPS);
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
#pragma unroll
            for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
                for (int element = 0; element < 4; ++element) sums[i][group][element] = 0;
            }
        }
    }

    static DEVICE int lane() { return threadIdx.x % 32; }
    static DEVICE int warp() { return threadIdx.x / 32; }

    // Of a stage, the pixels of grad come first.
    DEVICE int grad_bytes() const { return window.padded_pixels * GRAD_PITCH; }
    DEVICE TargetPixel* targets() const {
        return reinterpret_cast<TargetPixel*>(shared + 2 * window.stage_bytes);
    }
    DEVICE SourcePixel* sources() const {
        return reinterpret_cast<SourcePixel*>(targets() + window.padded_pixels);
    }

    // ---- copying ----

    // Fill the tables of a patch's pixels, the same for all patches.
    DEVICE void make_tables() {
        const int pixels = window.images * window.rows * window.columns;
        for (int number = threadIdx.x; number < window.padded_pixels; number += THREADS) {
            // what pads the patch has grad 0 and reads x somewhere: at the last pixel
            const Spot spot(min(number, pixels - 1), window.rows, window.columns);
            const int row = spot.image * window.image_pitch + spot.row * window.stride_y * window.row_pitch;
            const int element = ((spot.image * window.out_height + spot.row) * window.out_width + spot.column) *
                                window.out_channels;
            targets()[number] = {spot.packed(), number < pixels ? element : -1, (row + spot.column) * X_PITCH};
        }
        for (int number = threadIdx.x; number < window.source_pixels; number += THREADS) {
            const Spot spot(number, window.source_rows, window.source_columns);
            const int row = spot.image * window.image_pitch + spot.row * window.row_pitch;
            const int phase = spot.column % window.stride_x * window.phase_pitch;
            const int element =
                ((spot.image * window.height + spot.row) * window.width + spot.column) * window.channels;
            sources()[number] = {spot.packed(), element, (row + phase + spot.column / window.stride_x) * X_PITCH};
        }
    }

    // The copies of one patch that this thread issues, some at a time: first of grad, then of x.
    struct Copies {
        unsigned char* stage;
        int images_left, row, column;  // of the output, at the patch's first pixel
        int target, source;            // the next ones
    };

    DEVICE Copies copies_of(int patch, unsigned char* stage) const {
        const int across = patch / window.column_blocks;
        return {stage,
                window.batch - across / window.row_blocks * window.images,
                across % window.row_blocks * window.rows,
                patch % window.column_blocks * window.columns,
                int(threadIdx.x) / GRAD_CHUNKS,
                int(threadIdx.x) / X_CHUNKS};
    }

    // Issue the next one. Returns false when all are.
    DEVICE bool copy_next(Copies& copies, const T* grad, const T* x) const {
        if (copies.target < window.padded_pixels) {
            copy_grad(copies, grad);
            copies.target += THREADS / GRAD_CHUNKS;
        } else if (copies.source < window.source_pixels) {
            copy_x(copies, x);
            copies.source += THREADS / X_CHUNKS;
        } else {
            return false;
        }
        return true;
    }

    static constexpr int GRAD_CHUNKS = ROWS / CHUNK<T>, X_CHUNKS = CHANNELS / CHUNK<T>;  // of a pixel

    DEVICE void copy_grad(const Copies& copies, const T* grad) const {
        const TargetPixel target = targets()[copies.target];
        const Spot spot(target.spot);
        const int channel = threadIdx.x % GRAD_CHUNKS * CHUNK<T>;
        const bool valid = first_row + channel < window.out_channels && target.element >= 0 &&
                           spot.image < copies.images_left && copies.row + spot.row < window.out_height &&
                           copies.column + spot.column < window.out_width;
        const long long line = (long long)(window.batch - copies.images_left) * window.out_height + copies.row;
        const T* const source = grad + (line * window.out_width + copies.column) * window.out_channels + first_row +
                                channel + target.element;
        copy_async<CHUNK_BYTES>(copies.stage + copies.target * GRAD_PITCH + channel * sizeof(T), valid ? source : grad,
                                valid);
    }

    DEVICE void copy_x(const Copies& copies, const T* x) const {
        const SourcePixel pixel = sources()[copies.source];
        const Spot spot(pixel.spot);
        const int row = copies.row * window.stride_y - window.padding_y;
        const int column = copies.column * window.stride_x - window.padding_x;
        const int channel = threadIdx.x % X_CHUNKS * CHUNK<T>;
        const bool valid = first_channel + channel < window.channels && spot.image < copies.images_left &&
                           unsigned(row + spot.row) < unsigned(window.height) &&
                           unsigned(column + spot.column) < unsigned(window.width);
        const long long line = (long long)(window.batch - copies.images_left) * window.height + row;
        const T* const source =
            x + (line * window.width + column) * window.channels + first_channel + channel + pixel.element;
        copy_async<CHUNK_BYTES>(copies.stage + grad_bytes() + pixel.byte + channel * sizeof(T), valid ? source : x,
                                valid);
    }

    // ---- multiplying ----

    // The block's groups of columns, dealt to the warps: all taps of 8 channels, then of the next 8.
    DEVICE int group_number(int group) const { return warp() * GROUPS + group; }
    DEVICE bool group_exists(int number) const { return number < CHANNELS / 8 * tap_count; }
    DEVICE int tap_of(int number) const { return first_tap + number % tap_count; }
    DEVICE int channel_of(int number) const { return number / tap_count * 8; }

    // Where a group's elements lie, from those of tap 0 and channel 0 on; groups that do not exist read the first.
    DEVICE int group_offset(int group) const {
        const int number = group_exists(group_number(group)) ? group_number(group) : 0;
        const int tap = tap_of(number), down = tap / window.kernel_width * window.dilation_y;
        const int right = tap % window.kernel_width * window.dilation_x;
        const int phase = right % window.stride_x * window.phase_pitch;
        const int pixel = down * window.row_pitch + phase + right / window.stride_x;
        return pixel * X_PITCH + channel_of(number) * int(sizeof(T));
    }

    // For the loads of this lane: float32 of all groups, 16-bit elements of every second group, the lane's half.
    static constexpr int LOADS = sizeof(T) == 2 ? (GROUPS + 1) / 2 : GROUPS;

    DEVICE void make_offsets(int (&offsets)[LOADS]) const {
#pragma unroll
        for (int load = 0; load < LOADS; ++load) {
            if constexpr (sizeof(T) == 2) {
                offsets[load] = group_offset(min(2 * load + lane() / 16, GROUPS - 1));
            } else {
                offsets[load] = group_offset(load) + lane() / 4 * int(sizeof(T));
            }
        }
    }

    // Add the products of DEPTH pixels from `pixel` on.
    DEVICE void multiply(const unsigned char* stage, int pixel, const int (&offsets)[LOADS]) {
        if (!group_exists(group_number(0))) return;  // the same for all lanes
        const unsigned char* const grad = stage + pixel * GRAD_PITCH;
        const unsigned char* const x = stage + grad_bytes();
        if constexpr (sizeof(T) == 2) {
            multiply_halves(grad, x + targets()[pixel + lane() % 16].byte, offsets);
        } else {
            multiply_floats(grad, x + targets()[pixel + lane() % 4].byte, x + targets()[pixel + 4 + lane() % 4].byte,
                            offsets);
        }
    }

    // 16-bit elements: ldmatrix transposes, as both operands have pixels one below the other.
    DEVICE void multiply_halves(const unsigned char* grad, const unsigned char* x, const int (&offsets)[LOADS]) {
        uint32_t a[DOWN][4];
        const unsigned char* const row = grad + (lane() / 16 * 8 + lane() % 8) * GRAD_PITCH + lane() / 8 % 2 * 16;
#pragma unroll
        for (int i = 0; i < DOWN; ++i) load_matrices_transposed(a[i], row + i * 32);
#pragma unroll
        for (int load = 0; load < LOADS; ++load) {
            uint32_t pair[4];
            load_matrices_transposed(pair, x + offsets[load]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int group = 2 * load + half;
                if (group >= GROUPS) continue;
                const uint32_t b[2] = {pair[2 * half], pair[2 * half + 1]};
#pragma unroll
                for (int i = 0; i < DOWN; ++i) TensorCore<T>::multiply(sums[i][group], a[i], b);
            }
        }
    }

    // float32: four rows 4g to 4g + 3 of 32 come by one load; see row_of for the rows they become.
    DEVICE void multiply_floats(const unsigned char* grad, const unsigned char* x, const unsigned char* x_later,
                                const int (&offsets)[LOADS]) {
        uint32_t a[DOWN][4];
        const unsigned char* const row = grad + lane() % 4 * GRAD_PITCH + lane() / 4 * 16;
#pragma unroll
        for (int i = 0; i < DOWN; i += 2) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 four = *reinterpret_cast<const uint4*>(row + half * 4 * GRAD_PITCH + i * 64);
                a[i][2 * half] = TensorCore<T>::prepare(four.x);
                a[i][2 * half + 1] = TensorCore<T>::prepare(four.y);
                a[i + 1][2 * half] = TensorCore<T>::prepare(four.z);
                a[i + 1][2 * half + 1] = TensorCore<T>::prepare(four.w);
            }
        }
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            const uint32_t b[2] = {
                TensorCore<T>::prepare(*reinterpret_cast<const uint32_t*>(x + offsets[group])),
                TensorCore<T>::prepare(*reinterpret_cast<const uint32_t*>(x_later + offsets[group]))};
#pragma unroll
            for (int i = 0; i < DOWN; ++i) TensorCore<T>::multiply(sums[i][group], a[i], b);
        }
    }

    // The row of sums[i][..][2 * half] and the next.
    static DEVICE int row_of(int i, int half) {
        if constexpr (sizeof(T) == 4) return i / 2 * 32 + lane() / 4 * 4 + i % 2 * 2 + half;
        return i * 16 + half * 8 + lane() / 4;
    }

    // Write the sums to partials (out_channels, taps, channels) of the block's slice.
    DEVICE void store(float* partials) const {
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            const int number = group_number(group);
            const int channel = first_channel + channel_of(number) + lane() % 4 * 2;
            if (!group_exists(number) || channel >= window.channels) continue;
#pragma unroll
            for (int i = 0; i < DOWN; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = first_row + row_of(i, half);
                    if (row >= window.out_channels) continue;
                    float* const target = partials + ((long long)row * window.taps + tap_of(number)) * window.channels;
                    const float* const pair = &sums[i][group][2 * half];
                    *reinterpret_cast<float2*>(target + channel) = make_float2(pair[0], pair[1]);
                }
            }
        }
    }
};

constexpr int COPIES_AT_ONCE = 3;

// The grid is (row blocks x channel blocks x tap blocks, slices); partials are (slices, out_channels, taps,
// channels).
template <typename T, int CHANNELS, int GROUPS>
__global__ void __launch_bounds__(WindowTile<T, CHANNELS, GROUPS>::THREADS, WindowTile<T, CHANNELS, GROUPS>::BLOCKS)
window_grad_weight(const T* __restrict__ grad, const T* __restrict__ x, float* __restrict__ partials,
                   const __grid_constant__ Window window) {
    WindowTile<T, CHANNELS, GROUPS> tile(window);
    tile.make_tables();
    __syncthreads();
    int offsets[WindowTile<T, CHANNELS, GROUPS>::LOADS];
    tile.make_offsets(offsets);

    const int first = int(blockIdx.y) * window.slice_patches;
    const int end = min(first + window.slice_patches, window.patches);
    unsigned char* reading = tile.shared;
    unsigned char* writing = tile.shared + window.stage_bytes;
    auto copies = tile.copies_of(first, reading);
    while (tile.copy_next(copies, grad, x)) {}
    for (int patch = first; patch < end; ++patch) {
        commit_copies();
        wait_copies<0>();
        __syncthreads();  // the patch has landed, and nobody reads the one before any more
        copies = tile.copies_of(patch + 1, writing);
        for (int pixel = 0; pixel < window.padded_pixels; pixel += tile.DEPTH) {
            if (patch + 1 < end) {  // early, a few at a time: they need no time of their own
#pragma unroll 1
                for (int i = 0; i < COPIES_AT_ONCE; ++i) tile.copy_next(copies, grad, x);
            }
            tile.multiply(reading, pixel, offsets);
        }
        if (patch + 1 < end) {
            while (tile.copy_next(copies, grad, x)) {}
        }
        unsigned char* const next = writing;
        writing = reading;
        reading = next;
    }
    tile.store(partials + (long long)blockIdx.y * window.out_channels * window.taps * window.channels);
}

// ---- gathered pixels ---------------------------------------------------------------------------------------

struct Gather {
    int height, width, channels;  // of x
    int out_height, out_width, out_channels;
    int kernel_width, taps, groups;
    int stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
    int pixels, slice_pixels;     // of the output, of all images

    DEVICE int group_inputs() const { return channels / groups; }
    DEVICE int group_outputs() const { return out_channels / groups; }
    DEVICE int columns() const { return taps * group_inputs(); }
};

// Operand b, CROSSWISE: lines are (tap, channel), the depth is output pixels.
template <typename Slab>
struct TapLoader {
    typedef typename Slab::T T;
    static constexpr int DEPTHS = SLAB_DEPTH<T> / Slab::STEP;  // of a slab, that this thread copies
    static constexpr int PANELS = Slab::COUNT / DEPTHS;
    static_assert(Slab::STEP <= SLAB_DEPTH<T>);

    const T* const x;  // of the group
    const Gather& problem;
    Digits pixel;  // image, row, column of the first depth
    int pixels_left;
    int down[PANELS], right[PANELS], channel[PANELS];

    DEVICE TapLoader(const T* x, const Gather& problem, int first_line, int first_pixel, int end_pixel)
        : x(x), problem(problem),
          pixel(first_pixel + Slab::depth(0), Slab::STEP, problem.out_height, problem.out_width),
          pixels_left(end_pixel - first_pixel - Slab::depth(0)) {
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel) {
            // past the end any line does: the last chunk is read once more
            const int line = min(first_line + Slab::line(panel * DEPTHS), problem.columns() - CHUNK<T>);
            const int tap = line / problem.group_inputs();
            channel[panel] = line - tap * problem.group_inputs();
            down[panel] = tap / problem.kernel_width * problem.dilation_y - problem.padding_y;
            right[panel] = tap % problem.kernel_width * problem.dilation_x - problem.padding_x;
        }
    }

    DEVICE void copy(unsigned char* slab) {
#pragma unroll
        for (int depth = 0; depth < DEPTHS; ++depth) {
            const T* const image = x + (long long)pixel.outer * problem.height * problem.width * problem.channels;
            const int row = pixel.middle * problem.stride_y, column = pixel.inner * problem.stride_x;
#pragma unroll
            for (int panel = 0; panel < PANELS; ++panel) {
                const int h = row + down[panel], w = column + right[panel];
                const bool valid = pixels_left > 0 && unsigned(h) < unsigned(problem.height) &&
                                   unsigned(w) < unsigned(problem.width);
                const int offset = (h * problem.width + w) * problem.channels + channel[panel];
                copy_async<CHUNK_BYTES>(Slab::destination(slab, panel * DEPTHS + depth), valid ? image + offset : x,
                                        valid);
            }
            pixel.advance();
            pixels_left -= Slab::STEP;
        }
    }
};

// The grid is (column blocks x row blocks x groups, slices); partials are (slices, out_channels, taps, channels of
// a group).
template <typename T, int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS, int STAGES>
__global__ void __launch_bounds__(ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * 32, 1)
gather_grad_weight(const T* __restrict__ grad, const T* __restrict__ x, float* __restrict__ partials,
                   const __grid_constant__ Gather problem) {
    typedef Tile<T, ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS, STAGES, Layout::CROSSWISE, Layout::CROSSWISE> WeightTile;
    const int rows = problem.group_outputs(), columns = problem.columns();
    const int across = (columns + COLUMNS - 1) / COLUMNS, down = (rows + ROWS - 1) / ROWS;
    const int first_column = int(blockIdx.x) % across * COLUMNS;
    const int first_row = int(blockIdx.x) / across % down * ROWS;
    const int group = int(blockIdx.x) / across / down;
    const int first = int(blockIdx.y) * problem.slice_pixels;
    const int end = min(first + problem.slice_pixels, problem.pixels);

    MatrixLoader<typename WeightTile::SlabA> pixels_of_grad(
        grad + (long long)first * problem.out_channels + group * rows, first_row, rows, problem.out_channels,
        end - first);
    TapLoader<typename WeightTile::SlabB> pixels_of_x(x + group * problem.group_inputs(), problem, first_column, first,
                                                      end);
    WeightTile tile;
    tile.compute(dynamic_shared_memory<unsigned char>(), pixels_of_grad, pixels_of_x,
                 (end - first + SLAB_DEPTH<T> - 1) / SLAB_DEPTH<T>);

    float* const matrix = partials + ((long long)blockIdx.y * problem.out_channels + group * rows) * columns;
#pragma unroll
    for (int block = 0; block < WeightTile::BLOCKS; ++block) {
        const int column = first_column + WeightTile::column_of(block);
        tile.for_each_run(block, [&](int row, const float(&values)[WeightTile::RUN]) {
            if (first_row + row >= rows) return;
            float* const target = matrix + (long long)(first_row + row) * columns + column;
#pragma unroll
            for (int v = 0; v < WeightTile::RUN; v += 4) {
                if (column + v >= columns) continue;  // a multiple of 4
                *reinterpret_cast<float4*>(target + v) =
                    make_float4(values[v], values[v + 1], values[v + 2], values[v + 3]);
            }
        });
    }
}
