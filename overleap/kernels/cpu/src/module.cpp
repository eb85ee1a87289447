// The extension module: instruction set, then the ops by family. Tensors come as addresses, shapes
// as numbers; the Python side of a family (../linear.py, ...) has checked both.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "isa.h"

namespace nb = nanobind;

namespace overleap {

#if defined(__x86_64__)
// Whether the machine has it and the system lets this process use it.
static bool matrix_unit() {
#if defined(__linux__)
    constexpr int kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("amx-int8") && !syscall(SYS_arch_prctl, kAskFor, kTileData);
#else
    return false;
#endif
}
#endif

Isa best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                __builtin_cpu_supports("avx512bf16");
    if (wide) return matrix_unit() ? Isa::amx : Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::portable;
}

thread_local Tape* recording = nullptr;

static Isa current = best_isa();

Isa isa() { return current; }

void set_isa(Isa wanted) {
    if (wanted > best_isa()) throw std::invalid_argument("this machine lacks that instruction set");
    current = wanted;
}

}  // namespace overleap

NB_MODULE(_native, m) {
    m.def("isa", [] {
        const char* names[] = {"portable", "avx2", "avx512", "amx"};
        return std::string(names[static_cast<int>(overleap::isa())]);
    });
    m.def("set_isa", [](const std::string& name) {
        if (name == "portable") overleap::set_isa(overleap::Isa::portable);
        else if (name == "avx2") overleap::set_isa(overleap::Isa::avx2);
        else if (name == "avx512") overleap::set_isa(overleap::Isa::avx512);
        else if (name == "amx") overleap::set_isa(overleap::Isa::amx);
        else throw std::invalid_argument("no such instruction set");
    });
    using Numbers = std::vector<int64_t>;
    nb::class_<overleap::Sequences>(m, "Sequences")
        .def("__init__",
             [](overleap::Sequences* made, Numbers start, Numbers count, Numbers slot) {
                 new (made) overleap::Sequences{std::move(start), std::move(count), std::move(slot)};
             })
        .def("move", [](overleap::Sequences& own, Numbers start, Numbers slot) {
            own.start = std::move(start), own.slot = std::move(slot);
        });
    nb::class_<overleap::Tape>(m, "Tape")
        .def(nb::init<>())
        .def("play", &overleap::Tape::play, overleap::Unlocked());
    // Which tape keeps the calls of this thread from now on; None for none.
    m.def("record", [](overleap::Tape* tape) { overleap::recording = tape; },
          nb::arg("tape").none());
    overleap::bind_linear(m);
    overleap::bind_attention(m);
    overleap::bind_rows(m);
    overleap::bind_sampling(m);
    overleap::bind_ceiling(m);
}
