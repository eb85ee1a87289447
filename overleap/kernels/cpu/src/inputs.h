// Activations made ready for products: normalised, rounded as released linears round their inputs, as
// elements with zeros up to a whole group of columns. Read next: meet.h.
#pragma once

#include "meet.h"
#include "rms.h"
#include "threads.h"

namespace overleap::OVERLEAP_ISA {

// Where activations come from.
struct Given {
    const void* x;  // [rows, columns]
    Float type;
    int64_t rows, columns;
    const void* norm;  // [columns], or null
    Float norm_type;
    float eps;
};

// One row: `plain` and `rounded` are where elements go, null for not wanted.
template <class E, class X>
static inline void prepare_given(const Given& g, const X* x, E* plain, E* rounded) {
    const int64_t n = g.columns;
    float* row = room<float, 1>(n + kInputGroup + W);
    vectors(n, [&](int64_t i, auto lanes) { lanes.write(row + i, lanes.read(x + i)); });
    if (g.norm) {
        const float factor = inverse_rms(x, n, g.eps);
        typed(g.norm_type, [&](auto e) {
            auto* weight = static_cast<const decltype(e)*>(g.norm);
            vectors(n, [&](int64_t i, auto lanes) {
                // As the norm on its own stores it, in the type of its input.
                X few[W];
                lanes.write(few, lanes.read(row + i) * factor * lanes.read(weight + i));
                lanes.write(row + i, lanes.read(few));
            });
        });
    }
    const int64_t whole = whole_columns(n);
    std::memset(row + n, 0, static_cast<size_t>(whole - n) * 4);
    if (plain)
        for (int64_t i = 0; i < whole; i += W) store(plain + i, load(row + i));
    if (!rounded) return;
    for (int64_t i = 0; i < n; i += kInputGroup)
        round_group(row + i, static_cast<int>(whole - i < kInputGroup ? whole - i : kInputGroup));
    for (int64_t i = 0; i < whole; i += W) store(rounded + i, load(row + i));
}

// Activations as elements, rows whole_columns(columns) apart.
template <class E>
class Inputs {
  public:
    Inputs(const Given& g, bool plain, bool rounded, int threads) : stride_(whole_columns(g.columns)) {
        const bool same = g.type == (sizeof(E) == 2 ? Float::bf16 : Float::f32);
        const bool given = same && stride_ == g.columns && !g.norm;
        if (plain && given) plain_ = static_cast<const E*>(g.x);
        const bool copied = plain && !given;
        if (!copied && !rounded) return;
        own_.resize((copied + rounded) * g.rows * stride_);
        E* to_plain = copied ? own_.data() : nullptr;
        E* to_rounded = rounded ? own_.data() + copied * g.rows * stride_ : nullptr;
        if (copied) plain_ = to_plain;
        rounded_ = to_rounded;
        typed(g.type, [&](auto e) {
            auto* x = static_cast<const decltype(e)*>(g.x);
            parallel_ranges(threads, g.rows, 1 + 8192 / (stride_ + 1), [&](int64_t a, int64_t b) {
                for (int64_t i = a; i < b; i++)
                    prepare_given(g, x + i * g.columns, to_plain ? to_plain + i * stride_ : nullptr,
                                  to_rounded ? to_rounded + i * stride_ : nullptr);
            });
        });
    }

    const E* row(int64_t i, bool rounded) const { return (rounded ? rounded_ : plain_) + i * stride_; }
    int64_t stride() const { return stride_; }

  private:
    int64_t stride_;
    const E *plain_ = nullptr, *rounded_ = nullptr;
    RawBuffer<E> own_;
};

// Whether a product loses nothing when both sides are bf16.
static inline bool narrow_enough(Float x_type, bool round_input, Form form) {
    return kPairs && form != Form::f32 &&
           (x_type == Float::bf16 || (round_input && form >= Form::fp8));
}

}  // namespace overleap::OVERLEAP_ISA
