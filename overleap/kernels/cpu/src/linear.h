// Products with stored weights: matmul, grouped_matmul, experts. See ../linear.py for the ops.
#pragma once

#include <cstdint>

#include "isa.h"

namespace overleap {

enum class Float : int { f32, bf16 };           // of activations
enum class Form : int { f32, bf16, fp8, fp4 };  // of weights

// A stored weight [rows, columns]; packed bytes stay where they are, in the memory map if need be.
struct Stored {
    const void* data;
    const uint8_t* scale;
    Form form;
    int64_t rows, columns;
};

// x [tokens, groups, columns] times the weight's rows, group by group -> out [tokens, rows].
struct Product {
    const void* x;
    Float x_type;
    int64_t tokens, groups;
    Stored weight;
    bool round_input;
    void* out;
    Float out_type;
    int threads;
};

// Addresses of one expert's bytes; scales are 0 for plain weights.
struct ExpertBytes {
    uint64_t w1, w1_scale, w2, w2_scale, w3, w3_scale;
};

// Sum over chosen experts of w2(silu(min(w1 x, limit)) * clamp(w3 x, +-limit) * weight).
struct Mixture {
    const void* x;  // [tokens, width]
    Float type;
    int64_t tokens, width, inner, chosen, experts;
    const int64_t* ids;   // [tokens, chosen]
    const float* weight;  // [tokens, chosen]
    const ExpertBytes* table;
    Form form;
    float limit;
    bool round_input;
    void* out;  // [tokens, width]
    int threads;
};

OVERLEAP_EVERY_ISA(void product(const Product&); void mixture(const Mixture&);)

}  // namespace overleap
