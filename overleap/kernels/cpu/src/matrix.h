// Products on the machine's matrix unit (AMX), and sums in its order on vectors.
// A tile adds up 32 columns: the even ones and the odd ones apart, one after the other, then both to the
// sum so far; what is below float's normal range counts as 0. Which columns meet in a tile is for us to
// choose: tile q of 128 takes every fourth pair from q on, those in lane q of a vector's blocks (tile.h).
// Elsewhere nothing of this is used. Read next: meet.h.
#pragma once

#include "matrix_unit.h"
#include "tile.h"

namespace overleap::OVERLEAP_ISA {

#if defined(__AMX_BF16__)
template <class E>
constexpr bool kMatrix = sizeof(E) == 2;  // whether many rows go to the matrix unit
#else
template <class E>
constexpr bool kMatrix = false;
#endif

// While it lives, numbers below float's normal range are 0 for this thread, as they are for a tile.
template <bool Asked>
class NoTiny {
  public:
    NoTiny() {}
};

#if defined(__AMX_BF16__)
template <>
class NoTiny<true> {
    unsigned before_ = _mm_getcsr();

  public:
    NoTiny() { _mm_setcsr(before_ | 0x8040); }
    ~NoTiny() { _mm_setcsr(before_); }
    NoTiny(const NoTiny&) = delete;
    NoTiny& operator=(const NoTiny&) = delete;
};
#endif

constexpr int64_t kBlockColumns = 128;  // of four tiles
constexpr int64_t kTileRows = 16;       // of activations

// Rows of activations as tiles take them: within a block of columns, tile by tile.
template <class E>
class Tiled {
  public:
    // `past` rows behind the last may be read, whatever is in them.
    void resize(int64_t rows, int64_t columns, int64_t past) {
        // A line more than whole blocks: rows a power of two apart would share a few lines of the cache.
        apart_ = (columns + kBlockColumns - 1) / kBlockColumns * kBlockColumns + 64 / sizeof(E);
        elements_.resize((rows + past) * apart_);
    }

    int64_t apart() const { return apart_; }
    const E* row(int64_t i) const { return elements_.data() + i * apart_; }

    // Row i, from one with whole_columns(columns).
    void put(int64_t i, const E* from, int64_t columns) {
#if defined(__AMX_BF16__)
        const __m512i every_fourth =
            _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        E* to = elements_.data() + i * apart_;
        for (int64_t k = 0; k < columns; k += kBlockColumns) {
            __m512i v[4] = {};
            for (int64_t j = 0; j < 4 && k + 32 * j < columns; j++)
                v[j] = _mm512_permutexvar_epi32(every_fourth, _mm512_loadu_si512(from + k + 32 * j));
            // Quarter q of v[j] becomes quarter j of tile q's part.
            const __m512i even[2] = {_mm512_shuffle_i32x4(v[0], v[1], 0x88),
                                     _mm512_shuffle_i32x4(v[2], v[3], 0x88)};
            const __m512i odd[2] = {_mm512_shuffle_i32x4(v[0], v[1], 0xdd),
                                    _mm512_shuffle_i32x4(v[2], v[3], 0xdd)};
            _mm512_storeu_si512(to + k, _mm512_shuffle_i32x4(even[0], even[1], 0x88));
            _mm512_storeu_si512(to + k + 32, _mm512_shuffle_i32x4(odd[0], odd[1], 0x88));
            _mm512_storeu_si512(to + k + 64, _mm512_shuffle_i32x4(even[0], even[1], 0xdd));
            _mm512_storeu_si512(to + k + 96, _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd));
        }
#else
        static_cast<void>(i), static_cast<void>(from), static_cast<void>(columns);
#endif
    }

  private:
    int64_t apart_ = 0;
    RawBuffer<E> elements_;
};

#if defined(__AMX_BF16__)

constexpr int64_t kTile = 512;    // elements of a tile of weights: 16 pairs of 16 rows
constexpr int64_t kHigh = 4 * kTileRows;  // activation rows that meet a panel at once

// Lane 4 b + i of v[q] becomes what was lane 4 b + q of v[i].
static inline void transpose_blocks(__m512i* v) {
    const __m512i low[2] = {_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpacklo_epi32(v[2], v[3])};
    const __m512i high[2] = {_mm512_unpackhi_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[2], v[3])};
    v[0] = _mm512_unpacklo_epi64(low[0], low[1]);
    v[1] = _mm512_unpackhi_epi64(low[0], low[1]);
    v[2] = _mm512_unpacklo_epi64(high[0], high[1]);
    v[3] = _mm512_unpackhi_epi64(high[0], high[1]);
}

// 16 R rows, `apart` elements from one to the next, against a panel of `tiles` tiles -> [16 R, 16].
template <int R>
[[gnu::noinline]] static void tile_products(const bf16* x, int64_t apart, const bf16* panel,
                                            int64_t tiles, float* out) {
    const int64_t bytes = 2 * apart;
    [[maybe_unused]] const int64_t next = kTileRows * apart;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < tiles; t++, x += 32, panel += kTile) {
        _tile_loadd(4, panel, 64);
        _tile_loadd(5, x, bytes);
        _tile_dpbf16ps(0, 5, 4);
        if constexpr (R > 1) {
            _tile_loadd(6, x + next, bytes);
            _tile_dpbf16ps(1, 6, 4);
        }
        if constexpr (R > 2) {
            _tile_loadd(7, x + 2 * next, bytes);
            _tile_dpbf16ps(2, 7, 4);
        }
        if constexpr (R > 3) {
            _tile_loadd(5, x + 3 * next, bytes);
            _tile_dpbf16ps(3, 5, 4);
        }
    }
    _tile_stored(0, out, 64);
    if constexpr (R > 1) _tile_stored(1, out + 256, 64);
    if constexpr (R > 2) _tile_stored(2, out + 512, 64);
    if constexpr (R > 3) _tile_stored(3, out + 768, 64);
}

// `rows` rows, at most kHigh, from x on; 15 more may be read.
static inline void tile_products(int64_t rows, const bf16* x, int64_t apart, const bf16* panel,
                                 int64_t tiles, float* out) {
    switch ((rows + kTileRows - 1) / kTileRows) {
        case 1: return tile_products<1>(x, apart, panel, tiles, out);
        case 2: return tile_products<2>(x, apart, panel, tiles, out);
        case 3: return tile_products<3>(x, apart, panel, tiles, out);
        default: return tile_products<4>(x, apart, panel, tiles, out);
    }
}

// R rows against the vectors of a reader, added up in the order of tiles. Within NoTiny.
template <int R, class Reader, class Ahead>
static inline void direct_tiles(const Reader& reader, int64_t columns, const bf16* const* x,
                                Ahead ahead, vf* out) {
    const int64_t half = whole_columns(columns) / 2;
    float* const parts = room<float, 5>(2 * R * half);  // the even columns of a row, then its odd ones
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int r = 0; r < R; r++)
        for (int64_t i = 0; i < half; i += W) {
            const __m512i pairs = _mm512_loadu_si512(x[r] + 2 * i);
            _mm512_storeu_si512(parts + 2 * r * half + i, _mm512_slli_epi32(pairs, 16));
            _mm512_storeu_si512(parts + (2 * r + 1) * half + i, _mm512_and_si512(pairs, upper));
        }
    vf sum[R] = {};
    for (int64_t k = 0; k < columns; k += kBlockColumns) {
        const int64_t end = k + kBlockColumns < columns ? k + kBlockColumns : columns;
        __m512i tile[R][4];
        for (int i = 0; i < 4; i++) {
            vf even[R] = {}, odd[R] = {};
            for (int64_t j = k; j < end; j += kColumns) {
                if (i == 0) ahead.step();
                __m512i v[4];
                reader.quad(i, j, v);
#pragma GCC unroll 4
                for (int p = 0; p < 4; p++) {
                    const vf first = reinterpret_cast<vf>(_mm512_slli_epi32(v[p], 16));
                    const vf second = reinterpret_cast<vf>(_mm512_and_si512(v[p], upper));
                    const float* part = parts + j / 2 + 4 * p;
#pragma GCC unroll 6
                    for (int r = 0; r < R; r++) {
                        even[r] = fma(broadcast(part + 2 * r * half), first, even[r]);
                        odd[r] = fma(broadcast(part + (2 * r + 1) * half), second, odd[r]);
                    }
                }
            }
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) tile[r][i] = reinterpret_cast<__m512i>(even[r] + odd[r]);
        }
        for (int r = 0; r < R; r++) {
            transpose_blocks(tile[r]);
            for (int q = 0; q < 4; q++) sum[r] = sum[r] + reinterpret_cast<vf>(tile[r][q]);
        }
    }
    for (int r = 0; r < R; r++) out[r] = sum[r];
}

#endif

}  // namespace overleap::OVERLEAP_ISA
