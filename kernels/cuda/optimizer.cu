// Optimizers: one launch updates up to TENSORS tensors, however many elements each of them has.
//
// The addresses of the tensors travel with the launch, in a table by value, so that nothing is copied
// to the device although gradients lie elsewhere at every step. Numbers that a captured launch has to
// read anew each time it is replayed lie in the device's memory instead, at `live`.
#include <elements.cuh>

constexpr int TENSORS = 64;
constexpr int THREADS = 256;
constexpr int CHUNK = 4096;  // elements of a block

// Tensors whose elements belong together: ROWS of them at each place, all of one size. The blocks from
// first_chunk[p] on are for place p; places that are not in use begin behind the last block.
template <int ROWS>
struct Table {
    void* rows[ROWS][TENSORS];
    long long sizes[TENSORS];
    int first_chunk[TENSORS];
};

// Returns the last place that begins at this block or before: the one with elements for it.
template <int ROWS>
DEVICE int place_of(const Table<ROWS>& table, int block) {
    int place = 0;
    for (int step = TENSORS / 2; step; step /= 2) {
        if (table.first_chunk[place + step] <= block) place += step;
    }
    return place;
}

// Lets `update` change the elements of this block's chunk: ROWS values each, of which it may change all
// but the second, the gradient.
template <typename T, int ROWS, typename Update>
DEVICE void update_chunk(const Table<ROWS>& table, int place, const Update& update) {
    typedef typename Accumulator<T>::type Real;
    constexpr int WIDTH = 16 / sizeof(T);
    typedef Pack<T, WIDTH> Wide;
    const long long start = (long long)(int(blockIdx.x) - table.first_chunk[place]) * CHUNK;
    const long long left = table.sizes[place] - start;
    const int count = left < CHUNK ? int(left) : CHUNK;
    T* rows[ROWS];
    uint64_t addresses = 0;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        rows[row] = static_cast<T*>(table.rows[row][place]) + start;
        addresses |= reinterpret_cast<uint64_t>(rows[row]);
    }
    const int wide = addresses % sizeof(Wide) == 0 ? count / WIDTH : 0;
    for (int i = threadIdx.x; i < wide; i += THREADS) {
        Wide elements[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; ++row) elements[row] = reinterpret_cast<Wide*>(rows[row])[i];
#pragma unroll
        for (int lane = 0; lane < WIDTH; ++lane) {
            Real values[ROWS];
#pragma unroll
            for (int row = 0; row < ROWS; ++row) values[row] = to_float(elements[row].values[lane]);
            update(values);
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                elements[row].values[lane] = from_float<T>(values[row]);
            }
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            if (update.writes(row)) reinterpret_cast<Wide*>(rows[row])[i] = elements[row];
        }
    }
    for (int i = wide * WIDTH + threadIdx.x; i < count; i += THREADS) {
        Real values[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; ++row) values[row] = to_float(rows[row][i]);
        update(values);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            if (update.writes(row)) rows[row][i] = from_float<T>(values[row]);
        }
    }
}

// ---- stochastic gradient descent -------------------------------------------------------------------

struct SgdNumbers {
    double lr, momentum, share, weight_decay, sign, nesterov;  // share of the gradient in the velocity
};

template <typename Real>
struct SgdUpdate {
    Real lr, momentum, share, weight_decay, sign;
    bool nesterov, moves, fresh;

    DEVICE bool writes(int row) const { return row == 0 || (row == 2 && moves); }

    // values: the parameter, its gradient, its velocity
    DEVICE void operator()(Real (&values)[3]) const {
        Real step = sign * values[1];
        if (weight_decay != 0) step += weight_decay * values[0];
        if (moves) {
            const Real velocity = fresh ? step : momentum * values[2] + share * step;
            values[2] = velocity;
            step = nesterov ? step + momentum * velocity : velocity;
        }
        values[0] -= lr * step;
    }
};

// One chunk a block. Rows: values, gradients, velocities; `fresh` has a bit for each place whose
// velocity starts now. Without momentum, velocities are only read.
template <typename T>
__global__ void __launch_bounds__(THREADS)
sgd(Table<3> table, uint64_t fresh, SgdNumbers given, const SgdNumbers* live) {
    typedef typename Accumulator<T>::type Real;
    const int place = place_of(table, blockIdx.x);
    const Real momentum = Real(live ? live->momentum : given.momentum);
    const SgdUpdate<Real> update = {
        Real(live ? live->lr : given.lr),
        momentum,
        Real(live ? live->share : given.share),
        Real(live ? live->weight_decay : given.weight_decay),
        Real(live ? live->sign : given.sign),
        (live ? live->nesterov : given.nesterov) != 0,
        momentum != 0,
        (fresh >> place & 1) != 0,
    };
    update_chunk<T>(table, place, update);
}

// ---- Adam --------------------------------------------------------------------------------------------

struct AdamNumbers {
    double keep, keep_square;  // what the two averages keep of themselves, and what they take
    double add, add_square;
    double eps, shrink, weight_decay, sign;
    double rate[TENSORS];         // the learning rate, and the root of the square's average, corrected
    double root_factor[TENSORS];  // for averages that started at 0, by how many steps a place has made
};

template <typename Real>
struct AdamUpdate {
    Real keep, keep_square, add, add_square, eps, shrink, weight_decay, sign, rate, root_factor;

    DEVICE bool writes(int row) const { return row != 1; }

    // values: the parameter, its gradient, the averages of the gradient and of its square
    DEVICE void operator()(Real (&values)[4]) const {
        const Real before = values[0] * shrink;
        Real step = sign * values[1];
        if (weight_decay != 0) step += weight_decay * before;
        values[2] = values[2] * keep + add * step;
        values[3] = values[3] * keep_square + add_square * (step * step);
        const Real root = square_root(values[3]) / root_factor + eps;
        values[0] = before - rate * (values[2] / root);
    }

    static DEVICE float square_root(float x) { return sqrtf(x); }
    static DEVICE double square_root(double x) { return sqrt(x); }
};

// One chunk a block. Rows: values, gradients, averages, averages of squares.
template <typename T>
__global__ void __launch_bounds__(THREADS)
adam(Table<4> table, AdamNumbers given, const AdamNumbers* live) {
    typedef typename Accumulator<T>::type Real;
    const int place = place_of(table, blockIdx.x);
    const AdamUpdate<Real> update = {
        Real(live ? live->keep : given.keep),
        Real(live ? live->keep_square : given.keep_square),
        Real(live ? live->add : given.add),
        Real(live ? live->add_square : given.add_square),
        Real(live ? live->eps : given.eps),
        Real(live ? live->shrink : given.shrink),
        Real(live ? live->weight_decay : given.weight_decay),
        Real(live ? live->sign : given.sign),
        Real(live ? live->rate[place] : given.rate[place]),
        Real(live ? live->root_factor[place] : given.root_factor[place]),
    };
    update_chunk<T>(table, place, update);
}

// ---- gradients of a scaled loss --------------------------------------------------------------------

template <typename Real>
struct Unscaling {
    Real factor;
    float* found;

    DEVICE bool writes(int) const { return true; }

    DEVICE void operator()(Real (&values)[1]) const {
        if (!(values[0] - values[0] == 0)) *found = 1;  // infinite or nan; all write the same
        values[0] *= factor;
    }
};

// One chunk a block. One row: gradients, multiplied by a factor. `found` becomes 1 where an element is
// not finite, and is left alone otherwise.
template <typename T>
__global__ void __launch_bounds__(THREADS) unscale(Table<1> table, double factor, float* found) {
    typedef typename Accumulator<T>::type Real;
    const Unscaling<Real> update = {Real(factor), found};
    update_chunk<T>(table, place_of(table, blockIdx.x), update);
}
