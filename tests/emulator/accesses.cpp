// Answers the calls that g++ puts before every access with -fsanitize=thread.
#include "accesses.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include <dlfcn.h>

namespace emulator {
namespace {

enum Kind { READ, WRITE, ATOMIC, COPY };
enum Space { SHARED, GLOBAL };

constexpr int NOBODY = -1, SEVERAL = -2;

// When one or several threads accessed a byte.
struct Access {
    const void* caller;
    uint32_t block, epoch, warp_epoch;
    int16_t thread = NOBODY, warp = NOBODY;
};

struct Byte {
    Access write, read;
    bool in_flight;  // an asynchronous copy may write it at any time
    bool atomic;     // write was one
};

// Memory and what is known of each byte of it.
struct Region {
    const unsigned char *begin, *end;
    Space space;
    std::unique_ptr<Byte[]> bytes;

    Region(const void* begin, size_t size, Space space)
        : begin(static_cast<const unsigned char*>(begin)), end(this->begin + size), space(space),
          bytes(new Byte[size]()) {}
};

std::vector<Region> regions;                               // shared ones first
std::vector<std::pair<const unsigned char*, size_t>> arrays;  // the launch's, in global memory
std::vector<bool> blocks_with_atomics;

// ---- races --------------------------------------------------------------------------------------------

Access now(const void* caller) {
    return {caller, block_number, block_epoch, current->warp_epoch, int16_t(current->rank),
            int16_t(current->warp)};
}

// Whether all that made an earlier access had to be done with it before the running thread goes on.
bool ordered(const Access& earlier, Space space) {
    if (earlier.thread == NOBODY) return true;
    if (earlier.block != block_number)  // a pair of atomics may order blocks, a barrier cannot
        return space == SHARED ||
               (blocks_with_atomics[earlier.block] && blocks_with_atomics[block_number]);
    if (earlier.epoch < block_epoch || earlier.thread == current->rank) return true;
    return earlier.warp == current->warp && earlier.warp_epoch < current->warp_epoch;
}

[[noreturn]] void report_race(const char* what, const char* before, const Access& earlier, Space space,
                              const void* caller) {
    char who[64] = "several threads";
    if (earlier.thread >= 0) snprintf(who, sizeof who, "thread %d", earlier.thread);
    char block[32] = "";
    if (earlier.block != block_number) snprintf(block, sizeof block, " of another block");
    fail_at(caller, "race in %s memory: %s meets the %s by %s%s, @%#zx",
            space == SHARED ? "shared" : "global", what, before, who, block, place(earlier.caller));
}

void remember_read(Byte& byte, const Access& access, Space space) {
    if (ordered(byte.read, space)) {
        byte.read = access;
        return;
    }
    byte.read.thread = SEVERAL;
    if (byte.read.warp != access.warp) byte.read.warp = SEVERAL;
    byte.read.warp_epoch = std::max(byte.read.warp_epoch, access.warp_epoch);
}

void check(Byte& byte, Kind kind, const Region& region, const void* caller) {
    const Access access = now(caller);
    const char* what = kind == READ ? "a read" : kind == COPY ? "a copy" : "a write";
    const bool two_atomics = kind == ATOMIC && byte.atomic;
    if (byte.in_flight)
        report_race(what, "copy that may still be on its way", byte.write, region.space, caller);
    if (!two_atomics && !ordered(byte.write, region.space))
        report_race(what, "write", byte.write, region.space, caller);
    if (kind == READ) {
        remember_read(byte, access, region.space);
        return;
    }
    if (!ordered(byte.read, region.space)) report_race(what, "read", byte.read, region.space, caller);
    byte.write = access;
    byte.read.thread = NOBODY;
    byte.in_flight = kind == COPY;
    byte.atomic = kind == ATOMIC;
}

// ---- how accesses of a warp are cut ---------------------------------------------------------------------

constexpr size_t SECTOR = 32, BANK = 4, BANKS = 32;

// One instruction of one warp: what its lanes access together.
struct Request {
    uintptr_t addresses[32];
    uint32_t lanes;
};

struct Instruction {
    Kind kind;
    Space space;
    int bytes;
    unsigned long long requests, pieces, least;  // pieces there were, and there had to be
    std::map<int, std::vector<Request>> of_warps;
    std::vector<int> executions;  // of each thread of the block
};

std::unordered_map<const void*, Instruction> instructions;

void note(const Region& region, const void* pointer, int bytes, Kind kind, const void* caller) {
    Instruction& instruction = instructions[caller];
    instruction.kind = kind;
    instruction.space = region.space;
    instruction.bytes = bytes;
    instruction.executions.resize(1024);
    // Lanes arrive one after another: the n-th execution of each belongs to one request.
    const size_t n = instruction.executions[current->rank]++;
    auto& requests = instruction.of_warps[current->warp];
    if (requests.size() <= n) requests.resize(n + 1);
    requests[n].addresses[current->lane] = uintptr_t(pointer);
    requests[n].lanes |= 1u << current->lane;
}

size_t count_distinct(std::vector<uintptr_t>& values) {
    std::sort(values.begin(), values.end());
    return std::unique(values.begin(), values.end()) - values.begin();
}

// Sectors of 32 bytes that a request touches, and the least that its distinct bytes fill.
std::pair<size_t, size_t> cut_global(const Request& request, size_t bytes) {
    std::vector<uintptr_t> sectors, units;
    const size_t unit = std::min<size_t>(bytes, 4);
    for (int lane = 0; lane < 32; ++lane) {
        if (!(request.lanes >> lane & 1)) continue;
        for (size_t at = 0; at < bytes; at += unit) {
            sectors.push_back((request.addresses[lane] + at) / SECTOR);
            units.push_back((request.addresses[lane] + at) / unit);
        }
    }
    return {count_distinct(sectors), (count_distinct(units) * unit + SECTOR - 1) / SECTOR};
}

// Passes through shared memory: in each, a bank gives one word. Wide accesses go by half or quarter warps.
std::pair<size_t, size_t> cut_shared(const Request& request, size_t bytes) {
    const int group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
    size_t passes = 0, least = 0;
    for (int first = 0; first < 32; first += group) {
        std::vector<uintptr_t> of_bank[BANKS];
        for (int lane = first; lane < first + group; ++lane) {
            if (!(request.lanes >> lane & 1)) continue;
            for (size_t at = 0; at < std::max(bytes, BANK); at += BANK) {
                const uintptr_t word = (request.addresses[lane] + at) / BANK;
                of_bank[word % BANKS].push_back(word);
            }
        }
        size_t worst = 0;
        for (auto& words : of_bank) worst = std::max(worst, count_distinct(words));
        passes += worst;
        least += worst > 0;
    }
    return {passes, least};
}

const Region* region_of(const void* pointer) {
    const auto at = static_cast<const unsigned char*>(pointer);
    for (const Region& region : regions)
        if (at >= region.begin && at < region.end) return &region;
    return nullptr;  // the thread's own stack, or an array that came by no argument
}

void watch(const void* pointer, int bytes, Kind kind, const void* caller) {
    const Region* region = region_of(pointer);
    if (!region) return;
    note(*region, pointer, bytes, kind, caller);
    const auto first = static_cast<const unsigned char*>(pointer);
    for (auto at = first; at < std::min(first + bytes, region->end); ++at)
        check(region->bytes[at - region->begin], kind, *region, caller);
}

}  // namespace

void watch_launch() {
    regions.clear();
    const Launch& launch = running();
    regions.emplace_back(dynamic_shared, launch.dynamic_bytes, SHARED);
    regions.emplace_back(launch.static_begin, launch.static_end - launch.static_begin, SHARED);
    for (auto [begin, size] : arrays) regions.emplace_back(begin, size, GLOBAL);
    blocks_with_atomics.assign(size_t(launch.grid.x) * launch.grid.y * launch.grid.z, false);
}

void watch_block() {
    if (regions.empty()) return;
    for (int shared = 0; shared < 2; ++shared)
        std::fill_n(regions[shared].bytes.get(), regions[shared].end - regions[shared].begin, Byte());
}

void finish_block() {
    for (auto& [caller, instruction] : instructions) {
        for (auto& [warp, requests] : instruction.of_warps) {
            for (const Request& request : requests) {
                const auto [pieces, least] = instruction.space == GLOBAL
                                                 ? cut_global(request, instruction.bytes)
                                                 : cut_shared(request, instruction.bytes);
                ++instruction.requests;
                instruction.pieces += pieces;
                instruction.least += least;
            }
        }
        instruction.of_warps.clear();
        instruction.executions.clear();
    }
}

void watch_issued_copy(void* destination, const void* source, int bytes, bool valid, const void* caller) {
    watch(destination, bytes, COPY, caller);
    if (valid) watch(source, bytes, READ, static_cast<const char*>(caller) + 1);  // a row of its own
}

void watch_landed_copy(void* destination, int bytes, const void* caller) {
    const Region* region = region_of(destination);
    if (!region) return;
    for (int i = 0; i < bytes; ++i) {
        Byte& byte = region->bytes[static_cast<unsigned char*>(destination) + i - region->begin];
        byte.in_flight = false;
        byte.write = now(caller);
    }
}

void watch_row(const void* row, const void* caller) { watch(row, 16, READ, caller); }

void watch_atomic(void* pointer, int bytes, const void* caller) {
    const Region* region = region_of(pointer);
    if (region && region->space == GLOBAL) blocks_with_atomics[block_number] = true;
    watch(pointer, bytes, ATOMIC, caller);
}

}  // namespace emulator

extern "C" {

void __tsan_init() {}

#define EMULATOR_WATCH(suffix, bytes)                                                            \
    void __tsan_read##suffix(void* pointer) {                                                    \
        emulator::watch(pointer, bytes, emulator::READ, __builtin_return_address(0));            \
    }                                                                                            \
    void __tsan_write##suffix(void* pointer) {                                                   \
        emulator::watch(pointer, bytes, emulator::WRITE, __builtin_return_address(0));           \
    }                                                                                            \
    void __tsan_unaligned_read##suffix(void* pointer) {                                          \
        emulator::watch(pointer, bytes, emulator::READ, __builtin_return_address(0));            \
    }                                                                                            \
    void __tsan_unaligned_write##suffix(void* pointer) {                                         \
        emulator::watch(pointer, bytes, emulator::WRITE, __builtin_return_address(0));           \
    }
EMULATOR_WATCH(1, 1)
EMULATOR_WATCH(2, 2)
EMULATOR_WATCH(4, 4)
EMULATOR_WATCH(8, 8)
EMULATOR_WATCH(16, 16)

void __tsan_read_range(void* pointer, size_t bytes) {
    emulator::watch(pointer, int(bytes), emulator::READ, __builtin_return_address(0));
}
void __tsan_write_range(void* pointer, size_t bytes) {
    emulator::watch(pointer, int(bytes), emulator::WRITE, __builtin_return_address(0));
}

// The arrays of the next launch: count addresses, count sizes.
void emulator_watch_arrays(size_t count, const size_t* addresses, const size_t* sizes) {
    emulator::arrays.clear();
    for (size_t i = 0; i < count; ++i)
        emulator::arrays.push_back({reinterpret_cast<unsigned char*>(addresses[i]), sizes[i]});
}

struct AccessRow {
    const char* library;
    size_t address;
    int kind, space, bytes;
    unsigned long long requests, pieces, least;
};

// Writes up to `capacity` rows, forgets all and returns how many there were.
size_t emulator_accesses(AccessRow* rows, size_t capacity) {
    size_t count = 0;
    for (auto& [caller, instruction] : emulator::instructions) {
        Dl_info library{};
        dladdr(caller, &library);
        if (count < capacity)
            rows[count] = {library.dli_fname, emulator::place(caller), instruction.kind, instruction.space,
                           instruction.bytes, instruction.requests, instruction.pieces, instruction.least};
        ++count;
    }
    if (count <= capacity) emulator::instructions.clear();
    return count;
}
}
