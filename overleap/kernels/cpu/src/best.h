// The k best scores of a stream of entries, in memory that does not grow with the stream.
// A total order (score, then the smaller entry), so the result does not depend on how the stream
// was cut: parts chosen apart and put together give what one pass gives.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace overleap::OVERLEAP_ISA {

// Bits of the lanes where a >= least.
static inline uint32_t lanes_at_least(vi a, int32_t least) {
#if defined(__AVX512F__)
    return _mm512_cmpge_epi32_mask(reinterpret_cast<__m512i>(a), _mm512_set1_epi32(least));
#elif defined(__AVX2__)
    __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(least), reinterpret_cast<__m256i>(a));
    return 0xffu & ~static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(below)));
#else
    uint32_t bits = 0;
    for (int i = 0; i < W; i++) bits |= static_cast<uint32_t>(a[i] >= least) << i;
    return bits;
#endif
}

// Integers in the order of the floats; -0.0 is 0.0.
static inline vi sortable(vf score) {
    vi bits = reinterpret_cast<vi>(score + 0.0f);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

class Best {
  public:
    // Larger is better: the score above, the inverted entry number below.
    static uint64_t rank(int32_t order, int64_t entry) {
        uint64_t high = static_cast<uint32_t>(order) ^ 0x80000000u;
        return high << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(entry));
    }

    void start(int64_t k, int64_t entries) {
        k_ = k;
        size_ = 0;
        least_ = INT32_MIN;
        // Room for twice as many again as are kept, so that shrinking is rare.
        kept_.resize(static_cast<size_t>(std::min(3 * k, entries) + 64));
    }

    // Scores of entries first .. first + count - 1, later ones than before; readable up to a whole
    // vector.
    void offer(const float* score, int64_t first, int count) {
        for (int i = 0; i < count; i += W) {
            vi order = sortable(load(score + i));
            uint32_t found = lanes_at_least(order, least_);
            if (count - i < W) found &= (1u << (count - i)) - 1;
            if (!found) continue;
            int32_t lane[W];
            std::memcpy(lane, &order, sizeof lane);
            for (; found; found &= found - 1) {
                int at = __builtin_ctz(found);
                add(rank(lane[at], first + i + at));
            }
        }
    }

    // What another kept, of other entries.
    void join(const uint64_t* kept, int64_t count) {
        for (int64_t i = 0; i < count; i++) add(kept[i]);
    }

    // At most k ranks, in no order.
    const std::vector<uint64_t>& shrunk(int64_t& count) {
        shrink();
        count = size_;
        return kept_;
    }

    // Entry numbers, best first, -1 behind.
    void write(int64_t* out) {
        shrink();
        std::sort(kept_.begin(), kept_.begin() + size_, std::greater<uint64_t>());
        for (int64_t i = 0; i < size_; i++) out[i] = static_cast<uint32_t>(~kept_[i]);
        std::fill(out + size_, out + k_, -1);
    }

  private:
    void add(uint64_t rank) {
        if (size_ == static_cast<int64_t>(kept_.size())) shrink();
        kept_[size_++] = rank;
    }

    void shrink() {
        if (size_ <= k_) return;
        auto last = kept_.begin() + k_ - 1;
        std::nth_element(kept_.begin(), last, kept_.begin() + size_, std::greater<uint64_t>());
        size_ = k_;
        // A later entry must score more than the last one kept.
        int32_t order = static_cast<int32_t>(static_cast<uint32_t>(*last >> 32) ^ 0x80000000u);
        least_ = order < INT32_MAX ? order + 1 : order;
    }

    int64_t k_ = 0, size_ = 0;
    int32_t least_ = INT32_MIN;  // the order of a score that may still be among the best
    std::vector<uint64_t> kept_;
};

}  // namespace overleap::OVERLEAP_ISA
