// The vector of one instruction set, and the few operations on it that the kernels need.
// Compiled once per instruction set (see isa.h); OVERLEAP_ISA is the namespace. Every function
// here is inline and local to its instruction set, so no two sets ever share machine code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace overleap::OVERLEAP_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t bf16;  // the upper half of a float

static inline vf all(float x) { return x - vf{}; }

static inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// The first n lanes, zeros behind them.
static inline vf load_part(const float* p, int n) {
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
    vf v{};
    std::memcpy(&v, p, 4 * static_cast<size_t>(n));
    return v;
#endif
}

static inline void store_part(float* p, vf v, int n) {
    std::memcpy(p, &v, 4 * static_cast<size_t>(n));
}

// a * b + c in one rounding where the machine has it; the same on every path of one build.
static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

static inline vf max(vf a, vf b) { return a > b ? a : b; }
static inline vf min(vf a, vf b) { return a < b ? a : b; }

static inline vf abs(vf a) {
    return reinterpret_cast<vf>(reinterpret_cast<vu>(a) & 0x7fffffffu);
}

// The lane half a vector on joins every lane, then the one half of that on, ... down to the next.
template <int Half = W / 2, class Join>
static inline float onto_halves(vf v, const Join& join) {
    vi from;
    for (int i = 0; i < W; i++) from[i] = (i + Half) % W;
    v = join(v, __builtin_shuffle(v, from));
    if constexpr (Half > 1) return onto_halves<Half / 2>(v, join);
    return v[0];
}

// Sum of the lanes, always in the same order: halves onto halves.
static inline float sum(vf v) {
    return onto_halves(v, [](vf a, vf b) { return a + b; });
}

static inline float largest(vf v) {
    return onto_halves(v, [](vf a, vf b) { return max(a, b); });
}

// -- bfloat16

static inline float wide(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// Nearest, ties to even; a NaN stays one.
static inline bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40);
    return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline vf load(const bf16* p) {
#if defined(__AVX512F__)
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(__AVX2__)
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
    vu v;
    for (int i = 0; i < W; i++) v[i] = static_cast<uint32_t>(p[i]) << 16;
    return reinterpret_cast<vf>(v);
#endif
}

static inline vf load_part(const bf16* p, int n) {
    bf16 copy[W] = {};
    std::memcpy(copy, p, 2 * static_cast<size_t>(n));
    return load(copy);
}

static inline void store(bf16* p, vf v) {
    vu bits = reinterpret_cast<vu>(v);
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    vu quiet = (bits >> 16) | 0x40;
    vu out = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(out)));
#else
    for (int i = 0; i < W; i++) p[i] = static_cast<bf16>(out[i]);
#endif
}

static inline void store_part(bf16* p, vf v, int n) {
    bf16 copy[W];
    store(copy, v);
    std::memcpy(p, copy, 2 * static_cast<size_t>(n));
}

// -- functions

// e^x within 2 units in the last place; 0 far below, infinity far above, NaN of a NaN.
static inline vf exp(vf x) {
    vf clamped = min(max(x, all(-104.0f)), all(89.0f));
    vf turns = clamped * 1.44269504088896341f;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    vf whole = (turns + magic) - magic;
    vf rest = fma(whole, all(-0.693145751953125f), clamped);
    rest = fma(whole, all(-1.42860682030941723212e-6f), rest);
    vf p = all(1.9875691500e-4f);
    p = fma(p, rest, all(1.3981999507e-3f));
    p = fma(p, rest, all(8.3334519073e-3f));
    p = fma(p, rest, all(4.1665795894e-2f));
    p = fma(p, rest, all(1.6666665459e-1f));
    p = fma(p, rest, all(5.0000001201e-1f));
    p = fma(p, rest * rest, rest + 1.0f);
    // 2^whole in two factors, since whole may leave the range of a normal exponent.
    vi n = __builtin_convertvector(whole, vi);
    vi half = n >> 1;
    vf a = reinterpret_cast<vf>((half + 127) << 23);
    vf b = reinterpret_cast<vf>((n - half + 127) << 23);
    vf result = p * a * b;
    result = x > 88.7228390520f ? all(INFINITY) : result;
    result = x < -103.9720763f ? vf{} : result;
    return x == x ? result : x;
}

static inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace overleap::OVERLEAP_ISA
