// What the machine itself allows. See kernel_ceiling.cpp.
#pragma once

#include <cstdint>

#include "isa.h"

namespace overleap {

// Whole MiB are read; out gets one number for each, so that no compiler leaves the reading out.
struct Reading {
    const uint8_t* from;
    int64_t bytes;
    uint32_t* out;  // [bytes / 2^20]
    int threads;
};

OVERLEAP_EVERY_ISA(void read_all(const Reading&);)

}  // namespace overleap
