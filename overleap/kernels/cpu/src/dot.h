// Many dot products at once: a few rows of activations against 4 rows of weights.
// An output is W running sums over its columns, added up at the end in one order: the same for one
// row as for a thousand.
#pragma once

#include <vector>

#include "panel.h"

namespace overleap::OVERLEAP_ISA {

// A buffer of this thread, as it was left; it only ever grows to the largest panel.
template <class E>
static inline E* scratch(size_t count) {
    thread_local std::vector<E> buffer;
    if (buffer.size() < count) buffer.resize(count);
    return buffer.data();
}

constexpr int kRows = W == 16 ? 6 : 3;  // activation rows of a tile: what the registers hold
constexpr int kCols = 4;                // weight rows of a tile

static inline vf dot_step(vf sum, const float* x, vf w) { return fma(load(x), w, sum); }

#if defined(__AVX512BF16__)
static inline vf dot_step(vf sum, const bf16* x, __m512bh w) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)), w);
}
static inline __m512bh load_step(const bf16* w) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(w));
}
#endif
static inline vf load_step(const float* w) { return load(w); }

typedef float four __attribute__((vector_size(16)));

// The sums of the lanes of four vectors, halves onto halves as sum() does.
static inline four sum4(vf a, vf b, vf c, vf d) {
#if defined(__AVX512F__)
    auto halves = [](vf p, vf q) -> vf {
        vf low = _mm512_shuffle_f32x4(p, q, 0x44), high = _mm512_shuffle_f32x4(p, q, 0xee);
        return low + high;  // p0+8.. in lanes 0..7, q's in 8..15
    };
    vf ab = halves(a, b), cd = halves(c, d);
    vf low = _mm512_shuffle_f32x4(ab, cd, 0x88), high = _mm512_shuffle_f32x4(ab, cd, 0xdd);
    vf quarter = low + high;  // four lanes each of a, b, c, d
    vf pair = quarter + static_cast<vf>(_mm512_permute_ps(quarter, 0x4e));
    vf one = pair + static_cast<vf>(_mm512_permute_ps(pair, 0xb1));
    __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(first, one));
#else
    return four{sum(a), sum(b), sum(c), sum(d)};
#endif
}

static inline void narrow4(bf16* to, four v) {
    typedef uint32_t bits4 __attribute__((vector_size(16)));
    typedef uint16_t half4 __attribute__((vector_size(8)));
    bits4 bits = reinterpret_cast<bits4>(v);
    bits4 rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    bits4 out = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
    half4 half = __builtin_convertvector(out, half4);
    std::memcpy(to, &half, sizeof half);
}

// x[0 .. R - 1] against 4 rows of weights `stride` apart -> sums[r] of four outputs.
template <int R, class E>
static inline void dot_tile(
    const E* const* x, const E* w, int64_t stride, int64_t columns, four* sums) {
    vf acc[R][kCols] = {};
    for (int64_t k = 0; k < columns; k += kStep<E>) {
        auto w0 = load_step(w + k), w1 = load_step(w + stride + k);
        auto w2 = load_step(w + 2 * stride + k), w3 = load_step(w + 3 * stride + k);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            acc[r][0] = dot_step(acc[r][0], x[r] + k, w0);
            acc[r][1] = dot_step(acc[r][1], x[r] + k, w1);
            acc[r][2] = dot_step(acc[r][2], x[r] + k, w2);
            acc[r][3] = dot_step(acc[r][3], x[r] + k, w3);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) sums[r] = sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}

// As dot_tile for any number of rows up to kRows.
template <class E>
static inline void dot_rows(
    int rows, const E* const* x, const E* w, int64_t stride, int64_t columns, four* sums) {
    switch (rows) {
        case 1: return dot_tile<1>(x, w, stride, columns, sums);
        case 2: return dot_tile<2>(x, w, stride, columns, sums);
        case 3: return dot_tile<3>(x, w, stride, columns, sums);
        case 4: return dot_tile<4>(x, w, stride, columns, sums);
        case 5: return dot_tile<5>(x, w, stride, columns, sums);
        default: return dot_tile<6>(x, w, stride, columns, sums);
    }
}

}  // namespace overleap::OVERLEAP_ISA
