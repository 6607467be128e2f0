// The gradient of 2-D convolution by the weight, on pixels in one long row of places (warpgroups of sm_90a):
//     out(k, tap, c) = sum over places of grad(place, k) * x(place + the tap's shift, c)
//
// Images follow one another line by line, with gaps of zeros such that each tap reads what lies a constant number of
// places further on. Pixel (row, column) of the output is at place (image * lines + row) * pitch + column. Below,
// images of 3 x 2 pixels with a padding of 1 have 3 lines and pitch 4. Tap (r, s) of 3 x 3 has shift 4 r + s: for pixel 0
// of grad, tap (1, 1) reads pixel 0 of x, tap (1, 0) the gap before it.
//
//     x    .  .  .  .     grad    0  1  2  .
//          .  0  1  2             3  4  5  .     The gap after a line is the one before the next,
//          .  3  4  5             .  .  .  .     the gap after an image the one before the next.
//          .  .  .  .             0  1  2  .     <- the next image
//          .  0  1  2             3  4  5  .
//
// With a stride, the residues of x's rows and columns are phases, each with places of its own; a tap reads one phase.
//
// So the depth of this product is one row, which blocks share in slices and run through in stages. Shared memory has
// the stages of grad, and a ring of places for each phase of x: each pixel is copied once for all taps of a block.
//
// Operand a is grad by way of registers: what a warpgroup loads serves its taps. Operand b is x, for another tap from
// another place on. 16-bit elements are columns (warpgroup_operand_of_columns), copied from x as it lies; any place can
// be the first. Float32 is blocks of four places of a channel (warpgroup_operand_of_blocks), made in registers,
// where it is rounded as well; only a block can be the first. The rest of a shift is taken `back` from grad: it is the
// same for the taps of a warpgroup, and the pitch is a multiple of four.
#include <indices.cuh>
#include <tile.cuh>

constexpr int MOST_PHASES = 4, MOST_GROUPS = 18;
constexpr int GROUP_TAPS = 3;  // of a warpgroup

struct Places {
    int batch, height, width, channels;  // of x
    int out_height, out_width, out_channels, taps;
    int stride_y, stride_x, padding_y, padding_x;
    Divisor lines, pitch;   // of an image, of a line
    int places;             // that are multiplied
    int slice_places;       // a multiple of a stage
    int ring_places;        // of a phase, a multiple of a stage
    int ahead_places;       // that x is copied ahead of grad, a multiple of a stage: no shift is larger
    int phase_places;       // from one ring to the next in shared memory
    int column_bytes;       // of 16-bit elements: from one column of all rings to the next
    int phases, groups;
    int phase_rows[MOST_PHASES], phase_columns[MOST_PHASES];  // of padded x, the first
    // Groups of taps, each a warpgroup's. What is no tap has number -1, and reads as another one.
    int backs[MOST_GROUPS];
    int tap_numbers[MOST_GROUPS * GROUP_TAPS];
    int tap_rings[MOST_GROUPS * GROUP_TAPS];   // the place at which the ring of the tap's phase begins
    int tap_shifts[MOST_GROUPS * GROUP_TAPS];  // without what is taken back
};

// Image, line and column of a place.
struct Spot {
    int image, line, column;

    DEVICE Spot(int place, const Places& problem) {
        const int lines = divide(place, problem.pitch);
        image = divide(lines, problem.lines);
        line = lines - image * problem.lines.divisor;
        column = place - lines * problem.pitch.divisor;
    }
};

// The pixel of x at a spot of a phase, counted through; -1 in a gap.
DEVICE int pixel_of_x(const Spot& spot, int phase, const Places& problem) {
    const int row = spot.line * problem.stride_y + problem.phase_rows[phase] - problem.padding_y;
    const int column = spot.column * problem.stride_x + problem.phase_columns[phase] - problem.padding_x;
    const bool is_gap = spot.image >= problem.batch || unsigned(row) >= unsigned(problem.height) ||
                        unsigned(column) >= unsigned(problem.width);
    return is_gap ? -1 : (spot.image * problem.height + row) * problem.width + column;
}

// The pixel of grad at a place, which may be before the first; -1 in a gap.
DEVICE int pixel_of_grad(int place, const Places& problem) {
    const Spot spot(max(place, 0), problem);
    const bool is_gap = place < 0 || spot.image >= problem.batch || spot.line >= problem.out_height ||
                        spot.column >= problem.out_width;
    return is_gap ? -1 : (spot.image * problem.out_height + spot.line) * problem.out_width + spot.column;
}

// A block's tile: 64 channels of grad, 64 of x, and the taps of three groups, which read at most PHASES phases.
template <typename Element, int PHASES>
struct PlacesTile {
    typedef Element T;
    static constexpr int ROWS = 64, CHANNELS = 64, WARPGROUPS_OF_BLOCK = 3;
    static constexpr int THREADS = WARPGROUPS_OF_BLOCK * 128;
    static constexpr int DEPTH = 32 / sizeof(T);  // places that one product takes
    static constexpr int STEPS = 4, STAGE = STEPS * DEPTH;
    static constexpr int AHEAD = 2;           // stages whose copies are on their way
    static constexpr int STAGES = AHEAD + 2;  // in shared memory: one is multiplied, and products of the last still run
    static constexpr int BACK = sizeof(T) == 4 ? 4 : 0;  // places of grad that a stage has before its own
    static constexpr int GRAD_PLACES = BACK + STAGE;
    // A place of grad. What is loaded together shares no banks: of float32, 4 places x 32 bytes; of 16-bit elements 8
    // places x 16 bytes, as chunk c of place p stands at c ^ p % 8.
    static constexpr int GRAD_PITCH = ROWS * sizeof(T) + (sizeof(T) == 4 ? 32 : 0);
    static constexpr int GRAD_BYTES = GRAD_PLACES * GRAD_PITCH;
    static constexpr int GRAD_CHUNKS = ROWS / CHUNK<T>;
    static constexpr int COLUMNS = CHANNELS / 8;
    static constexpr int PLACE_CHUNKS = sizeof(T) == 4 ? 16 : 1;  // from a place of a ring to the next
    static constexpr int MIRROR = DEPTH;  // a ring's first places stand behind its last as well, for products there
    static constexpr int ENTRIES = GRAD_PLACES + PHASES * STAGE;  // of a table
    static constexpr int TABLES_BYTES = 2 * ENTRIES * sizeof(int);
    static_assert(ENTRIES <= THREADS && GRAD_PLACES % 4 == 0 && STAGE % 4 == 0 && PHASES <= MOST_PHASES);
    // Float32: a stage of x is blocks of four places of a channel; a thread makes some of one channel, in two parts.
    static constexpr int FOURS = STAGE / 4, FOURS_AT_ONCE = THREADS / CHANNELS;
    static constexpr int PART_FOURS = ((PHASES * FOURS + FOURS_AT_ONCE - 1) / FOURS_AT_ONCE + 1) / 2;
    typedef float Part[PART_FOURS][4];

    const Places& problem;
    unsigned char* const shared;
    int first_row, first_channel, first_place, group, back;
    int reading;  // where in the rings the next stage of grad begins, in chunks
    int writing;  // where the next stage of x is copied to, in places
    int rings[GROUP_TAPS], shifts[GROUP_TAPS];  // of this warpgroup's taps, in chunks
    float sums[GROUP_TAPS][COLUMNS][4];

    DEVICE explicit PlacesTile(const Places& problem)
        : problem(problem), shared(dynamic_shared_memory<unsigned char>()), reading(0), writing(0) {
        const int row_blocks = (problem.out_channels + ROWS - 1) / ROWS;
        const int channel_blocks = (problem.channels + CHANNELS - 1) / CHANNELS;
        first_row = int(blockIdx.x) % row_blocks * ROWS;
        first_channel = int(blockIdx.x) / row_blocks % channel_blocks * CHANNELS;
        first_place = int(blockIdx.y) * problem.slice_places;
        // the same in all threads of a warp, and said so: operands are in uniform registers
        const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0);
        group = int(blockIdx.x) / row_blocks / channel_blocks * WARPGROUPS_OF_BLOCK + warpgroup;
        const int read = min(group, problem.groups - 1);  // one that exists
        back = problem.backs[read];
#pragma unroll
        for (int i = 0; i < GROUP_TAPS; ++i) {
            rings[i] = problem.tap_rings[read * GROUP_TAPS + i] * PLACE_CHUNKS;
            shifts[i] = problem.tap_shifts[read * GROUP_TAPS + i] * PLACE_CHUNKS;
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
                for (int element = 0; element < 4; ++element) sums[i][j][element] = 0;
            }
        }
    }

    static DEVICE int lane() { return threadIdx.x % 32; }
    static DEVICE int warp_row() { return threadIdx.x / 32 % 4 * 16; }

    // Of the slice; past the last place grad is 0.
    DEVICE int stages() const {
        return (min(problem.slice_places, problem.places - first_place) + STAGE - 1) / STAGE;
    }

    // Shared memory: stages of grad, two tables of pixels (those of one stage and of the next), rings of x.
    DEVICE unsigned char* grad_of(int stage) const { return shared + stage % STAGES * GRAD_BYTES; }
    DEVICE int* table_of(int stage) const {
        return reinterpret_cast<int*>(shared + STAGES * GRAD_BYTES) + (stage & 1) * ENTRIES;
    }
    DEVICE unsigned char* ring() const { return shared + STAGES * GRAD_BYTES + TABLES_BYTES; }

    // ---- copying ----

    // A stage brings places of x that lie ahead_places further on. Stages before 0, without grad, bring the first ones.
    DEVICE int place_of_x(int stage) const { return first_place + problem.ahead_places + stage * STAGE; }

    // Find what a stage copies: of each pixel the number of its first chunk in the array, less than 0 in a gap.
    DEVICE void make_table(int stage) {
        const int entry = threadIdx.x, number = entry - GRAD_PLACES;
        if (number < 0) {
            const int pixel = pixel_of_grad(first_place + stage * STAGE - BACK + entry, problem);
            table_of(stage)[entry] = pixel * (problem.out_channels / CHUNK<T>);
        } else if (number < problem.phases * STAGE) {
            const int pixel = pixel_of_x(Spot(place_of_x(stage) + number % STAGE, problem), number / STAGE, problem);
            table_of(stage)[entry] = pixel * (problem.channels / CHUNK<T>);
        }
    }

    // Issue a stage's copies of grad; its table is made.
    DEVICE void copy_grad(int stage, const T* grad) const {
        constexpr int STEP = THREADS / GRAD_CHUNKS;
        const int first = threadIdx.x / GRAD_CHUNKS, chunk = threadIdx.x % GRAD_CHUNKS;
        const int channel = first_row + chunk * CHUNK<T>;
        const bool exists = channel < problem.out_channels;
        const T* const source = exists ? grad + channel : grad;
        const int moved = sizeof(T) == 2 ? chunk ^ first % 8 : chunk;  // STEP is a multiple of 8
        unsigned char* const places = grad_of(stage) + first * GRAD_PITCH + moved * CHUNK_BYTES;
#pragma unroll
        for (int place = 0; place < GRAD_PLACES; place += STEP) {
            if (place + STEP > GRAD_PLACES && first + place >= GRAD_PLACES) break;
            copy_chunk(places + place * GRAD_PITCH, source, table_of(stage)[first + place], exists);
        }
    }

    // Issue those of x, of 16-bit elements: a pixel's chunks go to the columns.
    DEVICE void copy_pixels(int stage, const T* x) const {
        constexpr int STEP = THREADS / COLUMNS;
        const int column = threadIdx.x % COLUMNS, channel = first_channel + column * 8;
        const bool exists = channel < problem.channels;
        const T* const source = exists ? x + channel : x;
        const int* const chunks = table_of(stage) + GRAD_PLACES;
        unsigned char* const places = ring() + column * problem.column_bytes + writing * CHUNK_BYTES;
        const int end = problem.phases * STAGE;
#pragma unroll 1
        for (int number = threadIdx.x / COLUMNS; number < end; number += STEP) {
            const int place = number % STAGE, chunk = chunks[number];
            unsigned char* const destination = places + (number / STAGE * problem.phase_places + place) * CHUNK_BYTES;
            copy_chunk(destination, source, chunk, exists);
            if (writing == 0 && place < MIRROR) {
                copy_chunk(destination + problem.ring_places * CHUNK_BYTES, source, chunk, exists);
            }
        }
    }

    // Copy a chunk counted from the source on, zeros where there is none.
    static DEVICE void copy_chunk(unsigned char* destination, const T* source, int chunk, bool exists) {
        copy_async<CHUNK_BYTES>(destination, source + (long long)max(chunk, 0) * CHUNK<T>, exists && chunk >= 0);
    }

    // The stage of x is copied.
    DEVICE void end_copies() { writing = writing + STAGE == problem.ring_places ? 0 : writing + STAGE; }

    // The thread's fours of places, counted through all phases, and its channel.
    static DEVICE int four_of(int part, int i) {
        return threadIdx.x / CHANNELS + (part * PART_FOURS + i) * FOURS_AT_ONCE;
    }
    static DEVICE int channel() { return threadIdx.x % CHANNELS; }

    // Float32: load a part of a stage of x.
    DEVICE void load_x(Part& values, int part, int stage, const T* x) const {
        const bool exists = first_channel + channel() < problem.channels;
        const T* const source = x + first_channel + channel();
        const int4* const fours = reinterpret_cast<const int4*>(table_of(stage) + GRAD_PLACES);
#pragma unroll
        for (int i = 0; i < PART_FOURS; ++i) {
            const int four = four_of(part, i);
            if (four >= problem.phases * FOURS) break;
            const int4 chunks = fours[four];
            const int starts[4] = {chunks.x, chunks.y, chunks.z, chunks.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                values[i][j] = exists && starts[j] >= 0 ? source[(long long)starts[j] * CHUNK<T>] : 0;
            }
        }
    }

    // Round a part, and store it as blocks.
    DEVICE void store_x(const Part& values, int part) const {
        uint4* const blocks = reinterpret_cast<uint4*>(ring()) + channel();
#pragma unroll
        for (int i = 0; i < PART_FOURS; ++i) {
            const int four = four_of(part, i);
            if (four >= problem.phases * FOURS) break;
            const int phase = four / FOURS, place = writing + four % FOURS * 4;
            uint32_t bits[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) bits[j] = TensorCore<T>::prepare(__float_as_uint(values[i][j]));
            const uint4 block = make_uint4(bits[0], bits[1], bits[2], bits[3]);
            uint4* const target = blocks + (phase * problem.phase_places + place) * PLACE_CHUNKS;
            *target = block;
            if (place < MIRROR) target[problem.ring_places * PLACE_CHUNKS] = block;
        }
    }

    // ---- multiplying ----

    // Load the warp's 16 rows of grad at the places of a step. Of 16-bit elements, matrices are rows 0-7 and 8-15 at
    // places 0-7, then at places 8-15. Of float32 a thread's two rows are neighbours: see row_of.
    DEVICE void load(uint32_t (&a)[4], int stage, int step) const {
        const unsigned char* const places = grad_of(stage) + step * (DEPTH * GRAD_PITCH);
        if constexpr (sizeof(T) == 2) {
            const int place = lane() / 16 * 8 + lane() % 8, chunk = warp_row() / 8 + lane() / 8 % 2;
            load_matrices_transposed(a, places + place * GRAD_PITCH + (chunk ^ lane() % 8) * CHUNK_BYTES);
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int place = BACK - back + half * 4 + lane() % 4;
                const uint2 rows =
                    *reinterpret_cast<const uint2*>(places + place * GRAD_PITCH + row_of(0) * int(sizeof(T)));
                a[2 * half] = TensorCore<T>::prepare(rows.x);
                a[2 * half + 1] = TensorCore<T>::prepare(rows.y);
            }
        }
    }

    DEVICE uint64_t operand() const {
        if constexpr (sizeof(T) == 2) return warpgroup_operand_of_columns(ring(), problem.column_bytes);
        return warpgroup_operand_of_blocks(ring(), 4 * PLACE_CHUNKS * CHUNK_BYTES, 128);
    }

    // Issue the products of a step of the next stage.
    DEVICE void multiply(const uint32_t (&a)[4], int step) {
        constexpr int STEP_CHUNKS = DEPTH * PLACE_CHUNKS;
        const uint64_t all = operand();
        const int ring_chunks = problem.ring_places * PLACE_CHUNKS;
        begin_products();
#pragma unroll
        for (int i = 0; i < GROUP_TAPS; ++i) {
            const int first = reading + shifts[i];
            const int wrapped = first >= ring_chunks - step * STEP_CHUNKS ? ring_chunks : 0;
            const uint32_t chunk = rings[i] + first + step * STEP_CHUNKS - wrapped;
            TensorCore<T>::multiply_columns(sums[i], a, all + chunk);
        }
        commit_products();
    }

    // The products of a stage are issued.
    DEVICE void end_products() {
        reading += STAGE * PLACE_CHUNKS;
        if (reading == problem.ring_places * PLACE_CHUNKS) reading = 0;
    }

    // The row of sums[..][..][2 * half] and the next.
    static DEVICE int row_of(int half) {
        return warp_row() + (sizeof(T) == 4 ? lane() / 4 * 2 + half : half * 8 + lane() / 4);
    }

    // Write the sums to partials (out_channels, taps, channels) of the slice.
    DEVICE void store(float* partials) const {
        if (group >= problem.groups) return;
#pragma unroll
        for (int i = 0; i < GROUP_TAPS; ++i) {
            const int tap = problem.tap_numbers[group * GROUP_TAPS + i];
            if (tap < 0) continue;
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                const int channel = first_channel + j * 8 + lane() % 4 * 2;
                if (channel >= problem.channels) continue;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = first_row + row_of(half);
                    if (row >= problem.out_channels) continue;
                    const long long line = (long long)row * problem.taps + tap;
                    *reinterpret_cast<float2*>(partials + line * problem.channels + channel) =
                        make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
                }
            }
        }
    }
};

// The grid is (row blocks x channel blocks x blocks of groups, slices); partials are (slices, out_channels, taps,
// channels).
template <typename T, int PHASES>
__global__ void __launch_bounds__(PlacesTile<T, PHASES>::THREADS, 1)
places_grad_weight(const T* __restrict__ grad, const T* __restrict__ x, float* __restrict__ partials,
                   const __grid_constant__ Places problem) {
    typedef PlacesTile<T, PHASES> Tile;
    constexpr int AHEAD = Tile::AHEAD, STEPS = Tile::STEPS;
    Tile tile(problem);
    typename Tile::Part first, second;
    for (int stage = -problem.ahead_places / Tile::STAGE; stage < AHEAD; ++stage) {
        tile.make_table(stage);
        __syncthreads();
        if constexpr (sizeof(T) == 2) {
            tile.copy_pixels(stage, x);
        } else {
            tile.load_x(first, 0, stage, x);
            tile.load_x(second, 1, stage, x);
            tile.store_x(first, 0);
            tile.store_x(second, 1);
        }
        tile.end_copies();
        if (stage < 0) continue;
        tile.copy_grad(stage, grad);
        commit_copies();
    }
    tile.make_table(AHEAD);
    // Tensor cores shall always have products to do: the last steps of a stage still run when the next one's first are
    // issued, and copies are issued between steps. Each step is a group of products.
    const int stages = tile.stages();
    uint32_t a[STEPS][4];
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
        const bool copying = stage + AHEAD < stages;
        wait_copies<AHEAD - 1>();
        show_to_products();
        __syncthreads();  // the stage has landed, a table is made, and products of the last stage but one are done
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            wait_products<STEPS - 1>();  // this step's of the last stage are done: a can be loaded anew
            tile.load(a[step], stage, step);
            tile.multiply(a[step], step);
            if constexpr (sizeof(T) == 4) {  // two steps pass until loads have arrived
                if (step == 0 && copying) tile.load_x(first, 0, stage + AHEAD, x);
                if (step == 1 && copying) tile.load_x(second, 1, stage + AHEAD, x);
                if (step == 2 && copying) tile.store_x(first, 0);
                if (step == 3 && copying) tile.store_x(second, 1);
            } else if (step == 0 && copying) {
                tile.copy_pixels(stage + AHEAD, x);
            }
            if (step == 1 && copying) tile.copy_grad(stage + AHEAD, grad);
            if (step == 2) tile.make_table(stage + AHEAD + 1);
        }
        commit_copies();
        tile.end_copies();
        tile.end_products();
    }
    wait_products<0>();
    tile.store(partials + (long long)blockIdx.y * problem.out_channels * problem.taps * problem.channels);
}
