// Products of a few rows of activations with W rows of weights at once.
// A piece is 16 bytes of a row. A vector of weights holds the same piece of W / 4 rows, and a piece of
// activations is multiplied with all of them: an output is 4 running sums over its columns (bf16: of
// pairs), added up at the end in one order, for one row of activations as for a thousand.
// Read next: panel.h (stored codes as numbers), meet.h (few rows and many), kernel_linear.cpp.
#pragma once

#include "buffer.h"
#include "panel.h"

namespace overleap::OVERLEAP_ISA {

constexpr int kTall = W == 16 ? 6 : 3;  // activation rows of a tile: what the registers hold
constexpr int kColumns = 32;            // columns come in groups of so many

template <class E>
constexpr int kPiece = 16 / static_cast<int>(sizeof(E));
template <class E>
constexpr int kPieces = kColumns / kPiece<E>;  // of a group

// Columns of prepared activations: a multiple of kColumns, zeros behind the end.
static inline int64_t whole_columns(int64_t columns) {
    return (columns + kColumns - 1) / kColumns * kColumns;
}

// A buffer of this thread, as it was left. One for each Tag, where several are in use at once.
template <class T, int Tag = 0>
static inline T* room(int64_t count) {
    thread_local RawBuffer<T> mine;
    if (mine.size() < count) mine.resize(count);
    return mine.data();
}

// -- One step of a product

static inline vf broadcast(const float* piece) {
#if defined(__AVX512F__)
    return _mm512_broadcast_f32x4(_mm_loadu_ps(piece));
#else
    float four[4];
    std::memcpy(four, piece, sizeof four);
    vf v;
    for (int i = 0; i < W; i++) v[i] = four[i % 4];
    return v;
#endif
}
static inline vf multiply_add(vf x, vf w, vf sum) { return fma(x, w, sum); }

// 4 W bytes of elements.
template <class E>
struct VectorOf {
    typedef vf type;
};

#if defined(__AVX512BF16__)
template <>
struct VectorOf<bf16> {
    typedef __m512i type;
};
static inline __m512i broadcast(const bf16* piece) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(piece)));
}
static inline vf multiply_add(__m512i x, __m512i w, vf sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
}
#endif

template <class E>
using Vector = typename VectorOf<E>::type;

template <class E>
static inline Vector<E> vector_at(const E* p) {
    Vector<E> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Lane 4 b + i of the result: the 4 lanes of block b of sum i, added up.
static inline vf outputs(vf s0, vf s1, vf s2, vf s3) {
    vi low, high, left, right;
    for (int b = 0; b < W; b += 4) {
        for (int i = 0; i < 4; i++) {
            low[b + i] = b + i / 2 + (i % 2) * W;
            high[b + i] = low[b + i] + 2;
            left[b + i] = b + i % 2 + (i / 2) * W;
            right[b + i] = left[b + i] + 2;
        }
    }
    vf first = __builtin_shuffle(s0, s1, low) + __builtin_shuffle(s0, s1, high);
    vf second = __builtin_shuffle(s2, s3, low) + __builtin_shuffle(s2, s3, high);
    return __builtin_shuffle(first, second, left) + __builtin_shuffle(first, second, right);
}

// The running sums of R rows with W outputs.
template <int R>
struct Sums {
    vf sum[R][4] = {};

    // One piece of the columns, from k on, with its 4 vectors of weights. Not inlined, the sums would
    // lie in memory.
    template <class E>
    [[gnu::always_inline]] inline void add(const E* const* x, int64_t k, const E* vectors) {
        const auto w0 = vector_at(vectors), w1 = vector_at(vectors + W * kPiece<E> / 4);
        const auto w2 = vector_at(vectors + W * kPiece<E> / 2);
        const auto w3 = vector_at(vectors + 3 * W * kPiece<E> / 4);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const auto piece = broadcast(x[r] + k);
            sum[r][0] = multiply_add(piece, w0, sum[r][0]);
            sum[r][1] = multiply_add(piece, w1, sum[r][1]);
            sum[r][2] = multiply_add(piece, w2, sum[r][2]);
            sum[r][3] = multiply_add(piece, w3, sum[r][3]);
        }
    }

    [[gnu::always_inline]] inline void end(vf* out) const {
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) out[r] = outputs(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    }
};

template <int R, class E>
static inline void tile(const E* const* x, const E* panel, int64_t columns, vf* out) {
    Sums<R> sums;
    for (int64_t k = 0; k < columns; k += kPiece<E>) sums.add(x, k, panel + k * W);
    sums.end(out);
}

// x[0 .. rows - 1], at most kTall, against a panel -> W outputs each. On its own: within a large function
// the compiler leaves steps as calls, and the sums in memory.
template <class E>
[[gnu::noinline]] static void products(
    int rows, const E* const* x, const E* panel, int64_t columns, vf* out) {
    switch (rows) {
        case 1: return tile<1>(x, panel, columns, out);
        case 2: return tile<2>(x, panel, columns, out);
        case 3: return tile<3>(x, panel, columns, out);
        case 4: return tile<4>(x, panel, columns, out);
        case 5: return tile<5>(x, panel, columns, out);
        default: return tile<6>(x, panel, columns, out);
    }
}

// -- A panel: W rows of a stored weight. Row 4 b + i lies in block b of every fourth vector from i.

// Rows first .. first + count - 1, count at most W.
struct Panel {
    Stored weight;
    int64_t first;
    int count;
};

// Readers: quad(i, k, v) makes the vectors i of columns k .. k + 31, one for each piece.

// Any form, any scale, any end of a row, by way of kColumns elements. Where there are only `count`
// rows, the last repeats.
template <class E>
struct PlainReader {
    const Stored& w;
    int64_t first, count;

    [[gnu::always_inline]] inline void quad(int i, int64_t k, Vector<E>* v) const {
        for (int b = 0; b < W / 4; b++) {
            E few[kColumns] = {};
            decode_columns(w, first + (4 * b + i < count ? 4 * b + i : count - 1), k, few);
            for (int p = 0; p < kPieces<E>; p++)
                std::memcpy(reinterpret_cast<uint8_t*>(v + p) + 16 * b, few + p * kPiece<E>, 16);
        }
    }
};

#if defined(__AVX512F__)
// 16 bytes of rows 0, 4, 8 and 12 from `row` on, a row in each quarter.
static inline __m512i quarters(const uint8_t* row, int64_t stride) {
    auto at = [&](int b) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 4 * b * stride));
    };
    __m512i v = _mm512_inserti32x4(_mm512_castsi128_si512(at(0)), at(1), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(v, at(2), 2), at(3), 3);
}
#else
static inline vf quarters(const uint8_t* row, int64_t stride) {
    vf v;
    for (int b = 0; b < W / 4; b++)
        std::memcpy(reinterpret_cast<uint8_t*>(&v) + 16 * b, row + 4 * b * stride, 16);
    return v;
}
#endif

// Elements that need no decoding.
template <class E>
struct CopyReader {
    const E* rows;
    int64_t columns;

    [[gnu::always_inline]] inline void quad(int i, int64_t k, Vector<E>* v) const {
        const int64_t stride = columns * static_cast<int64_t>(sizeof(E));
        auto* row = reinterpret_cast<const uint8_t*>(rows + i * columns + k);
        for (int p = 0; p < kPieces<E>; p++)
            v[p] = reinterpret_cast<Vector<E>>(quarters(row + 16 * p, stride));
    }
};

#if defined(__AVX512BF16__)

// Whether a shift of the exponents does for all scales.
static inline bool shifts(const uint8_t* scale, int64_t count, int least, int most) {
    uint8_t low = 255, high = 0;
    for (int64_t i = 0; i < count; i++) {
        low = scale[i] < low ? scale[i] : low;
        high = scale[i] > high ? scale[i] : high;
    }
    return low >= 127 + least && high <= 127 + most;
}

class Fp4Reader {
    int64_t stride, groups;
    const uint8_t *code, *scale;

  public:
    Fp4Reader(const Stored& w, int64_t first)
        : stride(w.columns / 2), groups(w.columns / kFp4Group),
          code(static_cast<const uint8_t*>(w.data) + first * stride),
          scale(w.scale + first * groups) {}

    bool fits() const { return shifts(scale, W * groups, -125, 125); }

    [[gnu::always_inline]] inline void quad(int i, int64_t k, __m512i* v) const {
        const __m512i values = _mm512_load_si512(kFp4Values);
        const __m512i bytes = quarters(code + i * stride + k / 2, stride);
        const __m512i lower = lowering(i, k / kFp4Group);
        // Codes into the low bits of bytes, then of words; what else is in a word does not count.
        const __m512i shifted = _mm512_srli_epi16(bytes, 4);
        const __m512i half[2] = {_mm512_unpacklo_epi8(bytes, shifted),
                                 _mm512_unpackhi_epi8(bytes, shifted)};
        for (int p = 0; p < 4; p++) {
            const __m512i word = p % 2 ? _mm512_unpackhi_epi8(half[p / 2], half[p / 2])
                                       : _mm512_unpacklo_epi8(half[p / 2], half[p / 2]);
            v[p] = _mm512_subs_epu16(_mm512_permutexvar_epi16(word, values), lower);
        }
    }

  private:
    // What is to be subtracted from the words of rows i, i + 4, i + 8 and i + 12 in a group.
    __m512i lowering(int i, int64_t group) const {
        const uint8_t* s = scale + i * groups + group;
        const uint32_t four = s[0] | s[4 * groups] << 8 | s[8 * groups] << 16 |
                              static_cast<uint32_t>(s[12 * groups]) << 24;
        const __m512i own = _mm512_add_epi16(  // byte b into the words of block b
            _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0) * 0x0001000100010001,
            _mm512_set1_epi16(static_cast<short>(0x8000)));
        const __m512i codes = _mm512_shuffle_epi8(_mm512_set1_epi32(static_cast<int>(four)), own);
        return _mm512_sub_epi16(_mm512_set1_epi16(static_cast<short>((kFp4Raised + 127) << 7)),
                                _mm512_slli_epi16(codes, 7));
    }
};

struct Fp8Reader {
    int64_t stride, blocks, first;
    const uint8_t *code, *scale;

    Fp8Reader(const Stored& w, int64_t row)
        : stride(w.columns), blocks((stride + kWeightBlock - 1) / kWeightBlock), first(row),
          code(static_cast<const uint8_t*>(w.data) + row * stride),
          scale(w.scale + row / kWeightBlock * blocks) {}

    bool fits() const {
        return first / kWeightBlock == (first + W - 1) / kWeightBlock &&
               shifts(scale, blocks, -117, 119);
    }

    [[gnu::always_inline]] inline void quad(int i, int64_t k, __m512i* v) const {
        const __m512i shift =
            _mm512_set1_epi16(static_cast<short>((scale[k / kWeightBlock] - 127) * 128));
        for (int p = 0; p < 4; p += 2) {
            const __m512i bytes = quarters(code + i * stride + k + 8 * p, stride);
            v[p] = fp8_numbers(_mm512_unpacklo_epi8(bytes, _mm512_setzero_si512()), shift);
            v[p + 1] = fp8_numbers(_mm512_unpackhi_epi8(bytes, _mm512_setzero_si512()), shift);
        }
    }
};

#endif

// body(reader) with the fastest reader of a panel.
template <class E, class Body>
static inline void read(const Panel& panel, const Body& body) {
    const Stored& w = panel.weight;
    const int64_t first = panel.first, count = panel.count;
    if (count == W && w.columns % kColumns == 0) {
        if (w.form == (sizeof(E) == 2 ? Form::bf16 : Form::f32)) {
            const E* rows = static_cast<const E*>(w.data) + first * w.columns;
            return body(CopyReader<E>{rows, w.columns});
        }
#if defined(__AVX512BF16__)
        if constexpr (sizeof(E) == 2) {
            if (w.form == Form::fp4)
                if (Fp4Reader reader(w, first); reader.fits()) return body(reader);
            if (w.form == Form::fp8)
                if (Fp8Reader reader(w, first); reader.fits()) return body(reader);
        }
#endif
    }
    body(PlainReader<E>{w, first, count});
}

}  // namespace overleap::OVERLEAP_ISA
