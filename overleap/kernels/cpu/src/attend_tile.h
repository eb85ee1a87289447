// A tile of rows that many queries share, in the two layouts that the two products of attention
// read: rows in the lanes (scores), dims in the lanes (weighted sums). A score is one running sum over
// the dims of a row, a mixed value one over the rows of the tile, in order: neither depends on how
// many queries, rows or dims are in the registers at once. Read next: kernel_attention.cpp.
#pragma once

#include "buffer.h"
#include "kv_rows.h"

namespace overleap::OVERLEAP_ISA {

constexpr int kTileRows = 64;
constexpr int kHeads = W == 16 ? 8 : 4;  // queries at once: what the registers hold, 2 vectors each

// What a lane of a product takes at once: two bf16 of neighbours, or a float.
template <class E>
constexpr int kLane = 4 / sizeof(E);

static inline vf step(vf sum, const float* values, const float* q) {
    return fma(load(values), all(*q), sum);
}

#if defined(__AVX512BF16__)
static inline vf step(vf sum, __m512i pairs, uint32_t q) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pairs),
                            reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(q))));
}
static inline vf step(vf sum, const bf16* values, const bf16* q) {
    uint32_t pair;
    std::memcpy(&pair, q, 4);
    return step(sum, _mm512_loadu_si512(values), pair);
}

template <int Which>
static inline __m512i quarters(__m512i a, __m512i b) {
    return _mm512_maskz_shuffle_i32x4(0xffff, a, b, Which);
}

// 16 rows of 16 lanes, `stride` lanes apart -> 16 lanes of 16 rows, kTileRows lanes apart.
static inline void turn_block(const uint32_t* in, int64_t stride, uint32_t* out) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(in + i * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_maskz_unpacklo_epi32(0xffff, a[i], a[i + 1]);
        b[i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // a[i + j]: lanes j, 4 + j, 8 + j, 12 + j of rows i .. i + 3
        a[i] = _mm512_maskz_unpacklo_epi64(0xff, b[i], b[i + 2]);
        a[i + 1] = _mm512_maskz_unpackhi_epi64(0xff, b[i], b[i + 2]);
        a[i + 2] = _mm512_maskz_unpacklo_epi64(0xff, b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_maskz_unpackhi_epi64(0xff, b[i + 1], b[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        __m512i low0 = quarters<0x88>(a[j], a[4 + j]);
        __m512i high0 = quarters<0xdd>(a[j], a[4 + j]);
        __m512i low1 = quarters<0x88>(a[8 + j], a[12 + j]);
        __m512i high1 = quarters<0xdd>(a[8 + j], a[12 + j]);
        _mm512_storeu_si512(out + j * kTileRows, quarters<0x88>(low0, low1));
        _mm512_storeu_si512(out + (4 + j) * kTileRows, quarters<0x88>(high0, high1));
        _mm512_storeu_si512(out + (8 + j) * kTileRows, quarters<0xdd>(low0, low1));
        _mm512_storeu_si512(out + (12 + j) * kTileRows, quarters<0xdd>(high0, high1));
    }
}
#else
static inline void turn_block(const uint32_t* in, int64_t stride, uint32_t* out) {
    for (int i = 0; i < W; i++)
        for (int j = 0; j < W; j++) out[j * kTileRows + i] = in[i * stride + j];
}
#endif

template <class E>
class Tile {
  public:
    // Elements of a row, zeros behind its width.
    static int64_t padded(int64_t width) {
        constexpr int64_t whole = W * kLane<E>;
        return (width + whole - 1) / whole * whole;
    }

    void shape(int64_t width) {
        width_ = padded(width);
        rows_.resize(kTileRows * width_);
        across_.resize(kTileRows * width_);
        if (kLane<E> == 2) along_.resize(kTileRows * width_);
    }

    void put(int at, const uint8_t* row, const RowLayout& layout) {
        decode_row(row, layout, width_, rows_.data() + at * width_);
    }

    // Rows begin .. end - 1 are there: make both layouts of them.
    void ready(int begin, int end) {
        const int64_t lanes = width_ / kLane<E>;
        const auto* in = reinterpret_cast<const uint32_t*>(rows_.data());
        auto* out = reinterpret_cast<uint32_t*>(across_.data());
        for (int n = begin / W * W; n < end; n += W)
            for (int64_t k = 0; k < lanes; k += W)
                turn_block(in + n * lanes + k, lanes, out + k * kTileRows + n);
#if defined(__AVX512BF16__)
        if constexpr (kLane<E> == 2)
            for (int n = begin / 2 * 2; n < end; n += 2) weave(n);
#endif
    }

    // Scores of `heads` queries, `padded` elements apart, with rows begin .. end - 1, times `scale`
    // -> [heads, kTileRows]; those of other rows are not meant.
    void score(const E* q, int heads, int begin, int end, float scale, float* out) const {
        int h = 0;
        for (; h + kHeads <= heads; h += kHeads)
            score_some<kHeads>(q + h * width_, begin, end, scale, out + h * kTileRows);
        for (; h + 4 <= heads && kHeads > 4; h += 4)
            score_some<4>(q + h * width_, begin, end, scale, out + h * kTileRows);
        for (; h + 2 <= heads; h += 2)
            score_some<2>(q + h * width_, begin, end, scale, out + h * kTileRows);
        if (h < heads) score_some<1>(q + h * width_, begin, end, scale, out + h * kTileRows);
    }

    // mixed = mixed * keep + weights times rows begin .. end - 1, for `heads` rows of both.
    void mix(const E* weight, int heads, int begin, int end, const float* keep, float* mixed) const {
        int h = 0;
        auto next = [&](int64_t by) {
            weight += by * kTileRows, keep += by, mixed += by * width_, h += static_cast<int>(by);
        };
        for (; h + kHeads <= heads; next(kHeads)) mix_some<kHeads>(weight, begin, end, keep, mixed);
        for (; h + 4 <= heads && kHeads > 4; next(4)) mix_some<4>(weight, begin, end, keep, mixed);
        for (; h + 2 <= heads; next(2)) mix_some<2>(weight, begin, end, keep, mixed);
        if (h < heads) mix_some<1>(weight, begin, end, keep, mixed);
    }

  private:
#if defined(__AVX512BF16__)
    // Rows n and n + 1 as pairs, dim by dim.
    void weave(int n) {
        alignas(64) static constexpr uint16_t order[2][32] = {
            {0,  32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
             8,  40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
            {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
             24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
        const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
        const E* row = rows_.data() + n * width_;
        E* out = along_.data() + n * width_;
        for (int64_t k = 0; k < width_; k += 32) {
            __m512i a = _mm512_loadu_si512(row + k), b = _mm512_loadu_si512(row + width_ + k);
            _mm512_storeu_si512(out + 2 * k, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(out + 2 * k + 32, _mm512_permutex2var_epi16(a, high, b));
        }
    }
#endif

    template <int R>
    void score_some(const E* q, int begin, int end, float scale, float* out) const {
        constexpr int C = R <= kHeads / 2 ? 4 : 2;
        int n = begin / W * W;
        for (; n + (C - 1) * W < end; n += C * W) score_block<R, C>(q, n, scale, out);
        for (; n < end; n += W) score_block<R, 1>(q, n, scale, out);
    }

    template <int R, int C>
    void score_block(const E* q, int n, float scale, float* out) const {
        vf sum[R][C] = {};
        const E* value = across_.data() + n * kLane<E>;
        for (int64_t k = 0; k < width_; k += kLane<E>, value += kTileRows * kLane<E>)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int c = 0; c < C; c++)
                    sum[r][c] = step(sum[r][c], value + c * W * kLane<E>, q + r * width_ + k);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) store(out + r * kTileRows + n + c * W, sum[r][c] * scale);
    }

    template <int R>
    void mix_some(const E* weight, int begin, int end, const float* keep, float* mixed) const {
        constexpr int C = R <= kHeads / 2 ? 4 : 2;
        int64_t k = 0;
        for (; k + C * W <= width_; k += C * W)
            mix_block<R, C>(weight, begin, end, keep, mixed + k, k);
        for (; k < width_; k += W) mix_block<R, 1>(weight, begin, end, keep, mixed + k, k);
    }

    template <int R, int C>
    void mix_block(
        const E* weight, int begin, int end, const float* keep, float* mixed, int64_t k) const {
        vf sum[R][C];
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) sum[r][c] = load(mixed + r * width_ + c * W) * keep[r];
        mix_rows<R, C>(weight, begin, end, k, sum);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) store(mixed + r * width_ + c * W, sum[r][c]);
    }

    template <int R, int C>
    void mix_rows(const float* weight, int begin, int end, int64_t k, vf (*sum)[C]) const {
        const float* row = rows_.data() + begin * width_ + k;
        for (int n = begin; n < end; n++, row += width_)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int c = 0; c < C; c++)
                    sum[r][c] = step(sum[r][c], row + c * W, weight + r * kTileRows + n);
    }

#if defined(__AVX512BF16__)
    // A row that is not meant may hold anything, so it is taken out of a pair at either end.
    template <int R, int C>
    void mix_rows(const bf16* weight, int begin, int end, int64_t k, vf (*sum)[C]) const {
        if (begin % 2) mix_half<R, C>(weight, begin / 2, 0xffff0000u, k, sum);
        const bf16* pair = along_.data() + (begin + 1) / 2 * 2 * width_ + 2 * k;
        for (int n = (begin + 1) / 2 * 2; n + 1 < end; n += 2, pair += 2 * width_)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int c = 0; c < C; c++)
                    sum[r][c] = step(sum[r][c], pair + 2 * c * W, weight + r * kTileRows + n);
        if (end % 2) mix_half<R, C>(weight, end / 2, 0x0000ffffu, k, sum);
    }

    template <int R, int C>
    void mix_half(const bf16* weight, int pair, uint32_t mask, int64_t k, vf (*sum)[C]) const {
        const bf16* values = along_.data() + pair * 2 * width_ + 2 * k;
        for (int c = 0; c < C; c++) {
            __m512i half = _mm512_and_si512(_mm512_loadu_si512(values + 2 * c * W),
                                            _mm512_set1_epi32(static_cast<int>(mask)));
            for (int r = 0; r < R; r++) {
                uint32_t w;
                std::memcpy(&w, weight + r * kTileRows + 2 * pair, 4);
                sum[r][c] = step(sum[r][c], half, w);
            }
        }
    }
#endif

    int64_t width_ = 0;
    Buffer<E> rows_;    // [kTileRows, width]: as decoded
    Buffer<E> across_;  // [width / lane, kTileRows, lane]
    Buffer<E> along_;   // [kTileRows / 2, width, 2]; floats have no pairs
};

}  // namespace overleap::OVERLEAP_ISA
