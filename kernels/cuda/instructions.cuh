// The only PTX of the project: one wrapper for each instruction that CUDA C++ has no word for.
// Nothing of the CUDA toolkit's headers is needed, so that NVRTC alone compiles every kernel.
#pragma once

typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;

#define DEVICE __device__ __forceinline__

// ---- memory of a block ----------------------------------------------------------------------------

// The block's dynamic shared memory; its size is given at launch. Every caller gets the same memory.
template <typename T>
DEVICE T* dynamic_shared_memory() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared_bytes[];
    return reinterpret_cast<T*>(dynamic_shared_bytes);
}

DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- 16-bit floating point -------------------------------------------------------------------------

DEVICE float float16_bits_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Rounds to nearest, ties to even.
DEVICE uint16_t float_to_float16_bits(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Rounds to nearest, ties to even.
DEVICE uint16_t float_to_bfloat16_bits(float value) {
#if __CUDA_ARCH__ >= 800
    uint32_t pair;  // converting two at a time is several times as fast as converting one
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(value));
    return uint16_t(pair);
#else
    const uint32_t bits = __float_as_uint(value);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    const uint32_t quiet_nan = bits >> 16 | 0x40u;  // rounding could turn a NaN into infinity
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded >> 16);
#endif
}

// ---- asynchronous copies from global to shared memory ------------------------------------------------

// Copies BYTES (4, 8 or 16) without passing through registers, or writes zeros where not valid; source
// must be a valid address either way, both addresses multiples of BYTES. It lands at a later
// wait_copies. Before sm_80 it is an ordinary copy.
template <int BYTES>
DEVICE void copy_async(void* destination, const void* source, bool valid) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
#if __CUDA_ARCH__ >= 800
    const int bytes = valid ? BYTES : 0;
    if constexpr (BYTES == 16) {  // past the L1 cache: measured, it is no slower
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(shared_address(destination)), "l"(source), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :: "r"(shared_address(destination)), "l"(source), "n"(BYTES), "r"(bytes)
                     : "memory");
    }
#else
    if constexpr (BYTES == 16) {
        *static_cast<uint4*>(destination) =
            valid ? *static_cast<const uint4*>(source) : make_uint4(0, 0, 0, 0);
    } else if constexpr (BYTES == 8) {
        *static_cast<uint2*>(destination) =
            valid ? *static_cast<const uint2*>(source) : make_uint2(0, 0);
    } else {
        *static_cast<uint32_t*>(destination) = valid ? *static_cast<const uint32_t*>(source) : 0u;
    }
#endif
}

// Closes the group of the copies that this thread has issued since the last one.
DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's groups are still on their way.
template <int PENDING>
DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
#endif
}

// ---- matrices from shared memory into the registers of a warp ----------------------------------------

// Loads four matrices of 8 rows of 16 bytes. Lane l gives the address of row l % 8 of matrix l / 8; matrix
// i arrives in fragment[i]: lane l holds bytes 4 * (l % 4) to 4 * (l % 4) + 3 of row l / 4.
DEVICE void load_matrices(uint32_t (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row)) : "memory");
}

// The same with each 8x8 matrix of 16-bit elements transposed: lane l of fragment[i] holds the elements
// (row 2 * (l % 4), column l / 4) and (row 2 * (l % 4) + 1, column l / 4), the first in the low half.
DEVICE void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row)) : "memory");
}

// ---- tensor cores: d = a * b + d, a 16 x K by rows, b K x 8 by columns, d 16 x 8 in float32 -------------
// With g = lane / 4 and t = lane % 4, d[0..3] are d(g, 2t), d(g, 2t + 1), d(g + 8, 2t), d(g + 8, 2t + 1).

// The tensor core drops the low 13 bits of a float32. Growing it first by the share that this loses on average
// leaves what fits into tf32 as it is, and takes the bias from the rest: errors are within 3/4 of a unit in the
// last place, their root mean square is 6% above that of rounding to nearest. It costs one multiplication. (Adding half
// a unit to the bits would make a zero of the NaN that the GPU's own arithmetic gives, all ones.)
DEVICE uint32_t round_to_tf32(uint32_t bits) { return __float_as_uint(__uint_as_float(bits) * 1.00035f); }

// K = 8: a = a(g, t), a(g + 8, t), a(g, t + 4), a(g + 8, t + 4); b = b(t, g), b(t + 4, g). From sm_80 on.
DEVICE void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}

// K = 16, two elements a register, the lower k in the low half: a = a(g, 2t..), a(g + 8, 2t..),
// a(g, 2t + 8..), a(g + 8, 2t + 8..); b = b(2t.., g), b(2t + 8.., g).
DEVICE void multiply_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // sm_75 multiplies K = 8 at a time
    for (int half = 0; half < 2; ++half) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
#endif
}

// As multiply_float16, with bfloat16 elements. From sm_80 on.
DEVICE void multiply_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}

// ---- tensor cores of sm_90a: a warpgroup's four warps multiply together -----------------------------------
// d = a * b + d, a 64 x 32 bytes of depth, b 32 bytes of depth x N, d 64 x N in float32, N 64 or 128. Warp w of
// the warpgroup (threads 128i to 128i + 127) has rows 16w to 16w + 15 of a and d; d[j] holds columns 8j to 8j + 7
// as multiply_tf32's d holds its 8. The products run on their own: operands stay as they are, and d is not looked
// at, until wait_products says so. All threads of a warpgroup take part in each of these.
//
// Operands in shared memory lie in rows of 128 bytes, their 16-byte chunks moved: chunk c of row r stands at
// c ^ r % 8, where row 0 is at a multiple of 1024 bytes (or in columns, see there). An operand is named by a number
// that warpgroup_operand makes; of lines along the depth it may begin at any row.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WARPGROUPS 1
#else
#define WARPGROUPS 0
#endif

// Lines (rows of a, columns of b) contiguous along the depth: row r holds 128 bytes of line r's depth. The
// products of depths 32 bytes on take the operand plus 2. With EVERY = 2 every second group of eight rows counts.
template <int EVERY = 1>
DEVICE uint64_t warpgroup_operand(const void* rows) {
    constexpr uint64_t SWIZZLE_128_BYTES = 1ull << 62;
    const uint64_t eight_rows = EVERY * 1024 >> 4;
    return SWIZZLE_128_BYTES | eight_rows << 32 | 1ull << 16 | (shared_address(rows) & 0x3ffffu) >> 4;
}

// 16-bit elements contiguous across lines: a panel is 64 lines; row r of it holds their elements at depth r.
// Panels lie panel_bytes apart. The products of depths 16 on take the operand plus 128.
DEVICE uint64_t warpgroup_operand_of_panels(const void* rows, int panel_bytes) {
    constexpr uint64_t SWIZZLE_128_BYTES = 1ull << 62;
    const uint64_t eight_rows = 1024 >> 4;
    return SWIZZLE_128_BYTES | eight_rows << 32 | uint64_t(panel_bytes >> 4) << 16 |
           (shared_address(rows) & 0x3ffffu) >> 4;
}

// 16-bit elements contiguous across lines, but not in rows of 128 bytes: a column is 8 lines, it holds their 16 bytes at
// one depth, then at the next, and it may start at any multiple of 16 bytes. Columns lie column_bytes apart, and may
// overlap. The products of depths n on take the operand plus n, for any n.
DEVICE uint64_t warpgroup_operand_of_columns(const void* first, int column_bytes) {
    const uint64_t eight_depths = 8 * 16 >> 4;
    return uint64_t(column_bytes >> 4) << 32 | eight_depths << 16 | (shared_address(first) & 0x3ffffu) >> 4;
}

// Lines contiguous along the depth, but not in rows of 128 bytes: a block of 128 bytes is 8 lines, it holds 16 bytes of
// each one's depth. Blocks of the next depths lie depth_bytes on, those of the next lines line_bytes; both, and the
// address, are multiples of 16.
DEVICE uint64_t warpgroup_operand_of_blocks(const void* first, int depth_bytes, int line_bytes) {
    return uint64_t(line_bytes >> 4) << 32 | uint64_t(depth_bytes >> 4) << 16 | (shared_address(first) & 0x3ffffu) >> 4;
}

// What this thread has written to shared memory (or copied, and waited for) can be read by products that are
// issued after the next barrier.
DEVICE void show_to_products() {
#if WARPGROUPS
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before the first product after registers of d or a were written.
DEVICE void begin_products() {
#if WARPGROUPS
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes the group of the products issued since the last one.
DEVICE void commit_products() {
#if WARPGROUPS
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most PENDING groups of products are still running.
template <int PENDING>
DEVICE void wait_products() {
#if WARPGROUPS
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
#endif
}

// The registers of d in the order of an instruction's operands: those of 32 columns, of 64 and of 128.
#define FOUR_OF_D(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define SIXTEEN_OF_D(j) FOUR_OF_D(j), FOUR_OF_D(j + 1), FOUR_OF_D(j + 2), FOUR_OF_D(j + 3)
#define D_OF_32 SIXTEEN_OF_D(0)
#define D_OF_64 D_OF_32, SIXTEEN_OF_D(4)
#define D_OF_128 D_OF_64, SIXTEEN_OF_D(8), SIXTEEN_OF_D(12)
#define OPERANDS_0_TO_15 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define OPERANDS_0_TO_31                                                                                    \
    OPERANDS_0_TO_15 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OPERANDS_OF_32 "{" OPERANDS_0_TO_15 "}"
#define OPERANDS_OF_64 "{" OPERANDS_0_TO_31 "}"
#define OPERANDS_OF_128                                                                                     \
    "{" OPERANDS_0_TO_31 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "     \
    "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// 16-bit elements, both operands in shared memory; b's elements contiguous across lines with PANELS_B.
template <bool PANELS_B, int BLOCKS>
DEVICE void warpgroup_multiply_float16(float (&d)[BLOCKS][4], uint64_t a, uint64_t b) {
    static_assert(BLOCKS == 8 || BLOCKS == 16);
#if WARPGROUPS
    if constexpr (BLOCKS == 8) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " OPERANDS_OF_64
                     ", %32, %33, 1, 1, 1, 0, %34;"
                     : D_OF_64 : "l"(a), "l"(b), "n"(int(PANELS_B)));
    } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " OPERANDS_OF_128
                     ", %64, %65, 1, 1, 1, 0, %66;"
                     : D_OF_128 : "l"(a), "l"(b), "n"(int(PANELS_B)));
    }
#else
    __trap();
#endif
}

template <bool PANELS_B, int BLOCKS>
DEVICE void warpgroup_multiply_bfloat16(float (&d)[BLOCKS][4], uint64_t a, uint64_t b) {
    static_assert(BLOCKS == 8 || BLOCKS == 16);
#if WARPGROUPS
    if constexpr (BLOCKS == 8) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " OPERANDS_OF_64
                     ", %32, %33, 1, 1, 1, 0, %34;"
                     : D_OF_64 : "l"(a), "l"(b), "n"(int(PANELS_B)));
    } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " OPERANDS_OF_128
                     ", %64, %65, 1, 1, 1, 0, %66;"
                     : D_OF_128 : "l"(a), "l"(b), "n"(int(PANELS_B)));
    }
#else
    __trap();
#endif
}

// Float32 elements, of which the low 13 bits are dropped; a in registers, as multiply_tf32's a of a warp's rows, b in
// rows or blocks.
template <int BLOCKS>
DEVICE void warpgroup_multiply_tf32(float (&d)[BLOCKS][4], const uint32_t (&a)[4], uint64_t b) {
    static_assert(BLOCKS == 8 || BLOCKS == 16);
#if WARPGROUPS
    if constexpr (BLOCKS == 8) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 " OPERANDS_OF_64
                     ", {%32, %33, %34, %35}, %36, 1, 1, 1;"
                     : D_OF_64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32 " OPERANDS_OF_128
                     ", {%64, %65, %66, %67}, %68, 1, 1, 1;"
                     : D_OF_128 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
#else
    __trap();
#endif
}

// 16-bit elements, d 64 x 32 or 64; a in registers as multiply_float16's a of a warp's rows, b of columns.
template <int BLOCKS>
DEVICE void warpgroup_multiply_columns_float16(float (&d)[BLOCKS][4], const uint32_t (&a)[4], uint64_t b) {
    static_assert(BLOCKS == 4 || BLOCKS == 8);
#if WARPGROUPS
    if constexpr (BLOCKS == 4) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 " OPERANDS_OF_32
                     ", {%16, %17, %18, %19}, %20, 1, 1, 1, 1;"
                     : D_OF_32 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " OPERANDS_OF_64
                     ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                     : D_OF_64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
#else
    __trap();
#endif
}

template <int BLOCKS>
DEVICE void warpgroup_multiply_columns_bfloat16(float (&d)[BLOCKS][4], const uint32_t (&a)[4], uint64_t b) {
    static_assert(BLOCKS == 4 || BLOCKS == 8);
#if WARPGROUPS
    if constexpr (BLOCKS == 4) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " OPERANDS_OF_32
                     ", {%16, %17, %18, %19}, %20, 1, 1, 1, 1;"
                     : D_OF_32 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " OPERANDS_OF_64
                     ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                     : D_OF_64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
#else
    __trap();
#endif
}
