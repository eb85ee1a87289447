// index_topk: scores of a tile of keys for a block of tokens, and at once the best of them.
// A score is summed in one order (groups of a head, then heads), whatever the block and the tile.
// Read next: key_tile.h, best.h.
#include "best.h"
#include "key_tile.h"
#include "matrix_unit.h"
#include "threads.h"

namespace overleap::OVERLEAP_ISA {

constexpr int kBlockTokens = 16;           // tokens that share a tile
constexpr int kHeads = W == 16 ? 4 : 2;    // heads at once: what the registers hold
constexpr int kVectors = 2;                // vectors of keys at once
constexpr int64_t kPartEntries = 2048;     // the least that a thread is sent for
constexpr int kTileRows = 16;              // pairs of token and head in a tile of the matrix unit

// -- Integer dot products of one vector of lifted keys.

#if defined(__AVX512VNNI__)
typedef __m512i Dots;
static inline Dots dots_start(int32_t bias) { return _mm512_set1_epi32(bias); }
static inline Dots dots_step(Dots sum, const uint8_t* keys, int32_t q) {
    return _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(keys), _mm512_set1_epi32(q));
}
static inline vf dots_end(Dots sum) { return _mm512_cvtepi32_ps(sum); }
#elif defined(__AVX2__)
// 16-bit sums of pairs: a group of 32 stays below 8 * 2 * 24 * 12.
typedef __m256i Dots;
static inline Dots dots_start(int32_t bias) { return _mm256_set1_epi32(bias & 0xffff); }
static inline Dots dots_step(Dots sum, const uint8_t* keys, int32_t q) {
    __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys));
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(key, _mm256_set1_epi32(q)));
}
static inline vf dots_end(Dots sum) {
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
}
#else
typedef int16_t Dots __attribute__((vector_size(8 * W)));
typedef int8_t Quads __attribute__((vector_size(4 * W)));
static inline Dots dots_start(int32_t bias) {
    Dots sum{};
    for (int i = 0; i < W; i++) sum[4 * i] = static_cast<int16_t>(bias);
    return sum;
}
static inline Dots dots_step(Dots sum, const uint8_t* keys, int32_t q) {
    Quads key, query;
    std::memcpy(&key, keys, sizeof key);
    for (int i = 0; i < W; i++) std::memcpy(reinterpret_cast<char*>(&query) + 4 * i, &q, 4);
    return sum + __builtin_convertvector(key, Dots) * __builtin_convertvector(query, Dots);
}
static inline vf dots_end(Dots sum) {
    vf whole;
    for (int i = 0; i < W; i++) {
        int32_t all_four = sum[4 * i] + sum[4 * i + 1] + sum[4 * i + 2] + sum[4 * i + 3];
        whole[i] = static_cast<float>(all_four);
    }
    return whole;
}
#endif

// -- Queries of a block of tokens.

class Queries {
  public:
    void fill(const Choice& c, int64_t first, int tokens, const KeyTile& tile) {
        tokens_ = tokens, heads_ = c.heads, steps_ = tile.steps(), groups_ = tile.groups();
        values_.resize(static_cast<size_t>((tokens * heads_ + kTileRows - 1) * steps_));
        scales_.resize(static_cast<size_t>(tokens * heads_ * groups_));
        biases_.resize(scales_.size());
        weight_ = c.weight + first * heads_;
        for (int64_t h = 0; h < tokens * heads_; h++) {
            const uint8_t* row = c.q + (first * heads_ + h) * c.keys.layout.bytes;
            if (c.keys.layout.kind == RowKind::wide)
                std::memcpy(values_.data() + h * steps_, row, static_cast<size_t>(4 * steps_));
            else packed(row, c.keys.layout.width, h);
        }
    }

    // Scores of the keys in vectors `vector` and vector + 1 for one token of the block.
    void score(int token, const KeyTile& tile, int vector, bool packed, float* out) const {
        vf sum[kVectors] = {};
        int64_t head = token * heads_, end = head + heads_;
        for (; head + kHeads <= end; head += kHeads) add<kHeads>(head, tile, vector, packed, sum);
        for (; head < end; head++) add<1>(head, tile, vector, packed, sum);
        for (int v = 0; v < kVectors; v++) store(out + v * W, sum[v]);
    }

#if defined(__AMX_INT8__)
    // Packed keys first .. first + W - 1 of the tile for all tokens, on the matrix unit -> out[token *
    // kTileKeys + first + lane]. The dot products are whole numbers and exact; what follows is summed as
    // in score().
    void score_all(const KeyTile& tile, int first, float* out) {
        const int vector = first / W;
        const int64_t rows = tokens_ * heads_;
        dots_.resize(static_cast<size_t>(groups_ * kTileRows * W));
        for (int t = 0; t < tokens_; t++) store(out + t * kTileKeys + first, vf{});
        for (int64_t row = 0; row < rows; row += kTileRows) {
            const int32_t* q = values_.data() + row * steps_;
            const uint8_t* keys = tile.steps_of(vector);
            int32_t* dots = dots_.data();
            for (int64_t g = 0; g < groups_; g++) {
                _tile_zero(0);
                _tile_loadd(1, q + g * kGroupSteps, 4 * steps_);
                _tile_loadd(2, keys + g * kGroupSteps * 4 * W, 4 * W);
                _tile_dpbssd(0, 1, 2);
                _tile_stored(0, dots + g * kTileRows * W, 4 * W);
            }
            add_dots(row, std::min(rows, row + kTileRows), tile.scales_of(vector), out + first);
        }
    }
#endif

  private:
#if defined(__AMX_INT8__)
    // Dot products of the rows [row, last) onto the scores of their tokens.
    void add_dots(int64_t row, int64_t last, const float* key_scale, float* out) const {
        switch (groups_) {
            case 2: return add_dots_of<2>(row, last, key_scale, out);
            case 4: return add_dots_of<4>(row, last, key_scale, out);
            default: return add_dots_of<0>(row, last, key_scale, out);
        }
    }

    template <int Groups>  // 0: any number
    [[gnu::noinline]] void add_dots_of(int64_t row, int64_t last, const float* key_scale,
                                       float* out) const {
        const int64_t groups = Groups ? Groups : groups_;
        const int32_t* whole = dots_.data();
        const float* own_scale = scales_.data() + row * groups;
        for (int64_t r = row; r < last;) {
            const int64_t token = r / heads_, end = std::min(last, (token + 1) * heads_);
            vf score = load(out + token * kTileKeys);
            for (; r < end; r++, whole += W, own_scale += groups) {
                vf dot{};
#pragma GCC unroll 4
                for (int64_t g = 0; g < groups; g++) {
                    const vf scale = load(key_scale + g * W) * all(own_scale[g]);
                    const __m512i at = _mm512_load_si512(whole + g * kTileRows * W);
                    dot = fma(_mm512_cvtepi32_ps(at), scale, dot);
                }
                score = fma(all(weight_[r]), max(vf{}, dot), score);
            }
            store(out + token * kTileKeys, score);
        }
    }
#endif

    void packed(const uint8_t* row, int64_t width, int64_t h) {
        for (int64_t g = 0; g < groups_; g++) {
            uint8_t bytes[16];
            int8_t value[kFp4Group];
            group_bytes(row, width / 2, g, bytes);
            for (int j = 0; j < 4; j++) split_nibbles(bytes + 4 * j, kTwice, value + 8 * j);
            int32_t sum = 0;
            for (int8_t v : value) sum += v;
            std::memcpy(values_.data() + h * steps_ + g * kGroupSteps, value, sizeof value);
            biases_[h * groups_ + g] = -kLift * sum;
            // A quarter, since both sides are doubled.
            scales_[h * groups_ + g] = 0.25f * e8m0(row[width / 2 + g]);
        }
    }

    template <int R>
    void add(int64_t head, const KeyTile& tile, int vector, bool packed, vf* score) const {
        vf dot[R][kVectors] = {};
        if (packed) dot_packed<R>(head, tile, vector, dot);
        else dot_wide<R>(head, tile, vector, dot);
        for (int r = 0; r < R; r++) {
            vf weight = all(weight_[head + r]);
            // In this order a NaN stays one.
            for (int v = 0; v < kVectors; v++)
                score[v] = fma(weight, max(vf{}, dot[r][v]), score[v]);
        }
    }

    template <int R>
    void dot_packed(int64_t head, const KeyTile& tile, int vector, vf (*dot)[kVectors]) const {
        const int32_t* q = values_.data() + head * steps_;
        for (int64_t g = 0; g < groups_; g++, q += kGroupSteps) {
            Dots sum[R][kVectors];
            for (int r = 0; r < R; r++)
                for (int v = 0; v < kVectors; v++)
                    sum[r][v] = dots_start(biases_[(head + r) * groups_ + g]);
            for (int s = 0; s < kGroupSteps; s++)
                for (int r = 0; r < R; r++)
                    for (int v = 0; v < kVectors; v++) {
                        const uint8_t* keys = tile.steps_of(vector + v);
                        int64_t step = g * kGroupSteps + s;
                        sum[r][v] = dots_step(sum[r][v], keys + step * 4 * W, q[r * steps_ + s]);
                    }
            for (int r = 0; r < R; r++)
                for (int v = 0; v < kVectors; v++) {
                    vf scale = load(tile.scales_of(vector + v) + g * W);
                    scale *= all(scales_[(head + r) * groups_ + g]);
                    dot[r][v] = fma(dots_end(sum[r][v]), scale, dot[r][v]);
                }
        }
    }

    template <int R>
    void dot_wide(int64_t head, const KeyTile& tile, int vector, vf (*dot)[kVectors]) const {
        const int32_t* q = values_.data() + head * steps_;
        for (int64_t s = 0; s < steps_; s++)
            for (int r = 0; r < R; r++) {
                float value;
                std::memcpy(&value, q + r * steps_ + s, 4);
                for (int v = 0; v < kVectors; v++) {
                    const uint8_t* keys = tile.steps_of(vector + v) + s * 4 * W;
                    dot[r][v] = fma(load(reinterpret_cast<const float*>(keys)), all(value), dot[r][v]);
                }
            }
    }

    int64_t tokens_ = 0, heads_ = 0, steps_ = 0, groups_ = 0;
    std::vector<int32_t> values_;  // [tokens, heads, steps]: four int8, or a float; a tile behind it
    Buffer<int32_t> dots_;         // [groups, kTileRows, W]
    std::vector<int32_t> biases_;  // [tokens, heads, groups]: takes the lift of the keys out again
    std::vector<float> scales_;    // [tokens, heads, groups]
    const float* weight_ = nullptr;
};

// -- The op.

// Tokens of one sequence, and which part of their entries.
struct Piece {
    int64_t sequence, first, position;
    int tokens;
    int64_t begin, end;
};

struct Room {
    KeyTile tile;
    Queries queries;
    Best best[kBlockTokens];
    alignas(64) float scores[kBlockTokens * kTileKeys];
};

// Opaque to the compiler, which would look the thread's address up again for every use.
[[gnu::noipa]] static Room& room() {
    static thread_local Room mine;
    return mine;
}

// The best entries of a piece, in room().best.
static void search(const Choice& c, const Piece& piece) {
    Room& my = room();
    bool packed = c.keys.layout.kind == RowKind::key;
    my.tile.shape(c.keys.layout);
    my.queries.fill(c, piece.first, piece.tokens, my.tile);
    for (int t = 0; t < piece.tokens; t++) my.best[t].start(c.k, piece.end - piece.begin);
#if defined(__AMX_INT8__)
    TileShapes shapes;
    shapes.set(0, kTileRows, 4 * W);  // dot products
    shapes.set(1, kTileRows, kFp4Group);
    shapes.set(2, kGroupSteps, 4 * W);
    const Tiles in_use(shapes);
#endif
    for (int64_t low = piece.begin; low < piece.end; low += kTileKeys) {
        int count = static_cast<int>(std::min<int64_t>(kTileKeys, piece.end - low));
        my.tile.fill(c.keys, piece.sequence, low, count, piece.end);
        auto seen = [&](int t) {
            const int64_t visible = (piece.position + t + 1) / c.ratio - low;
            return static_cast<int>(std::min<int64_t>(count, visible));
        };
#if defined(__AMX_INT8__)
        if (packed) {
            for (int at = 0; at < count; at += W) my.queries.score_all(my.tile, at, my.scores);
            for (int t = 0; t < piece.tokens; t++)
                my.best[t].offer(my.scores + t * kTileKeys, low, seen(t));
            continue;
        }
#endif
        for (int t = 0; t < piece.tokens; t++) {
            for (int at = 0; at < seen(t); at += kVectors * W)
                my.queries.score(t, my.tile, at / W, packed, my.scores + at);
            my.best[t].offer(my.scores, low, seen(t));
        }
    }
}

static std::vector<Piece> blocks(const Choice& c) {
    std::vector<Piece> found;
    for (size_t b = 0; b < c.sequences.size(); b++) {
        const Stretch& s = c.sequences[b];
        for (int64_t at = 0; at < s.count; at += kBlockTokens) {
            int tokens = static_cast<int>(std::min<int64_t>(kBlockTokens, s.count - at));
            int64_t end = (s.start + at + tokens) / c.ratio;
            found.push_back({static_cast<int64_t>(b), s.first + at, s.start + at, tokens, 0, end});
        }
    }
    return found;
}

// Few tokens: every thread searches a part of the entries, then the parts are put together.
static void choose_in_parts(const Choice& c, const std::vector<Piece>& whole) {
    int64_t many = (2 * c.threads + whole.size() - 1) / whole.size();
    std::vector<Piece> parts;
    std::vector<size_t> ends;
    for (const Piece& piece : whole) {
        int64_t wanted = std::max<int64_t>(1, std::min(many, piece.end / kPartEntries));
        int64_t tiles = (piece.end + kTileKeys - 1) / kTileKeys;
        int64_t size = (tiles + wanted - 1) / wanted * kTileKeys;
        for (int64_t low = 0; low < piece.end; low += size) {
            parts.push_back(piece);
            parts.back().begin = low;
            parts.back().end = std::min(low + size, piece.end);
        }
        ends.push_back(parts.size());
    }
    std::vector<std::vector<uint64_t>> kept(parts.size() * kBlockTokens);
    parallel(c.threads, static_cast<int64_t>(parts.size()), [&](int64_t i) {
        search(c, parts[i]);
        for (int t = 0; t < parts[i].tokens; t++)
            room().best[t].take(kept[i * kBlockTokens + t]);
    });
    for (size_t w = 0; w < whole.size(); w++)
        for (int t = 0; t < whole[w].tokens; t++) {
            Best& best = room().best[0];
            best.start(c.k, whole[w].end);
            for (size_t i = w ? ends[w - 1] : 0; i < ends[w]; i++)
                best.join(kept[i * kBlockTokens + t]);
            best.write(c.out + (whole[w].first + t) * c.k);
        }
}

void choose(const Choice& c) {
    std::vector<Piece> whole = blocks(c);
    if (whole.empty()) return;
    if (c.threads > 1 && whole.size() < 2 * static_cast<size_t>(c.threads))
        return choose_in_parts(c, whole);
    parallel(c.threads, static_cast<int64_t>(whole.size()), [&](int64_t i) {
        search(c, whole[i]);
        for (int t = 0; t < whole[i].tokens; t++)
            room().best[t].write(c.out + (whole[i].first + t) * c.k);
    });
}

}  // namespace overleap::OVERLEAP_ISA
