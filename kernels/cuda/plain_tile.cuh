// A block's tile of a matrix product by ordinary multiply-adds: any sizes and strides, exact in float32.
//
// sums[row][column] += a[row][depth] * b[depth][column]: every thread keeps a part of the tile in registers,
// the block runs through the depth in slabs of DEPTH that are staged in shared memory, and while one slab is
// multiplied the next one is on its way from global memory to registers. Loaders say where operands lie.
#pragma once
#include <elements.cuh>

// Elements of 16 bytes of the type sums are taken in: the width of accesses to shared memory.
template <typename Sum> constexpr int PLAIN_VECTOR = 16 / sizeof(Sum);

constexpr int PLAIN_DEPTH = 8;

// A tile of ROWS x COLUMNS, of which each thread computes THREAD_ROWS x THREAD_COLUMNS.
template <typename SumType, int TILE_ROWS, int TILE_COLUMNS, int THREAD_ROWS, int THREAD_COLUMNS>
struct PlainTile {
    typedef SumType Sum;
    static constexpr int ROWS = TILE_ROWS, COLUMNS = TILE_COLUMNS, DEPTH = PLAIN_DEPTH;
    static constexpr int VECTOR = PLAIN_VECTOR<Sum>;
    static constexpr int ACROSS = COLUMNS / THREAD_COLUMNS;  // threads side by side
    static constexpr int THREADS = ROWS / THREAD_ROWS * ACROSS;
    static_assert(THREADS % 32 == 0 && ACROSS % 8 == 0 && ROWS / THREAD_ROWS % 4 == 0);
    static_assert(THREAD_ROWS % VECTOR == 0 && THREAD_COLUMNS % VECTOR == 0);

    // One slab; rows are padded by 16 bytes so that a warp's scattered stores meet all banks.
    template <int LENGTH>
    struct Slab {
        Sum values[DEPTH][LENGTH + VECTOR];
    };
    struct Shared {
        Slab<ROWS> a[2];
        Slab<COLUMNS> b[2];
    };

    Sum sums[THREAD_ROWS][THREAD_COLUMNS];

    // A warp's 32 threads are 4 x 8 patches: each slab row is read as few whole 128-byte lines.
    static DEVICE int thread_row() { return threadIdx.x / 32 / (ACROSS / 8) * 4 + threadIdx.x % 32 / 8; }
    static DEVICE int thread_column() { return threadIdx.x / 32 % (ACROSS / 8) * 8 + threadIdx.x % 8; }

    // Where sums[i] and sums[..][j] belong in the tile: runs of VECTOR neighbours, the runs far apart.
    static DEVICE int row_of(int i) {
        return i / VECTOR * (ROWS / THREAD_ROWS * VECTOR) + thread_row() * VECTOR + i % VECTOR;
    }
    static DEVICE int column_of(int j) {
        return j / VECTOR * (ACROSS * VECTOR) + thread_column() * VECTOR + j % VECTOR;
    }

    // Compute the tile from `slabs` slabs of both operands.
    template <typename LoaderA, typename LoaderB>
    DEVICE void compute(Shared& shared, LoaderA& a, LoaderB& b, long long slabs) {
#pragma unroll
        for (int i = 0; i < THREAD_ROWS; ++i) {
#pragma unroll
            for (int j = 0; j < THREAD_COLUMNS; ++j) sums[i][j] = 0;
        }
        if (slabs == 0) return;
        a.load();
        b.load();
        a.store(shared.a[0]);
        b.store(shared.b[0]);
        __syncthreads();
        int current = 0;
        for (long long slab = 1; slab < slabs; ++slab) {
            a.load();
            b.load();
            multiply(shared.a[current], shared.b[current]);
            current ^= 1;
            a.store(shared.a[current]);
            b.store(shared.b[current]);
            __syncthreads();
        }
        multiply(shared.a[current], shared.b[current]);
    }

    typedef Pack<Sum, VECTOR> Run;

    // Call visit(row, column, values) for all sums of this thread: values are those of VECTOR columns from column on.
    template <typename Visit>
    DEVICE void for_each_run(Visit visit) const {
#pragma unroll
        for (int i = 0; i < THREAD_ROWS; ++i) {
#pragma unroll
            for (int j = 0; j < THREAD_COLUMNS; j += VECTOR) {
                Run run;
#pragma unroll
                for (int element = 0; element < VECTOR; ++element) run.values[element] = sums[i][j + element];
                visit(row_of(i), column_of(j), run);
            }
        }
    }

private:
    DEVICE void multiply(const Slab<ROWS>& a, const Slab<COLUMNS>& b) {
#pragma unroll
        for (int depth = 0; depth < DEPTH; ++depth) {
            Run left[THREAD_ROWS / VECTOR], right[THREAD_COLUMNS / VECTOR];
#pragma unroll
            for (int i = 0; i < THREAD_ROWS / VECTOR; ++i) {
                left[i] = *reinterpret_cast<const Run*>(&a.values[depth][row_of(i * VECTOR)]);
            }
#pragma unroll
            for (int j = 0; j < THREAD_COLUMNS / VECTOR; ++j) {
                right[j] = *reinterpret_cast<const Run*>(&b.values[depth][column_of(j * VECTOR)]);
            }
#pragma unroll
            for (int i = 0; i < THREAD_ROWS; ++i) {
#pragma unroll
                for (int j = 0; j < THREAD_COLUMNS; ++j) {
                    sums[i][j] += left[i / VECTOR].values[i % VECTOR] * right[j / VECTOR].values[j % VECTOR];
                }
            }
        }
    }
};

// ---- how threads share the work of loading a slab -----------------------------------------------------

// VECTOR neighbours along the depth for each access: for operands contiguous along the depth.
template <typename Tile, typename T, int LENGTH, int VECTOR>
struct DepthwiseLoads {
    static constexpr int CHUNKS = Tile::DEPTH / VECTOR;  // accesses for one row (or column) of the slab
    static constexpr int STEP = Tile::THREADS / CHUNKS;
    static constexpr int COUNT = LENGTH / STEP;
    static_assert(Tile::DEPTH % VECTOR == 0 && LENGTH % STEP == 0);

    Pack<T, VECTOR> loaded[COUNT];

    static DEVICE int first_depth() { return threadIdx.x % CHUNKS * VECTOR; }
    static DEVICE int line(int i) { return threadIdx.x / CHUNKS + i * STEP; }

    DEVICE void store(typename Tile::template Slab<LENGTH>& slab) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
#pragma unroll
            for (int element = 0; element < VECTOR; ++element) {
                slab.values[first_depth() + element][line(i)] = to_float(loaded[i].values[element]);
            }
        }
    }
};

// VECTOR neighbours across the depth for each access: for operands contiguous along rows or columns.
template <typename Tile, typename T, int LENGTH, int VECTOR>
struct CrosswiseLoads {
    static constexpr int ACROSS = Tile::THREADS / Tile::DEPTH;
    static constexpr int COUNT = LENGTH / (ACROSS * VECTOR);
    static_assert(LENGTH % (ACROSS * VECTOR) == 0);

    Pack<T, VECTOR> loaded[COUNT];

    static DEVICE int depth() { return threadIdx.x / ACROSS; }
    static DEVICE int line(int i) { return (threadIdx.x % ACROSS + i * ACROSS) * VECTOR; }

    DEVICE void store(typename Tile::template Slab<LENGTH>& slab) const {
        typedef typename Tile::Sum Sum;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            Pack<Sum, VECTOR> converted;
#pragma unroll
            for (int element = 0; element < VECTOR; ++element) {
                converted.values[element] = to_float(loaded[i].values[element]);
            }
            *reinterpret_cast<Pack<Sum, VECTOR>*>(&slab.values[depth()][line(i)]) = converted;
        }
    }
};

template <typename T, int VECTOR>
DEVICE Pack<T, VECTOR> load_or_zero(const T* address, bool valid) {
    return valid ? *reinterpret_cast<const Pack<T, VECTOR>*>(address) : Pack<T, VECTOR>{};
}

// Store values at target, by one access if they are `whole`: aligned, and none of them past the end. Otherwise only
// the first `left` exist.
template <typename T, typename Sum, int WIDTH>
DEVICE void store_run(T* target, const Pack<Sum, WIDTH>& run, int left, bool whole) {
    if (whole) {
        Pack<T, WIDTH> converted;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) converted.values[i] = from_float<T>(run.values[i]);
        *reinterpret_cast<Pack<T, WIDTH>*>(target) = converted;
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            if (i < left) target[i] = from_float<T>(run.values[i]);
        }
    }
}

// ---- loaders of plain matrices --------------------------------------------------------------------------

// `lines` lines (rows of a, columns of b) that lie line_stride apart, each `depth` elements that lie
// depth_stride apart. With VECTOR > 1 depth_stride is 1, and all else a multiple of VECTOR.
template <typename Tile, typename T, int LENGTH, int VECTOR>
struct DepthwiseMatrix : DepthwiseLoads<Tile, T, LENGTH, VECTOR> {
    typedef DepthwiseLoads<Tile, T, LENGTH, VECTOR> Loads;
    const T* address;
    long long line_stride, depth_stride, depth_left;
    uint32_t valid = 0;  // bit i: line i exists
    static_assert(Loads::COUNT <= 32);

    DEVICE DepthwiseMatrix(const T* matrix, long long first_line, long long lines, long long line_stride,
                           long long depth, long long depth_stride)
        : line_stride(line_stride), depth_stride(depth_stride), depth_left(depth - this->first_depth()) {
        address = matrix + (first_line + this->line(0)) * line_stride + this->first_depth() * depth_stride;
#pragma unroll
        for (int i = 0; i < this->COUNT; ++i) {
            valid |= uint32_t(first_line + this->line(i) < lines) << i;
        }
    }

    DEVICE void load() {
#pragma unroll
        for (int i = 0; i < this->COUNT; ++i) {
            this->loaded[i] = load_or_zero<T, VECTOR>(address + i * this->STEP * line_stride,
                                                      depth_left > 0 && (valid >> i & 1u));
        }
        address += Tile::DEPTH * depth_stride;
        depth_left -= Tile::DEPTH;
    }
};

// The same, but a warp reads along the lines, which lie side by side: line_stride must be 1.
template <typename Tile, typename T, int LENGTH, int VECTOR>
struct CrosswiseMatrix : CrosswiseLoads<Tile, T, LENGTH, VECTOR> {
    const T* address;
    long long depth_stride, depth_left, lines_left;

    DEVICE CrosswiseMatrix(const T* matrix, long long first_line, long long lines, long long line_stride,
                           long long depth, long long depth_stride)
        : depth_stride(depth_stride), depth_left(depth - this->depth()), lines_left(lines - first_line) {
        address = matrix + first_line + this->line(0) + this->depth() * depth_stride;
    }

    DEVICE void load() {
#pragma unroll
        for (int i = 0; i < this->COUNT; ++i) {
            this->loaded[i] = load_or_zero<T, VECTOR>(address + i * this->ACROSS * VECTOR,
                                                      depth_left > 0 && this->line(i) < lines_left);
        }
        address += Tile::DEPTH * depth_stride;
        depth_left -= Tile::DEPTH;
    }
};
