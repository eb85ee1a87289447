// Loops over a row of f32 or bf16 values: whole vectors, then a last part with the same arithmetic.
#pragma once

#include "linear.h"
#include "simd.h"

namespace overleap::OVERLEAP_ISA {

// body(E{}) with the element type.
template <class Body>
static inline void typed(Float type, const Body& body) {
    if (type == Float::bf16) body(bf16{});
    else body(float{});
}

struct Whole {
    template <class E>
    vf read(const E* p) const { return load(p); }
    template <class E>
    void write(E* p, vf v) const { store(p, v); }
};

struct Part {
    int n;
    template <class E>
    vf read(const E* p) const { return load_part(p, n); }
    template <class E>
    void write(E* p, vf v) const { store_part(p, v, n); }
};

// body(i, lanes) for every vector of n values; `lanes` reads and writes one.
template <class Body>
static inline void vectors(int64_t n, const Body& body) {
    int64_t i = 0;
    for (; i + W <= n; i += W) body(i, Whole{});
    if (i < n) body(i, Part{static_cast<int>(n - i)});
}

// Every lane takes that of number (own ^ Step).
template <int Step>
static inline vf exchanged(vf v) {
    vi from;
    for (int i = 0; i < W; i++) from[i] = i ^ Step;
    return __builtin_shuffle(v, from);
}

}  // namespace overleap::OVERLEAP_ISA
