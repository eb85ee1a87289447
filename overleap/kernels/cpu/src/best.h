// The k best scores of a stream of entries, in memory that does not grow with the stream.
// A total order (score, then the smaller entry), so the result does not depend on how the stream
// was cut: parts chosen apart and put together give what one pass gives. What is kept lies in the
// order of the entries until it is written, so of equal scores the first ones are the ones to keep.
#pragma once

#include <algorithm>

#include "buffer.h"
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

// The lanes of these bits, one after the other; memory behind them, up to a whole vector, is spoiled.
static inline void store_lanes(int32_t* to, vi v, uint32_t bits) {
#if defined(__AVX512F__)
    // Through a register: a compressing store costs a hundred cycles on Zen 4.
    __m512i dense = _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits),
                                                reinterpret_cast<__m512i>(v));
    _mm512_storeu_si512(to, dense);
#else
    for (; bits; bits &= bits - 1) *to++ = v[__builtin_ctz(bits)];
#endif
}

static inline vi load(const int32_t* p) {
    vi v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Bits of the first n lanes, all of them where n is large.
static inline uint32_t first_lanes(int64_t n) {
    return n >= W ? (1u << W) - 1 : (1u << n) - 1;
}

// Integers in the order of the floats; -0.0 is 0.0.
static inline vi sortable(vf score) {
    vi bits = reinterpret_cast<vi>(score + 0.0f);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The k-th largest of n values, 1 <= k <= n, by halving the range; values and W behind are spoiled.
static inline int32_t kth_largest(int32_t* value, int64_t n, int64_t k) {
    vi least = vi{} + value[0], most = least;
    for (int64_t i = 0; i < n; i += W) {
        uint32_t lanes = first_lanes(n - i);
        vi v = load(value + i);
        for (int j = 0; lanes != first_lanes(W) && j < W; j++)
            if (!(lanes >> j & 1)) v[j] = value[0];
        least = v < least ? v : least, most = v > most ? v : most;
    }
    int64_t low = least[0], high = most[0];
    for (int i = 1; i < W; i++) {
        low = std::min<int64_t>(low, least[i]);
        high = std::max<int64_t>(high, most[i]);
    }
    while (low < high) {
        const int32_t middle = static_cast<int32_t>(low + (high - low + 1) / 2);
        int64_t above = 0;
        for (int64_t i = 0; i < n; i += W)
            above += __builtin_popcount(lanes_at_least(load(value + i), middle) &
                                        first_lanes(n - i));
        const bool upper = above >= k;
        if (upper) low = middle;
        else high = middle - 1, k -= above;
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i += W) {
            vi v = load(value + i);
            uint32_t lanes = lanes_at_least(v, middle);
            lanes = (upper ? lanes : ~lanes) & first_lanes(n - i);
            store_lanes(value + kept, v, lanes);
            kept += __builtin_popcount(lanes);
        }
        n = kept;
    }
    return static_cast<int32_t>(low);
}

class Best {
  public:
    void start(int64_t k, int64_t entries) {
        k_ = k;
        size_ = 0;
        least_ = INT32_MIN;
        // Room for many more than are kept, so that shrinking is rare.
        room_ = std::min(std::max(2 * k, k + 1024), std::max(entries, k));
        order_.resize(static_cast<size_t>(room_ + kOffered + W));
        number_.resize(order_.size());
        spoiled_.resize(order_.size()), sorted_.resize(order_.size());
    }

    static constexpr int kOffered = 256;  // entries at once, at most

    // Scores of entries first .. first + count - 1, later ones than before; readable up to a whole
    // vector.
    void offer(const float* score, int64_t first, int count) {
        if (size_ > room_) shrink();
        vi number;
        for (int i = 0; i < W; i++) number[i] = static_cast<int32_t>(first) + i;
        for (int i = 0; i < count; i += W, number += W) {
            vi order = sortable(load(score + i));
            uint32_t found = lanes_at_least(order, least_) & first_lanes(count - i);
            if (!found) continue;
            store_lanes(order_.data() + size_, order, found);
            store_lanes(number_.data() + size_, number, found);
            size_ += __builtin_popcount(found);
        }
    }

    // What another kept of later entries.
    void join(const std::vector<uint64_t>& kept) {
        for (uint64_t rank : kept) {
            if (size_ > room_) shrink();
            order_[size_] = static_cast<int32_t>(rank >> 32);
            number_[size_++] = static_cast<int32_t>(rank);
        }
    }

    // At most k, in the order of the entries.
    void take(std::vector<uint64_t>& kept) {
        shrink();
        kept.resize(static_cast<size_t>(size_));
        for (int64_t i = 0; i < size_; i++)
            kept[i] = uint64_t{static_cast<uint32_t>(order_[i])} << 32 |
                      static_cast<uint32_t>(number_[i]);
    }

    // Entry numbers, best first, -1 behind.
    void write(int64_t* out) {
        shrink();
        sort();
        for (int64_t i = 0; i < size_; i++) out[i] = static_cast<uint32_t>(number_[i]);
        std::fill(out + size_, out + k_, -1);
    }

  private:
    void shrink() {
        if (size_ <= k_) return;
        std::copy(order_.begin(), order_.begin() + size_, spoiled_.begin());
        const int32_t last = kth_largest(spoiled_.data(), size_, k_);
        // Everything above it, and as many of its equals as there is room for.
        int64_t above = 0, kept = 0;
        for (int64_t i = 0; last < INT32_MAX && i < size_; i += W)
            above += __builtin_popcount(lanes_at_least(load(order_.data() + i), last + 1) &
                                        first_lanes(size_ - i));
        int64_t equals = k_ - above;
        for (int64_t i = 0; i < size_; i += W) {
            vi order = load(order_.data() + i), number = load(number_.data() + i);
            uint32_t found = lanes_at_least(order, last) & first_lanes(size_ - i);
            uint32_t more = last < INT32_MAX ? lanes_at_least(order, last + 1) & found : 0;
            uint32_t equal = found & ~more;
            while (__builtin_popcount(equal) > equals) equal &= ~(1u << (31 - __builtin_clz(equal)));
            equals -= __builtin_popcount(equal);
            found = more | equal;
            store_lanes(order_.data() + kept, order, found);
            store_lanes(number_.data() + kept, number, found);
            kept += __builtin_popcount(found);
        }
        size_ = kept;
        // A later entry must score more than the last one kept.
        least_ = last < INT32_MAX ? last + 1 : last;
    }

    // Best first, a byte of the score at a time: equals keep their order.
    void sort() {
        uint32_t count[4][257] = {};
        auto rank = [](int32_t order) { return ~(static_cast<uint32_t>(order) ^ 0x80000000u); };
        for (int64_t i = 0; i < size_; i++)
            for (int digit = 0; digit < 4; digit++)
                count[digit][(rank(order_[i]) >> 8 * digit & 255) + 1]++;
        for (int digit = 0; digit < 4; digit++) {
            for (int i = 1; i < 256; i++) count[digit][i] += count[digit][i - 1];
            for (int64_t i = 0; i < size_; i++) {
                int64_t to = count[digit][rank(order_[i]) >> 8 * digit & 255]++;
                spoiled_[to] = order_[i];
                sorted_[to] = number_[i];
            }
            order_.swap(spoiled_), number_.swap(sorted_);
        }
    }

    int64_t k_ = 0, size_ = 0, room_ = 0;
    int32_t least_ = INT32_MIN;  // the order of a score that may still be among the best
    Buffer<int32_t> order_, number_;
    Buffer<int32_t> spoiled_, sorted_;  // for shrinking and sorting
};

}  // namespace overleap::OVERLEAP_ISA
