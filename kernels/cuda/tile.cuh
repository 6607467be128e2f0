// A block's tile of a matrix product on tensor cores: sums[row][column] = sum of a[row][depth] * b[depth][column].
//
// The block runs through the depth in slabs of 128 bytes (32 float32 or 64 16-bit elements). A ring of STAGES
// slabs of both operands lies in shared memory; while one is multiplied, the next are on their way from global
// memory. Elements are float (rounded to tf32), float16 or bfloat16; sums are float32. From sm_80 on.
//
// WRITING A LOADER. A loader brings one operand: an object in each thread with a method
//     copy(unsigned char* slab)    issue copy_async for this thread's part of the next slab, then move on
// "Lines" are the rows of a or the columns of b. An operand's slab is LINES rows of 128 bytes; its 16-byte
// chunks lie where Slab::destination says. Thread t copies chunk Slab::chunk() of rows Slab::row(i), i < COUNT:
//   DEPTHWISE (lines are contiguous along the depth in memory): row(i) holds the whole depth of line(i), and
//     the thread's chunk starts at depth chunk() * CHUNK of the slab;
//   CROSSWISE (contiguous across lines): row(i) holds depth(i) of a panel of 128 bytes of lines, and the
//     thread's chunk is the CHUNK lines from line(i) on.
// Depth past the end must be copied as zeros, in both operands. Lines past the end may hold anything: their sums
// must not be stored; read a valid line instead. MatrixLoader below loads plain matrices.
#pragma once
#include <elements.cuh>

enum class Layout { DEPTHWISE, CROSSWISE };

constexpr int SLAB_BYTES = 128;  // depth of a slab, and length of a row in shared memory
constexpr int CHUNK_BYTES = 16;  // one asynchronous copy

// Elements of a slab's depth, and of a chunk.
template <typename T> constexpr int SLAB_DEPTH = SLAB_BYTES / sizeof(T);
template <typename T> constexpr int CHUNK = CHUNK_BYTES / sizeof(T);

// What one instruction does: it multiplies a depth of 32 bytes.
template <typename T> struct TensorCore;

template <> struct TensorCore<float> {
    static DEVICE uint32_t prepare(uint32_t bits) { return round_to_tf32(bits); }
    static DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        multiply_tf32(d, a, b);
    }
    template <int BLOCKS>
    static DEVICE void multiply_columns(float (&d)[BLOCKS][4], const uint32_t (&a)[4], uint64_t b) {
        warpgroup_multiply_tf32(d, a, b);
    }
};

template <> struct TensorCore<float16> {
    static DEVICE uint32_t prepare(uint32_t bits) { return bits; }
    static DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        multiply_float16(d, a, b);
    }
    template <bool PANELS_B, int BLOCKS>
    static DEVICE void multiply_groups(float (&d)[BLOCKS][4], uint64_t a, uint64_t b) {
        warpgroup_multiply_float16<PANELS_B>(d, a, b);
    }
    template <int BLOCKS>
    static DEVICE void multiply_columns(float (&d)[BLOCKS][4], const uint32_t (&a)[4], uint64_t b) {
        warpgroup_multiply_columns_float16(d, a, b);
    }
};

template <> struct TensorCore<bfloat16> {
    static DEVICE uint32_t prepare(uint32_t bits) { return bits; }
    static DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        multiply_bfloat16(d, a, b);
    }
    template <bool PANELS_B, int BLOCKS>
    static DEVICE void multiply_groups(float (&d)[BLOCKS][4], uint64_t a, uint64_t b) {
        warpgroup_multiply_bfloat16<PANELS_B>(d, a, b);
    }
    template <int BLOCKS>
    static DEVICE void multiply_columns(float (&d)[BLOCKS][4], const uint32_t (&a)[4], uint64_t b) {
        warpgroup_multiply_columns_bfloat16(d, a, b);
    }
};

// One operand's part of a stage: where its LINES lines lie, and which of its chunks a thread copies.
template <typename Element, Layout LAYOUT_, int LINES_, int THREADS, bool INTERLEAVED>
struct Slab {
    typedef Element T;
    static constexpr Layout LAYOUT = LAYOUT_;
    static constexpr int LINES = LINES_;
    static constexpr int BYTES = LINES * SLAB_BYTES;
    static constexpr int STEP = THREADS / 8;  // rows from one of a thread's copies to the next
    static constexpr int COUNT = LINES / STEP;
    static constexpr int PANEL = SLAB_BYTES / sizeof(T);  // lines side by side in a row, CROSSWISE
    static_assert(LINES % STEP == 0 && LINES % PANEL == 0 && STEP % 8 == 0);
    static_assert((STEP & (STEP - 1)) == 0 && (LAYOUT == Layout::DEPTHWISE || SLAB_DEPTH<T> % STEP == 0));

    static DEVICE int chunk() { return threadIdx.x % 8; }
    static DEVICE int row(int i) { return threadIdx.x / 8 + i * STEP; }

    // DEPTHWISE. Interleaved, 32 lines are dealt to 4 groups of 8 rows in turn: a thread's sums then belong to
    // neighbouring columns (see Tile::get_run).
    static DEVICE int line_of_row(int row) {
        return INTERLEAVED ? row / 32 * 32 + row % 8 * 4 + row / 8 % 4 : row;
    }

    // The line of the thread's copy i, CROSSWISE the first of its chunk. Written as a sum of what depends on the
    // thread and what depends on i: row(0) < STEP, a power of two, so each has bits of its own.
    static DEVICE int line(int i) {
        if constexpr (LAYOUT == Layout::DEPTHWISE) return line_of_row(row(0)) + line_of_row(i * STEP);
        return chunk() * CHUNK<T> + i * STEP / SLAB_DEPTH<T> * PANEL;
    }

    // The depth at which the thread's copy i starts.
    static DEVICE int depth(int i) {
        if constexpr (LAYOUT == Layout::DEPTHWISE) return chunk() * CHUNK<T>;
        return row(0) + i * STEP % SLAB_DEPTH<T>;
    }

    // Chunks change places within their row so that no two threads of a load meet in a bank: eight rows one
    // below the other (ldmatrix), or chunks 2n and 2n + 1 of four rows (128-bit loads of float32, CROSSWISE).
    static DEVICE int offset(int row, int chunk) { return row * SLAB_BYTES + (chunk ^ key(row)) * CHUNK_BYTES; }
    static DEVICE int key(int row) {
        return LAYOUT == Layout::CROSSWISE && sizeof(T) == 4 ? row % 4 * 2 : row % 8;
    }

    // STEP is a multiple of 8: the key of row(i) is that of row(0).
    static DEVICE unsigned char* destination(unsigned char* slab, int i) {
        return slab + offset(row(0), chunk()) + i * STEP * SLAB_BYTES;
    }
};

// Which of a warp's rows an instruction's 16 are.
enum class RowOrder {
    IN_TURN,   // 16 neighbours
    DEALT,     // every fourth but one pair: four neighbours belong to different instructions (float32, CROSSWISE)
    BY_EIGHT,  // groups of eight neighbours go to the instructions in turn (warpgroups)
};

// The sums of a tile of ROWS x COLUMNS, as they lie in the registers of warps with WARP_ROWS x WARP_COLUMNS each,
// made of instructions' results of 16 x 8. DEALT_COLUMNS: four neighbouring columns belong to different
// instructions (Slab::line_of_row).
template <int ROWS_, int COLUMNS_, int WARP_ROWS_, int WARP_COLUMNS, RowOrder ROW_ORDER, bool DEALT_COLUMNS>
struct TileSums {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, WARP_ROWS = WARP_ROWS_;
    static constexpr int WARPS_DOWN = ROWS / WARP_ROWS, WARPS_ACROSS = COLUMNS / WARP_COLUMNS;
    static constexpr int THREADS = WARPS_DOWN * WARPS_ACROSS * 32;
    static constexpr int RUN = 8;  // neighbouring columns whose sums a thread can have in one row
    static constexpr int DOWN = WARP_ROWS / 16, ACROSS = WARP_COLUMNS / 8;
    static constexpr int BLOCKS = ACROSS / 4;  // of 32 columns, in which a thread has a run in each of its rows

    float sums[DOWN][ACROSS][4];

    static DEVICE int lane() { return threadIdx.x % 32; }
    static DEVICE int warp_row() { return threadIdx.x / 32 / WARPS_ACROSS * WARP_ROWS; }
    static DEVICE int warp_column() { return threadIdx.x / 32 % WARPS_ACROSS * WARP_COLUMNS; }

    // The row of sums[i][..][2 * half] and sums[i][..][2 * half + 1] in the tile.
    static DEVICE int row_of(int i, int half) {
        const int group = lane() / 4;
        if (ROW_ORDER == RowOrder::DEALT) return warp_row() + i / 2 * 32 + group * 4 + i % 2 * 2 + half;
        if (ROW_ORDER == RowOrder::BY_EIGHT) return warp_row() + half * DOWN * 8 + i * 8 + group;
        return warp_row() + i * 16 + half * 8 + group;
    }

    // The first column of this thread's runs in a block.
    static DEVICE int column_of(int block) { return warp_column() + block * 32 + lane() % 4 * RUN; }

    // Give the sums of one row, row_of(i, half), in columns column_of(block) to column_of(block) + RUN - 1.
    DEVICE void get_run(int i, int half, int block, float (&values)[RUN]) const {
        float pairs[4][2];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int element = 0; element < 2; ++element) pairs[j][element] = sums[i][4 * block + j][2 * half + element];
        }
        if constexpr (DEALT_COLUMNS) {  // element e of pair j of lane t is column 8t + 4e + j
#pragma unroll
            for (int v = 0; v < RUN; ++v) values[v] = pairs[v % 4][v / 4];
        } else {  // pair j of lane t is columns 8j + 2t: hand pair j to lane j
            exchange(pairs, 1);
            exchange(pairs, 2);
#pragma unroll
            for (int v = 0; v < RUN; ++v) values[v] = pairs[v / 2][v % 2];
        }
    }

    // Call visit(row, values) for every run of this thread in columns column_of(block) on. All threads of a warp
    // must call it together; visit may be left early.
    template <typename Visit>
    DEVICE void for_each_run(int block, Visit visit) const {
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float values[RUN];
                get_run(i, half, block, values);
                visit(row_of(i, half), values);
            }
        }
    }

protected:
    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
#pragma unroll
            for (int j = 0; j < ACROSS; ++j) {
#pragma unroll
                for (int element = 0; element < 4; ++element) sums[i][j][element] = 0;
            }
        }
    }

private:
    // Swap with the lane that differs in `bit` the pairs whose number differs from the own lane's in it.
    static DEVICE void exchange(float (&pairs)[4][2], int bit) {
        const bool upper = lane() & bit;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (j & bit) continue;
#pragma unroll
            for (int element = 0; element < 2; ++element) {
                float& low = pairs[j][element];
                float& high = pairs[j + bit][element];
                const float received = __shfl_xor_sync(0xffffffffu, upper ? low : high, bit);
                low = upper ? received : low;
                high = upper ? high : received;
            }
        }
    }
};

// ldmatrix and the tensor cores of warpgroups keep the order of lines where 16-bit elements are CROSSWISE.
template <typename T, Layout LAYOUT_B> constexpr bool DEALS_COLUMNS = LAYOUT_B == Layout::DEPTHWISE || sizeof(T) == 4;

template <typename T, Layout LAYOUT_A>
constexpr RowOrder ROW_ORDER_OF = LAYOUT_A == Layout::CROSSWISE && sizeof(T) == 4 ? RowOrder::DEALT
                                                                                : RowOrder::IN_TURN;

// A tile by the instructions of single warps.
template <typename Element, int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS, int STAGES, Layout LAYOUT_A,
          Layout LAYOUT_B>
struct Tile : TileSums<ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS, ROW_ORDER_OF<Element, LAYOUT_A>,
                       DEALS_COLUMNS<Element, LAYOUT_B>> {
    typedef Element T;
    typedef TileSums<ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS, ROW_ORDER_OF<Element, LAYOUT_A>,
                     DEALS_COLUMNS<Element, LAYOUT_B>>
        Sums;
    using Sums::ACROSS;
    using Sums::DOWN;
    using Sums::sums;
    using Sums::warp_column;
    using Sums::warp_row;
    typedef Slab<T, LAYOUT_A, ROWS, Sums::THREADS, false> SlabA;
    typedef Slab<T, LAYOUT_B, COLUMNS, Sums::THREADS, true> SlabB;
    static constexpr int STAGE_BYTES = SlabA::BYTES + SlabB::BYTES;
    static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
    static_assert(WARP_ROWS == 32 || WARP_ROWS == 64);
    static_assert(WARP_COLUMNS == 32 || WARP_COLUMNS == 64);
    static_assert(STAGES >= 2);

    // Compute the tile from `slabs` slabs of both operands. `shared` holds SHARED_BYTES at a multiple of 1024;
    // threads still read it when the first of them returns.
    template <typename LoaderA, typename LoaderB>
    DEVICE void compute(unsigned char* shared, LoaderA& a, LoaderB& b, int slabs) {
        this->clear();
        if (slabs == 0) return;
#pragma unroll
        for (int stage = 0; stage < STAGES - 1; ++stage) {
            if (stage < slabs) copy(shared + stage * STAGE_BYTES, a, b);
            commit_copies();
        }
        unsigned char* const end = shared + SHARED_BYTES;
        unsigned char* reading = shared;
        unsigned char* writing = end - STAGE_BYTES;
        wait_copies<STAGES - 2>();
        __syncthreads();
        load(0, reading, 0);
        for (int slab = 0; slab < slabs; ++slab) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                if (step == STEPS - 1) {  // the next slab has landed, and no warp needs the last one any more
                    wait_copies<STAGES - 2>();
                    __syncthreads();
                    reading = reading + STAGE_BYTES == end ? shared : reading + STAGE_BYTES;
                }
                load((step + 1) % 2, reading, (step + 1) % STEPS);  // ahead of its use by one step
                if (step == 0) {
                    if (slab + STAGES - 1 < slabs) copy(writing, a, b);
                    commit_copies();
                    writing = writing + STAGE_BYTES == end ? shared : writing + STAGE_BYTES;
                }
                multiply(step % 2);
            }
        }
    }

private:
    static constexpr int STEPS = 4;  // instructions along a slab
    static constexpr int STEP_BYTES = SLAB_BYTES / STEPS;

    // What the instructions of one step read, twice: one step is loaded while the other is multiplied.
    uint32_t fragments_a[2][DOWN][4];
    uint32_t fragments_b[2][ACROSS][2];

    template <typename LoaderA, typename LoaderB>
    static DEVICE void copy(unsigned char* stage, LoaderA& a, LoaderB& b) {
        a.copy(stage);
        b.copy(stage + SlabA::BYTES);
    }

    DEVICE void load(int buffer, const unsigned char* stage, int step) {
        load_a(fragments_a[buffer], stage, step);
        load_b(fragments_b[buffer], stage + SlabA::BYTES, step);
    }

    DEVICE void load_a(uint32_t (&fragments)[DOWN][4], const unsigned char* slab, int step) {
        const int lane = Sums::lane();
        if constexpr (LAYOUT_A == Layout::DEPTHWISE) {
            // matrices: rows 0-7, rows 8-15, and both again 16 bytes on
            const int offset = SlabA::offset(warp_row() + lane % 16, lane / 16) ^ step * STEP_BYTES;
#pragma unroll
            for (int i = 0; i < DOWN; ++i) load_matrices(fragments[i], slab + offset + i * 16 * SLAB_BYTES);
        } else if constexpr (sizeof(T) == 2) {
            // matrices: depths 0-7 of lines 0-7 and 8-15, then depths 8-15
            const int row = warp_row() / SlabA::PANEL * SLAB_DEPTH<T> + lane / 16 * 8 + lane % 8;
            const int offset = SlabA::offset(row, warp_row() % SlabA::PANEL / CHUNK<T> + lane / 8 % 2);
#pragma unroll
            for (int i = 0; i < DOWN; ++i) {
                const int chunks = i * 16 / CHUNK<T> * CHUNK_BYTES;
                load_matrices_transposed(fragments[i], slab + (offset ^ chunks) + step * 16 * SLAB_BYTES);
            }
        } else {
            // four lines of one depth at once; see row_of for the rows they become
#pragma unroll
            for (int i = 0; i < DOWN; i += 2) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint4 lines = load_lines<SlabA>(slab, warp_row() + i * 16, step, half);
                    fragments[i][2 * half] = lines.x;
                    fragments[i][2 * half + 1] = lines.y;
                    fragments[i + 1][2 * half] = lines.z;
                    fragments[i + 1][2 * half + 1] = lines.w;
                }
            }
        }
    }

    DEVICE void load_b(uint32_t (&fragments)[ACROSS][2], const unsigned char* slab, int step) {
        const int lane = Sums::lane();
        if constexpr (LAYOUT_B == Layout::DEPTHWISE) {
            // matrices: rows 0-7, the same 16 bytes on, then rows 8-15
            const int row = warp_column() + lane / 16 * 8 + lane % 8;
            const int offset = SlabB::offset(row, lane / 8 % 2) ^ step * STEP_BYTES;
#pragma unroll
            for (int j = 0; j < ACROSS; j += 2) {
                uint32_t pair[4];
                load_matrices(pair, slab + offset + j * 8 * SLAB_BYTES);
                split(fragments, j, pair);
            }
        } else if constexpr (sizeof(T) == 2) {
            // matrices: depths 0-7 and 8-15 of lines 0-7, then of lines 8-15
            const int row = warp_column() / SlabB::PANEL * SLAB_DEPTH<T> + lane % 16;
            const int offset = SlabB::offset(row, warp_column() % SlabB::PANEL / CHUNK<T> + lane / 16);
#pragma unroll
            for (int j = 0; j < ACROSS; j += 2) {
                uint32_t pair[4];
                const int chunks = j * 8 / CHUNK<T> * CHUNK_BYTES;
                load_matrices_transposed(pair, slab + (offset ^ chunks) + step * 16 * SLAB_BYTES);
                split(fragments, j, pair);
            }
        } else {
#pragma unroll
            for (int j = 0; j < ACROSS; j += 4) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint4 lines = load_lines<SlabB>(slab, warp_column() + j * 8, step, half);
                    fragments[j][half] = lines.x;
                    fragments[j + 1][half] = lines.y;
                    fragments[j + 2][half] = lines.z;
                    fragments[j + 3][half] = lines.w;
                }
            }
        }
    }

    static DEVICE void split(uint32_t (&fragments)[ACROSS][2], int j, const uint32_t (&pair)[4]) {
        fragments[j][0] = pair[0];
        fragments[j][1] = pair[1];
        fragments[j + 1][0] = pair[2];
        fragments[j + 1][1] = pair[3];
    }

    // Float32, CROSSWISE: lines 4g to 4g + 3 of 32, at depth t or, in the second half, t + 4 of a step.
    template <typename SlabType>
    static DEVICE uint4 load_lines(const unsigned char* slab, int first_line, int step, int half) {
        const int row = Sums::lane() % 4;
        const int start = first_line / SlabType::PANEL * SLAB_DEPTH<T> + step * 8 + half * 4;  // key 0
        const int offset = SlabType::offset(row, Sums::lane() / 4) + start * SLAB_BYTES;
        return *reinterpret_cast<const uint4*>(slab + offset);
    }

    DEVICE void multiply(int buffer) {
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
#pragma unroll
            for (int element = 0; element < 4; ++element) {
                fragments_a[buffer][i][element] = TensorCore<T>::prepare(fragments_a[buffer][i][element]);
            }
        }
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) {
#pragma unroll
            for (int element = 0; element < 2; ++element) {
                fragments_b[buffer][j][element] = TensorCore<T>::prepare(fragments_b[buffer][j][element]);
            }
        }
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
#pragma unroll
            for (int j = 0; j < ACROSS; ++j) {
                TensorCore<T>::multiply(sums[i][j], fragments_a[buffer][i], fragments_b[buffer][j]);
            }
        }
    }
};

// Sums by the instructions of warpgroups (sm_90a), each four warps one below the other: rows of a are depthwise.
// Float32 of b must be rounded to tf32 in memory, and depthwise.
template <typename Element, int ROWS, int COLUMNS, int WARP_ROWS, Layout LAYOUT_B>
struct WarpgroupSums
    : TileSums<ROWS, COLUMNS, WARP_ROWS, COLUMNS, RowOrder::BY_EIGHT, DEALS_COLUMNS<Element, LAYOUT_B>> {
    typedef Element T;
    typedef TileSums<ROWS, COLUMNS, WARP_ROWS, COLUMNS, RowOrder::BY_EIGHT, DEALS_COLUMNS<Element, LAYOUT_B>> Sums;
    using Sums::DOWN;
    using Sums::sums;
    typedef Slab<T, Layout::DEPTHWISE, ROWS, Sums::THREADS, false> SlabA;
    typedef Slab<T, LAYOUT_B, COLUMNS, Sums::THREADS, true> SlabB;
    static_assert(WARP_ROWS == 16 || WARP_ROWS == 32);
    static_assert(COLUMNS == 64 || COLUMNS == 128);
    static_assert(ROWS % (4 * WARP_ROWS) == 0);
    static_assert(sizeof(T) == 2 || LAYOUT_B == Layout::DEPTHWISE);

protected:
    // Issue the products of a slab of b with ROWS rows of a from first_row on; they lie as those of a slab.
    DEVICE void multiply(const unsigned char* rows, int first_row, const unsigned char* slab_b) {
        if constexpr (sizeof(T) == 4) {
            load_a(rows, first_row + Sums::warp_row());
            const uint64_t b = warpgroup_operand(slab_b);
            begin_products();
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
#pragma unroll
                for (int i = 0; i < DOWN; ++i) {
                    warpgroup_multiply_tf32(sums[i], fragments[step][i], b + step * (STEP_BYTES >> 4));
                }
            }
        } else {
            constexpr bool PANELS = LAYOUT_B == Layout::CROSSWISE;
            // the same in all threads, and said so: an operand is in a uniform register
            const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0);
            const uint64_t a = warpgroup_operand<DOWN>(rows + (first_row + warpgroup * 4 * WARP_ROWS) * SLAB_BYTES);
            const uint64_t b = PANELS ? warpgroup_operand_of_panels(slab_b, SLAB_DEPTH<T> * SLAB_BYTES)
                                      : warpgroup_operand(slab_b);
            constexpr int STEP_A = STEP_BYTES >> 4, EIGHT_ROWS = 8 * SLAB_BYTES >> 4;
            constexpr int STEP_B = PANELS ? 16 * SLAB_BYTES >> 4 : STEP_BYTES >> 4;
            begin_products();
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
#pragma unroll
                for (int i = 0; i < DOWN; ++i) {
                    const uint64_t a_step = a + step * STEP_A + i * EIGHT_ROWS;
                    TensorCore<T>::template multiply_groups<PANELS>(sums[i], a_step, b + step * STEP_B);
                }
            }
        }
        commit_products();
    }

private:
    static constexpr int STEPS = 4;  // instructions along a slab
    static constexpr int STEP_BYTES = SLAB_BYTES / STEPS;

    uint32_t fragments[STEPS][DOWN][4];  // of a, where it goes through registers to be rounded

    // Load and round a slab of this warp's rows, the first of which is `first`. Matrices: the first and the second
    // eight of an instruction's rows, and both again 16 bytes on.
    DEVICE void load_a(const unsigned char* rows, int first) {
        const int lane = Sums::lane();
        const int row = first + lane / 8 % 2 * DOWN * 8 + lane % 8;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int offset = SlabA::offset(row, lane / 16) ^ step * STEP_BYTES;
#pragma unroll
            for (int i = 0; i < DOWN; ++i) load_matrices(fragments[step][i], rows + offset + i * 8 * SLAB_BYTES);
        }
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int i = 0; i < DOWN; ++i) {
#pragma unroll
                for (int element = 0; element < 4; ++element) {
                    fragments[step][i][element] = round_to_tf32(fragments[step][i][element]);
                }
            }
        }
    }
};

// A tile by warpgroups. A multiprocessor should have two blocks, which take turns: each drains the tensor cores
// after every slab. A block that is alone leaves the products of one slab running while it issues those of the
// next (float32 cannot: the registers of a are needed again).
template <typename T, int ROWS, int COLUMNS, int WARP_ROWS, int STAGES, Layout LAYOUT_B>
struct WarpgroupTile : WarpgroupSums<T, ROWS, COLUMNS, WARP_ROWS, LAYOUT_B> {
    typedef WarpgroupSums<T, ROWS, COLUMNS, WARP_ROWS, LAYOUT_B> Base;
    typedef typename Base::SlabA SlabA;
    typedef typename Base::SlabB SlabB;
    static constexpr int STAGE_BYTES = SlabA::BYTES + SlabB::BYTES;
    static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
    static constexpr int RUNNING = ROWS * COLUMNS > 128 * 128 && sizeof(T) == 2 ? 1 : 0;  // slabs of products
    static constexpr int AHEAD = STAGES - 1 - RUNNING;                                     // slabs of copies
    static_assert(AHEAD >= 1);

    // As Tile::compute.
    template <typename LoaderA, typename LoaderB>
    DEVICE void compute(unsigned char* shared, LoaderA& a, LoaderB& b, int slabs) {
        this->clear();
#pragma unroll
        for (int stage = 0; stage < AHEAD; ++stage) {
            if (stage < slabs) copy(shared + stage * STAGE_BYTES, a, b);
            commit_copies();
        }
        unsigned char* const end = shared + SHARED_BYTES;
        unsigned char* reading = shared;
        unsigned char* writing = shared + AHEAD * STAGE_BYTES;
        for (int slab = 0; slab < slabs; ++slab) {
            wait_copies<AHEAD - 1>();
            show_to_products();
            __syncthreads();  // this slab has landed, and products of `writing` are done
            this->multiply(reading, 0, reading + SlabA::BYTES);
            if (slab + AHEAD < slabs) copy(writing, a, b);
            commit_copies();
            wait_products<RUNNING>();
            reading = reading + STAGE_BYTES == end ? shared : reading + STAGE_BYTES;
            writing = writing + STAGE_BYTES == end ? shared : writing + STAGE_BYTES;
        }
        wait_products<0>();
    }

private:
    template <typename LoaderA, typename LoaderB>
    static DEVICE void copy(unsigned char* stage, LoaderA& a, LoaderB& b) {
        a.copy(stage);
        b.copy(stage + SlabA::BYTES);
    }
};

// A plain matrix. DEPTHWISE, line l at depth d is matrix[l * stride + d]; CROSSWISE it is matrix[d * stride + l].
// Depth (DEPTHWISE) or lines (CROSSWISE), stride and the address are multiples of 16 bytes.
template <typename Slab>
struct MatrixLoader {
    typedef typename Slab::T T;
    const T* address;
    int offsets[Slab::COUNT];
    long long stride;
    int depth_left;  // from where this thread's first chunk of the next slab starts

    // Load `depth` depths from matrix on, of the lines from first_line on; there are `lines` in all.
    DEVICE MatrixLoader(const T* matrix, long long first_line, long long lines, long long stride, int depth)
        : stride(stride), depth_left(depth - Slab::depth(0)) {
        const int last = lines - first_line < Slab::LINES ? int(lines - first_line) : Slab::LINES;
        if constexpr (Slab::LAYOUT == Layout::DEPTHWISE) {
            address = matrix + first_line * stride + Slab::depth(0);
#pragma unroll
            for (int i = 0; i < Slab::COUNT; ++i) offsets[i] = clamp(Slab::line(i), last - 1) * int(stride);
        } else {
            address = matrix + first_line + Slab::depth(0) * stride;
#pragma unroll
            for (int i = 0; i < Slab::COUNT; ++i) {
                offsets[i] = clamp(Slab::line(i), last - CHUNK<T>) + (Slab::depth(i) - Slab::depth(0)) * int(stride);
            }
        }
    }

    DEVICE void copy(unsigned char* slab) {
#pragma unroll
        for (int i = 0; i < Slab::COUNT; ++i) {
            const bool valid = depth_left > Slab::depth(i) - Slab::depth(0);
            copy_async<CHUNK_BYTES>(Slab::destination(slab, i), address + offsets[i], valid);
        }
        address += Slab::LAYOUT == Layout::DEPTHWISE ? SLAB_DEPTH<T> : SLAB_DEPTH<T> * stride;
        depth_left -= SLAB_DEPTH<T>;
    }

private:
    static DEVICE int clamp(int line, int last) { return line < last ? line : last; }
};
