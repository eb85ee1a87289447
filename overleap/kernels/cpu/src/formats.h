// Bytes of the released weights and cache as numbers: e4m3, e2m1, e8m0. Exact in float and bfloat16.
// The rules are those of kernels/torch/quant.py, which defines them.
#pragma once

#include "simd.h"

namespace overleap::OVERLEAP_ISA {

constexpr int kWeightBlock = 128;  // FP8 weights: 128 x 128 share a scale
constexpr int kFp4Group = 32;      // FP4 weights and indexer keys: 32 neighbours share a scale
constexpr int kKvGroup = 64;       // cache entries: 64 neighbours share a scale
constexpr int kInputGroup = 128;   // inputs of a packed linear share a scale

struct Tables {
    float e4m3[256], e2m1[16];
    constexpr Tables() : e4m3(), e2m1() {
        for (int code = 0; code < 128; code++) {
            int exponent = code >> 3, fraction = code & 7;
            float value = exponent ? 1.0f + fraction / 8.0f : fraction / 8.0f;
            for (int e = exponent ? exponent : 1; e < 7; e++) value /= 2;
            for (int e = 7; e < exponent; e++) value *= 2;
            if (code == 127) value = __builtin_nanf("");
            e4m3[code] = value, e4m3[code + 128] = -value;
        }
        const float half[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
        for (int code = 0; code < 8; code++) e2m1[code] = half[code], e2m1[code + 8] = -half[code];
    }
};
inline constexpr Tables kTables;

// 2^(code - 127); 255 is a NaN.
static inline float e8m0(uint8_t code) {
    uint32_t bits = code == 255 ? 0x7fc00000u : code ? static_cast<uint32_t>(code) << 23 : 0x400000u;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

typedef uint8_t vb __attribute__((vector_size(W)));

static inline vu widen(const uint8_t* p) {
    vb bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, vu);
}

static inline vf e8m0(vu code) {
    vu bits = code == 0u ? 0x400000u - vu{} : code << 23;
    return reinterpret_cast<vf>(code == 255u ? 0x7fc00000u - vu{} : bits);
}

}  // namespace overleap::OVERLEAP_ISA
