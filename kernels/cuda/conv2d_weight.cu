// The gradient of 2-D convolution by the weight, on tensor cores:
//     out(k, tap, c) = sum over output pixels of grad(pixel, k) * x(the pixel that the tap reads, c)
// a matrix product whose depth, all output pixels, is much larger than its result. Blocks therefore share the
// pixels in slices; each writes its sums in float32 to partials, which slices.cu adds up in a fixed order.
// Arrays are channels-last. Rows of the product are output channels k, columns are (tap, c).
//
//   window_grad_weight     stages patches of neighbouring pixels in shared memory and reads from there for all
//                          taps: every pixel of x comes from global memory about once, not once for each tap.
//   warpgroup_grad_weight  is the same by the tensor cores of warpgroups: 16-bit elements on sm_90a.
//   gather_grad_weight     is an ordinary tiled product whose loader gathers the pixels of each tap: for pointwise
//                          convolutions, groups, and few channels.
//
// conv2d_weight_places.cu has one more kernel, for float32 too by warpgroups.
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
    // Where shared memory has pixels of x, in pixels: columns that lie stride_x apart are adjacent, rows that lie
    // stride_y apart are line_pitch apart; the residues of both follow at pitches of their own.
    int phase_pitch, row_phase_pitch, line_pitch, image_pitch;
    int image_pixels, column_bytes;            // see WarpgroupWindow
    int row_runs, tap_step;                    // of a row of the kernel; from one tap of a run to the next
    int step_copies;                           // that a thread of it issues while it multiplies 16 pixels
    int slice_patches;

    // The place of x's pixel, from the patch's first one on. Pixel (row, column) of the output reads for a tap what
    // lies place(0, tap's row, tap's column) behind place(image, row * stride_y, column * stride_x).
    DEVICE int place(int image, int row, int column) const {
        return image * image_pitch + row % stride_y * row_phase_pitch + row / stride_y * line_pitch +
               column % stride_x * phase_pitch + column / stride_x;
    }

    DEVICE int place_of_tap(int tap) const {
        return place(0, tap / kernel_width * dilation_y, tap % kernel_width * dilation_x);
    }
};

// Row, column and image of a pixel within a patch. Packed, they take 10, 10 and 9 bits; above each is a bit that is 0.
struct Spot {
    int image, row, column;

    DEVICE Spot(int number, int rows, int columns) {
        column = number % columns;
        row = number / columns % rows;
        image = number / columns / rows;
    }
    DEVICE uint32_t packed() const { return uint32_t(image) << 22 | row << 11 | column; }

    // All bits above; and what, added to a packed spot, makes those 1 whose number is at least the given one.
    static constexpr uint32_t ABOVE = 1u << 31 | 1u << 21 | 1u << 10;
    static DEVICE uint32_t reaching(int image, int row, int column) {
        return uint32_t(512 - between(image, 512)) << 22 | (1024 - between(row, 1024)) << 11 |
               (1024 - between(column, 1024));
    }

private:
    static DEVICE int between(int number, int most) { return max(0, min(number, most)); }
};

// A pixel of x or of grad in a patch.
struct PatchPixel {
    uint32_t spot;  // packed
    int chunk;      // of the array, from the patch's first pixel on; -1 past the patch's last pixel
    int byte;       // in shared memory, see make_tables
};

// Brings the patches of a block: ROWS channels of grad and CHANNELS of x. Blocks share the taps in runs: of one tap,
// but see WarpgroupWindow.
template <typename Element, int ROWS_, int CHANNELS_, int RUNS_, int THREADS_>
struct PatchLoader {
    typedef Element T;
    static constexpr int ROWS = ROWS_, CHANNELS = CHANNELS_, THREADS = THREADS_;
    static constexpr int RUNS = RUNS_;  // of a block, at most
    static constexpr int GRAD_CHUNKS = ROWS / CHUNK<T>, X_CHUNKS = CHANNELS / CHUNK<T>;  // of a pixel

    const Window& window;
    unsigned char* const shared;  // two stages, then tables
    int first_row, first_channel, first_run, run_count;

    DEVICE PatchLoader(const Window& window, int all_runs)
        : window(window), shared(dynamic_shared_memory<unsigned char>()) {
        const int row_blocks = (window.out_channels + ROWS - 1) / ROWS;
        const int channel_blocks = (window.channels + CHANNELS - 1) / CHANNELS;
        first_row = int(blockIdx.x) % row_blocks * ROWS;
        first_channel = int(blockIdx.x) / row_blocks % channel_blocks * CHANNELS;
        first_run = int(blockIdx.x) / row_blocks / channel_blocks * RUNS;
        run_count = min(all_runs - first_run, RUNS);
    }

    static DEVICE int lane() { return threadIdx.x % 32; }
    static DEVICE int warp() { return threadIdx.x / 32; }

    // The tables of a patch's pixels, the same for all patches.
    DEVICE PatchPixel* targets() const { return reinterpret_cast<PatchPixel*>(shared + 2 * window.stage_bytes); }
    DEVICE PatchPixel* sources() const { return targets() + window.padded_pixels; }

    // The chunks of grad and of x from the patch's first pixel to that at a spot.
    DEVICE int chunks_to_target(Spot spot) const {
        const int pixels = (spot.image * window.out_height + spot.row) * window.out_width + spot.column;
        return pixels * (window.out_channels / CHUNK<T>);
    }
    DEVICE int chunks_to_source(Spot spot) const {
        const int pixels = (spot.image * window.height + spot.row) * window.width + spot.column;
        return pixels * (window.channels / CHUNK<T>);
    }

    // The copies of one patch that this thread issues, some at a time: first of grad, then of x.
    struct Copies {
        int stage;           // bytes from the first stage on
        int target, source;  // the next ones
        int grad, x;         // the thread's chunk of the patch's first pixel; that of x may lie outside
        // Added to a packed spot: some bit of ABOVE is 1 past the end of an image or of the batch, or if the chunk
        // does not exist; some bit is 0 before x's image begins.
        uint32_t past_grad, past_x, within_x;
    };

    DEVICE Copies copies_of(int patch, unsigned char* stage) const {
        const int across = patch / window.column_blocks;
        const int image = across / window.row_blocks * window.images;
        const int row = across % window.row_blocks * window.rows;
        const int column = patch % window.column_blocks * window.columns;
        const int source_row = row * window.stride_y - window.padding_y;
        const int source_column = column * window.stride_x - window.padding_x;
        const int grad_channel = first_row + grad_chunk() * CHUNK<T>;
        const int x_channel = first_channel + x_chunk() * CHUNK<T>;
        const bool has_grad = grad_channel < window.out_channels, has_x = x_channel < window.channels;
        const int left = window.batch - image;
        Copies copies;
        copies.stage = int(stage - shared);
        copies.target = threadIdx.x / GRAD_CHUNKS;
        copies.source = threadIdx.x / X_CHUNKS;
        copies.grad = ((image * window.out_height + row) * window.out_width + column) *
                          (window.out_channels / CHUNK<T>) + grad_channel / CHUNK<T>;
        copies.x = ((image * window.height + source_row) * window.width + source_column) *
                       (window.channels / CHUNK<T>) + x_channel / CHUNK<T>;
        copies.past_grad =
            has_grad ? Spot::reaching(left, window.out_height - row, window.out_width - column) : Spot::ABOVE;
        copies.past_x = has_x ? Spot::reaching(left, window.height - source_row, window.width - source_column)
                              : Spot::ABOVE;
        copies.within_x = Spot::reaching(0, -source_row, -source_column);
        return copies;
    }

    // The thread's chunk of a pixel of grad, and of x.
    static DEVICE int grad_chunk() { return threadIdx.x % GRAD_CHUNKS; }
    static DEVICE int x_chunk() { return threadIdx.x % X_CHUNKS; }

    // Chunk 0 stands for one that is not valid.
    static DEVICE const T* chunk_at(const T* array, int chunk) { return array + (long long)chunk * CHUNK<T>; }

    static DEVICE void copy_grad(const Copies& copies, const PatchPixel& pixel, const T* grad,
                                 unsigned char* destination) {
        const bool valid = pixel.chunk >= 0 && !(pixel.spot + copies.past_grad & Spot::ABOVE);
        copy_async<CHUNK_BYTES>(destination, chunk_at(grad, valid ? copies.grad + pixel.chunk : 0), valid);
    }

    static DEVICE void copy_x(const Copies& copies, const PatchPixel& pixel, const T* x, unsigned char* destination) {
        const uint32_t past = pixel.spot + copies.past_x, within = pixel.spot + copies.within_x;
        const bool valid = !((past | ~within) & Spot::ABOVE);
        copy_async<CHUNK_BYTES>(destination, chunk_at(x, valid ? copies.x + pixel.chunk : 0), valid);
    }

    // Where partials (out_channels, taps, channels) of the block's slice have a row and tap.
    DEVICE float* partials_of(float* partials, int row, int tap) const {
        return partials + ((long long)row * window.taps + tap) * window.channels;
    }
};

// `CHANNELS` channels of x and 64 of grad; a warp computes all 64 rows of GROUPS groups of 8 columns.
template <typename Element, int CHANNELS, int GROUPS>
struct WindowTile : PatchLoader<Element, 64, CHANNELS, 8 * GROUPS / (CHANNELS / 8), 8 * 32> {
    typedef Element T;
    static constexpr int WARPS = 8;
    typedef PatchLoader<Element, 64, CHANNELS, WARPS * GROUPS / (CHANNELS / 8), WARPS * 32> Loader;
    using Loader::first_channel;
    using Loader::first_row;
    using Loader::first_run;
    using Loader::lane;
    using Loader::ROWS;
    using Loader::run_count;
    using Loader::shared;
    using Loader::sources;
    using Loader::targets;
    using Loader::THREADS;
    using Loader::warp;
    using Loader::window;
    typedef typename Loader::Copies Copies;
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

    float sums[DOWN][GROUPS][4];

    DEVICE explicit WindowTile(const Window& window) : Loader(window, window.taps) {
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
#pragma unroll
            for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
                for (int element = 0; element < 4; ++element) sums[i][group][element] = 0;
            }
        }
    }

    // Of a stage, the pixels of grad come first.
    DEVICE int grad_bytes() const { return window.padded_pixels * GRAD_PITCH; }

    // ---- copying ----

    // Both tables say where pixels of x lie in shared memory: that of grad, of the pixel that tap 0 reads.
    DEVICE void make_tables() {
        const int pixels = window.images * window.rows * window.columns;
        for (int number = threadIdx.x; number < window.padded_pixels; number += THREADS) {
            // what pads the patch has grad 0 and reads x somewhere: at the last pixel
            const Spot spot(min(number, pixels - 1), window.rows, window.columns);
            const int place = window.place(spot.image, spot.row * window.stride_y, spot.column * window.stride_x);
            targets()[number] = {spot.packed(), number < pixels ? this->chunks_to_target(spot) : -1, place * X_PITCH};
        }
        for (int number = threadIdx.x; number < window.source_pixels; number += THREADS) {
            const Spot spot(number, window.source_rows, window.source_columns);
            sources()[number] = {spot.packed(), this->chunks_to_source(spot),
                                 window.place(spot.image, spot.row, spot.column) * X_PITCH};
        }
    }

    // Issue the next one. Returns false when all are.
    DEVICE bool copy_next(Copies& copies, const T* grad, const T* x) const {
        if (copies.target < window.padded_pixels) {
            this->copy_grad(copies, targets()[copies.target], grad,
                            shared + copies.stage + copies.target * GRAD_PITCH + this->grad_chunk() * CHUNK_BYTES);
            copies.target += THREADS / Loader::GRAD_CHUNKS;
        } else if (copies.source < window.source_pixels) {
            const PatchPixel pixel = sources()[copies.source];
            this->copy_x(copies, pixel, x,
                         shared + copies.stage + grad_bytes() + pixel.byte + this->x_chunk() * CHUNK_BYTES);
            copies.source += THREADS / Loader::X_CHUNKS;
        } else {
            return false;
        }
        return true;
    }

    // ---- multiplying ----

    // The block's groups of columns, dealt to the warps: all taps of 8 channels, then of the next 8.
    DEVICE int group_number(int group) const { return warp() * GROUPS + group; }
    DEVICE bool group_exists(int number) const { return number < CHANNELS / 8 * run_count; }
    DEVICE int tap_of(int number) const { return first_run + number % run_count; }
    DEVICE int channel_of(int number) const { return number / run_count * 8; }

    // Where a group's elements lie, from those of tap 0 and channel 0 on; groups that do not exist read the first.
    DEVICE int group_offset(int group) const {
        const int number = group_exists(group_number(group)) ? group_number(group) : 0;
        return window.place_of_tap(tap_of(number)) * X_PITCH + channel_of(number) * int(sizeof(T));
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

    // What one step of DEPTH pixels reads of grad, and of x for the groups of each load.
    typedef uint32_t FragmentsA[DOWN][4];
    typedef uint32_t FragmentsB[LOADS][sizeof(T) == 2 ? 4 : 2];

    DEVICE void load(FragmentsA& a, FragmentsB& b, const unsigned char* stage, int pixel,
                     const int (&offsets)[LOADS]) const {
        load_grad(a, stage, pixel);
        const Pixels pixels = pixels_of_x(stage, pixel);
#pragma unroll
        for (int load = 0; load < LOADS; ++load) load_x(b[load], pixels, offsets[load]);
    }

    // Add the products of one step, a and b. Warps without groups have none.
    DEVICE void step(FragmentsA& a, const FragmentsB& b) {
        if (!group_exists(group_number(0))) return;  // the same for all lanes
        prepare(a);
#pragma unroll
        for (int load = 0; load < LOADS; ++load) multiply(a, b[load], load);
    }

    // The same, and load what the next step reads meanwhile: its a, and each part of b where it is needed no more.
    DEVICE void step(FragmentsA& a, FragmentsB& b, FragmentsA& next_a, const unsigned char* stage, int next_pixel,
                     const int (&offsets)[LOADS]) {
        if (!group_exists(group_number(0))) return;
        load_grad(next_a, stage, next_pixel);
        const Pixels next = pixels_of_x(stage, next_pixel);
        prepare(a);
#pragma unroll
        for (int load = 0; load < LOADS; ++load) {
            multiply(a, b[load], load);
            load_x(b[load], next, offsets[load]);
        }
    }

    // Where this lane reads x: 16-bit elements of one pixel, float32 of two.
    struct Pixels {
        const unsigned char *first, *second;
    };

    DEVICE Pixels pixels_of_x(const unsigned char* stage, int pixel) const {
        const unsigned char* const x = stage + grad_bytes();
        if constexpr (sizeof(T) == 2) return {x + targets()[pixel + lane() % 16].byte, nullptr};
        return {x + targets()[pixel + lane() % 4].byte, x + targets()[pixel + 4 + lane() % 4].byte};
    }

    // ldmatrix transposes 16-bit elements, as both operands have pixels one below the other. Of float32 four rows 4g
    // to 4g + 3 of 32 come by one load; see row_of for the rows they become.
    DEVICE void load_grad(FragmentsA& a, const unsigned char* stage, int pixel) const {
        const unsigned char* const grad = stage + pixel * GRAD_PITCH;
        if constexpr (sizeof(T) == 2) {
            const unsigned char* const row = grad + (lane() / 16 * 8 + lane() % 8) * GRAD_PITCH + lane() / 8 % 2 * 16;
#pragma unroll
            for (int i = 0; i < DOWN; ++i) load_matrices_transposed(a[i], row + i * 32);
        } else {
            const unsigned char* const row = grad + lane() % 4 * GRAD_PITCH + lane() / 4 * 16;
#pragma unroll
            for (int i = 0; i < DOWN; i += 2) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint4 four = *reinterpret_cast<const uint4*>(row + half * 4 * GRAD_PITCH + i * 64);
                    a[i][2 * half] = four.x;
                    a[i][2 * half + 1] = four.y;
                    a[i + 1][2 * half] = four.z;
                    a[i + 1][2 * half + 1] = four.w;
                }
            }
        }
    }

    static DEVICE void load_x(uint32_t (&b)[4], const Pixels& pixels, int offset) {
        load_matrices_transposed(b, pixels.first + offset);
    }
    static DEVICE void load_x(uint32_t (&b)[2], const Pixels& pixels, int offset) {
        b[0] = *reinterpret_cast<const uint32_t*>(pixels.first + offset);
        b[1] = *reinterpret_cast<const uint32_t*>(pixels.second + offset);
    }

    static DEVICE void prepare(FragmentsA& a) {
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
#pragma unroll
            for (int element = 0; element < 4; ++element) a[i][element] = TensorCore<T>::prepare(a[i][element]);
        }
    }

    DEVICE void multiply(const FragmentsA& a, const uint32_t (&b)[4], int load) {
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        multiply_group(a, first, 2 * load);
        if (2 * load + 1 < GROUPS) multiply_group(a, second, 2 * load + 1);
    }
    DEVICE void multiply(const FragmentsA& a, const uint32_t (&b)[2], int load) {
        const uint32_t prepared[2] = {TensorCore<T>::prepare(b[0]), TensorCore<T>::prepare(b[1])};
        multiply_group(a, prepared, load);
    }
    DEVICE void multiply_group(const FragmentsA& a, const uint32_t (&b)[2], int group) {
#pragma unroll
        for (int i = 0; i < DOWN; ++i) TensorCore<T>::multiply(sums[i][group], a[i], b);
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
                    const float* const pair = &sums[i][group][2 * half];
                    *reinterpret_cast<float2*>(this->partials_of(partials, row, tap_of(number)) + channel) =
                        make_float2(pair[0], pair[1]);
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
    typedef WindowTile<T, CHANNELS, GROUPS> Tile;
    Tile tile(window);
    tile.make_tables();
    __syncthreads();
    int offsets[Tile::LOADS];
    tile.make_offsets(offsets);

    const int first = int(blockIdx.y) * window.slice_patches;
    const int end = min(first + window.slice_patches, window.patches);
    unsigned char* reading = tile.shared;
    unsigned char* writing = tile.shared + window.stage_bytes;
    auto copies = tile.copies_of(first, reading);
    while (tile.copy_next(copies, grad, x)) {}
    typename Tile::FragmentsA even, odd;
    typename Tile::FragmentsB b;
    for (int patch = first; patch < end; ++patch) {
        commit_copies();
        wait_copies<0>();
        __syncthreads();  // the patch has landed, and nobody reads the one before any more
        copies = tile.copies_of(patch + 1, writing);
        const auto copy_some = [&] {  // early, a few at a time: they need no time of their own
            if (patch + 1 == end) return;
#pragma unroll 1
            for (int i = 0; i < COPIES_AT_ONCE; ++i) tile.copy_next(copies, grad, x);
        };
        if constexpr (Tile::BLOCKS > 1) {  // the other block has work while this one waits for its loads
            for (int pixel = 0; pixel < window.padded_pixels; pixel += Tile::DEPTH) {
                copy_some();
                tile.load(even, b, reading, pixel, offsets);
                tile.step(even, b);
            }
        } else {
            const int last = window.padded_pixels - Tile::DEPTH;
            tile.load(even, b, reading, 0, offsets);
#pragma unroll 1
            for (int pixel = 0; pixel <= last; pixel += 2 * Tile::DEPTH) {
                copy_some();
                tile.step(even, b, odd, reading, min(pixel + Tile::DEPTH, last), offsets);
                if (pixel == last) break;
                copy_some();
                tile.step(odd, b, even, reading, min(pixel + 2 * Tile::DEPTH, last), offsets);
            }
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

// ---- windows by warpgroups ---------------------------------------------------------------------------------

// 64 channels of grad, and 64 or 8 of x. A run of taps is what one product computes, all rows of them: one tap of 64
// channels, or up to four taps of 8 channels in a row of the kernel. A block has nine taps: three warpgroups have three
// each; or eight runs of few channels: two warpgroups have four each.
//
// Operand a is grad, by way of registers: what a warpgroup loads for 16 pixels serves all its runs. Operand b is x
// in shared memory, as columns of 8 channels (warpgroup_operand_of_columns), each of them an array of pixels; for
// another tap it starts at another pixel. 16 pixels that are multiplied at once therefore lie one after the other in
// x. So that they do, a patch's rows of grad are as far apart as those of x (line_pitch), and what lies between is 0.
// The pixels of an image, image_pixels with what rounds them up, are multiplied one after the other.
//
// Of 8 channels there is one such array, and the columns of an operand are the taps of a run: the same array from other
// pixels on. They must be equally far apart, so that a run takes every tap_step-th tap of its row.
template <typename Element, int CHANNELS>
struct WarpgroupWindow
    : PatchLoader<Element, 64, CHANNELS, CHANNELS == 8 ? 8 : 9, CHANNELS == 8 ? 2 * 128 : 3 * 128> {
    typedef Element T;
    typedef PatchLoader<Element, 64, CHANNELS, CHANNELS == 8 ? 8 : 9, CHANNELS == 8 ? 2 * 128 : 3 * 128> Loader;
    using Loader::first_run;
    using Loader::lane;
    using Loader::run_count;
    using Loader::shared;
    using Loader::sources;
    using Loader::targets;
    using Loader::THREADS;
    using Loader::warp;
    using Loader::window;
    typedef typename Loader::Copies Copies;
    static constexpr int WARPGROUPS_OF_BLOCK = THREADS / 128;
    static constexpr int WARPGROUP_RUNS = (Loader::RUNS + WARPGROUPS_OF_BLOCK - 1) / WARPGROUPS_OF_BLOCK;
    static constexpr int RUN_TAPS = CHANNELS == 8 ? 4 : 1;
    static constexpr int TAP_COLUMNS = CHANNELS / 8;  // of 8 channels
    static constexpr int COLUMNS = RUN_TAPS * TAP_COLUMNS;
    static constexpr int DEPTH = 16;                  // pixels that one instruction takes
    static constexpr int PIXEL_BYTES = 128;           // of grad
    static constexpr int BLOCKS = CHANNELS == 8 ? 2 : 1;  // that share a multiprocessor
    static_assert(sizeof(T) == 2);

    float sums[WARPGROUP_RUNS][COLUMNS][4];
    int own_run, own_runs;  // the first of this warpgroup, and how many it has
    int run_places[WARPGROUP_RUNS];

    DEVICE explicit WarpgroupWindow(const Window& window)
        : Loader(window, window.taps / window.kernel_width * window.row_runs) {
        // the same in all threads of a warp, and said so: operands are in uniform registers
        const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0);
        const int share = (run_count + WARPGROUPS_OF_BLOCK - 1) / WARPGROUPS_OF_BLOCK;
        own_run = first_run + warpgroup * share;
        own_runs = min(share, first_run + run_count - own_run);
#pragma unroll
        for (int i = 0; i < WARPGROUP_RUNS; ++i) {
            const int run = min(own_run + i, first_run + run_count - 1);  // one that exists
            run_places[i] =
                window.place(0, row_of_run(run) * window.dilation_y, column_of_run(run) * window.dilation_x);
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
                for (int element = 0; element < 4; ++element) sums[i][j][element] = 0;
            }
        }
    }

    // Row and column of a run's first tap in the kernel. Runs of a row begin at each of the first tap_step taps; when
    // they are full, the next ones follow.
    DEVICE int row_of_run(int run) const { return run / window.row_runs; }
    DEVICE int column_of_run(int run) const {
        const int number = run % window.row_runs;
        return number % window.tap_step + number / window.tap_step * (RUN_TAPS * window.tap_step);
    }

    // Of a stage, the pixels of grad come first. Chunk c of pixel p stands at c ^ p % 8: eight pixels that are loaded
    // together share no banks.
    DEVICE int grad_bytes() const { return window.padded_pixels * PIXEL_BYTES; }

    // ---- copying ----

    DEVICE int target_count() const { return window.images * window.rows * window.columns; }

    // Both tables say where a pixel lies: of grad its chunk 0 within the stage, of x within a column.
    DEVICE void make_tables() {
        for (int number = threadIdx.x; number < target_count(); number += THREADS) {
            const Spot spot(number, window.rows, window.columns);
            const int place = spot.image * window.image_pixels + spot.row * window.line_pitch + spot.column;
            targets()[number] = {spot.packed(), this->chunks_to_target(spot),
                                 place * PIXEL_BYTES + place % 8 * CHUNK_BYTES};
        }
        for (int number = threadIdx.x; number < window.source_pixels; number += THREADS) {
            const Spot spot(number, window.source_rows, window.source_columns);
            sources()[number] = {spot.packed(), this->chunks_to_source(spot),
                                 window.place(spot.image, spot.row, spot.column) * CHUNK_BYTES};
        }
    }

    // What lies between the rows is never copied. In x it may be anything that 0 times it is 0.
    DEVICE void clear_stages() {
        for (int byte = threadIdx.x * CHUNK_BYTES; byte < 2 * window.stage_bytes; byte += THREADS * CHUNK_BYTES) {
            *reinterpret_cast<uint4*>(shared + byte) = make_uint4(0, 0, 0, 0);
        }
    }

    // Issue the next one. Returns false when all are.
    DEVICE bool copy_next(Copies& copies, const T* grad, const T* x) const {
        if (copies.target < target_count()) {
            const PatchPixel pixel = targets()[copies.target];
            this->copy_grad(copies, pixel, grad,
                            shared + copies.stage + (pixel.byte ^ this->grad_chunk() * CHUNK_BYTES));
            copies.target += THREADS / Loader::GRAD_CHUNKS;
        } else if (copies.source < window.source_pixels) {
            const PatchPixel pixel = sources()[copies.source];
            this->copy_x(copies, pixel, x,
                         shared + copies.stage + grad_bytes() + this->x_chunk() * window.column_bytes + pixel.byte);
            copies.source += THREADS / Loader::X_CHUNKS;
        } else {
            return false;
        }
        return true;
    }

    // ---- multiplying ----

    // Add the products of a patch, and issue copies of the next one meanwhile. RUNS, the warpgroup's, are known to the
    // compiler: with branches between products it would fence each of them.
    template <int RUNS = WARPGROUP_RUNS>
    DEVICE void multiply(const unsigned char* stage, Copies& copies, bool copying, const T* grad, const T* x) {
        if constexpr (RUNS > 1) {
            if (own_runs < RUNS) return multiply<RUNS - 1>(stage, copies, copying, grad, x);
        }
        const int steps = window.padded_pixels / DEPTH, image_steps = window.image_pixels / DEPTH;
        const uint64_t columns = warpgroup_operand_of_columns(stage + grad_bytes(), window.column_bytes);
        int place = 0, image_step = 0;  // of x, and within the image, of the next step
        auto multiply_step = [&](const uint32_t(&a)[4]) {
            begin_products();
#pragma unroll
            for (int i = 0; i < RUNS; ++i) {
                TensorCore<T>::multiply_columns(sums[i], a, columns + (place + run_places[i]));
            }
            commit_products();
            place += DEPTH;
            if (++image_step == image_steps) {
                image_step = 0;
                place += window.image_pitch - window.image_pixels;
            }
        };
        auto copy_some = [&]() {
            if (!copying) return;
#pragma unroll 1
            for (int i = 0; i < window.step_copies; ++i) copy_next(copies, grad, x);
        };
        // The pixels of one step are loaded while those of the step before are multiplied.
        uint32_t even[4], odd[4];
        load(even, stage, 0);
#pragma unroll 1
        for (int step = 0; step < steps; step += 2) {
            multiply_step(even);
            load(odd, stage, min(step + 1, steps - 1));
            copy_some();
            wait_products<0>();
            if (step + 1 == steps) break;
            multiply_step(odd);
            load(even, stage, min(step + 2, steps - 1));
            copy_some();
            wait_products<0>();
        }
    }

    // The warp's 16 rows of grad at the pixels of a step: rows 0-7 and 8-15 at pixels 0-7, then at pixels 8-15.
    static DEVICE void load(uint32_t (&a)[4], const unsigned char* stage, int step) {
        const int pixel = lane() / 16 * 8 + lane() % 8, chunk = warp() % 4 * 2 + lane() / 8 % 2;
        const int offset = pixel * PIXEL_BYTES + (chunk ^ lane() % 8) * CHUNK_BYTES;
        load_matrices_transposed(a, stage + step * (DEPTH * PIXEL_BYTES) + offset);
    }

    // Write the sums to partials (out_channels, taps, channels) of the block's slice.
    DEVICE void store(float* partials) const {
#pragma unroll
        for (int i = 0; i < WARPGROUP_RUNS; ++i) {
            if (i >= own_runs) continue;
            const int first_tap = row_of_run(own_run + i) * window.kernel_width;
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                const int column = column_of_run(own_run + i) + j / TAP_COLUMNS * window.tap_step;
                const int channel = this->first_channel + j % TAP_COLUMNS * 8 + lane() % 4 * 2;
                if (column >= window.kernel_width || channel >= window.channels) continue;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = this->first_row + warp() % 4 * 16 + half * 8 + lane() / 4;
                    if (row >= window.out_channels) continue;
                    const float* const pair = &sums[i][j][2 * half];
                    *reinterpret_cast<float2*>(this->partials_of(partials, row, first_tap + column) + channel) =
                        make_float2(pair[0], pair[1]);
                }
            }
        }
    }
};

// Grid and partials are those of window_grad_weight.
template <typename T, int CHANNELS>
__global__ void __launch_bounds__(WarpgroupWindow<T, CHANNELS>::THREADS, WarpgroupWindow<T, CHANNELS>::BLOCKS)
warpgroup_grad_weight(const T* __restrict__ grad, const T* __restrict__ x, float* __restrict__ partials,
                      const __grid_constant__ Window window) {
    WarpgroupWindow<T, CHANNELS> tile(window);
    tile.make_tables();
    tile.clear_stages();
    __syncthreads();

    const int first = int(blockIdx.y) * window.slice_patches;
    const int end = min(first + window.slice_patches, window.patches);
    unsigned char* reading = tile.shared;
    unsigned char* writing = tile.shared + window.stage_bytes;
    auto copies = tile.copies_of(first, reading);
    while (tile.copy_next(copies, grad, x)) {}
    for (int patch = first; patch < end; ++patch) {
        commit_copies();
        wait_copies<0>();
        show_to_products();
        __syncthreads();  // the patch has landed, and nobody reads the one before any more
        copies = tile.copies_of(patch + 1, writing);
        tile.multiply(reading, copies, patch + 1 < end, grad, x);
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
