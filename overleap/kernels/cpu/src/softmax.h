// The running softmax of a block of queries: largest score, sum of weights, weighted rows.
// Parts of a token's rows may be summed apart and joined in order. Read next: kernel_attention.cpp.
#pragma once

#include <cmath>

#include "attend_tile.h"

namespace overleap::OVERLEAP_ISA {

// e^x for x <= 0; 0 far below, NaN of a NaN.
static inline vf exp_below(vf x) {
#if defined(__AVX512F__)
    x = _mm512_max_ps(all(-150.0f), x);  // in this order a NaN stays one
    vf whole = _mm512_roundscale_ps(x * 1.44269504088896341f, 0);
    vf rest = fma(whole, all(-0.693145751953125f), x);
    rest = fma(whole, all(-1.42860682030941723212e-6f), rest);
    vf p = all(1.9875691500e-4f);
    p = fma(p, rest, all(1.3981999507e-3f));
    p = fma(p, rest, all(8.3334519073e-3f));
    p = fma(p, rest, all(4.1665795894e-2f));
    p = fma(p, rest, all(1.6666665459e-1f));
    p = fma(p, rest, all(5.0000001201e-1f));
    p = fma(p, rest * rest, rest + 1.0f);
    return _mm512_scalef_ps(p, whole);
#else
    return exp(x);
#endif
}

// Of queries [tokens, heads] of a block, over some of their rows.
struct Sums {
    Buffer<float> top, total;  // [queries]; -inf and 0 where nothing was seen
    Buffer<float> mixed;       // [queries, padded width]

    void start(int64_t queries, int64_t width) {
        top.assign(queries, -INFINITY);
        total.assign(queries, 0.0f);
        mixed.assign(queries * width, 0.0f);
    }

    // What another saw of other rows: its queries begin .. end - 1 are those from `first` on here.
    void join(const Sums& other, int64_t begin, int64_t end, int64_t first, int64_t width) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t r = first + i - begin;
            if (other.top[i] == -INFINITY && other.total[i] == 0.0f) continue;
            const float most = other.top[i] > top[r] ? other.top[i] : top[r];
            const float own = exp_below(all(top[r] - most))[0];
            const float theirs = exp_below(all(other.top[i] - most))[0];
            top[r] = most;
            total[r] = total[r] * own + other.total[i] * theirs;
            float* to = mixed.data() + r * width;
            const float* from = other.mixed.data() + i * width;
            for (int64_t k = 0; k < width; k += W)
                store(to + k, fma(load(from + k), all(theirs), load(to + k) * own));
        }
    }
};

template <class E>
class Softmax {
  public:
    Tile<E> tile;

    void shape(int64_t heads, int64_t width, float scale) {
        heads_ = heads, scale_ = scale;
        width_ = Tile<E>::padded(width);
        tile.shape(width);
        score_.resize(heads * kTileRows);
        weight_.resize(heads * kTileRows);
        keep_.resize(heads + W), least_.resize(heads + W);
    }

    // Rows begin .. end - 1 of the tile, for the heads of one token: queries and sums from `first` on.
    void add(const E* q, int64_t first, int begin, int end, Sums& sums) {
        const int heads = static_cast<int>(heads_);
        tile.score(q, heads, begin, end, scale_, score_.data());
        float* top = sums.top.data() + first;
        for (int h = 0; h < heads; h++) least_[h] = raise(h, begin, end, top[h]);
        for (int h = 0; h < heads; h += W) {
            int n = heads - h < W ? heads - h : W;
            vf fall = load_part(top + h, n) - load(least_.data() + h);
            store(keep_.data() + h, exp_below(fall));
        }
        for (int h = 0; h < heads; h++) {
            top[h] = least_[h];
            float& total = sums.total[first + h];
            total = total * keep_[h] + weigh(h, begin, end, top[h]);
        }
        tile.mix(weight_.data(), heads, begin, end, keep_.data(), sums.mixed.data() + first * width_);
    }

  private:
    // The largest score so far; scores of rows that are not meant become -inf.
    float raise(int h, int begin, int end, float top) {
        float* score = score_.data() + h * kTileRows;
        vi lane;
        for (int i = 0; i < W; i++) lane[i] = i;
        vf most = all(top);
        for (int n = begin / W * W; n < end; n += W) {
            vf here = load(score + n);
            if (n < begin || n + W > end) {
                here = (lane + n >= begin) & (lane + n < end) ? here : all(-INFINITY);
                store(score + n, here);
            }
            most = max(most, here);
        }
        return largest(most);
    }

    // Scores to weights; returns their sum.
    float weigh(int h, int begin, int end, float top) {
        const float* score = score_.data() + h * kTileRows;
        E* weight = weight_.data() + h * kTileRows;
        vf total{};
        for (int n = begin / W * W; n < end; n += W) {
            vf share = exp_below(load(score + n) - top);
            total += share;
            store_weight(weight + n, share);
        }
        return sum(total);
    }

    static void store_weight(float* to, vf v) { store(to, v); }
#if defined(__AVX512BF16__)
    static void store_weight(bf16* to, vf v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
    }
#endif

    int64_t heads_ = 0, width_ = 0;
    float scale_ = 0;
    Buffer<float> score_;         // [heads, kTileRows]: of one token
    Buffer<E> weight_;            // the same
    Buffer<float> keep_, least_;  // [heads]
};

}  // namespace overleap::OVERLEAP_ISA
