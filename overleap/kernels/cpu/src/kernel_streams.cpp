// Residual streams: collapsed before a sub-layer (hc_pre, hc_head), spread after it (hc_post).
// A token's product with fn is W running sums over its columns in one order, however many tokens
// and threads there are. Read next: kernels/torch/hyper.py (the definition).
#include "rows.h"
#include "threads.h"
#include "typed.h"

namespace overleap::OVERLEAP_ISA {
namespace {

constexpr int kTokens = 16;   // a block of tokens shares one reading of fn
constexpr int kDepth = 512;   // columns of a pass: 12 KiB of a tile's fn, 8 KiB of its x
constexpr int kSoon = 256;    // columns ahead that a lone token asks for
constexpr int kSlice = 6;     // rows of fn that one thread takes of a lone block
constexpr int kMostRows = (2 + kMostStreams) * kMostStreams;
constexpr int kTall = 4, kBroad = W == 16 ? 6 : 2;  // the sums of a tile fit the registers

// Running sums of a block: of every token with every row of fn, and of its squares.
struct Sums {
    vf product[kTokens * kMostRows];
    vf square[kTokens];
};

// Gates of W tokens, one in each lane.
struct Gates {
    vf pre[kMostStreams], post[kMostStreams], comb[kMostStreams * kMostStreams];
};

int rows_of(const Collapse& c) {
    return static_cast<int>(c.post ? (2 + c.streams) * c.streams : c.streams);
}

template <int Tall, int Broad>
void tile(const float* x, const float* fn, int64_t stride, int64_t n, vf* sum) {
    vf kept[Tall][Broad];
    for (int t = 0; t < Tall; t++)
        for (int r = 0; r < Broad; r++) kept[t][r] = sum[t * kMostRows + r];
    vectors(n, [&](int64_t i, auto lanes) {
        vf row[Tall];
        for (int t = 0; t < Tall; t++) row[t] = load(x + t * kDepth + i);
        for (int r = 0; r < Broad; r++) {
            if (Tall == 1) __builtin_prefetch(fn + r * stride + i + kSoon);
            vf w = lanes.read(fn + r * stride + i);
            for (int t = 0; t < Tall; t++) kept[t][r] = fma(row[t], w, kept[t][r]);
        }
    });
    for (int t = 0; t < Tall; t++)
        for (int r = 0; r < Broad; r++) sum[t * kMostRows + r] = kept[t][r];
}

// Rows [0, rows) of fn against all tokens of a block, a few rows at a time: those stay close by.
template <int Broad>
void slices(const float* x, const float* fn, int64_t stride, int64_t n, int tokens, int rows,
            vf* sum) {
    int r = 0;
    for (; r + Broad <= rows; r += Broad) {
        int t = 0;
        for (; t + kTall <= tokens; t += kTall)
            tile<kTall, Broad>(x + t * kDepth, fn + r * stride, stride, n, sum + t * kMostRows + r);
        for (; t < tokens; t++)
            tile<1, Broad>(x + t * kDepth, fn + r * stride, stride, n, sum + t * kMostRows + r);
    }
    if constexpr (Broad > 1)
        slices<1>(x, fn + r * stride, stride, n, tokens, rows - r, sum + r);
}

// Columns of a token as floats, and their squares added up. `next` will be read soon.
template <class E>
void widen_row(const E* x, int64_t n, const E* next, float* out, vf& square) {
    vf sums[4] = {square};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        for (int64_t line = 0; line < 4 * W; line += 64 / static_cast<int64_t>(sizeof(E)))
            __builtin_prefetch(next + i + line);
        for (int j = 0; j < 4; j++) {
            vf v = load(x + i + j * W);
            store(out + i + j * W, v);
            sums[j] = fma(v, v, sums[j]);
        }
    }
    vectors(n - i, [&](int64_t j, auto lanes) {
        vf v = lanes.read(x + i + j);
        store(out + i + j, v);
        sums[0] = fma(v, v, sums[0]);
    });
    square = (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Sums of a block with rows [first, last) of fn; row 0 brings the squares.
template <class E>
void project(const Collapse& c, int64_t token, int tokens, int first, int last, Sums& sums) {
    alignas(64) thread_local float of_this_thread[kTokens * kDepth];
    float* wide = of_this_thread;
    const int64_t columns = c.streams * c.width;
    const E* x = static_cast<const E*>(c.x) + token * columns;
    vf square[kTokens] = {};
    for (int t = 0; t < tokens; t++)
        for (int r = first; r < last; r++) sums.product[t * kMostRows + r] = vf{};
    for (int64_t from = 0; from < columns; from += kDepth) {
        const int64_t n = columns - from < kDepth ? columns - from : kDepth;
        // The next columns, or the first ones of the next block; at the end, of nothing.
        const int64_t ahead = from + kDepth < columns ? kDepth : tokens * columns - from;
        for (int t = 0; t < tokens; t++) {
            const E* here = x + t * columns + from;
            widen_row(here, n, here + ahead, wide + t * kDepth, square[t]);
        }
        slices<kBroad>(wide, c.fn + first * columns + from, columns, n, tokens, last - first,
                       sums.product + first);
    }
    for (int t = 0; t < tokens && !first; t++) sums.square[t] = square[t];
}

void normalise(vf* first, int64_t step, int64_t streams, float eps) {
    vf total{};
    for (int64_t i = 0; i < streams; i++) total += first[i * step];
    const vf share = 1.0f / (total + eps);
    for (int64_t i = 0; i < streams; i++) first[i * step] = first[i * step] * share;
}

// From logits to doubly stochastic matrices (eq. 8), columns last.
void sinkhorn(vf* comb, int64_t m, int64_t iterations, float eps) {
    for (int64_t j = 0; j < m; j++) {
        vf *row = comb + j * m, top = row[0], total{};
        for (int64_t k = 1; k < m; k++) top = max(row[k], top);
        for (int64_t k = 0; k < m; k++) row[k] = exp(row[k] - top), total += row[k];
        for (int64_t k = 0; k < m; k++) row[k] = row[k] / total + eps;
    }
    for (int64_t k = 0; k < m; k++) normalise(comb + k, m, m, eps);
    for (int64_t i = 1; i < iterations; i++) {
        for (int64_t j = 0; j < m; j++) normalise(comb + j * m, 1, m, eps);
        for (int64_t k = 0; k < m; k++) normalise(comb + k, m, m, eps);
    }
}

// Gates of tokens first .. first + n - 1 of a block, n <= W.
void gate(const Collapse& c, const Sums& sums, int first, int n, Gates& g) {
    const int64_t m = c.streams;
    float mix[kMostRows][W] = {};
    for (int t = 0; t < n; t++) {
        float mean = sum(sums.square[first + t]) / static_cast<float>(m * c.width);
        float factor = 1.0f / std::sqrt(mean + c.norm_eps);
        for (int r = 0; r < rows_of(c); r++)
            mix[r][t] = sum(sums.product[(first + t) * kMostRows + r]) * factor;
    }
    auto logit = [&](int64_t r, int kind) { return load(mix[r]) * c.scale[kind] + c.base[r]; };
    for (int64_t j = 0; j < m; j++) g.pre[j] = sigmoid(logit(j, 0)) + c.eps;
    if (!c.post) return;
    for (int64_t j = 0; j < m; j++) g.post[j] = 2.0f * sigmoid(logit(m + j, 1));
    for (int64_t i = 0; i < m * m; i++) g.comb[i] = logit(2 * m + i, 2);
    sinkhorn(g.comb, m, c.iterations, c.eps);
}

// One lane's gates as they are returned, and the gated sum of its streams.
template <class E>
void finish(const Collapse& c, const Gates& g, int lane, int64_t token) {
    const int64_t m = c.streams, d = c.width;
    float pre[kMostStreams];
    for (int64_t j = 0; j < m; j++) pre[j] = g.pre[j][lane];
    if (c.post) {
        for (int64_t j = 0; j < m; j++) c.post[token * m + j] = g.post[j][lane];
        for (int64_t i = 0; i < m * m; i++) c.comb[token * m * m + i] = g.comb[i][lane];
    }
    const E* x = static_cast<const E*>(c.x) + token * m * d;
    E* y = static_cast<E*>(c.y) + token * d;
    vectors(d, [&](int64_t i, auto lanes) {
        vf total{};
        for (int64_t j = 0; j < m; j++) total = fma(lanes.read(x + j * d + i), all(pre[j]), total);
        lanes.write(y + i, total);
    });
}

// A block, shared out among `threads`: rows of fn first, then tokens.
template <class E>
void collapse_block(const Collapse& c, int64_t token, int tokens, int threads) {
    thread_local Sums of_this_thread;
    Sums& sums = of_this_thread;
    const int rows = rows_of(c), slice = threads > 1 ? kSlice : rows;
    parallel_ranges(threads, rows, slice, [&](int64_t first, int64_t last) {
        project<E>(c, token, tokens, static_cast<int>(first), static_cast<int>(last), sums);
    });
    Gates gates[kTokens / W];
    for (int t = 0; t < tokens; t += W)
        gate(c, sums, t, tokens - t < W ? tokens - t : W, gates[t / W]);
    parallel_ranges(threads, tokens, threads > 1 ? 2 : tokens, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++)
            finish<E>(c, gates[t / W], static_cast<int>(t % W), token + t);
    });
}

template <class E, int Fixed>
void spread_token(const Spread& s, int64_t token) {
    const int64_t m = Fixed ? Fixed : s.streams, d = s.width;
    const E* y = static_cast<const E*>(s.y) + token * d;
    const E* x = static_cast<const E*>(s.x) + token * m * d;
    const float *post = s.post + token * m, *comb = s.comb + token * m * m;
    E* out = static_cast<E*>(s.out) + token * m * d;
    vectors(d, [&](int64_t i, auto lanes) {
        for (int64_t j = 0; j < m; j++) {  // of the next token: streams are too short to be followed
            __builtin_prefetch(x + (m + j) * d + i);
            __builtin_prefetch(out + (m + j) * d + i, 1);
        }
        vf fresh = lanes.read(y + i), old[kMostStreams];
        for (int64_t j = 0; j < m; j++) old[j] = lanes.read(x + j * d + i);
        for (int64_t k = 0; k < m; k++) {
            vf total = fresh * post[k];
            for (int64_t j = 0; j < m; j++) total = fma(old[j], all(comb[j * m + k]), total);
            lanes.write(out + k * d + i, total);
        }
    });
}

}  // namespace

void collapse(const Collapse& c) {
    const int64_t blocks = (c.tokens + kTokens - 1) / kTokens;
    const bool tiny = c.tokens * c.streams * c.width * rows_of(c) < 2 * kRowsWork;
    const int threads = tiny ? 1 : c.threads;
    typed(c.type, [&](auto e) {
        using E = decltype(e);
        auto block = [&](int64_t first, int64_t last, int inner) {
            collapse_block<E>(c, first, static_cast<int>(last - first), inner);
        };
        if (blocks == 1) return block(0, c.tokens, threads);
        parallel_ranges(threads, c.tokens, kTokens,
                        [&](int64_t first, int64_t last) { block(first, last, 1); });
    });
}

void spread(const Spread& s) {
    const int64_t values = s.streams * s.width, grain = kRowsWork / (values ? values : 1);
    typed(s.type, [&](auto e) {
        using E = decltype(e);
        parallel_ranges(s.threads, s.tokens, grain ? grain : 1, [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; t++)
                if (s.streams == 4) spread_token<E, 4>(s, t);
                else spread_token<E, 0>(s, t);
        });
    });
}

}  // namespace overleap::OVERLEAP_ISA
