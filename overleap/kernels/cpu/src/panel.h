// Rows of a stored weight as numbers ready for dot products, and activations rounded to match.
// Element: bf16 where the machine multiplies pairs of them, else float. Both hold e4m3 and e2m1
// times a power of two exactly, so which one is used only decides how a sum is rounded.
#pragma once

#include "formats.h"
#include "linear.h"

namespace overleap::OVERLEAP_ISA {

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;  // a dot product instruction over bf16 pairs
#else
constexpr bool kPairs = false;
#endif

static inline void put(float& to, float x) { to = x; }
static inline void put(bf16& to, float x) { to = narrow(x); }

// -- activations

// Values of one group of at most 128, rounded to e4m3 with a common power-of-two scale, as the
// released linears round their inputs: 2^ceil(log2(amax / 448)), amax at least 1e-4, ties to even.
static inline void round_group(float* x, int count) {
    vu most{};
    for (int i = 0; i < count; i += W) {
        vu bits = reinterpret_cast<vu>(load(x + i)) & 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    uint32_t top = 0;
    for (int i = 0; i < W; i++) top = most[i] > top ? most[i] : top;
    bool bad = (top >> 23) == 255;
    int exponent = static_cast<int>(top >> 23) - 127 - 8 + ((top & 0x7fffffu) > 0x600000u);
    exponent = exponent < -22 ? -22 : exponent;
    uint32_t up = static_cast<uint32_t>(127 + exponent) << 23;
    uint32_t down = static_cast<uint32_t>(127 - exponent) << 23;
    float scale, inverse;
    std::memcpy(&scale, &up, 4);
    std::memcpy(&inverse, &down, 4);
    for (int i = 0; i < count; i += W) {
        vf v = load(x + i);
        vu sign = reinterpret_cast<vu>(v) & 0x80000000u;
        vf size = abs(v) * inverse;
        // At this power of two float itself is spaced as e4m3 is at the value: adding it rounds.
        vi binade = reinterpret_cast<vi>(size) & ~0x7fffff;
        const int32_t lowest = (127 - 6) << 23;
        binade = binade > lowest ? binade : lowest - vi{};
        vf magic = reinterpret_cast<vf>(binade + (20 << 23));
        vf rounded = ((size + magic) - magic) * scale;
        v = reinterpret_cast<vf>(reinterpret_cast<vu>(rounded) | sign);
        store(x + i, bad ? all(NAN) : v);
    }
}

// -- weights

// The scale of code 0 is below the normal range, where some products here take it for 0.
static inline float scaled(float value, uint8_t code) {
    return code ? value * e8m0(code) : value * e8m0(1) * 0.5f;
}

// The plain way, for any scale and any end of a row.
template <class E>
static inline void decode_fp8(const uint8_t* code, int64_t n, uint8_t scale, E* out) {
    for (int64_t i = 0; i < n; i++) put(out[i], scaled(kTables.e4m3[code[i]], scale));
}

template <class E>
static inline void decode_fp4(const uint8_t* code, int64_t n, uint8_t scale, E* out) {
    for (int64_t i = 0; i < n; i++)
        put(out[i], scaled(kTables.e2m1[code[i / 2] >> (i % 2 * 4) & 15], scale));
}

#if defined(__AVX512BF16__)

alignas(64) constexpr bf16 kFp8Subnormals[32] = {  // multiples of 2^-9
    0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
// e2m1 times 2^125: 0 .5 1 1.5 2 3 4 6 and their negatives, twice. Both zeros are 0, which stays 0 when
// an exponent is subtracted with saturation.
alignas(64) constexpr bf16 kFp4Values[32] = {
    0x0000, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0, 0x7f00, 0x7f40,
    0x0000, 0xfd80, 0xfe00, 0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40,
    0x0000, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0, 0x7f00, 0x7f40,
    0x0000, 0xfd80, 0xfe00, 0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40,
};
constexpr int kFp4Raised = 125;

// The bf16 of 32 codes, one in the low byte of each word; `shift` is added to the exponents.
static inline __m512i fp8_numbers(__m512i word, __m512i shift) {
    __m512i size = _mm512_and_si512(word, _mm512_set1_epi16(0x7f));
    __m512i sign = _mm512_slli_epi16(_mm512_and_si512(word, _mm512_set1_epi16(0x80)), 8);
    __m512i value = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16(120 << 7));
    __mmask32 low = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8));
    value = _mm512_mask_permutexvar_epi16(value, low, size, _mm512_load_si512(kFp8Subnormals));
    value = _mm512_mask_add_epi16(value, _mm512_test_epi16_mask(size, size), value, shift);
    __mmask32 nan = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7f));
    value = _mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7fc0));
    return _mm512_or_si512(value, sign);
}

// The bytes of the bf16 of a code without its sign, high ones and low ones.
struct Fp8Bytes {
    alignas(64) uint8_t high[128], low[128];
    constexpr Fp8Bytes() : high(), low() {
        for (int code = 0; code < 128; code++) {
            int value = code < 8 ? kFp8Subnormals[code] : code == 127 ? 0x7fc0 : (120 << 7) + (code << 4);
            high[code] = static_cast<uint8_t>(value >> 8), low[code] = static_cast<uint8_t>(value);
        }
    }
};
inline constexpr Fp8Bytes kFp8Bytes;

// The high and low bytes of the bf16 of 64 codes, unscaled.
static inline void fp8_bytes(__m512i code, __m512i& high, __m512i& low) {
    const __m512i* h = reinterpret_cast<const __m512i*>(kFp8Bytes.high);
    const __m512i* l = reinterpret_cast<const __m512i*>(kFp8Bytes.low);
    high = _mm512_permutex2var_epi8(_mm512_load_si512(h), code, _mm512_load_si512(h + 1));
    low = _mm512_permutex2var_epi8(_mm512_load_si512(l), code, _mm512_load_si512(l + 1));
    // high | (code & 0x80)
    high = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
}

// 32 codes at a time; the scale is added to the exponents, so it must keep them in range.
static inline int64_t decode_fp8_fast(const uint8_t* code, int64_t n, uint8_t scale, bf16* out) {
    int shift = scale - 127;
    if (shift < -117 || shift > 119) return 0;
    const __m512i add = _mm512_set1_epi16(static_cast<short>(shift * 128));
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code + i));
        _mm512_storeu_si512(out + i, fp8_numbers(_mm512_cvtepu8_epi16(bytes), add));
    }
    return i;
}

// One group of 32.
static inline bool decode_fp4_fast(const uint8_t* code, uint8_t scale, bf16* out) {
    int shift = scale - 127;
    if (shift < -125 || shift > 125) return false;
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code));
    // A byte's halves into the two words of its lane.
    __m512i pair = _mm512_cvtepu8_epi32(bytes);
    pair = _mm512_or_si512(pair, _mm512_slli_epi32(pair, 12));
    pair = _mm512_and_si512(pair, _mm512_set1_epi32(0x000f000f));
    __m512i value = _mm512_permutexvar_epi16(pair, _mm512_load_si512(kFp4Values));
    __m512i lower = _mm512_set1_epi16(static_cast<short>((kFp4Raised - shift) * 128));
    _mm512_storeu_si512(out, _mm512_subs_epu16(value, lower));
    return true;
}

#endif

static inline int64_t decode_fp8_fast(const uint8_t* code, int64_t n, uint8_t scale, float* out) {
    const float factor = e8m0(scale) * 0x1p100f;  // of 2^120; the rest below, so that it is finite
    if (scale > 127 + 27 || scale < 127 - 100) return 0;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        vu c = widen(code + i);
        vu size = c & 0x7fu, sign = (c & 0x80u) << 24;
        vf value = reinterpret_cast<vf>(size << 20) * 0x1p20f * factor;
        value = size == 0x7fu ? all(NAN) : value;
        store(out + i, reinterpret_cast<vf>(reinterpret_cast<vu>(value) | sign));
    }
    return i;
}

// One group of 32: a code's three bits are the top of a float that is 2^126 too small.
static inline bool decode_fp4_fast(const uint8_t* code, uint8_t scale, float* out) {
    if (scale > 127 + 120 || scale < 127 - 120) return false;
    const float factor = e8m0(scale);
    uint8_t halves[kFp4Group];
    for (int i = 0; i < kFp4Group / 2; i++)
        halves[2 * i] = code[i] & 15, halves[2 * i + 1] = code[i] >> 4;
    for (int i = 0; i < kFp4Group; i += W) {
        vu c = widen(halves + i);
        vf value = reinterpret_cast<vf>((c & 7u) << 22) * 0x1p126f * factor;
        store(out + i, reinterpret_cast<vf>(reinterpret_cast<vu>(value) | (c & 8u) << 28));
    }
    return true;
}

// Columns first .. first + 31 of a row, as far as it has them. A group of FP4 begins at `first`.
template <class E>
static inline void decode_columns(const Stored& w, int64_t row, int64_t first, E* out) {
    const int64_t k = w.columns, at = row * k + first;
    const int64_t n = k - first < kFp4Group ? k - first : kFp4Group;
    if (w.form == Form::f32) {
        for (int64_t i = 0; i < n; i++) put(out[i], static_cast<const float*>(w.data)[at + i]);
    } else if (w.form == Form::bf16) {
        for (int64_t i = 0; i < n; i++) put(out[i], wide(static_cast<const bf16*>(w.data)[at + i]));
    } else if (w.form == Form::fp8) {
        int64_t blocks = (k + kWeightBlock - 1) / kWeightBlock;
        const uint8_t* code = static_cast<const uint8_t*>(w.data) + at;
        uint8_t scale = w.scale[row / kWeightBlock * blocks + first / kWeightBlock];
        int64_t done = decode_fp8_fast(code, n, scale, out);
        decode_fp8(code + done, n - done, scale, out + done);
    } else {
        const uint8_t* code = static_cast<const uint8_t*>(w.data) + at / 2;
        uint8_t scale = w.scale[at / kFp4Group];
        if (!decode_fp4_fast(code, scale, out)) decode_fp4(code, kFp4Group, scale, out);
    }
}

}  // namespace overleap::OVERLEAP_ISA
