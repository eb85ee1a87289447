// The factor of RMSNorm, summed in an order that the width alone decides.
#pragma once

#include "typed.h"

namespace overleap::OVERLEAP_ISA {

template <class E>
static inline float inverse_rms(const E* x, int64_t n, float eps) {
    vf sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        for (int j = 0; j < 4; j++) {
            vf v = load(x + i + j * W);
            sums[j] = fma(v, v, sums[j]);
        }
    vectors(n - i, [&](int64_t j, auto lanes) {
        vf v = lanes.read(x + i + j);
        sums[0] = fma(v, v, sums[0]);
    });
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    return 1.0f / std::sqrt(total / static_cast<float>(n) + eps);
}

}  // namespace overleap::OVERLEAP_ISA
