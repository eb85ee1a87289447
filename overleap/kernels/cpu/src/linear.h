// Products with stored weights: matmul, project, grouped_matmul, experts. See ../linear.py for the ops.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace overleap {

enum class Float : int { f32, bf16 };           // of activations
enum class Form : int { f32, bf16, fp8, fp4 };  // of weights

// Bytes that so many numbers take, scales apart; an even number of FP4.
inline int64_t bytes_of(Form form, int64_t numbers) {
    switch (form) {
        case Form::f32: return 4 * numbers;
        case Form::bf16: return 2 * numbers;
        case Form::fp8: return numbers;
        default: return numbers / 2;
    }
}

// A stored weight [rows, columns]; packed bytes stay where they are, in the memory map if need be.
struct Stored {
    const void* data;
    const uint8_t* scale;
    Form form;
    int64_t rows, columns;
};

// A weight that the input meets, and where the result goes: rows `out_stride` elements apart.
struct Linear {
    Stored weight;
    bool round_input;  // the input is rounded to FP8 first
    void* out;
    Float out_type;
    int64_t out_stride;
};

// x [tokens, groups, columns], perhaps RMS-normalised, times the rows of several weights. With
// groups, group g meets the g-th part of a weight's rows.
struct Product {
    const void* x;
    Float x_type;
    int64_t tokens, groups, columns;
    const void* norm;  // [columns], or null
    Float norm_type;
    float eps;
    std::vector<Linear> linears;
    int threads;
};

// Addresses of one expert's bytes; scales are 0 for plain weights.
struct ExpertBytes {
    uint64_t w1, w1_scale, w2, w2_scale, w3, w3_scale;
};

// Experts of one form.
struct Expertise {
    const ExpertBytes* table;
    int64_t count, inner;
    Form form;
    bool round_input;
};

// Sum over chosen experts of w2(silu(min(w1 x, limit)) * clamp(w3 x, +-limit) * weight), and with
// weight 1 of the shared ones, which every token chooses.
struct Mixture {
    const void* x;  // [tokens, width]
    Float type;
    int64_t tokens, width, chosen;
    const int64_t* ids;   // [tokens, chosen]
    const float* weight;  // [tokens, chosen]
    Expertise routed, shared;
    float limit;
    void* out;  // [tokens, width]
    int threads;
};

OVERLEAP_EVERY_ISA(void product(const Product&); void mixture(const Mixture&);)

}  // namespace overleap
