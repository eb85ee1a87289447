// Ops on single rows: norms, rotation, Hadamard, cache rows, pooling, routing, residual streams.
// See ../rows.py, ../streams.py and ../sequences.py for the ops. Read next: kernel_rows.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "linear.h"

namespace overleap {

constexpr int64_t kRowsWork = 16384;  // values that are worth a task of their own
constexpr int64_t kMostRotary = 512;  // rotary dims of a row
constexpr int64_t kMostHadamard = 4096;
constexpr int64_t kMostStreams = 8;
constexpr int64_t kMostPooled = 256;  // rows that are pooled into one entry

// Rows of width values; `heads` neighbours share a token, hence a position.
struct Rows {
    const void* x;
    Float type;
    int64_t count, heads, width;
    void* out;
    int threads;

    int64_t grain() const { return width < kRowsWork ? kRowsWork / (width ? width : 1) : 1; }
};

struct Norm {
    const void* weight;  // [width], or null
    Float weight_type;
    float eps;
};

struct Turn {
    const int64_t* position;  // [count / heads]
    const float* frequency;   // [rotary / 2]
    int64_t rotary;
    bool inverse;
};

// Packed cache rows: e4m3 with bf16 rotary dims (`key` false), or pairs of e2m1.
struct Packing {
    bool key;
    int64_t rotary, bytes;
};

// The new tokens of the sequences of a step, and where they are kept.
struct Sequences {
    std::vector<int64_t> start, count, slot;
};

struct Pooling {
    const float* fresh;  // [tokens, 2, width]
    const float* tail;   // [slots, capacity, 2, width]
    const float* ape;    // [ratio, width]
    int64_t width, capacity, ratio;
    bool overlapped;
    Sequences sequences;
    float* out;
    int threads;
};

struct Routing {
    float* logit;          // [tokens, experts]; left as affinities
    const float* bias;     // [experts], or null
    const int64_t* fixed;  // [tokens, k], or null
    int64_t tokens, experts, k;
    float scale;
    int64_t* ids;  // [tokens, k], unless fixed
    float* weight;
    int threads;
};

// fn has (2 + streams) * streams rows for hc_pre, streams for hc_head (post is null then).
struct Collapse {
    const void* x;  // [tokens, streams, width]
    Float type;
    int64_t tokens, streams, width;
    const float *fn, *base, *scale;
    int64_t iterations;
    float eps, norm_eps;
    void* y;
    float *post, *comb;
    int threads;
};

struct Spread {
    const void *y, *x;
    Float type;
    int64_t tokens, streams, width;
    const float *post, *comb;
    void* out;
    int threads;
};

OVERLEAP_EVERY_ISA(void rms_norm(const Rows&, const Norm&);)
OVERLEAP_EVERY_ISA(void norm_rope(const Rows&, const Norm&, const Turn&);)
OVERLEAP_EVERY_ISA(void rotate(const Rows&, const Turn&);)
OVERLEAP_EVERY_ISA(void hadamard(const Rows&);)
OVERLEAP_EVERY_ISA(void quantize(const Rows&, const Packing&);)
OVERLEAP_EVERY_ISA(void compress(const Pooling&);)
OVERLEAP_EVERY_ISA(void route(const Routing&);)
OVERLEAP_EVERY_ISA(void collapse(const Collapse&);)
OVERLEAP_EVERY_ISA(void spread(const Spread&);)

}  // namespace overleap
