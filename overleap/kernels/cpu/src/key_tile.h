// A tile of indexer keys made ready for many queries: keys lie in the lanes of a vector.
// Packed keys: e2m1 values times 2 are whole numbers, -12 .. 12, so a group of 32 is an exact integer
// dot product; scales follow in float. Wide keys: one float after the other. Read next:
// kernel_index.cpp.
#pragma once

#include <algorithm>

#include "attention.h"
#include "buffer.h"
#include "formats.h"

namespace overleap::OVERLEAP_ISA {

constexpr int kTileKeys = 256;
constexpr int64_t kAhead = 128;  // entries that are fetched before they are needed
constexpr int kGroupSteps = kFp4Group / 4;  // a step is 4 values of every key of a vector

// Twice the e2m1 value of a code, as bytes. Added to keys where one side is to be unsigned (VNNI).
#if defined(__AMX_INT8__)
constexpr int kLift = 0;
#else
constexpr int kLift = 12;
#endif
#define OVERLEAP_TWICE(by) {by, 1 + by, 2 + by, 3 + by, 4 + by, 6 + by, 8 + by, 12 + by, \
                            by, by - 1, by - 2, by - 3, by - 4, by - 6, by - 8, by - 12}
alignas(16) constexpr int8_t kTwice[16] = OVERLEAP_TWICE(0);
alignas(16) constexpr int8_t kLifted[16] = OVERLEAP_TWICE(kLift);
#undef OVERLEAP_TWICE

// Values in an order of our own, the same for queries and keys: of every 4 packed bytes first the
// low nibbles, then the high ones.
static inline void split_nibbles(const uint8_t* packed, const int8_t* table, int8_t* out) {
    for (int i = 0; i < 4; i++) {
        out[i] = table[packed[i] & 15];
        out[4 + i] = table[packed[i] >> 4];
    }
}

// The 16 packed bytes of one group, zeros behind the end of a short one.
static inline void group_bytes(const uint8_t* row, int64_t half, int64_t group, uint8_t* out) {
    int64_t left = half - 16 * group;
    std::memset(out, 0, 16);
    std::memcpy(out, row + 16 * group, static_cast<size_t>(left < 16 ? left : 16));
}

class KeyTile {
  public:
    void shape(const RowLayout& layout) {
        layout_ = layout;
        groups_ = (layout.width + kFp4Group - 1) / kFp4Group;
        bool packed = layout.kind == RowKind::key;
        steps_ = packed ? groups_ * kGroupSteps : layout.width;
        values_.resize(static_cast<size_t>(steps_ * kTileKeys * 4));
        apart_.resize(static_cast<size_t>(W * layout.bytes));
        scales_.resize(packed ? static_cast<size_t>(groups_ * kTileKeys) : 0);
    }

    // Entries first .. first + count - 1 of a sequence, which go on up to `end`. Lanes behind them
    // repeat the last one.
    void fill(const Pages& keys, int64_t sequence, int64_t first, int count, int64_t end) {
        for (int at = 0; at < count; at += W) {
            if (first + at + kAhead < end) {  // no hardware follows from page to page
                const uint8_t* later = keys.entry(sequence, first + at + kAhead);
                for (int64_t i = 0; i < W * layout_.bytes; i += 64) __builtin_prefetch(later + i);
            }
            const uint8_t* rows = keys.entry(sequence, first + at);
            if (at + W > count || keys.left(first + at) < W) {
                for (int i = 0; i < W; i++)
                    std::memcpy(apart_.data() + i * layout_.bytes,
                                keys.entry(sequence, first + std::min(at + i, count - 1)),
                                static_cast<size_t>(layout_.bytes));
                rows = apart_.data();
            }
            if (layout_.kind == RowKind::key) packed(rows, at / W);
            else wide(rows, at / W);
        }
    }

    // Step 0 of a vector of keys; its steps follow one another, 4 W bytes each.
    const uint8_t* steps_of(int vector) const { return values_.data() + vector * steps_ * 4 * W; }
    const float* scales_of(int vector) const { return scales_.data() + vector * groups_ * W; }
    int64_t steps() const { return steps_; }
    int64_t groups() const { return groups_; }

  private:
    void packed(const uint8_t* rows, int vector) {
        uint8_t* out = values_.data() + vector * steps_ * 4 * W;
        float* scale = scales_.data() + vector * groups_ * W;
        int64_t g = 0;
#if defined(__AVX512F__)
        for (; 16 * (g + 2) <= layout_.width / 2; g += 2)
            packed_pair(rows + 16 * g, out + g * kGroupSteps * 4 * W);
#endif
        for (; g < groups_; g++) packed_group(rows, g, out + g * kGroupSteps * 4 * W);
        for (g = 0; g < groups_; g += 4) scales(rows, g, scale + g * W);
    }

    // Of groups g .. g + 3, from four bytes within the row.
    void scales(const uint8_t* rows, int64_t g, float* out) const {
        const int64_t at = layout_.width / 2 + g, from = std::min(at, layout_.bytes - 4);
        uint32_t four[W];
        for (int i = 0; i < W; i++, rows += layout_.bytes)
            if (from >= 0) std::memcpy(&four[i], rows + from, 4);
            else four[i] = static_cast<uint32_t>(rows[at]) << 8 * (at - from);
        vu words;
        std::memcpy(&words, four, sizeof words);
        for (int64_t j = 0; j < 4 && g + j < groups_; j++)
            store(out + j * W, e8m0(words >> static_cast<uint32_t>(8 * (at + j - from)) & 255u));
    }

    void packed_group(const uint8_t* rows, int64_t g, uint8_t* out) const {
        for (int i = 0; i < W; i++) {
            uint8_t bytes[16];
            group_bytes(rows + i * layout_.bytes, layout_.width / 2, g, bytes);
            for (int j = 0; j < 4; j++) {
                int8_t value[8];
                split_nibbles(bytes + 4 * j, kLifted, value);
                std::memcpy(out + (2 * j * W + i) * 4, value, 4);
                std::memcpy(out + ((2 * j + 1) * W + i) * 4, value + 4, 4);
            }
        }
    }

#if defined(__AVX512F__)
    // Two groups: 32 bytes of each of 16 rows, turned into 8 words of 16 rows.
    void packed_pair(const uint8_t* rows, uint8_t* out) const {
        const int64_t b = layout_.bytes;
        auto half = [&](int row) {
            return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + row * b));
        };
        __m512i two[8], word[8];  // rows i and 4 + i, then rows 8 + i and 12 + i
        for (int i = 0; i < 8; i++) {
            int row = i < 4 ? i : 4 + i;
            two[i] = _mm512_inserti64x4(_mm512_castsi256_si512(half(row)), half(row + 4), 1);
        }
        for (int i = 0; i < 8; i += 4) {
            __m512i low01 = _mm512_unpacklo_epi32(two[i], two[i + 1]);
            __m512i low23 = _mm512_unpacklo_epi32(two[i + 2], two[i + 3]);
            __m512i high01 = _mm512_unpackhi_epi32(two[i], two[i + 1]);
            __m512i high23 = _mm512_unpackhi_epi32(two[i + 2], two[i + 3]);
            word[i] = _mm512_unpacklo_epi64(low01, low23);
            word[i + 1] = _mm512_unpackhi_epi64(low01, low23);
            word[i + 2] = _mm512_unpacklo_epi64(high01, high23);
            word[i + 3] = _mm512_unpackhi_epi64(high01, high23);
        }
        __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(kLifted));
        __m512i lifted = _mm512_broadcast_i32x4(table), nibble = _mm512_set1_epi8(15);
        for (int i = 0; i < 8; i++) {
            __m512i rows16 = i < 4 ? _mm512_shuffle_i32x4(word[i], word[4 + i], 0x88)
                                   : _mm512_shuffle_i32x4(word[i - 4], word[i], 0xdd);
            __m512i low = _mm512_and_si512(rows16, nibble);
            __m512i high = _mm512_and_si512(_mm512_srli_epi16(rows16, 4), nibble);
            _mm512_storeu_si512(out + 128 * i, _mm512_shuffle_epi8(lifted, low));
            _mm512_storeu_si512(out + 128 * i + 64, _mm512_shuffle_epi8(lifted, high));
        }
    }
#endif

    void wide(const uint8_t* rows, int vector) {
        uint8_t* out = values_.data() + vector * steps_ * 4 * W;
        for (int64_t j = 0; j < steps_; j++)
            for (int i = 0; i < W; i++)
                std::memcpy(out + (j * W + i) * 4, rows + i * layout_.bytes + 4 * j, 4);
    }

    RowLayout layout_{};
    int64_t groups_ = 0, steps_ = 0;
    Buffer<uint8_t> values_, apart_;  // apart_: rows that do not follow one another
    Buffer<float> scales_;
};

}  // namespace overleap::OVERLEAP_ISA
