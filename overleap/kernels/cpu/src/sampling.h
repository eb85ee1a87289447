// From rows of logits to tokens. See ../sampling.py. Read next: kernel_sample.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace overleap {

// How the rows become tokens, one value a row; top_k is the vocabulary where nothing is cut.
struct Choices {
    std::vector<double> temperature, top_p, min_p, number;
    std::vector<int64_t> top_k;
};

struct Sampling {
    const float* logits;  // [rows, vocabulary]
    int64_t rows, vocabulary;
    Choices choices;
    const uint8_t* allowed;  // [rows, ceil(vocabulary / 8)], or null
    int64_t best;            // likeliest tokens wanted; -1: not even log-probabilities
    int64_t* ids;            // [rows, 1 + best], [rows, 1] for -1
    double* logprob;         // [rows, 1 + best]
    int threads;
};

OVERLEAP_EVERY_ISA(void sample(const Sampling&);)

}  // namespace overleap
