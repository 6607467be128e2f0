// 2-D convolution by ordinary multiply-adds, for every case: any channels, groups, stride, padding, dilation
// and element type. Arrays are channels-last; x is (batch, height, width, in_channels), the weight is
// (out_channels, kernel_height, kernel_width, channels of a group).
//
// Each pass is a matrix product whose one operand is never built: its loader finds the element of x or grad
// that a row and a depth stand for (an implicit GEMM).
//
//     pass         rows            columns                   depth
//     forward      output pixels   output channels           taps x channels of a group
//     grad_input   input pixels    channels of a group       taps x output channels of a group
//     grad_weight  output channels taps x channels           output pixels
//
// Groups are products of their own. Where groups are too narrow to fill a tile, such as in depthwise
// convolutions, the kernels named `direct_...` give one element of the result to each thread instead.
#include <plain_tile.cuh>
#include <pixels.cuh>

struct Convolution {
    int batch, height, width, in_channels;
    int out_height, out_width, out_channels;
    int kernel_height, kernel_width;
    int stride[2], padding[2], dilation[2];  // vertical, horizontal; padding before the first pixel
    int groups;

    DEVICE int group_inputs() const { return in_channels / groups; }
    DEVICE int group_outputs() const { return out_channels / groups; }
    DEVICE int taps() const { return kernel_height * kernel_width; }
    DEVICE long long output_pixels() const { return (long long)batch * out_height * out_width; }
    DEVICE long long input_pixels() const { return (long long)batch * height * width; }
};

DEVICE int ceil_divide(int a, int b) { return (a + b - 1) / b; }
DEVICE long long ceil_divide(long long a, int b) { return (a + b - 1) / b; }

// How pixels and taps meet on one axis: tap t of pixel i reads the source at start + i * step + t * tap_step.
struct Axis {
    int size;  // of the source
    int start, step, tap_step;
    int taps;

    DEVICE bool inside(int position) const { return (unsigned)position < (unsigned)size; }
};

DEVICE Axis forward_axis(const Convolution& c, int axis) {
    return {axis ? c.width : c.height, -c.padding[axis], c.stride[axis], c.dilation[axis],
            axis ? c.kernel_width : c.kernel_height};
}

// The axis of one residue class of input pixels, the pixels first, first + stride, first + 2 * stride, ...:
// tap t of the forward pass reaches the input pixel h from the output pixel (h + padding - t * dilation) / stride,
// where that divides. In one class the same taps do for all pixels, every tap_distance-th from first_tap on.
struct ResidueAxis {
    Axis axis;
    int first_tap, tap_distance;
};

DEVICE ResidueAxis residue_axis(const Convolution& c, int axis, int first) {
    const int stride = c.stride[axis], dilation = c.dilation[axis];
    const int kernel = axis ? c.kernel_width : c.kernel_height;
    const int reach = first + c.padding[axis];
    int tap = 0, distance = 1;
    while (tap < kernel && (reach - tap * dilation) % stride != 0) ++tap;
    while (distance * dilation % stride != 0) ++distance;
    const int taps = tap < kernel ? (kernel - 1 - tap) / distance + 1 : 0;
    const int start = taps > 0 ? (reach - tap * dilation) / stride : 0;
    return {{axis ? c.out_width : c.out_height, start, 1, -(distance * dilation / stride), taps}, tap, distance};
}

// ---- loaders --------------------------------------------------------------------------------------------

// Lines are pixels, the depth is (vertical tap, horizontal tap, channel): x of the forward pass, grad of the
// gradient by x. `pixels` are (batch, height, width), and VECTOR divides the channels.
template <typename Tile, typename T, int LENGTH, int VECTOR>
struct DepthwisePixels : DepthwiseLoads<Tile, T, LENGTH, VECTOR> {
    typedef DepthwiseLoads<Tile, T, LENGTH, VECTOR> Loads;
    const T* source;
    const Axis vertical, horizontal;
    const int pitch;                   // elements from one source pixel to the next
    Digits depth;                      // tap, tap, channel
    long long offsets[Loads::COUNT];   // of tap (0, 0), channel 0
    int top[Loads::COUNT], left[Loads::COUNT];

    DEVICE DepthwisePixels(const T* source, const Axis& vertical, const Axis& horizontal, int pitch,
                           int channels, long long first_pixel, long long pixels, int height, int width)
        : source(source), vertical(vertical), horizontal(horizontal), pitch(pitch),
          depth(this->first_depth(), Tile::DEPTH, max(horizontal.taps, 1), channels) {
#pragma unroll
        for (int i = 0; i < this->COUNT; ++i) {
            const Pixel pixel(first_pixel + this->line(i), height, width);
            top[i] = vertical.start + pixel.row * vertical.step;
            left[i] = horizontal.start + pixel.column * horizontal.step;
            offsets[i] = ((pixel.image * vertical.size + top[i]) * horizontal.size + left[i]) * pitch;
            if (first_pixel + this->line(i) >= pixels) top[i] = OUTSIDE;
        }
    }

    DEVICE void load() {
        const int down = depth.outer * vertical.tap_step, right = depth.middle * horizontal.tap_step;
        const long long offset = ((long long)down * horizontal.size + right) * pitch + depth.inner;
        const bool is_tap = depth.outer < vertical.taps;
#pragma unroll
        for (int i = 0; i < this->COUNT; ++i) {
            const bool valid = is_tap && vertical.inside(top[i] + down) && horizontal.inside(left[i] + right);
            this->loaded[i] = load_or_zero<T, VECTOR>(source + offsets[i] + offset, valid);
        }
        depth.advance();
    }

private:
    static constexpr int OUTSIDE = -(1 << 30);  // no tap reaches a pixel from there
};

// Lines are (vertical tap, horizontal tap, channel), the depth is output pixels: x of the gradient by weight.
template <typename Tile, typename T, int LENGTH, int VECTOR>
struct CrosswisePixels : CrosswiseLoads<Tile, T, LENGTH, VECTOR> {
    typedef CrosswiseLoads<Tile, T, LENGTH, VECTOR> Loads;
    const T* source;
    const Axis vertical, horizontal;
    const int pitch;
    Digits pixel;  // image, row, column of the output
    long long pixels_left;
    int down[Loads::COUNT], right[Loads::COUNT], channel[Loads::COUNT];

    DEVICE CrosswisePixels(const T* source, const Axis& vertical, const Axis& horizontal, int pitch,
                           int channels, int first_line, long long first_pixel, long long end_pixel,
                           int height, int width)
        : source(source), vertical(vertical), horizontal(horizontal), pitch(pitch),
          pixel(first_pixel + this->depth(), Tile::DEPTH, height, width),
          pixels_left(end_pixel - first_pixel - this->depth()) {
#pragma unroll
        for (int i = 0; i < this->COUNT; ++i) {
            const int line = first_line + this->line(i), tap = line / channels;
            channel[i] = tap < vertical.taps * horizontal.taps ? line % channels : -1;
            down[i] = vertical.start + tap / horizontal.taps * vertical.tap_step;
            right[i] = horizontal.start + tap % horizontal.taps * horizontal.tap_step;
        }
    }

    DEVICE void load() {
        const int row = pixel.middle * vertical.step, column = pixel.inner * horizontal.step;
        const T* image = source + (long long)pixel.outer * vertical.size * horizontal.size * pitch;
#pragma unroll
        for (int i = 0; i < this->COUNT; ++i) {
            const int h = row + down[i], w = column + right[i];
            const bool valid = pixels_left > 0 && channel[i] >= 0 && vertical.inside(h) && horizontal.inside(w);
            const long long offset = ((long long)h * horizontal.size + w) * pitch + channel[i];
            this->loaded[i] = load_or_zero<T, VECTOR>(image + offset, valid);
        }
        pixel.advance();
        pixels_left -= Tile::DEPTH;
    }
};

// Lines are channels of a group, the depth is (vertical tap, horizontal tap, output channel of the group), the
// taps being those of a residue class: the weight of the gradient by x.
template <typename Tile, typename T, int LENGTH, int VECTOR>
struct CrosswiseWeight : CrosswiseLoads<Tile, T, LENGTH, VECTOR> {
    const T* source;  // of the group
    const ResidueAxis vertical, horizontal;
    const int kernel_height, kernel_width, channels, first_line;
    Digits depth;  // tap, tap, output channel

    DEVICE CrosswiseWeight(const T* weight, const Convolution& c, const ResidueAxis& vertical,
                           const ResidueAxis& horizontal, int first_line)
        : source(weight), vertical(vertical), horizontal(horizontal), kernel_height(c.kernel_height),
          kernel_width(c.kernel_width), channels(c.group_inputs()), first_line(first_line),
          depth(this->depth_in_slab(), Tile::DEPTH, max(horizontal.axis.taps, 1), c.group_outputs()) {}

    static DEVICE int depth_in_slab() { return CrosswiseLoads<Tile, T, LENGTH, VECTOR>::depth(); }

    DEVICE void load() {
        const int r = vertical.first_tap + depth.outer * vertical.tap_distance;
        const int s = horizontal.first_tap + depth.middle * horizontal.tap_distance;
        const T* row = source + (((long long)depth.inner * kernel_height + r) * kernel_width + s) * channels;
        const bool is_tap = depth.outer < vertical.axis.taps;
#pragma unroll
        for (int i = 0; i < this->COUNT; ++i) {
            const int line = first_line + this->line(i);
            this->loaded[i] = load_or_zero<T, VECTOR>(row + line, is_tap && line < channels);
        }
        depth.advance();
    }
};

// ---- the three passes, one tile of the result for each block ----------------------------------------------

template <typename T, int ROWS, int COLUMNS, int THREAD_ROWS, int THREAD_COLUMNS>
using Tile = PlainTile<typename Accumulator<T>::type, ROWS, COLUMNS, THREAD_ROWS, THREAD_COLUMNS>;

// Blocks run through the columns of tiles first: neighbours in time share the rows, of the larger operand.
struct Place {
    long long row;
    int column, rest;

    // rest counts what the grid holds beyond tiles: groups, residue classes, slices.
    DEVICE Place(long long rows, int columns, int tile_rows, int tile_columns) {
        const int across = ceil_divide(columns, tile_columns);
        const long long down = ceil_divide(rows, tile_rows);
        column = int(blockIdx.x % across) * tile_columns;
        row = blockIdx.x / across % down * tile_rows;
        rest = int(blockIdx.x / across / down);
    }
};

// out = x * weight + bias + residual, (pixels, out_channels); with relu at least 0 (NaN stays). bias and
// residual may be null.
template <typename T, int VECTOR, int ROWS, int COLUMNS, int THREAD_ROWS, int THREAD_COLUMNS>
__global__ void __launch_bounds__(Tile<T, ROWS, COLUMNS, THREAD_ROWS, THREAD_COLUMNS>::THREADS, 1)
forward(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
        const T* __restrict__ residual, T* __restrict__ out, const __grid_constant__ Convolution c, long long relu) {
    typedef Tile<T, ROWS, COLUMNS, THREAD_ROWS, THREAD_COLUMNS> Tile;
    typedef typename Tile::Sum Sum;
    const int channels = c.group_inputs(), outputs = c.group_outputs(), depth = c.taps() * channels;
    const long long pixels = c.output_pixels();
    const Place place(pixels, outputs, ROWS, COLUMNS);
    const int group = place.rest;

    DepthwisePixels<Tile, T, ROWS, VECTOR> a(x + group * channels, forward_axis(c, 0), forward_axis(c, 1),
                                             c.in_channels, channels, place.row, pixels, c.out_height,
                                             c.out_width);
    DepthwiseMatrix<Tile, T, COLUMNS, VECTOR> b(weight + (long long)group * outputs * depth, place.column, outputs,
                                                depth, depth, 1);
    Tile tile;
    tile.compute(*dynamic_shared_memory<typename Tile::Shared>(), a, b, ceil_divide(depth, Tile::DEPTH));

    const bool whole = outputs % Tile::VECTOR == 0;  // then out_channels are, too
    tile.for_each_run([&](int tile_row, int tile_column, typename Tile::Run run) {
        const long long pixel = place.row + tile_row;
        const int left = outputs - place.column - tile_column;
        if (pixel >= pixels || left <= 0) return;
        const int channel = group * outputs + place.column + tile_column;
        const long long target = pixel * c.out_channels + channel;
#pragma unroll
        for (int i = 0; i < Tile::VECTOR; ++i) {
            if (i >= left) continue;
            Sum& value = run.values[i];
            if (bias) value += to_float(bias[channel + i]);
            if (residual) value += to_float(residual[target + i]);
            if (relu && value < 0) value = 0;
        }
        store_run(out + target, run, left, whole);
    });
}

// out = the gradient by x, (pixels, in_channels), of grad (output pixels, out_channels).
template <typename T, int VECTOR, int ROWS, int COLUMNS, int THREAD_ROWS, int THREAD_COLUMNS>
__global__ void __launch_bounds__(Tile<T, ROWS, COLUMNS, THREAD_ROWS, THREAD_COLUMNS>::THREADS, 1)
grad_input(const T* __restrict__ grad, const T* __restrict__ weight, T* __restrict__ out,
           const __grid_constant__ Convolution c) {
    typedef Tile<T, ROWS, COLUMNS, THREAD_ROWS, THREAD_COLUMNS> Tile;
    const int channels = c.group_inputs(), outputs = c.group_outputs();
    // every class gets the blocks of the largest, that of pixel (0, 0)
    const long long most = (long long)c.batch * ceil_divide(c.height, c.stride[0]) * ceil_divide(c.width, c.stride[1]);
    const Place place(most, channels, ROWS, COLUMNS);
    const int first_column = place.rest % c.stride[1];
    const int first_row = place.rest / c.stride[1] % c.stride[0];
    const int group = place.rest / c.stride[1] / c.stride[0];
    // a stride may be larger than the image: then classes are empty
    const int height = ceil_divide(max(c.height - first_row, 0), c.stride[0]);
    const int width = ceil_divide(max(c.width - first_column, 0), c.stride[1]);
    const long long pixels = (long long)c.batch * height * width;
    if (place.row >= pixels) return;

    const ResidueAxis vertical = residue_axis(c, 0, first_row), horizontal = residue_axis(c, 1, first_column);
    DepthwisePixels<Tile, T, ROWS, VECTOR> a(grad + group * outputs, vertical.axis, horizontal.axis, c.out_channels,
                                             outputs, place.row, pixels, height, width);
    CrosswiseWeight<Tile, T, COLUMNS, VECTOR> b(weight + (long long)group * outputs * c.taps() * channels, c,
                                                vertical, horizontal, place.column);
    Tile tile;
    const int depth = vertical.axis.taps * horizontal.axis.taps * outputs;
    tile.compute(*dynamic_shared_memory<typename Tile::Shared>(), a, b, ceil_divide(depth, Tile::DEPTH));

    const bool whole = channels % Tile::VECTOR == 0;
    tile.for_each_run([&](int tile_row, int tile_column, const typename Tile::Run& run) {
        const long long number = place.row + tile_row;
        const int left = channels - place.column - tile_column;
        if (number >= pixels || left <= 0) return;
        const Pixel pixel(number, height, width);
        const int h = first_row + pixel.row * c.stride[0], w = first_column + pixel.column * c.stride[1];
        const long long target = ((pixel.image * c.height + h) * c.width + w) * c.in_channels + group * channels;
        store_run(out + target + place.column + tile_column, run, left, whole);
    });
}

// partials[slice] = what the output pixels of one slice add to the gradient by weight, (out_channels, taps,
// channels). The slices are `slice_pixels` pixels each, a multiple of PLAIN_DEPTH.
template <typename T, int VECTOR, int ROWS, int COLUMNS, int THREAD_ROWS, int THREAD_COLUMNS>
__global__ void __launch_bounds__(Tile<T, ROWS, COLUMNS, THREAD_ROWS, THREAD_COLUMNS>::THREADS, 1)
grad_weight(const T* __restrict__ grad, const T* __restrict__ x,
            typename Accumulator<T>::type* __restrict__ partials, const __grid_constant__ Convolution c,
            long long slice_pixels) {
    typedef Tile<T, ROWS, COLUMNS, THREAD_ROWS, THREAD_COLUMNS> Tile;
    const int channels = c.group_inputs(), outputs = c.group_outputs(), columns = c.taps() * channels;
    const Place place(outputs, columns, ROWS, COLUMNS);
    const int group = place.rest % c.groups, slice = place.rest / c.groups;
    const long long first = slice * slice_pixels, end = min(first + slice_pixels, c.output_pixels());

    CrosswiseMatrix<Tile, T, ROWS, VECTOR> a(grad + first * c.out_channels + group * outputs, place.row, outputs,
                                             1, end - first, c.out_channels);
    CrosswisePixels<Tile, T, COLUMNS, VECTOR> b(x + group * channels, forward_axis(c, 0), forward_axis(c, 1),
                                                c.in_channels, channels, place.column, first, end, c.out_height,
                                                c.out_width);
    Tile tile;
    tile.compute(*dynamic_shared_memory<typename Tile::Shared>(), a, b, ceil_divide(end - first, Tile::DEPTH));

    const bool whole = columns % Tile::VECTOR == 0;
    tile.for_each_run([&](int tile_row, int tile_column, const typename Tile::Run& run) {
        const int row = int(place.row) + tile_row, left = columns - place.column - tile_column;
        if (row >= outputs || left <= 0) return;
        const long long line = ((long long)slice * c.groups + group) * outputs + row;
        store_run(partials + line * columns + place.column + tile_column, run, left, whole);
    });
}

// ---- narrow groups: one element of the result for each thread --------------------------------------------

// As `forward`; neighbouring threads have neighbouring output channels.
template <typename T>
__global__ void __launch_bounds__(256, 1)
direct_forward(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
               const T* __restrict__ residual, T* __restrict__ out, const __grid_constant__ Convolution c,
               long long relu) {
    typedef typename Accumulator<T>::type Sum;
    const long long target = thread_number(), number = quotient(target, c.out_channels);
    if (number >= c.output_pixels()) return;
    const Pixel pixel(number, c.out_height, c.out_width);
    const int channel = int(target - number * c.out_channels), channels = c.group_inputs();
    const int top = pixel.row * c.stride[0] - c.padding[0];
    const int left = pixel.column * c.stride[1] - c.padding[1];
    const T* image = x + pixel.image * c.height * c.width * c.in_channels + channel / c.group_outputs() * channels;
    const T* taps = weight + (long long)channel * c.taps() * channels;
    Sum sum = bias ? Sum(to_float(bias[channel])) : Sum(0);
    for (int r = 0; r < c.kernel_height; ++r) {
        const int h = top + r * c.dilation[0];
        for (int s = 0; s < c.kernel_width; ++s, taps += channels) {
            const int w = left + s * c.dilation[1];
            if ((unsigned)h >= (unsigned)c.height || (unsigned)w >= (unsigned)c.width) continue;
            const T* pixels = image + ((long long)h * c.width + w) * c.in_channels;
            for (int i = 0; i < channels; ++i) sum += Sum(to_float(pixels[i])) * Sum(to_float(taps[i]));
        }
    }
    if (residual) sum += to_float(residual[target]);
    out[target] = from_float<T>(relu && sum < 0 ? Sum(0) : sum);
}

// As `grad_input`; neighbouring threads have neighbouring input channels.
template <typename T>
__global__ void __launch_bounds__(256, 1)
direct_grad_input(const T* __restrict__ grad, const T* __restrict__ weight, T* __restrict__ out,
                  const __grid_constant__ Convolution c) {
    typedef typename Accumulator<T>::type Sum;
    const long long target = thread_number(), number = quotient(target, c.in_channels);
    if (number >= c.input_pixels()) return;
    const Pixel pixel(number, c.height, c.width);
    const int channels = c.group_inputs(), outputs = c.group_outputs();
    const int input = int(target - number * c.in_channels), group = input / channels, channel = input % channels;
    const int bottom = pixel.row + c.padding[0], right = pixel.column + c.padding[1];
    const T* image = grad + pixel.image * c.out_height * c.out_width * c.out_channels + group * outputs;
    const long long weight_pitch = (long long)c.taps() * channels;
    Sum sum = 0;
    for (int r = 0; r < c.kernel_height; ++r) {
        const int down = bottom - r * c.dilation[0], p = down / c.stride[0];
        if (down < 0 || down % c.stride[0] != 0 || p >= c.out_height) continue;
        for (int s = 0; s < c.kernel_width; ++s) {
            const int across = right - s * c.dilation[1], q = across / c.stride[1];
            if (across < 0 || across % c.stride[1] != 0 || q >= c.out_width) continue;
            const T* pixels = image + ((long long)p * c.out_width + q) * c.out_channels;
            const T* tap = weight + group * outputs * weight_pitch + (r * c.kernel_width + s) * channels + channel;
            for (int k = 0; k < outputs; ++k) {
                sum += Sum(to_float(pixels[k])) * Sum(to_float(tap[k * weight_pitch]));
            }
        }
    }
    out[target] = from_float<T>(sum);
}

// As `grad_weight`, for 32 neighbouring output channels and one tap and channel a block; the 8 rows of threads
// take every 8th pixel of the slice. The grid is (channel tiles x taps x channels, slices).
template <typename T>
__global__ void __launch_bounds__(256, 1)
direct_grad_weight(const T* __restrict__ grad, const T* __restrict__ x,
                   typename Accumulator<T>::type* __restrict__ partials, const __grid_constant__ Convolution c,
                   long long slice_pixels) {
    typedef typename Accumulator<T>::type Sum;
    constexpr int ROWS = 8;
    const int channels = c.group_inputs(), columns = c.taps() * channels;
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
    const int column = int(blockIdx.x % columns), output = int(blockIdx.x / columns) * 32 + lane;
    const int tap = column / channels;
    const int down = tap / c.kernel_width * c.dilation[0] - c.padding[0];
    const int right = tap % c.kernel_width * c.dilation[1] - c.padding[1];
    const long long first = blockIdx.y * slice_pixels, end = min(first + slice_pixels, c.output_pixels());
    const bool valid = output < c.out_channels;
    const int source = (valid ? output / c.group_outputs() : 0) * channels + column % channels;
    Digits position(first + row, ROWS, c.out_height, c.out_width);
    Sum sum = 0;
    for (long long pixel = first + row; pixel < end; pixel += ROWS, position.advance()) {
        const int h = position.middle * c.stride[0] + down, w = position.inner * c.stride[1] + right;
        if (!valid || (unsigned)h >= (unsigned)c.height || (unsigned)w >= (unsigned)c.width) continue;
        const long long read = (((long long)position.outer * c.height + h) * c.width + w) * c.in_channels + source;
        sum += Sum(to_float(grad[pixel * c.out_channels + output])) * Sum(to_float(x[read]));
    }
    Sum* sums = dynamic_shared_memory<Sum>();  // (ROWS, 32)
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (row != 0 || !valid) return;
    for (int i = 1; i < ROWS; ++i) sum += sums[i * 32 + lane];
    partials[((long long)blockIdx.y * c.out_channels + output) * columns + column] = sum;
}
