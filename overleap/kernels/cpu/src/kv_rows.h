// Cache rows as numbers: e4m3 with bf16 rotary dims, or float, into elements of a product.
// Element: bf16 where the machine multiplies pairs of them fast and the row is exact in bf16 (a packed
// row is: e4m3 times a power of two), else float. Read next: attend_tile.h.
#pragma once

#include <algorithm>

#include "attention.h"
#include "formats.h"

namespace overleap::OVERLEAP_ISA {

// Machines with a matrix unit multiply pairs of bf16 elsewhere at a third of their speed with floats.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
typedef bf16 Exact;  // a dot product instruction over bf16 pairs
#else
typedef float Exact;
#endif

static inline float number(float x) { return x; }
static inline float number(bf16 x) { return wide(x); }
static inline void keep(float& to, float x) { to = x; }
static inline void keep(bf16& to, float x) { to = narrow(x); }

template <class E>
static inline void copy_vector(const E* from, E* to) {
    std::memcpy(to, from, W * sizeof(E));
}
static inline void copy_vector(const bf16* from, float* to) { store(to, load(from)); }

// Any codes and any scale.
template <class E>
static inline void decode_slowly(const uint8_t* code, int64_t n, uint8_t scale, E* out) {
    for (int64_t i = 0; i < n; i++) keep(out[i], kTables.e4m3[code[i]] * e8m0(scale));
}

#if defined(__AVX512BF16__)

// The two bytes of every code's size in bf16.
struct SplitCodes {
    alignas(64) uint8_t low[128];
    alignas(64) uint8_t high[128];
    constexpr SplitCodes() : low(), high() {
        const uint16_t subnormal[8] = {0,      0x3b00, 0x3b80, 0x3bc0,
                                       0x3c00, 0x3c20, 0x3c40, 0x3c60};  // multiples of 2^-9
        for (int code = 0; code < 128; code++) {
            int bits = code < 8 ? subnormal[code] : (code << 4) + (120 << 7);
            low[code] = static_cast<uint8_t>(bits), high[code] = static_cast<uint8_t>(bits >> 8);
        }
    }
};
inline constexpr SplitCodes kSplit;

// A whole group: two tables of bytes, then the scale added to the exponents. False if a code is a
// NaN, or if a scale leaves the range of exponents.
static inline bool decode_group(const uint8_t* code, uint8_t scale, bf16* out) {
    int shift = scale - 127;
    if (shift < -117 || shift > 119) return false;
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // so that unpacking is in order
    __m512i bytes = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(code));
    __m512i size = _mm512_and_si512(bytes, _mm512_set1_epi8(0x7f));
    if (_mm512_cmpeq_epi8_mask(size, _mm512_set1_epi8(0x7f))) return false;
    __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kSplit.low), bytes,
                                           _mm512_load_si512(kSplit.low + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(kSplit.high), bytes,
                                            _mm512_load_si512(kSplit.high + 64));
    __m512i sign = _mm512_andnot_si512(_mm512_set1_epi8(0x7f), bytes);
    high = _mm512_or_si512(high, sign);
    const __m512i add = _mm512_set1_epi16(static_cast<short>(shift * 128));
    __m512i zero = _mm512_setzero_si512();
    for (int half = 0; half < 2; half++) {
        __m512i word = half ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high);
        __mmask32 some = half ? _mm512_test_epi16_mask(_mm512_unpackhi_epi8(size, zero),
                                                       _mm512_set1_epi16(0x7f))
                              : _mm512_test_epi16_mask(_mm512_unpacklo_epi8(size, zero),
                                                       _mm512_set1_epi16(0x7f));
        _mm512_storeu_si512(out + 32 * half, _mm512_mask_add_epi16(word, some, word, add));
    }
    return true;
}

// By way of bf16, twice as many lanes: faster than straight to float.
static inline bool decode_group(const uint8_t* code, uint8_t scale, float* out) {
    bf16 exact[kKvGroup];
    if (!decode_group(code, scale, exact)) return false;
    for (int i = 0; i < kKvGroup; i += W) store(out + i, load(exact + i));
    return true;
}

#else

static inline bool decode_group(const uint8_t* code, uint8_t scale, float* out) {
    if (scale > 127 + 27 || scale < 127 - 100) return false;
    const float factor = e8m0(scale) * 0x1p100f;  // of 2^120; the rest below, so that it is finite
    for (int i = 0; i < kKvGroup; i += W) {
        vu c = widen(code + i);
        vu size = c & 0x7fu, sign = (c & 0x80u) << 24;
        vf value = reinterpret_cast<vf>(size << 20) * 0x1p20f * factor;
        value = size == 0x7fu ? all(NAN) : value;
        store(out + i, reinterpret_cast<vf>(reinterpret_cast<vu>(value) | sign));
    }
    return true;
}

#endif

static inline void copy_rope(const uint8_t* stored, int64_t n, bf16* out) {
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) std::memcpy(out + i, stored + 2 * i, 4 * W);
    std::memcpy(out + i, stored + 2 * i, 2 * static_cast<size_t>(n - i));
}

static inline void copy_rope(const uint8_t* stored, int64_t n, float* out) {
    bf16 few[W] = {};  // what is stored is not aligned
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        std::memcpy(few, stored + 2 * i, sizeof few);
        store(out + i, load(few));
    }
    std::memcpy(few, stored + 2 * i, 2 * static_cast<size_t>(n - i));
    store_part(out + i, load(few), static_cast<int>(n - i));
}

template <class E>
static inline void decode_kv(const uint8_t* row, const RowLayout& layout, E* out) {
    int64_t plain = layout.width - layout.rope;
    const uint8_t* scale = row + plain + 2 * layout.rope;
    for (int64_t i = 0; i < plain; i += kKvGroup, scale++) {
        int64_t n = std::min<int64_t>(kKvGroup, plain - i);
        if (n < kKvGroup || !decode_group(row + i, *scale, out + i))
            decode_slowly(row + i, n, *scale, out + i);
    }
    copy_rope(row + plain, layout.rope, out + plain);
}

// The values of a stored row, zeros behind them up to `padded`.
template <class E>
static inline void decode_row(const uint8_t* row, const RowLayout& layout, int64_t padded, E* out) {
    if (layout.kind == RowKind::kv) decode_kv(row, layout, out);
    else
        for (int64_t i = 0; i < layout.width; i++) {
            float value;
            std::memcpy(&value, row + 4 * i, 4);
            keep(out[i], value);
        }
    for (int64_t i = layout.width; i < padded; i++) out[i] = E{};
}

}  // namespace overleap::OVERLEAP_ISA
