// A tile of a convolution whose taps are one pixel apart (stride 1), from a window of its source.
//
// Rows of the tile are target pixels one after the other, as pixels lie in memory but with gaps: a line is followed
// by as many rows as the source is padded to a side, an image by as many lines. Source pixels with the same gaps,
// which are zeros, are the rows of the window. A tap then reads ROWS neighbouring rows of the window, each tap
// from another row on: every pixel is copied once for all taps, where a tile of slabs copies it once for each.
//
//     gap . . . . .        a line of 4 pixels and a gap of 1, padding 1: the 3 taps of a line read rows
//     gap 0 1 2 3 gap      r, r + 1, r + 2, the next line's 5 rows on. Rows of the tile that are
//     gap 4 5 6 7 gap      gaps are computed, not stored, and not counted.
//
// Each channel block of SLAB_DEPTH channels has a window of its own, which stays while the weights of all taps
// pass by through a ring of slabs.
#pragma once
#include <tile.cuh>

// Steps are in rows of the window.
struct Window {
    int rows;           // a multiple of 8
    int top, left;      // gaps before the first source pixel
    int height, width;  // of the target: pixels from there on are gaps
    int first_row;      // that the first tap reads for the tile's first row
    int step_y, step_x; // from tap to tap
    int channel_blocks;
};

template <typename T, int ROWS, int COLUMNS, int WARP_ROWS, int STAGES, Layout LAYOUT_B>
struct WindowTile : WarpgroupSums<T, ROWS, COLUMNS, WARP_ROWS, LAYOUT_B> {
    typedef WarpgroupSums<T, ROWS, COLUMNS, WARP_ROWS, LAYOUT_B> Base;
    typedef typename Base::SlabB SlabB;
    static constexpr int RING_BYTES = STAGES * SlabB::BYTES;
    static constexpr int AHEAD = STAGES - 1;
    static_assert(AHEAD >= 1);

    // The bytes of shared memory that `compute` needs.
    static DEVICE int shared_bytes(const Window& window) { return RING_BYTES + window.rows * SLAB_BYTES; }

    // Compute the tile of taps_y x taps_x taps. `pixels` copies the window of the next channel block, `weights` the
    // slab of the next tap. Threads still read `shared`, a multiple of 1024, when the first of them returns.
    template <typename Pixels, typename Weights>
    DEVICE void compute(unsigned char* shared, Pixels& pixels, Weights& weights, const Window& window, int taps_y,
                        int taps_x) {
        this->clear();
        unsigned char* const rows = shared + RING_BYTES;
        const int taps = taps_y * taps_x, slabs = window.channel_blocks * taps;
        unsigned char* reading = shared;
        unsigned char* writing = shared + AHEAD * SlabB::BYTES;
#pragma unroll
        for (int stage = 0; stage < AHEAD; ++stage) {
            if (stage < slabs) weights.copy(shared + stage * SlabB::BYTES);
            commit_copies();
        }
        int b = 0, row = window.first_row;
        for (int slab = 0, tap = 0; slab < slabs; ++slab) {
            if (tap == 0) {
                if (slab > 0) __syncthreads();  // all products of the last window are done
                pixels.copy(rows);
                commit_copies();
                wait_copies<0>();
            } else {
                wait_copies<AHEAD - 1>();
            }
            show_to_products();
            __syncthreads();  // this slab has landed, and all products of the last one are done
            this->multiply(rows, row, reading);
            if (slab + AHEAD < slabs) weights.copy(writing);
            commit_copies();
            row += window.step_x;
            if (++b == taps_x) {
                b = 0;
                row += window.step_y - taps_x * window.step_x;
            }
            if (++tap == taps) {
                tap = 0;
                row = window.first_row;
            }
            wait_products<0>();
            reading = reading + SlabB::BYTES == rows ? shared : reading + SlabB::BYTES;
            writing = writing + SlabB::BYTES == rows ? shared : writing + SlabB::BYTES;
        }
    }
};
