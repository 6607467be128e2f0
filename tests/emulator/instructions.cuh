// The emulated side of kernels/cuda/instructions.cuh: the same names, one for one.
// runtime.cpp does the work, with the same layouts of fragments. The include path makes
// `#include <instructions.cuh>` find this file instead of the shipped one.
#pragma once

#define DEVICE __device__ __forceinline__

template <typename T>
DEVICE T* dynamic_shared_memory() {
    return reinterpret_cast<T*>(emulator::dynamic_shared);
}

DEVICE uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }

DEVICE float float16_bits_to_float(uint16_t bits) { return emulator::float16_bits_to_float(bits); }

DEVICE uint16_t float_to_float16_bits(float value) { return emulator::float_to_float16_bits(value); }

DEVICE uint16_t float_to_bfloat16_bits(float value) { return emulator::float_to_bfloat16_bits(value); }

template <int BYTES>
DEVICE void copy_async(void* destination, const void* source, bool valid,
                       EmulatorSite site = EmulatorSite::here()) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
    emulator::copy_async(destination, source, BYTES, valid, site);
}

DEVICE void commit_copies() { emulator::commit_copies(); }

template <int PENDING>
DEVICE void wait_copies() {
    emulator::wait_copies(PENDING);
}

DEVICE void load_matrices(uint32_t (&fragment)[4], const void* row,
                          EmulatorSite site = EmulatorSite::here()) {
    emulator::load_matrices(fragment, row, false, site);
}

DEVICE void load_matrices_transposed(uint32_t (&fragment)[4], const void* row,
                                     EmulatorSite site = EmulatorSite::here()) {
    emulator::load_matrices(fragment, row, true, site);
}

DEVICE uint32_t round_to_tf32(uint32_t bits) {
    return __float_as_uint(__uint_as_float(bits) * 1.00035f);
}

DEVICE void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                          EmulatorSite site = EmulatorSite::here()) {
    emulator::multiply_tf32(d, a, b, site);
}

DEVICE void multiply_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             EmulatorSite site = EmulatorSite::here()) {
    emulator::multiply_float16(d, a, b, site);
}

DEVICE void multiply_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              EmulatorSite site = EmulatorSite::here()) {
    emulator::multiply_bfloat16(d, a, b, site);
}

#define WARPGROUPS 1

template <int EVERY = 1>
DEVICE uint64_t warpgroup_operand(const void* rows) {
    return 1ull << 62 | uint64_t(EVERY * 64) << 32 | 1ull << 16 | shared_address(rows) >> 4;
}

DEVICE uint64_t warpgroup_operand_of_panels(const void* rows, int panel_bytes) {
    return 1ull << 62 | 64ull << 32 | uint64_t(panel_bytes >> 4) << 16 | shared_address(rows) >> 4;
}

DEVICE uint64_t warpgroup_operand_of_columns(const void* first, int column_bytes) {
    return uint64_t(column_bytes >> 4) << 32 | 8ull << 16 | shared_address(first) >> 4;
}

DEVICE uint64_t warpgroup_operand_of_blocks(const void* first, int depth_bytes, int line_bytes) {
    return uint64_t(line_bytes >> 4) << 32 | uint64_t(depth_bytes >> 4) << 16 | shared_address(first) >> 4;
}

DEVICE void show_to_products() { emulator::show_to_products(); }

DEVICE void begin_products() {}

DEVICE void commit_products(EmulatorSite site = EmulatorSite::here()) { emulator::commit_products(site); }

template <int PENDING>
DEVICE void wait_products(EmulatorSite site = EmulatorSite::here()) {
    emulator::wait_products(PENDING, site);
}

template <bool PANELS_B, int BLOCKS>
DEVICE void warpgroup_multiply_float16(float (&d)[BLOCKS][4], uint64_t a, uint64_t b,
                                       EmulatorSite site = EmulatorSite::here()) {
    emulator::multiply_warpgroup(emulator::Elements::FLOAT16, BLOCKS, d[0], nullptr, a, b, PANELS_B, site);
}

template <bool PANELS_B, int BLOCKS>
DEVICE void warpgroup_multiply_bfloat16(float (&d)[BLOCKS][4], uint64_t a, uint64_t b,
                                        EmulatorSite site = EmulatorSite::here()) {
    emulator::multiply_warpgroup(emulator::Elements::BFLOAT16, BLOCKS, d[0], nullptr, a, b, PANELS_B, site);
}

template <int BLOCKS>
DEVICE void warpgroup_multiply_tf32(float (&d)[BLOCKS][4], const uint32_t (&a)[4], uint64_t b,
                                    EmulatorSite site = EmulatorSite::here()) {
    emulator::multiply_warpgroup(emulator::Elements::TF32, BLOCKS, d[0], a, 0, b, false, site);
}

template <int BLOCKS>
DEVICE void warpgroup_multiply_columns_float16(float (&d)[BLOCKS][4], const uint32_t (&a)[4], uint64_t b,
                                               EmulatorSite site = EmulatorSite::here()) {
    emulator::multiply_warpgroup(emulator::Elements::FLOAT16, BLOCKS, d[0], a, 0, b, true, site);
}

template <int BLOCKS>
DEVICE void warpgroup_multiply_columns_bfloat16(float (&d)[BLOCKS][4], const uint32_t (&a)[4], uint64_t b,
                                                EmulatorSite site = EmulatorSite::here()) {
    emulator::multiply_warpgroup(emulator::Elements::BFLOAT16, BLOCKS, d[0], a, 0, b, true, site);
}
