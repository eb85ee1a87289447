// One source, compiled once per instruction set; which one runs is decided when the module loads.
// Not here: the vector type of an instruction set (simd.h). Read next: simd.h, module.cpp.
#pragma once

#include <cstdint>

// Declares the same functions for every instruction set: namespaces portable, avx2, avx512, amx.
#if defined(__x86_64__)
#define OVERLEAP_EVERY_ISA(...)  \
    namespace portable {         \
    __VA_ARGS__                  \
    }                            \
    namespace avx2 {             \
    __VA_ARGS__                  \
    }                            \
    namespace avx512 {           \
    __VA_ARGS__                  \
    }                            \
    namespace amx {              \
    __VA_ARGS__                  \
    }
#define OVERLEAP_CALL(function)                                          \
    (overleap::isa() == overleap::Isa::amx      ? overleap::amx::function    \
     : overleap::isa() == overleap::Isa::avx512 ? overleap::avx512::function \
     : overleap::isa() == overleap::Isa::avx2 ? overleap::avx2::function   \
                                              : overleap::portable::function)
#else
#define OVERLEAP_EVERY_ISA(...) \
    namespace portable {        \
    __VA_ARGS__                 \
    }
#define OVERLEAP_CALL(function) overleap::portable::function
#endif

namespace overleap {

// Each has what those before it have; amx is avx512 with a matrix unit.
enum class Isa { portable, avx2, avx512, amx };

// The instruction set in use: the best the machine has, or less if set_isa asked for it.
Isa isa();
// Raises std::invalid_argument for one that this machine does not have.
void set_isa(Isa wanted);
Isa best_isa();

}  // namespace overleap
