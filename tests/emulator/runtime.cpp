// The emulated GPU: fibers, barriers, warps, shared memory, asynchronous copies, tensor cores.
#include "accesses.h"

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

namespace emulator {

Thread* current;
uint3 block_index;
dim3 block_size, grid_size;
unsigned char* dynamic_shared;
uint32_t block_number, block_epoch;

namespace {

constexpr int MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 256 * 1024;
constexpr size_t SHARED_CAPACITY = 256 * 1024;
constexpr size_t SHARED_ALIGNMENT = 1024;  // of instructions.cuh's dynamic_shared_memory
constexpr unsigned char POISON = 0xff;     // four of them are a NaN, two as well

enum Order { FORWARD, REVERSE, RANDOM };

struct Settings {
    int order = FORWARD;
    uint32_t seed = 1;
    bool lazy_copies = true;  // asynchronous copies land when waited for, not when issued
} settings;

struct Statistics {
    unsigned long long blocks, switches, shuffles, copies, matrix_loads, bank_conflicts, products;
} statistics;

struct Copy {
    void* destination;
    const void* source;
    int bytes;
    bool valid;
    const void* caller;
};

struct Fiber : Thread {
    void* context;  // where it goes on: a stack pointer, or a ucontext_t
    bool done;
    Site waits_at;
    std::vector<Copy> copies;  // issued and not landed, oldest first
    std::vector<int> groups;   // committed: how many of the copies each one closes
    bool hidden;               // copies have landed that products of a warpgroup may not see yet
};

// The lanes of a warp that wait for each other at one instruction.
struct Meeting {
    uint32_t mask, arrived;
    const char* instruction;
    Site site;
    void* deposits[32];
};

Fiber fibers[MAX_THREADS];
Meeting meetings[MAX_THREADS / 32];
int thread_count;
std::vector<Fiber*> at_barrier;
Site barrier_site;

// Who can run, in order: a ring, since nobody is in it twice.
struct Ready {
    static constexpr unsigned SIZE = MAX_THREADS;
    Fiber* ring[SIZE];
    unsigned first, end;

    bool empty() const { return first == end; }
    void clear() { first = end = 0; }
    void push(Fiber* fiber) { ring[end++ % SIZE] = fiber; }
    Fiber* pop() { return ring[first++ % SIZE]; }
} ready;
void* scheduler_context;
unsigned char* stacks;
unsigned char* shared_arena;
Launch launch_now;
uint32_t random_state;

bool failed;
std::string error;
std::string error_library;  // in which the places "@0x..." of the message are
uint32_t warp_epochs[MAX_THREADS / 32];

// ---- fibers -------------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** save, void* load);
// Saves what the calling convention lets a function keep, changes stacks, and restores the same.
asm(R"(
.text
.p2align 4
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");

void switch_context(void** save, void* load) { emulator_switch(save, load); }

void prepare_context(Fiber& fiber, unsigned char* stack_end, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack_end);
    *--top = nullptr;  // entry finds the stack as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.context = top;
}
#else  // two system calls a switch: about ten times slower
ucontext_t contexts[MAX_THREADS], scheduler_ucontext, abandoned;

void switch_context(void** save, void* load) {
    ucontext_t* from = &abandoned;
    if (save == &scheduler_context) {
        from = &scheduler_ucontext;
        *save = from;
    } else if (*save) {
        from = static_cast<ucontext_t*>(*save);
    }
    swapcontext(from, static_cast<ucontext_t*>(load));
}

void prepare_context(Fiber& fiber, unsigned char* stack_end, void (*entry)()) {
    ucontext_t& context = contexts[fiber.rank];
    getcontext(&context);
    context.uc_stack.ss_sp = stack_end - STACK_BYTES / 2;
    context.uc_stack.ss_size = STACK_BYTES / 2;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
    fiber.context = &context;
}
#endif

[[noreturn]] void leave_launch() {
    void* never_read = nullptr;
    switch_context(&never_read, scheduler_context);
    __builtin_unreachable();
}

const char* base_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

std::string name(Site site) {
    return std::string(base_name(site.file)) + " line " + std::to_string(site.line);
}

bool same(Site a, Site b) {
    return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

std::string where() {
    char text[128];
    snprintf(text, sizeof text, "block (%u, %u, %u), thread (%u, %u, %u)", block_index.x, block_index.y,
             block_index.z, current->index.x, current->index.y, current->index.z);
    return text;
}

[[noreturn]] void fail_with(std::string message) {
    if (!failed) error = std::move(message);
    failed = true;
    leave_launch();
}

// Nobody can go on: say where everybody stands.
[[noreturn]] void report_deadlock() {
    std::vector<std::pair<Site, int>> waiting;
    int exited = 0;
    for (int i = 0; i < thread_count; ++i) {
        if (fibers[i].done) {
            ++exited;
            continue;
        }
        auto known = std::find_if(waiting.begin(), waiting.end(),
                                  [&](auto& entry) { return same(entry.first, fibers[i].waits_at); });
        if (known == waiting.end()) waiting.push_back({fibers[i].waits_at, 1});
        else ++known->second;
    }
    std::string message = "block (" + std::to_string(block_index.x) + ", " + std::to_string(block_index.y) +
                          ", " + std::to_string(block_index.z) + "): deadlock";
    for (auto& [site, count] : waiting)
        message += ", " + std::to_string(count) + " threads wait at " + name(site);
    fail_with(message + ", " + std::to_string(exited) + " have exited");
}

// Lets the next fiber run. The caller has noted itself wherever it waits, or is done.
void give_way() {
    Fiber* from = static_cast<Fiber*>(current);
    if (ready.empty()) {
        if (std::any_of(fibers, fibers + thread_count, [](Fiber& fiber) { return !fiber.done; }))
            report_deadlock();
        leave_launch();
    }
    Fiber* to = ready.pop();
    current = to;
    ++statistics.switches;
    if (to != from) switch_context(&from->context, to->context);
}

uint32_t random_below(uint32_t bound) {
    random_state = random_state * 1664525u + 1013904223u;
    return uint32_t((uint64_t(random_state >> 8) * bound) >> 24);
}

template <typename T>
void arrange(T* items, int count) {
    if (settings.order == REVERSE) std::reverse(items, items + count);
    if (settings.order == RANDOM)
        for (int i = count - 1; i > 0; --i) std::swap(items[i], items[random_below(i + 1)]);
}

void release(Fiber** waiting, int count) {  // in order of rank
    arrange(waiting, count);
    for (int i = 0; i < count; ++i) ready.push(waiting[i]);
}

void run_thread() {
    launch_now.body(launch_now.context);
    static_cast<Fiber*>(current)->done = true;
    give_way();
    __builtin_unreachable();
}

// ---- warps --------------------------------------------------------------------------------------------

// Every lane of mask leaves a pointer; the last one to come runs `work(deposits)`, then all go on.
template <typename Work>
void meet(uint32_t mask, const char* instruction, void* deposit, Site site, Work work) {
    Fiber* fiber = static_cast<Fiber*>(current);
    Meeting& meeting = meetings[fiber->warp];
    const uint32_t bit = 1u << fiber->lane;
    if (!(mask & bit)) fail(site, "%s: lane %d is not in its own mask %08x", instruction, fiber->lane, mask);
    if (!meeting.arrived) {
        meeting.mask = mask;
        meeting.instruction = instruction;
        meeting.site = site;
    } else if (meeting.mask != mask || meeting.instruction != instruction || !same(meeting.site, site)) {
        fail(site, "warp %d has diverged: %s with mask %08x meets %s with mask %08x at %s", fiber->warp,
             instruction, mask, meeting.instruction, meeting.mask, name(meeting.site).c_str());
    }
    meeting.arrived |= bit;
    meeting.deposits[fiber->lane] = deposit;
    fiber->waits_at = site;
    if (meeting.arrived != mask) {
        give_way();
        return;
    }
    work(meeting.deposits);
    meeting.arrived = 0;
    Fiber* others[32];
    int count = 0;
    for (int lane = 0; lane < 32; ++lane)
        if ((mask >> lane & 1) && lane != fiber->lane) others[count++] = &fibers[fiber->warp * 32 + lane];
    release(others, count);
    if (settings.order != FORWARD) {  // the last to come need not be the first to go on
        ready.push(fiber);
        give_way();
    }
}

constexpr uint32_t ALL_LANES = 0xffffffffu;

bool in_shared_memory(const void* pointer, size_t bytes) {
    auto inside = [&](const unsigned char* begin, const unsigned char* end) {
        auto first = static_cast<const unsigned char*>(pointer);
        return first >= begin && first + bytes <= end;
    };
    return inside(dynamic_shared, dynamic_shared + launch_now.dynamic_bytes) ||
           inside(launch_now.static_begin, launch_now.static_end);
}

void land(const Copy& copy) {
    if (copy.valid) memcpy(copy.destination, copy.source, copy.bytes);
    else memset(copy.destination, 0, copy.bytes);
}

// Sixteen-byte rows of one matrix are read at once if they lie in different groups of four banks.
int bank_conflicts(const char* const* rows) {
    int worst = 0;
    for (int i = 0; i < 8; ++i) {
        int others = 0;
        for (int j = 0; j < i; ++j)
            others += rows[j] != rows[i] && (uintptr_t(rows[j]) / 16 - uintptr_t(rows[i]) / 16) % 8 == 0;
        worst = std::max(worst, others);
    }
    return worst;
}

struct Product {
    float* d;
    const uint32_t *a, *b;
};

typedef float Row __attribute__((vector_size(32)));  // eight columns

struct Tile {
    float a[16][16];
    Row b[16], d[16];  // b[k][n]
};

template <int K>
void multiply(Tile& tile) {
    for (int m = 0; m < 16; ++m) {
        Row sums = tile.d[m];
        for (int k = 0; k < K; ++k) sums += tile.a[m][k] * tile.b[k];
        tile.d[m] = sums;
    }
}

// Collects the fragments of 32 lanes, multiplies, hands the result out. set_a and set_b(tile, product,
// g, t) write one lane's operands.
template <int K, typename SetOperands>
void multiply_fragments(const char* instruction, Product product, Site site, SetOperands set_operands) {
    meet(ALL_LANES, instruction, &product, site, [&](void* const* deposits) {
        ++statistics.products;
        static Tile tile;
        for (int lane = 0; lane < 32; ++lane) {
            const Product& of_lane = *static_cast<Product*>(deposits[lane]);
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i) tile.d[g + i / 2 * 8][2 * t + i % 2] = of_lane.d[i];
            set_operands(tile, of_lane, g, t);
        }
        multiply<K>(tile);
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i)
                static_cast<Product*>(deposits[lane])->d[i] = tile.d[g + i / 2 * 8][2 * t + i % 2];
        }
    });
}

template <typename ToFloat>
void multiply_16_bit(const char* instruction, Product product, Site site, ToFloat to_float) {
    multiply_fragments<16>(instruction, product, site, [&](Tile& tile, const Product& lane, int g, int t) {
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < 4; ++i)
                tile.a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = to_float(uint16_t(lane.a[i] >> 16 * half));
            for (int i = 0; i < 2; ++i)
                tile.b[2 * t + half + i * 8][g] = to_float(uint16_t(lane.b[i] >> 16 * half));
        }
    });
}

float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// ---- warpgroups ---------------------------------------------------------------------------------------

constexpr int GROUP_THREADS = 128, GROUP_ROWS = 64, MAX_GROUP_COLUMNS = 128;

// What one thread hands to a product.
struct GroupDeposit {
    float* d;
    const uint32_t* a_registers;
    uint64_t a, b;
};

struct GroupProduct {
    Elements elements;
    int columns;
    bool panels_b;
    GroupDeposit threads[GROUP_THREADS];
};

struct Warpgroup {
    int arrived;
    const char* instruction;
    Site site;
    const GroupDeposit* deposits[GROUP_THREADS];
    std::vector<GroupProduct> products;  // issued and not done, oldest first
    std::vector<int> groups;             // committed: how many of the products each one closes
};

Warpgroup warpgroups[MAX_THREADS / GROUP_THREADS];

// Every thread of the warpgroup leaves a deposit; the last one to come runs `work(warpgroup)`.
template <typename Work>
void meet_warpgroup(const char* instruction, const GroupDeposit* deposit, Site site, Work work) {
    Fiber* fiber = static_cast<Fiber*>(current);
    Warpgroup& group = warpgroups[fiber->rank / GROUP_THREADS];
    const int first = fiber->rank / GROUP_THREADS * GROUP_THREADS;
    if (first + GROUP_THREADS > thread_count) fail(site, "%s: the last warpgroup is not whole", instruction);
    if (group.arrived && (group.instruction != instruction || !same(group.site, site)))
        fail(site, "the warpgroup has diverged: %s meets %s at %s", instruction, group.instruction,
             name(group.site).c_str());
    group.instruction = instruction;
    group.site = site;
    group.deposits[fiber->rank - first] = deposit;
    fiber->waits_at = site;
    if (++group.arrived == GROUP_THREADS) {
        work(group);
        group.arrived = 0;
        Fiber* all[GROUP_THREADS];
        for (int i = 0; i < GROUP_THREADS; ++i) all[i] = &fibers[first + i];
        release(all, GROUP_THREADS);
    }
    give_way();
}

bool is_swizzled(uint64_t operand) { return operand >> 62; }

// Where an operand's element lies: along the depth and across lines in bytes, before chunks change places.
const unsigned char* operand_byte(uint64_t operand, int line_offset, int depth_offset) {
    uint32_t address = uint32_t(operand & 0x3fff) << 4;
    address += line_offset + depth_offset;
    if (is_swizzled(operand)) address ^= (address >> 7 & 7) << 4;
    return dynamic_shared + (address - SHARED_ALIGNMENT);
}

const unsigned char* operand_element(uint64_t operand, int line, int depth, int bytes, bool panels) {
    const int along = int(operand >> 16 & 0x3fff) << 4, eight_rows = int(operand >> 32 & 0x3fff) << 4;
    if (panels && !is_swizzled(operand))  // columns of 8 lines; the two distances change their roles
        return operand_byte(operand, line / 8 * eight_rows + line % 8 * bytes, depth / 8 * along + depth % 8 * 16);
    if (panels) {
        const int lines = 128 / bytes;
        return operand_byte(operand, line / lines * along + line % lines * bytes,
                            depth / 8 * eight_rows + depth % 8 * 128);
    }
    if (!is_swizzled(operand))  // blocks of 8 lines x 16 bytes
        return operand_byte(operand, line / 8 * eight_rows + line % 8 * 16,
                            depth * bytes / 16 * along + depth * bytes % 16);
    return operand_byte(operand, line / 8 * eight_rows + line % 8 * 128, depth * bytes);
}

float element_value(Elements elements, const unsigned char* at) {
    if (elements == Elements::TF32) {
        uint32_t bits;
        memcpy(&bits, at, 4);
        return as_float(bits & 0xffffe000u);
    }
    uint16_t bits;
    memcpy(&bits, at, 2);
    return elements == Elements::FLOAT16 ? float16_bits_to_float(bits) : as_float(uint32_t(bits) << 16);
}

void run_product(const GroupProduct& product) {
    const bool tf32 = product.elements == Elements::TF32;
    const int bytes = tf32 ? 4 : 2, depths = 32 / bytes, columns = product.columns;
    static float a[GROUP_ROWS][16], b[16][MAX_GROUP_COLUMNS];
    const GroupDeposit& first = product.threads[0];
    for (int row = 0; row < GROUP_ROWS && !first.a_registers; ++row)
        for (int k = 0; k < depths; ++k)
            a[row][k] = element_value(product.elements, operand_element(first.a, row, k, bytes, false));
    for (int thread = 0; thread < GROUP_THREADS && first.a_registers; ++thread)
        for (int i = 0; i < 4; ++i) {
            // a register is 4 bytes of the depth
            float* const row = a[thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8];
            const int k = (thread % 4 + i / 2 * 4) * (4 / bytes);
            const unsigned char* const at =
                reinterpret_cast<const unsigned char*>(&product.threads[thread].a_registers[i]);
            for (int element = 0; element < 4 / bytes; ++element)
                row[k + element] = element_value(product.elements, at + element * bytes);
        }
    for (int column = 0; column < columns; ++column)
        for (int k = 0; k < depths; ++k)
            b[k][column] = element_value(product.elements,
                                         operand_element(first.b, column, k, bytes, product.panels_b));
    for (int row = 0; row < GROUP_ROWS; ++row) {
        static float sums[MAX_GROUP_COLUMNS];
        auto of_column = [&](int column) -> float& {
            const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
            return product.threads[thread].d[column / 8 * 4 + row % 16 / 8 * 2 + column % 2];
        };
        for (int column = 0; column < columns; ++column) sums[column] = of_column(column);
        for (int k = 0; k < depths; ++k)
            for (int column = 0; column < columns; ++column) sums[column] += a[row][k] * b[k][column];
        for (int column = 0; column < columns; ++column) of_column(column) = sums[column];
    }
}

// The chunks of 16 bytes that a product reads are noted as read by the threads that issue it, in equal parts.
void watch_operand(uint64_t operand, int lines, bool panels, const void* caller) {
    const int across = panels ? lines / 8 : lines, along = panels ? 16 : 2, bytes = panels ? 2 : 16;
    for (int chunk = current->rank % GROUP_THREADS; chunk < across * along; chunk += GROUP_THREADS)
        // eight at a time are one read: of eight neighbours along the depth of panels, else of eight lines
        watch_row(panels ? operand_element(operand, chunk / along * 8, chunk % along, bytes, panels)
                         : operand_element(operand, chunk % across, chunk / across, bytes, panels),
                  caller);
}

// ---- faults -------------------------------------------------------------------------------------------

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};

void on_fault(int signal_number, siginfo_t* info, void* context) {
    Dl_info library{};
#if defined(__x86_64__)
    const auto instruction = uintptr_t(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#else
    const uintptr_t instruction = 0;
#endif
    char at[32] = "";
    if (dladdr(reinterpret_cast<void*>(instruction), &library) && library.dli_fname) {
        error_library = library.dli_fname;
        snprintf(at, sizeof at, ", @%#zx", size_t(instruction - uintptr_t(library.dli_fbase)));
    }
    if (signal_number != SIGSEGV && signal_number != SIGBUS)
        fail_with(where() + at + ": " + strsignal(signal_number));
    const auto fault = static_cast<unsigned char*>(info->si_addr);
    const bool shared = fault >= shared_arena && fault < shared_arena + SHARED_CAPACITY + 4096;
    const bool stack = fault >= stacks && fault < stacks + STACK_BYTES * MAX_THREADS;
    fail_with(where() + at + (shared  ? ": access past the end of shared memory"
                         : stack ? ": the thread's stack is full"
                                 : ": access outside of every array"));
}

class FaultHandler {
public:
    FaultHandler() {
        stack_t stack{};
        stack.ss_sp = memory;
        stack.ss_size = sizeof memory;
        sigaltstack(&stack, &old_stack);
        struct sigaction action{};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
        for (size_t i = 0; i < std::size(SIGNALS); ++i) sigaction(SIGNALS[i], &action, &old_actions[i]);
    }
    ~FaultHandler() {
        for (size_t i = 0; i < std::size(SIGNALS); ++i) sigaction(SIGNALS[i], &old_actions[i], nullptr);
        if (!old_stack.ss_sp) old_stack.ss_flags |= SS_DISABLE;
        sigaltstack(&old_stack, nullptr);
    }

private:
    static inline char memory[65536];
    stack_t old_stack;
    struct sigaction old_actions[std::size(SIGNALS)];
};

// ---- blocks -------------------------------------------------------------------------------------------

void* map_pages(size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

void make_memory() {
    if (stacks) return;
    stacks = static_cast<unsigned char*>(map_pages(STACK_BYTES * MAX_THREADS));
    for (int i = 0; i < MAX_THREADS; ++i) mprotect(stacks + STACK_BYTES * i, 4096, PROT_NONE);
    shared_arena = static_cast<unsigned char*>(map_pages(SHARED_CAPACITY + 4096));
    mprotect(shared_arena + SHARED_CAPACITY, 4096, PROT_NONE);
}

void prepare_thread(int rank) {
    Fiber& fiber = fibers[rank];
    fiber.rank = rank;
    fiber.lane = rank % 32;
    fiber.warp_epoch = 0;
    fiber.warp = rank / 32;
    const unsigned x = block_size.x, y = block_size.y, r = unsigned(rank);
    fiber.index = {r % x, r / x % y, r / (x * y)};
    fiber.done = false;
    fiber.waits_at = {"the kernel's start", 0};
    fiber.copies.clear();
    fiber.groups.clear();
    fiber.hidden = false;
    // Stacks that all ended at a multiple of 256 KB would share one set of each cache.
    const size_t color = size_t(rank % 61) * 1088 + 64;
    prepare_context(fiber, stacks + STACK_BYTES * (rank + 1) - color, run_thread);
}

void run_block() {
    ++statistics.blocks;
    memset(dynamic_shared, POISON, shared_arena + SHARED_CAPACITY - dynamic_shared);
    memset(launch_now.static_begin, POISON, launch_now.static_end - launch_now.static_begin);
    memset(meetings, 0, sizeof meetings);
    memset(warp_epochs, 0, sizeof warp_epochs);
    for (Warpgroup& group : warpgroups) group = {};
    block_epoch = 0;
    at_barrier.clear();
    ready.clear();
    if (launch_now.watched) watch_block();
    std::vector<Fiber*> order;
    for (int rank = 0; rank < thread_count; ++rank) {
        prepare_thread(rank);
        order.push_back(&fibers[rank]);
    }
    release(order.data(), thread_count);
    Fiber* first = ready.pop();
    current = first;
    switch_context(&scheduler_context, first->context);
    if (launch_now.watched) finish_block();
    // Between the last byte and the guard page alignment leaves a few bytes that nobody may write.
    const unsigned char* end = dynamic_shared + launch_now.dynamic_bytes;
    const bool intact = std::all_of(end, static_cast<const unsigned char*>(shared_arena + SHARED_CAPACITY),
                                    [](unsigned char byte) { return byte == POISON; });
    if (!failed && !intact) {
        failed = true;
        error = "block (" + std::to_string(block_index.x) + ", " + std::to_string(block_index.y) + ", " +
                std::to_string(block_index.z) + "): wrote past the end of shared memory";
    }
}

void run_grid() {
    std::vector<uint3> blocks;
    for (unsigned z = 0; z < grid_size.z; ++z)
        for (unsigned y = 0; y < grid_size.y; ++y)
            for (unsigned x = 0; x < grid_size.x; ++x) blocks.push_back({x, y, z});
    arrange(blocks.data(), int(blocks.size()));
    if (launch_now.watched) watch_launch();
    block_number = 0;
    for (uint3 index : blocks) {
        block_index = index;
        run_block();
        ++block_number;
        if (failed) return;
    }
}

}  // namespace

// ---- what device code calls -----------------------------------------------------------------------------

const Launch& running() { return launch_now; }

size_t place(const void* caller) {
    Dl_info library{};
    if (!dladdr(caller, &library) || !library.dli_fname) return 0;
    error_library = library.dli_fname;
    return uintptr_t(caller) - 1 - uintptr_t(library.dli_fbase);  // of the call, not of what follows it
}

void fail_at(const void* caller, const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    char at[32];
    snprintf(at, sizeof at, ", @%#zx: ", place(caller));
    fail_with(where() + at + text);
}

void fail(Site site, const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fail_with(where() + ", " + name(site) + ": " + text);
}

void synchronize_block(Site site) {
    Fiber* fiber = static_cast<Fiber*>(current);
    if (at_barrier.empty()) barrier_site = site;
    else if (!same(barrier_site, site))
        fail(site, "__syncthreads meets another one, of %d threads at %s", int(at_barrier.size()),
             name(barrier_site).c_str());
    fiber->waits_at = site;
    at_barrier.push_back(fiber);
    if (int(at_barrier.size()) == thread_count) {
        at_barrier.clear();
        ++block_epoch;
        Fiber* all[MAX_THREADS];
        for (int rank = 0; rank < thread_count; ++rank) all[rank] = &fibers[rank];
        release(all, thread_count);
    }
    give_way();
}

int count_block(bool predicate, Site site) {
    static int votes;  // of the barrier that is filling; read by all before the next one can fill
    static int result;
    if (at_barrier.empty()) votes = 0;
    votes += predicate;
    if (int(at_barrier.size()) == thread_count - 1) result = votes;
    synchronize_block(site);
    return result;
}

void synchronize_warp(uint32_t mask, Site site) {
    meet(mask, "__syncwarp", nullptr, site, [=](void* const*) {
        const int warp = current->warp;
        ++warp_epochs[warp];
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) fibers[32 * warp + lane].warp_epoch = warp_epochs[warp];
    });
}

void shuffle(uint32_t mask, void* value, size_t size, int source, Site site) {
    struct Deposit {
        void* value;
        int source;
        unsigned char received[16];
    } deposit{value, source, {}};
    if (source >= 0 && source < 32 && !(mask >> source & 1))
        fail(site, "shuffle reads lane %d, which is not in the mask %08x", source, mask);
    meet(mask, "shuffle", &deposit, site, [&](void* const* deposits) {
        ++statistics.shuffles;
        auto of_lane = [&](int lane) { return static_cast<Deposit*>(deposits[lane]); };
        for (int lane = 0; lane < 32; ++lane) {
            if (!(mask >> lane & 1)) continue;
            const int from = of_lane(lane)->source;
            memcpy(of_lane(lane)->received, of_lane(from >= 0 && from < 32 ? from : lane)->value, size);
        }
    });
    memcpy(value, deposit.received, size);
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
    struct Deposit {
        bool predicate;
        uint32_t result;
    } deposit{predicate, 0};
    meet(mask, "vote", &deposit, site, [&](void* const* deposits) {
        uint32_t result = 0;
        for (int lane = 0; lane < 32; ++lane)
            if ((mask >> lane & 1) && static_cast<Deposit*>(deposits[lane])->predicate) result |= 1u << lane;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) static_cast<Deposit*>(deposits[lane])->result = result;
    });
    return deposit.result;
}

void copy_async(void* destination, const void* source, int bytes, bool valid, Site site) {
    if (uintptr_t(destination) % bytes || uintptr_t(source) % bytes)
        fail(site, "copy_async of %d bytes is misaligned (destination %p, source %p)", bytes, destination,
             source);
    if (!in_shared_memory(destination, bytes)) fail(site, "copy_async writes outside of shared memory");
    ++statistics.copies;
    const Copy copy{destination, source, bytes, valid, __builtin_return_address(0)};
    if (launch_now.watched) watch_issued_copy(destination, source, bytes, valid, copy.caller);
    if (!settings.lazy_copies) land(copy);
    static_cast<Fiber*>(current)->copies.push_back(copy);
}

void commit_copies() {
    Fiber* fiber = static_cast<Fiber*>(current);
    const int closed = std::accumulate(fiber->groups.begin(), fiber->groups.end(), 0);
    fiber->groups.push_back(int(fiber->copies.size()) - closed);
}

void wait_copies(int pending) {
    Fiber* fiber = static_cast<Fiber*>(current);
    const auto first_left = fiber->groups.end() - std::min(size_t(pending), fiber->groups.size());
    const int landing = std::accumulate(fiber->groups.begin(), first_left, 0);
    fiber->groups.erase(fiber->groups.begin(), first_left);
    for (auto copy = fiber->copies.begin(); copy != fiber->copies.begin() + landing; ++copy) {
        if (settings.lazy_copies) land(*copy);
        fiber->hidden = true;
        if (launch_now.watched) watch_landed_copy(copy->destination, copy->bytes, copy->caller);
    }
    fiber->copies.erase(fiber->copies.begin(), fiber->copies.begin() + landing);
}

void load_matrices(uint32_t* fragment, const void* row, bool transposed, Site site) {
    struct Deposit {
        uint32_t* fragment;
        const char* row;
    } deposit{fragment, static_cast<const char*>(row)};
    if (uintptr_t(row) % 16) fail(site, "load_matrices: row %p is not at a multiple of 16 bytes", row);
    if (!in_shared_memory(row, 16)) fail(site, "load_matrices reads outside of shared memory");
    if (launch_now.watched) watch_row(row, __builtin_return_address(0));
    const char* instruction = transposed ? "load_matrices_transposed" : "load_matrices";
    meet(ALL_LANES, instruction, &deposit, site, [&](void* const* deposits) {
        auto of_lane = [&](int lane) { return static_cast<Deposit*>(deposits[lane]); };
        ++statistics.matrix_loads;
        for (int matrix = 0; matrix < 4; ++matrix) {
            const char* rows[8];
            for (int i = 0; i < 8; ++i) rows[i] = of_lane(8 * matrix + i)->row;
            statistics.bank_conflicts += bank_conflicts(rows);
            for (int lane = 0; lane < 32; ++lane) {
                const int g = lane / 4, t = lane % 4;
                char* to = reinterpret_cast<char*>(&of_lane(lane)->fragment[matrix]);
                if (transposed) {
                    memcpy(to, rows[2 * t] + 2 * g, 2);
                    memcpy(to + 2, rows[2 * t + 1] + 2 * g, 2);
                } else {
                    memcpy(to, rows[g] + 4 * t, 4);
                }
            }
        }
    });
}

void multiply_tf32(float* d, const uint32_t* a, const uint32_t* b, Site site) {
    auto to_float = [](uint32_t bits) { return as_float(bits & 0xffffe000u); };
    multiply_fragments<8>("multiply_tf32", {d, a, b}, site,
                          [&](Tile& tile, const Product& lane, int g, int t) {
                              for (int i = 0; i < 4; ++i)
                                  tile.a[g + i % 2 * 8][t + i / 2 * 4] = to_float(lane.a[i]);
                              for (int i = 0; i < 2; ++i) tile.b[t + i * 4][g] = to_float(lane.b[i]);
                          });
}

void multiply_float16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
    multiply_16_bit("multiply_float16", {d, a, b}, site, float16_bits_to_float);
}

void multiply_bfloat16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
    multiply_16_bit("multiply_bfloat16", {d, a, b}, site,
                    [](uint16_t bits) { return as_float(uint32_t(bits) << 16); });
}

void show_to_products() { static_cast<Fiber*>(current)->hidden = false; }

void multiply_warpgroup(Elements elements, int blocks, float* d, const uint32_t* a_registers, uint64_t a,
                        uint64_t b, bool panels_b, Site site) {
    const GroupDeposit deposit{d, a_registers, a, b};
    if (launch_now.watched) {
        if (!a_registers) watch_operand(a, GROUP_ROWS, false, __builtin_return_address(0));
        watch_operand(b, blocks * 8, panels_b, __builtin_return_address(0));
    }
    meet_warpgroup("warpgroup_multiply", &deposit, site, [&](Warpgroup& group) {
        ++statistics.products;
        GroupProduct product{elements, blocks * 8, panels_b, {}};
        for (int i = 0; i < GROUP_THREADS; ++i) {
            product.threads[i] = *group.deposits[i];
            if (product.threads[i].a != a || product.threads[i].b != b)
                fail(site, "the threads of a warpgroup name different operands");
        }
        for (int i = 0; i < thread_count; ++i)
            if (fibers[i].hidden) fail(site, "thread %d has not shown its copies to products", i);
        if (settings.lazy_copies) run_product(product);
        group.products.push_back(product);
    });
}

void commit_products(Site site) {
    meet_warpgroup("commit_products", nullptr, site, [](Warpgroup& group) {
        const int closed = std::accumulate(group.groups.begin(), group.groups.end(), 0);
        group.groups.push_back(int(group.products.size()) - closed);
    });
}

void wait_products(int pending, Site site) {
    meet_warpgroup("wait_products", nullptr, site, [=](Warpgroup& group) {
        const auto first_left = group.groups.end() - std::min(size_t(pending), group.groups.size());
        const int done = std::accumulate(group.groups.begin(), first_left, 0);
        group.groups.erase(group.groups.begin(), first_left);
        for (int i = 0; i < done && !settings.lazy_copies; ++i) run_product(group.products[i]);
        group.products.erase(group.products.begin(), group.products.begin() + done);
    });
}

float float16_bits_to_float(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
    const uint32_t exponent_and_mantissa = uint32_t(bits & 0x7fffu) << 13;
    if ((bits & 0x7c00u) == 0x7c00u)  // infinity or NaN
        return as_float(sign | 0x7f800000u | exponent_and_mantissa);
    return as_float(sign | as_bits(as_float(exponent_and_mantissa) * 0x1p112f));  // 127 - 15 more
}

uint16_t float_to_float16_bits(float value) {
    const uint32_t bits = as_bits(value);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;           // every NaN is this one
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;   // from 65520 on it rounds to infinity
    if (magnitude < 0x38800000u) {                         // subnormal: the sum rounds to multiples of 2^-24
        const uint32_t sum = as_bits(as_float(magnitude) + 0.5f);
        return sign | uint16_t(sum - as_bits(0.5f));
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return sign | uint16_t((rounded - 0x38000000u) >> 13);
}

uint16_t float_to_bfloat16_bits(float value) {
    const uint32_t bits = as_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

uint32_t shared_address(const void* pointer) {
    return uint32_t(static_cast<const unsigned char*>(pointer) - dynamic_shared) + SHARED_ALIGNMENT;
}

bool run(const Launch& launch) {
    make_memory();
    launch_now = launch;
    grid_size = launch.grid;
    block_size = launch.block;
    thread_count = int(block_size.x * block_size.y * block_size.z);
    random_state = settings.seed;
    failed = false;
    error.clear();
    error_library.clear();
    const size_t aligned = (launch.dynamic_bytes + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
    dynamic_shared = shared_arena + SHARED_CAPACITY - aligned;
    FaultHandler handler;
    run_grid();
    return !failed;
}

}  // namespace emulator

// ---- what g++ calls where -fsanitize finds undefined behaviour -----------------------------------------

namespace {

struct SourceLocation {
    const char* file;
    uint32_t line, column;
};

struct TypeDescriptor {
    uint16_t kind, information;
    char name[1];
};

struct TypeMismatch {
    SourceLocation location;
    TypeDescriptor* type;
    unsigned char log2_alignment, access;
};

struct OutOfBounds {
    SourceLocation location;
    TypeDescriptor *array, *index;
};

[[noreturn]] void undefined(const SourceLocation& location, const std::string& message) {
    emulator::fail({location.file, int(location.line)}, "%s", message.c_str());
}

}  // namespace

extern "C" {

void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* data, uintptr_t pointer) {
    char address[32];
    snprintf(address, sizeof address, "%#zx", size_t(pointer));
    if (!pointer) undefined(data->location, "access through a null pointer");
    undefined(data->location, std::string("misaligned access of ") + data->type->name + " at " + address +
                                  ", not a multiple of " + std::to_string(1 << data->log2_alignment));
}

void __ubsan_handle_out_of_bounds_abort(OutOfBounds* data, uintptr_t index) {
    undefined(data->location, "index " + std::to_string(intptr_t(index)) + " is out of bounds of " +
                                  data->array->name);
}

void __ubsan_handle_shift_out_of_bounds_abort(SourceLocation* location, uintptr_t, uintptr_t by) {
    undefined(*location, "shift by " + std::to_string(intptr_t(by)) + ", not 0 to the width less 1");
}

#define EMULATOR_OVERFLOW(operation, text)                                                          \
    void __ubsan_handle_##operation##_overflow_abort(SourceLocation* location, uintptr_t, uintptr_t) { \
        undefined(*location, text);                                                                 \
    }
EMULATOR_OVERFLOW(add, "a signed sum overflows")
EMULATOR_OVERFLOW(sub, "a signed difference overflows")
EMULATOR_OVERFLOW(mul, "a signed product overflows")
EMULATOR_OVERFLOW(negate, "a signed negation overflows")
EMULATOR_OVERFLOW(divrem, "division by zero")
}

// ---- what emulator.py calls -----------------------------------------------------------------------------

extern "C" {

const char* emulator_error() { return emulator::error.c_str(); }
const char* emulator_error_library() { return emulator::error_library.c_str(); }

void emulator_configure(int order, unsigned seed, int lazy_copies) {
    emulator::settings = {order, seed, lazy_copies != 0};
}

void emulator_statistics(unsigned long long* values, int reset) {
    memcpy(values, &emulator::statistics, sizeof emulator::statistics);
    if (reset) emulator::statistics = {};
}
}
