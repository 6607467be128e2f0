// Matrix products out = a * b of matrices in any memory, one or a batch of them. out is (batch, rows, columns),
// contiguous; a and b are read by strides, in elements, so that transposed matrices are not copied.
//
// Where there are few tiles, blocks share the depth in slices: their sums go to partials (slices, batch, rows,
// columns), which slices.cu adds up, instead of out. Otherwise partials is null.
#include <indices.cuh>
#include <plain_tile.cuh>
#include <tile.cuh>

constexpr int BATCH_AXES = 4;

struct Strides {
    long long line, depth;  // lines are the rows of a or the columns of b
    long long batch[BATCH_AXES];
};

struct Product {
    int rows, columns, depth, slice_depth;
    int batch[BATCH_AXES];  // sizes, the last axis varies fastest
    Strides a, b;

    DEVICE int products() const { return batch[0] * batch[1] * batch[2] * batch[3]; }
};

// Which tile a block computes, of which product and slice, and where its operands start. Blocks go down PANEL
// tiles before they move on to the right: what runs together reads few rows and columns.
template <int TILE_ROWS, int TILE_COLUMNS>
struct Place {
    static constexpr int PANEL = 8;
    int row, column;
    int depth;  // of the slice
    long long matrix;  // of out or of partials
    long long offset_a = 0, offset_b = 0;

    DEVICE explicit Place(const Product& p) {
        const int down = (p.rows - 1) / TILE_ROWS + 1, across = (p.columns - 1) / TILE_COLUMNS + 1;
        matrix = quotient(blockIdx.x, (long long)down * across);
        const int tile = int(blockIdx.x - matrix * down * across);
        const int first = tile / (PANEL * across) * PANEL, height = min(PANEL, down - first);
        const int in_panel = tile - first * across;
        row = (first + in_panel % height) * TILE_ROWS;
        column = in_panel / height * TILE_COLUMNS;

        const int slice = int(quotient(matrix, p.products()));
        const int start = slice * p.slice_depth;
        depth = min(p.slice_depth, p.depth - start);
        offset_a += start * p.a.depth;
        offset_b += start * p.b.depth;
        long long rest = matrix - (long long)slice * p.products();
#pragma unroll
        for (int axis = BATCH_AXES - 1; axis >= 0; --axis) {
            const long long next = quotient(rest, p.batch[axis]), index = rest - next * p.batch[axis];
            offset_a += index * p.a.batch[axis];
            offset_b += index * p.b.batch[axis];
            rest = next;
        }
    }
};

// ---- ordinary multiply-adds: exact in float32 ------------------------------------------------------------

template <Layout LAYOUT, typename Tile, typename T, int LENGTH, int VECTOR>
struct PlainLoader {
    typedef DepthwiseMatrix<Tile, T, LENGTH, VECTOR> Type;
};
template <typename Tile, typename T, int LENGTH, int VECTOR>
struct PlainLoader<Layout::CROSSWISE, Tile, T, LENGTH, VECTOR> {
    typedef CrosswiseMatrix<Tile, T, LENGTH, VECTOR> Type;
};

// CROSSWISE operands have lines side by side (line stride 1), DEPTHWISE ones any strides. With VECTOR > 1 the
// depth stride of these is 1, and sizes along contiguous axes, other strides and addresses fit such accesses.
template <typename T, Layout LAYOUT_A, Layout LAYOUT_B, int VECTOR, int ROWS, int COLUMNS, int THREAD_ROWS,
          int THREAD_COLUMNS>
__global__ void __launch_bounds__(ROWS / THREAD_ROWS * (COLUMNS / THREAD_COLUMNS), 1)
plain_matmul(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out,
             typename Accumulator<T>::type* __restrict__ partials, const __grid_constant__ Product p) {
    typedef PlainTile<typename Accumulator<T>::type, ROWS, COLUMNS, THREAD_ROWS, THREAD_COLUMNS> Tile;
    const Place<ROWS, COLUMNS> place(p);
    typename PlainLoader<LAYOUT_A, Tile, T, ROWS, VECTOR>::Type loader_a(
        a + place.offset_a, place.row, p.rows, p.a.line, place.depth, p.a.depth);
    typename PlainLoader<LAYOUT_B, Tile, T, COLUMNS, VECTOR>::Type loader_b(
        b + place.offset_b, place.column, p.columns, p.b.line, place.depth, p.b.depth);
    Tile tile;
    tile.compute(*dynamic_shared_memory<typename Tile::Shared>(), loader_a, loader_b,
                 (place.depth - 1) / Tile::DEPTH + 1);

    const bool whole = p.columns % Tile::VECTOR == 0;
    tile.for_each_run([&](int tile_row, int tile_column, const typename Tile::Run& run) {
        const int row = place.row + tile_row, column = place.column + tile_column;
        if (row >= p.rows || column >= p.columns) return;
        const long long target = (place.matrix * p.rows + row) * p.columns + column;
        if (partials) {
            store_run(partials + target, run, p.columns - column, whole);
        } else {
            store_run(out + target, run, p.columns - column, whole);
        }
    });
}

// ---- tensor cores: float32 is rounded to tf32 --------------------------------------------------------------

// Store neighbours from column on, by 16 bytes where rows of `columns` hold whole chunks.
template <typename T, int COUNT>
DEVICE void store_chunks(T* target, const float (&values)[COUNT], int columns, int column) {
#pragma unroll
    for (int first = 0; first < COUNT; first += CHUNK<T>) {
        Pack<float, CHUNK<T>> chunk;
#pragma unroll
        for (int v = 0; v < CHUNK<T>; ++v) chunk.values[v] = values[first + v];
        const int left = columns - column - first;
        if (left > 0) store_run(target + first, chunk, left, columns % CHUNK<T> == 0);
    }
}

// One stride of each operand is 1: that of the depth, DEPTHWISE, or of the lines, CROSSWISE. The size along that
// axis, all other strides and the addresses are multiples of 16 bytes.
template <typename T, Layout LAYOUT_A, Layout LAYOUT_B, int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS,
          int STAGES>
__global__ void __launch_bounds__(ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * 32, 1)
tensor_matmul(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out, float* __restrict__ partials,
              const __grid_constant__ Product p) {
    typedef Tile<T, ROWS, COLUMNS, WARP_ROWS, WARP_COLUMNS, STAGES, LAYOUT_A, LAYOUT_B> ProductTile;
    const Place<ROWS, COLUMNS> place(p);
    MatrixLoader<typename ProductTile::SlabA> loader_a(
        a + place.offset_a, place.row, p.rows, LAYOUT_A == Layout::DEPTHWISE ? p.a.line : p.a.depth, place.depth);
    MatrixLoader<typename ProductTile::SlabB> loader_b(
        b + place.offset_b, place.column, p.columns, LAYOUT_B == Layout::DEPTHWISE ? p.b.line : p.b.depth,
        place.depth);
    ProductTile tile;
    tile.compute(dynamic_shared_memory<unsigned char>(), loader_a, loader_b, (place.depth - 1) / SLAB_DEPTH<T> + 1);

#pragma unroll
    for (int block = 0; block < ProductTile::BLOCKS; ++block) {
        const int column = place.column + ProductTile::column_of(block);
        tile.for_each_run(block, [&](int row, const float(&values)[ProductTile::RUN]) {
            if (place.row + row >= p.rows) return;
            const long long target = (place.matrix * p.rows + place.row + row) * p.columns + column;
            if (partials) {
                store_chunks(partials + target, values, p.columns, column);
            } else {
                store_chunks(out + target, values, p.columns, column);
            }
        });
    }
}
