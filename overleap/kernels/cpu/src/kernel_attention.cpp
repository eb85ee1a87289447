// attend: tiles of stored rows, decoded once for a block of tokens, under a running softmax.
// A token's rows come in one order, in tiles cut at fixed places: window rows at absolute positions,
// entries at their rank among those the token attends to. So neither the block nor the call shows
// in the result, and all visible entries, named one by one, give the bits of "every visible entry".
#include <algorithm>
#include <iterator>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "dot.h"
#include "threads.h"

namespace overleap::OVERLEAP_ISA {

constexpr int kTileRows = 64;
constexpr int64_t kBlockValues = 1 << 17;  // results of a block of tokens: half of a small L2
constexpr int64_t kMostTokens = 32;
constexpr int64_t kLeastHeads = 8;  // of a thread's share, where threads share a token

// Tokens of one sequence, and some heads of them.
struct Block {
    const Stretch* sequence;
    int64_t number;  // of the sequence
    int64_t offset, tokens;
    int64_t head, heads;
};

// -- Rows

template <class E>
static inline int64_t decode_group(const uint8_t* code, int64_t n, uint8_t scale, E* out) {
    return decode_fp8_fast(code, n, scale, out);
}

#if defined(__AVX512BF16__)
// By way of bf16, twice as many lanes: faster than straight to float.
static inline int64_t decode_group(const uint8_t* code, int64_t n, uint8_t scale, float* out) {
    bf16 exact[kKvGroup];
    int64_t done = decode_fp8_fast(code, n, scale, exact);
    for (int64_t i = 0; i < done; i += W) store(out + i, load(exact + i));
    return done;
}
#endif

static inline void copy_rope(const uint8_t* stored, int64_t n, bf16* out) {
    std::memcpy(out, stored, static_cast<size_t>(2 * n));
}

static inline void copy_rope(const uint8_t* stored, int64_t n, float* out) {
    bf16 few[W] = {};  // what is stored is not aligned
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        std::memcpy(few, stored + 2 * i, sizeof few);
        store(out + i, load(few));
    }
    std::memcpy(few, stored + 2 * i, 2 * static_cast<size_t>(n - i));
    store_part(out + i, load(few), static_cast<int>(n - i));
}

template <class E>
static void decode_kv(const uint8_t* row, const RowLayout& layout, E* out) {
    int64_t plain = layout.width - layout.rope;
    const uint8_t* scale = row + plain + 2 * layout.rope;
    for (int64_t i = 0; i < plain; i += kKvGroup, scale++) {
        int64_t n = std::min<int64_t>(kKvGroup, plain - i);
        int64_t done = decode_group(row + i, n, *scale, out + i);
        decode_fp8(row + i + done, n - done, *scale, out + i + done);
    }
    copy_rope(row + plain, layout.rope, out + plain);
}

template <class E>
static void decode_entry(const uint8_t* row, const RowLayout& layout, E* out) {
    if (layout.kind == RowKind::kv) decode_kv(row, layout, out);
    else
        for (int64_t i = 0; i < layout.width; i++) {
            float value;
            std::memcpy(&value, row + 4 * i, 4);
            put(out[i], value);
        }
    for (int64_t i = layout.width; i < padded<E>(layout.width); i++) out[i] = E{};
}

// -- The running softmax of a block. X: queries and results; E: rows and queries in a product.

template <class X, class E>
class Softmax {
  public:
    void start(const Attention& a, const Block& block) {
        a_ = &a, block_ = block;
        stride_ = padded<E>(a.width);
        int64_t rows = block.tokens * block.heads;
        query_.resize(rows * stride_);
        mixed_.assign(rows * stride_, 0.0f);
        top_.assign(rows, -INFINITY);
        total_.assign(rows, 0.0f);
        tile_.resize(kTileRows * stride_);
        score_.resize(block.heads * kTileRows);
        keep_.resize(block.heads);
        buffer_.resize(a.width + W);
        for (int64_t r = 0; r < rows; r++)
            prepare_row(static_cast<const X*>(a.q) + packed_row(r) * a.width, a.width, false,
                        buffer_.data(), query_.data() + r * stride_);
    }

    void put_row(int at, const uint8_t* row, const RowLayout& layout) {
        decode_entry(row, layout, tile_.data() + at * stride_);
    }

    // Rows begin .. end - 1 of the tile, for one token of the block.
    void add(int64_t token, int begin, int end) {
        const E* q = query_.data() + token * block_.heads * stride_;
        for (int64_t h = 0; h < block_.heads; h += kRows) {
            int many = static_cast<int>(std::min<int64_t>(kRows, block_.heads - h));
            const E* row[kRows];
            for (int r = 0; r < many; r++) row[r] = q + (h + r) * stride_;
            for (int n = begin / kCols * kCols; n < end; n += kCols) {
                four sums[kRows];
                dot_rows(many, row, tile_.data() + n * stride_, stride_, stride_, sums);
                for (int r = 0; r < many; r++)
                    std::memcpy(score_.data() + (h + r) * kTileRows + n, &sums[r], sizeof sums[r]);
            }
        }
        for (int64_t h = 0; h < block_.heads; h++) weigh(token, h, begin, end);
        float* mixed = mixed_.data() + token * block_.heads * stride_;
        for (int64_t h = 0; h < block_.heads; h += kRows) mix(mixed, h, begin, end);
    }

    // With the sink in the denominator: results and log denominators.
    void finish() {
        for (int64_t r = 0; r < block_.tokens * block_.heads; r++) {
            float above = a_->sink[block_.head + r % block_.heads] - top_[r];
            float over = std::max(above, 0.0f);  // a sink far above every score must not overflow
            float under = exp(all(-over))[0];
            float total = total_[r] * under + exp(all(above - over))[0];
            a_->log[packed_row(r)] = top_[r] + over + std::log(total);
            X* out = static_cast<X*>(a_->out) + packed_row(r) * a_->width;
            const float* mixed = mixed_.data() + r * stride_;
            int64_t i = 0;
            for (; i + W <= a_->width; i += W) store(out + i, load(mixed + i) * (under / total));
            for (; i < a_->width; i++) put(out[i], mixed[i] * (under / total));
        }
    }

  private:
    int64_t packed_row(int64_t r) const {
        int64_t token = block_.sequence->first + block_.offset + r / block_.heads;
        return token * a_->heads + block_.head + r % block_.heads;
    }

    // Scores of one head to weights; what it has mixed so far is to be multiplied by keep.
    void weigh(int64_t token, int64_t h, int begin, int end) {
        int64_t r = token * block_.heads + h;
        float* score = score_.data() + h * kTileRows;
        for (int n = 0; n < kTileRows; n++)
            if (n < begin || n >= end) score[n] = -INFINITY;
        vf most = all(top_[r]);
        for (int n = 0; n < kTileRows; n += W) {
            vf scaled = load(score + n) * a_->scale;
            store(score + n, scaled);
            most = max(most, scaled);
        }
        float top = largest(most);
        vf total{};
        for (int n = 0; n < kTileRows; n += W) {
            vf weight = exp(load(score + n) - top);
            store(score + n, weight);
            total += weight;
        }
        keep_[h] = exp(all(top_[r] - top))[0];
        total_[r] = total_[r] * keep_[h] + sum(total);
        top_[r] = top;
    }

    void mix(float* mixed, int64_t h, int begin, int end) {
        switch (std::min<int64_t>(kRows, block_.heads - h)) {
            case 1: return mix_heads<1>(mixed, h, begin, end);
            case 2: return mix_heads<2>(mixed, h, begin, end);
            case 3: return mix_heads<3>(mixed, h, begin, end);
            case 4: return mix_heads<4>(mixed, h, begin, end);
            case 5: return mix_heads<5>(mixed, h, begin, end);
            default: return mix_heads<kRows>(mixed, h, begin, end);
        }
    }

    template <int R>
    void mix_heads(float* mixed, int64_t h, int begin, int end) const {
        constexpr int C = W == 16 ? 4 : 2;
        int64_t k = 0;
        for (; k + C * W <= stride_; k += C * W) mix_tile<R, C>(mixed, h, k, begin, end);
        for (; k < stride_; k += W) mix_tile<R, 1>(mixed, h, k, begin, end);
    }

    template <int R, int C>
    void mix_tile(float* mixed, int64_t h, int64_t k, int begin, int end) const {
        vf sum[R][C];
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++)
                sum[r][c] = load(mixed + (h + r) * stride_ + k + c * W) * keep_[h + r];
        const E* row = tile_.data() + begin * stride_ + k;
        const float* weight = score_.data() + h * kTileRows;
        for (int n = begin; n < end; n++, row += stride_) {
            vf value[C];
            for (int c = 0; c < C; c++) value[c] = load(row + c * W);
            for (int r = 0; r < R; r++) {
                vf w = all(weight[r * kTileRows + n]);
                for (int c = 0; c < C; c++) sum[r][c] = fma(w, value[c], sum[r][c]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) store(mixed + (h + r) * stride_ + k + c * W, sum[r][c]);
    }

    const Attention* a_ = nullptr;
    Block block_{};
    int64_t stride_ = 0;
    std::vector<E> query_, tile_;        // [tokens, heads, stride], [kTileRows, stride]
    std::vector<float> mixed_;           // [tokens, heads, stride]
    std::vector<float> top_, total_;     // [tokens, heads]
    std::vector<float> score_, keep_;    // [heads, kTileRows], [heads]: of one token
    std::vector<float> buffer_;
};

// -- Which rows a token sees

template <class X, class E>
static void attend_window(const Attention& a, const Block& block, Softmax<X, E>& softmax) {
    const Stretch& s = *block.sequence;
    int64_t begin = s.start + block.offset, end = begin + block.tokens;
    int64_t low = std::max<int64_t>(0, begin - a.window + 1);
    for (int64_t tile = low / kTileRows * kTileRows; tile < end; tile += kTileRows) {
        int64_t past = std::min(end, tile + kTileRows);
        for (int64_t p = std::max(low, tile); p < past; p++) {
            int64_t fresh = s.first + p - s.start;
            int64_t old = s.slot * a.ring_rows + p % a.ring_rows;
            const uint8_t* row = p < s.start ? a.ring + old * a.layout.bytes
                                             : a.fresh + fresh * a.layout.bytes;
            softmax.put_row(static_cast<int>(p - tile), row, a.layout);
        }
        for (int64_t t = 0; t < block.tokens; t++) {
            int64_t first = std::max(tile, begin + t - a.window + 1);
            int64_t last = std::min(past, begin + t + 1);
            if (first < last)
                softmax.add(t, static_cast<int>(first - tile), static_cast<int>(last - tile));
        }
    }
}

template <class X, class E>
static void attend_visible(const Attention& a, const Block& block, Softmax<X, E>& softmax) {
    int64_t begin = block.sequence->start + block.offset;
    int64_t count = (begin + block.tokens) / a.ratio;
    for (int64_t tile = 0; tile < count; tile += kTileRows) {
        int64_t past = std::min(count, tile + kTileRows);
        for (int64_t n = tile; n < past; n++)
            softmax.put_row(static_cast<int>(n - tile), a.entries.entry(block.number, n),
                            a.entries.layout);
        for (int64_t t = 0; t < block.tokens; t++) {
            int64_t last = std::min(past, (begin + t + 1) / a.ratio);
            if (tile < last) softmax.add(t, 0, static_cast<int>(last - tile));
        }
    }
}

template <class X, class E>
static void attend_chosen(const Attention& a, const Block& block, Softmax<X, E>& softmax) {
    static thread_local std::vector<int64_t> numbers;
    for (int64_t t = 0; t < block.tokens; t++) {
        const int64_t* chosen = a.chosen + (block.sequence->first + block.offset + t) * a.k;
        numbers.clear();
        std::copy_if(chosen, chosen + a.k, std::back_inserter(numbers),
                     [](int64_t n) { return n >= 0; });
        std::sort(numbers.begin(), numbers.end());
        int64_t count = static_cast<int64_t>(numbers.size());
        for (int64_t tile = 0; tile < count; tile += kTileRows) {
            int many = static_cast<int>(std::min<int64_t>(kTileRows, count - tile));
            for (int n = 0; n < many; n++)
                softmax.put_row(n, a.entries.entry(block.number, numbers[tile + n]),
                                a.entries.layout);
            softmax.add(t, 0, many);
        }
    }
}

template <class X, class E>
static void attend_block(const Attention& a, const Block& block) {
    static thread_local Softmax<X, E> softmax;
    softmax.start(a, block);
    attend_window(a, block, softmax);
    if (a.entries.rows && a.chosen) attend_chosen(a, block, softmax);
    else if (a.entries.rows) attend_visible(a, block, softmax);
    softmax.finish();
}

// -- The op

static std::vector<Block> blocks(const Attention& a) {
    int64_t tokens = kBlockValues / (a.heads * a.width);
    tokens = std::max<int64_t>(1, std::min(tokens, kMostTokens));
    int64_t all_blocks = 0;
    for (const Stretch& s : a.sequences) all_blocks += (s.count + tokens - 1) / tokens;
    int64_t shares = 1;
    if (all_blocks < a.threads)
        shares = std::max<int64_t>(1, std::min<int64_t>(a.threads, a.heads / kLeastHeads));
    int64_t heads = (a.heads + shares - 1) / shares;
    std::vector<Block> found;
    for (size_t b = 0; b < a.sequences.size(); b++) {
        const Stretch& s = a.sequences[b];
        for (int64_t at = 0; at < s.count; at += tokens)
            for (int64_t h = 0; h < a.heads; h += heads)
                found.push_back({&s, static_cast<int64_t>(b), at, std::min(tokens, s.count - at), h,
                                 std::min(heads, a.heads - h)});
    }
    return found;
}

void attend(const Attention& a) {
    // A kv row is exact in bf16; a wide row is not.
    typedef std::conditional_t<kPairs, bf16, float> Exact;
    bool exact = a.layout.kind == RowKind::kv;
    std::vector<Block> found = blocks(a);
    parallel(a.threads, static_cast<int64_t>(found.size()), [&](int64_t i) {
        if (a.type == Float::f32) attend_block<float, float>(a, found[i]);
        else if (exact) attend_block<bf16, Exact>(a, found[i]);
        else attend_block<bf16, float>(a, found[i]);
    });
}

}  // namespace overleap::OVERLEAP_ISA
