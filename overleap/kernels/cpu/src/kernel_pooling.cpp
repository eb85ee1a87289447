// Gated pooling of key/value rows into entries (compress), and the choice of experts (route).
// Read next: kernels/torch/compress.py and kernels/torch/moe.py (the definitions).
#include "rows.h"
#include "threads.h"
#include "typed.h"

namespace overleap::OVERLEAP_ISA {
namespace {

// A row that takes part in an entry: values, gates behind them, and what the gates get added.
struct Member {
    const float *value, *ape;
};

// Softmax over the members for every channel; a gate lies `width` behind its value.
void pool(const Member* member, int64_t members, int64_t width, int64_t channels, float* out) {
    vectors(channels, [&](int64_t i, auto lanes) {
        auto gate = [&](int64_t r) {
            return lanes.read(member[r].value + width + i) + lanes.read(member[r].ape + i);
        };
        vf top = gate(0), total{}, mass{};
        for (int64_t r = 1; r < members; r++) top = max(gate(r), top);
        for (int64_t r = 0; r < members; r++) {
            vf share = exp(gate(r) - top);
            mass += share;
            total = fma(share, lanes.read(member[r].value + i), total);
        }
        lanes.write(out + i, total / mass);
    });
}

// One entry of a sequence whose new tokens are packed from row `row`.
void pool_block(const Pooling& p, size_t b, int64_t row, int64_t block, float* out) {
    const int64_t start = p.sequences.start[b];
    const float* tail = p.tail + p.sequences.slot[b] * p.capacity * 2 * p.width;
    auto at = [&](int64_t position) {
        return position >= start ? p.fresh + (row + position - start) * 2 * p.width
                                 : tail + position % p.capacity * 2 * p.width;
    };
    const int64_t channels = p.overlapped ? p.width / 2 : p.width;
    Member member[kMostPooled];
    int64_t members = 0;
    if (p.overlapped && block)
        for (int64_t r = 0; r < p.ratio; r++)
            member[members++] = {at((block - 1) * p.ratio + r), p.ape + r * p.width};
    const int64_t half = p.overlapped ? channels : 0;
    for (int64_t r = 0; r < p.ratio; r++)
        member[members++] = {at(block * p.ratio + r) + half, p.ape + r * p.width + half};
    pool(member, members, p.width, channels, out);
}

// log(1 + u) for 0 <= u <= 1, within a few units in the last place.
vf log1p(vf u) {
    vf w = 1.0f + u;
    auto upper = w > 1.41421356f;
    vf f = (upper ? w * 0.5f : w) - 1.0f, z = f * f;
    vf p = all(7.0376836292e-2f);
    p = fma(p, f, all(-1.1514610310e-1f));
    p = fma(p, f, all(1.1676998740e-1f));
    p = fma(p, f, all(-1.2420140846e-1f));
    p = fma(p, f, all(1.4249322787e-1f));
    p = fma(p, f, all(-1.6668057665e-1f));
    p = fma(p, f, all(2.0000714765e-1f));
    p = fma(p, f, all(-2.4999993993e-1f));
    p = fma(p, f, all(3.3333331174e-1f));
    vf log = fma(p * z, f, f - 0.5f * z) + (upper ? all(0.69314718056f) : vf{});
    return log + (u - (w - 1.0f)) / w;  // what 1 + u lost
}

vf affinity(vf x) {
    vf softplus = max(x, vf{}) + log1p(exp(-abs(x)));
    vf root;
    for (int i = 0; i < W; i++) root[i] = std::sqrt(softplus[i]);
    return root;
}

// The k best ranks, best first; of equal ones the smaller expert.
void best(const Routing& r, const float* affinity, int64_t* ids) {
    auto rank = [&](int64_t e) { return r.bias ? affinity[e] + r.bias[e] : affinity[e]; };
    auto better = [](float a, float b) { return a > b || (a != a && b == b); };  // a NaN is best
    int64_t size = 0;
    for (int64_t e = 0; e < r.experts; e++) {
        const float own = rank(e);
        if (size == r.k && !better(own, rank(ids[size - 1]))) continue;
        int64_t at = size < r.k ? size++ : r.k - 1;
        for (; at && better(own, rank(ids[at - 1])); at--) ids[at] = ids[at - 1];
        ids[at] = e;
    }
}

void route_token(const Routing& r, int64_t token) {
    float* row = r.logit + token * r.experts;
    vectors(r.experts, [&](int64_t i, auto lanes) {
        lanes.write(row + i, affinity(lanes.read(row + i)));
    });
    if (!r.fixed) best(r, row, r.ids + token * r.k);
    const int64_t* ids = (r.fixed ? r.fixed : r.ids) + token * r.k;
    float* weight = r.weight + token * r.k;
    float total = 0;
    for (int64_t i = 0; i < r.k; i++) total += row[ids[i]];
    for (int64_t i = 0; i < r.k; i++) weight[i] = row[ids[i]] / total * r.scale;
}

}  // namespace

void compress(const Pooling& p) {
    struct Task {
        size_t sequence;
        int64_t row, block;
    };
    std::vector<Task> tasks;
    int64_t row = 0;
    for (size_t b = 0; b < p.sequences.start.size(); b++) {
        const int64_t start = p.sequences.start[b], end = start + p.sequences.count[b];
        for (int64_t block = start / p.ratio; block < end / p.ratio; block++)
            tasks.push_back({b, row, block});
        row += p.sequences.count[b];
    }
    const int64_t channels = p.overlapped ? p.width / 2 : p.width;
    const int64_t grain = kRowsWork / (4 * p.ratio * p.width) + 1;
    parallel_ranges(p.threads, static_cast<int64_t>(tasks.size()), grain,
                    [&](int64_t first, int64_t last) {
                        for (int64_t i = first; i < last; i++)
                            pool_block(p, tasks[i].sequence, tasks[i].row, tasks[i].block,
                                       p.out + i * channels);
                    });
}

void route(const Routing& r) {
    const int64_t grain = kRowsWork / (8 * r.experts) + 1;
    parallel_ranges(r.threads, r.tokens, grain, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) route_token(r, t);
    });
}

}  // namespace overleap::OVERLEAP_ISA
