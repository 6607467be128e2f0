// Calls a kernel of any signature with arguments by address, and describes the signature. The source that
// emulator.py generates for one kernel includes the kernel's source, then this, then says
// EMULATOR_EXPORT(its name).
#pragma once
#include "runtime.h"

#include <type_traits>
#include <utility>

// The linker's names of where this library's zero-initialized variables begin and end. Only the
// kernel's __shared__ variables are among them: the emulator's own state is in another library.
extern unsigned char __bss_start[] __attribute__((visibility("hidden")));
extern unsigned char _end[] __attribute__((visibility("hidden")));

namespace emulator {

template <typename T>
constexpr char kind_of() {
    return std::is_pointer_v<T>          ? 'p'
           : std::is_floating_point_v<T> ? 'f'
           : std::is_integral_v<T>       ? 'i'
           : std::is_class_v<T>          ? 's'
                                         : 'v';
}

template <typename T>
constexpr Parameter describe() {
    typedef std::remove_pointer_t<T> Target;
    Parameter parameter{kind_of<T>(), int(sizeof(T)), 'v', 0, std::is_const_v<Target>};
    if constexpr (std::is_pointer_v<T> && !std::is_void_v<Target>) {
        parameter.target_kind = kind_of<std::remove_const_t<Target>>();
        parameter.target_bytes = int(sizeof(Target));
    }
    return parameter;
}

template <typename... Parameters>
class Kernel {
public:
    constexpr explicit Kernel(void (*function)(Parameters...)) : function(function) {}

    static const Parameter* parameters() {
        static const Parameter described[] = {describe<Parameters>()..., Parameter{}};
        return described;
    }

    bool run(dim3 grid, dim3 block, size_t dynamic_bytes, void* const* arguments) const {
        struct Call {
            const Kernel& kernel;
            void* const* arguments;
        } call{*this, arguments};
        auto body = [](void* context) {
            const Call& call = *static_cast<Call*>(context);
            call.kernel.call(call.arguments, std::index_sequence_for<Parameters...>());
        };
        return emulator::run({grid, block, dynamic_bytes, __bss_start, _end, EMULATOR_WATCHED, body, &call});
    }

private:
    template <size_t... Index>
    void call(void* const* arguments, std::index_sequence<Index...>) const {
        function(*static_cast<std::remove_reference_t<Parameters>*>(arguments[Index])...);
    }

    void (*function)(Parameters...);
};

}  // namespace emulator

#define EMULATOR_PUBLIC extern "C" __attribute__((visibility("default")))

#define EMULATOR_EXPORT(...)                                                                            \
    EMULATOR_PUBLIC int emulator_parameter_count() {                                                   \
        int count = 0;                                                                                 \
        while (decltype(emulator::Kernel(&__VA_ARGS__))::parameters()[count].kind) ++count;            \
        return count;                                                                                  \
    }                                                                                                  \
    EMULATOR_PUBLIC const emulator::Parameter* emulator_parameters() {                                 \
        return decltype(emulator::Kernel(&__VA_ARGS__))::parameters();                                 \
    }                                                                                                  \
    EMULATOR_PUBLIC size_t emulator_static_bytes() { return size_t(_end - __bss_start); }              \
    EMULATOR_PUBLIC int emulator_run(const unsigned* grid, const unsigned* block, size_t dynamic_bytes, \
                                     void* const* arguments) {                                         \
        return emulator::Kernel(&__VA_ARGS__)                                                          \
            .run({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, dynamic_bytes, arguments); \
    }
