// Products of activations with one panel after another: many rows by way of a decoded panel, a few rows
// straight from the stored bytes. Both add up in the same order.
#pragma once

#include <algorithm>
#include <type_traits>

#include "matrix.h"

namespace overleap::OVERLEAP_ISA {

constexpr int64_t kNear = 8192;  // bytes of a panel that the first cache takes beside the one in use
constexpr int64_t kFew = kMatrix<bf16> ? 4 : 6;  // rows for which a panel is not worth writing

#if defined(__AVX512BF16__)

// FP8 codes without their scale, which x has taken over: it is one for all W rows, and a power of two
// on either side makes the same product.
class Fp8Codes {
    const Fp8Reader& of_;

  public:
    explicit Fp8Codes(const Fp8Reader& of) : of_(of) {}

    [[gnu::always_inline]] inline void quad(int i, int64_t k, __m512i* v) const {
        for (int p = 0; p < 4; p += 2) {
            __m512i high, low;
            fp8_bytes(quarters(of_.code + i * of_.stride + k + 8 * p, of_.stride), high, low);
            v[p] = _mm512_unpacklo_epi8(low, high);
            v[p + 1] = _mm512_unpackhi_epi8(low, high);
        }
    }

    // Whether no value left the range of a bf16.
    bool scale(const bf16* x, bf16* scaled) const {
        __mmask32 bad = 0;
        for (int64_t k = 0; k < of_.stride; k += kColumns) {
            const int shift = of_.scale[k / kWeightBlock] - 127;
            const __m512i v = _mm512_loadu_si512(x + k);
            const __m512i size = _mm512_and_si512(v, _mm512_set1_epi16(0x7fff));
            const __m512i up = _mm512_add_epi16(v, _mm512_set1_epi16(static_cast<short>(shift * 128)));
            const __mmask32 some = _mm512_test_epi16_mask(size, size);
            const int least = (shift < 0 ? 1 - shift : 1) << 7;
            const int most = (shift > 0 ? 255 - shift : 255) << 7;
            bad |= some & (_mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(static_cast<short>(least))) |
                           _mm512_cmpge_epu16_mask(size, _mm512_set1_epi16(static_cast<short>(most))));
            _mm512_storeu_si512(scaled + k, _mm512_mask_mov_epi16(v, some, up));
        }
        return !bad;
    }
};

#endif

// Asks for a panel's bytes in `steps` parts. The machine does not see them coming: W rows are W streams.
class Ahead {
    const uint8_t* data_;
    int64_t step_ = 0;
    bool near_ = true;

  public:
    Ahead(const Panel* next, int64_t steps) {
        if (!next) return;
        const Stored& w = next->weight;
        const int64_t bytes = bytes_of(w.form, w.columns * W);
        data_ = static_cast<const uint8_t*>(w.data) + bytes_of(w.form, next->first * w.columns);
        step_ = (bytes / steps + 63) / 64 * 64;
        near_ = bytes <= kNear;
        if (w.form != Form::fp4) return;
        const int64_t groups = w.columns / kFp4Group;
        for (int64_t at = 0; at < W * groups; at += 64)
            __builtin_prefetch(w.scale + next->first * groups + at);
    }

    void step() {
        for (int64_t line = 0; line < step_; line += 64)
            if (near_) __builtin_prefetch(data_ + line);
            else __builtin_prefetch(data_ + line, 0, 2);
        data_ += step_;
    }
};

// A panel made ready for products with many rows: W * whole_columns(columns) elements.
template <class E>
static inline void fill(const Panel& of, const Panel* next, E* panel) {
    const int64_t columns = of.weight.columns;
    Ahead ahead(next, (columns + kColumns - 1) / kColumns);
    read<E>(of, [&](const auto& reader) {
        for (int64_t k = 0; k < columns; k += kColumns) {
            ahead.step();
            for (int i = 0; i < 4; i++) {
                Vector<E> v[kPieces<E>];
                reader.quad(i, k, v);
                for (int p = 0; p < kPieces<E>; p++)
                    std::memcpy(panel + k * W + (4 * p + i) * (W / 4) * kPiece<E>, v + p, 4 * W);
            }
        }
    });
}

#if defined(__AMX_BF16__)

// The same as tiles, for the matrix unit.
static inline void fill_tiles(const Panel& of, const Panel* next, bf16* panel) {
    const int64_t columns = of.weight.columns;
    Ahead ahead(next, (columns + kColumns - 1) / kColumns);
    read<bf16>(of, [&](const auto& reader) {
        for (int64_t k = 0; k < columns; k += kColumns) {
            ahead.step();
            __m512i v[4][4];
            for (int i = 0; i < 4; i++) reader.quad(i, k, v[i]);
            bf16* to = panel + k / kBlockColumns * 4 * kTile + k % kBlockColumns / 8 * 32;
            for (int p = 0; p < 4; p++) {
                __m512i pairs[4] = {v[0][p], v[1][p], v[2][p], v[3][p]};
                transpose_blocks(pairs);
                for (int q = 0; q < 4; q++) _mm512_storeu_si512(to + q * kTile + p * 32, pairs[q]);
            }
        }
    });
    // The last block as far as it has no columns.
    for (int64_t k = whole_columns(columns); k % kBlockColumns; k += kColumns)
        for (int q = 0; q < 4; q++)
            std::memset(panel + (k / kBlockColumns * 4 + q) * kTile + k % kBlockColumns / 8 * 32, 0,
                        4 * 64);
}

// Rows [begin, end) on the matrix unit. `tiled` is row 0, the next one `apart` elements on.
template <class Body>
static inline void meet_tiles(const Panel& panel, const Panel* next, int64_t begin, int64_t end,
                              const bf16* tiled, int64_t apart, const Body& body) {
    TileShapes whole;
    for (int i = 0; i < 8; i++) whole.set(i, 16, 64);
    const Tiles in_use(whole);
    const int64_t tiles = (panel.weight.columns + kBlockColumns - 1) / kBlockColumns * 4;
    bf16* elements = room<bf16>(tiles * kTile);
    fill_tiles(panel, next, elements);
    alignas(64) float out[kHigh * W];
    for (int64_t i = begin; i < end; i += kHigh) {
        const int64_t rows = std::min(end - i, kHigh);
        tile_products(rows, tiled + i * apart, apart, elements, tiles, out);
        for (int64_t r = 0; r < rows; r++) body(i + r, load(out + r * W));
    }
}

#endif

template <int R, class E, class Reader>
static inline void direct(const Reader& reader, int64_t columns, const E* const* x, Ahead ahead,
                          vf* out) {
#if defined(__AMX_BF16__)
    if constexpr (kMatrix<E>) return direct_tiles<R>(reader, columns, x, ahead, out);
#endif
    vf sum[R][4] = {};
    for (int64_t k = 0; k < columns; k += kColumns) {
        ahead.step();
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            Vector<E> v[kPieces<E>];
            reader.quad(i, k, v);
            for (int p = 0; p < kPieces<E>; p++)
                for (int r = 0; r < R; r++)
                    sum[r][i] = multiply_add(broadcast(x[r] + k + p * kPiece<E>), v[p], sum[r][i]);
        }
    }
    for (int r = 0; r < R; r++) out[r] = outputs(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
}

template <int R, class E>
[[gnu::noinline]] static void direct_products(const Panel& panel, const Panel* next,
                                              const E* const* x, vf* out) {
    const int64_t columns = panel.weight.columns;
    const Ahead ahead(next, (columns + kColumns - 1) / kColumns);
    read<E>(panel, [&](const auto& reader) {
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<std::decay_t<decltype(reader)>, Fp8Reader>) {
            const Fp8Codes codes(reader);
            bf16* scaled = room<bf16, 4>(R * columns);
            const bf16* own[R];
            bool all = true;
            for (int r = 0; r < R; r++) {
                own[r] = scaled + r * columns;
                all = codes.scale(x[r], scaled + r * columns) && all;
            }
            if (all) return direct<R, bf16>(codes, columns, own, ahead, out);
        }
#endif
        direct<R, E>(reader, columns, x, ahead, out);
    });
}

// x[0 .. rows - 1], at most kFew, against a panel -> W outputs each.
template <class E>
static inline void few_products(int rows, const Panel& panel, const Panel* next, const E* const* x,
                                vf* out) {
    const NoTiny<kMatrix<E>> no_tiny;
    switch (rows) {
        case 1: return direct_products<1>(panel, next, x, out);
        case 2: return direct_products<2>(panel, next, x, out);
        case 3: return direct_products<3>(panel, next, x, out);
        case 4: return direct_products<4>(panel, next, x, out);
        case 5: return direct_products<5>(panel, next, x, out);
        default: return direct_products<6>(panel, next, x, out);
    }
}

// Activations that panels meet: row(i), and where many do, all of them as tiles, from row 0 on `apart`
// elements from one to the next.
template <class E, class Row>
struct Rows {
    Row row;
    const E* tiled;
    int64_t apart;
};

// W outputs of each of the rows [begin, end): body(i, outputs) takes them. `next` is the panel that is
// likely met after this one, or null.
template <class E, class Row, class Body>
static inline void meet(const Panel& panel, const Panel* next, int64_t begin, int64_t end,
                        const Rows<E, Row>& rows, const Body& body) {
    const bool few = end - begin <= kFew;
#if defined(__AMX_BF16__)
    if constexpr (kMatrix<E>)
        if (!few) return meet_tiles(panel, next, begin, end, rows.tiled, rows.apart, body);
#endif
    const E* x[kTall];
    vf out[kTall];
    const int64_t columns = whole_columns(panel.weight.columns);
    E* elements = nullptr;
    if (!few) fill(panel, next, elements = room<E>(W * columns));
    for (int64_t i = begin; i < end; i += kTall) {
        const int count = static_cast<int>(std::min<int64_t>(end - i, kTall));
        for (int r = 0; r < count; r++) x[r] = rows.row(i + r);
        if (few) few_products(count, panel, next, x, out);
        else products(count, x, elements, columns, out);
        for (int r = 0; r < count; r++) body(i + r, out[r]);
    }
}

}  // namespace overleap::OVERLEAP_ISA
