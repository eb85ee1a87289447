// The chosen experts of every token: only their bytes are read, rows are gathered by expert.
// A token's sum runs over its experts in order of their numbers, whatever else is in the call.
#include <memory>
#include <vector>

#include "dot.h"
#include "linear.h"
#include "threads.h"

namespace overleap::OVERLEAP_ISA {
namespace {

constexpr int64_t kPanelBytes = 96 * 1024;  // two panels at a time: gate and up
constexpr int64_t kFewBytes = 12 * 1024;

// One chosen pair (token, expert), in order of experts, tokens ascending within.
struct Row {
    int64_t token;
    float weight;
};

// Rows of one expert that has any.
struct Group {
    int64_t expert, first, count;
};

struct Plan {
    std::vector<Row> rows;
    std::vector<Group> groups;
    int64_t longest = 0;
};

Plan plan(const Mixture& m) {
    Plan made;
    std::vector<int64_t> start(static_cast<size_t>(m.experts) + 1, 0);
    int64_t pairs = m.tokens * m.chosen;
    for (int64_t i = 0; i < pairs; i++) start[static_cast<size_t>(m.ids[i]) + 1]++;
    for (int64_t e = 0; e < m.experts; e++) {
        int64_t count = start[static_cast<size_t>(e) + 1], first = start[static_cast<size_t>(e)];
        if (count) made.groups.push_back({e, first, count});
        made.longest = count > made.longest ? count : made.longest;
        start[static_cast<size_t>(e) + 1] = first + count;
    }
    made.rows.resize(static_cast<size_t>(pairs));
    for (int64_t i = 0; i < pairs; i++) {
        int64_t at = start[static_cast<size_t>(m.ids[i])]++;
        made.rows[static_cast<size_t>(at)] = {i / m.chosen, m.weight[i]};
    }
    return made;
}

Stored stored(const Mixture& m, uint64_t data, uint64_t scale, int64_t rows, int64_t columns) {
    return {reinterpret_cast<const void*>(data), reinterpret_cast<const uint8_t*>(scale), m.form,
            rows, columns};
}

int64_t panel_rows(int64_t bytes_a_row, int64_t longest, int64_t rows, int64_t pieces) {
    int64_t fit = (longest <= kRows ? kFewBytes : kPanelBytes) / bytes_a_row / kCols * kCols;
    int64_t even = (rows / pieces + kCols - 1) / kCols * kCols;
    int64_t panel = fit < even ? fit : even;
    return panel < kCols ? kCols : panel;
}

// silu(min(gate, limit)) * clamp(up, +-limit) * weight, each output on its own.
four gated(four gate, four up, float limit, float weight) {
    float g[W] = {}, u[W] = {};
    std::memcpy(g, &gate, sizeof gate);
    std::memcpy(u, &up, sizeof up);
    vf a = min(load(g), all(limit)), b = max(min(load(u), all(limit)), all(-limit));
    store(g, a * sigmoid(a) * b * weight);
    std::memcpy(&gate, g, sizeof gate);
    return gate;
}

template <class E>
struct Run {
    const Mixture& m;
    Plan made;
    const E* x;
    int64_t stride, inner_stride;
    std::unique_ptr<float[]> wide;  // hidden values before they are rounded, [rows, inner]
    std::unique_ptr<E[]> hidden;    // [rows, padded inner]

    // A panel of gate and up for all rows of an expert.
    void up(const Group& g, int64_t first, int64_t count, int64_t panel) {
        const ExpertBytes& bytes = m.table[g.expert];
        E* room = scratch<E>(static_cast<size_t>(2 * (panel + kCols) * stride));
        Stored w1 = stored(m, bytes.w1, bytes.w1_scale, m.inner, m.width);
        Stored w3 = stored(m, bytes.w3, bytes.w3_scale, m.inner, m.width);
        const E* gates = decode_panel(w1, first, count, room);
        const E* ups = decode_panel(w3, first, count, room + (panel + kCols) * stride);
        for (int64_t i = 0; i < g.count; i += kRows) {
            int rows = static_cast<int>(g.count - i < kRows ? g.count - i : kRows);
            const Row* row = made.rows.data() + g.first + i;
            const E* xs[kRows];
            for (int r = 0; r < rows; r++) xs[r] = x + row[r].token * stride;
            for (int64_t n = 0; n < count; n += kCols) {
                four gate[kRows], lift[kRows];
                dot_rows(rows, xs, gates + n * stride, stride, stride, gate);
                dot_rows(rows, xs, ups + n * stride, stride, stride, lift);
                size_t columns = static_cast<size_t>(count - n < kCols ? count - n : kCols);
                for (int r = 0; r < rows; r++) {
                    four value = gated(gate[r], lift[r], m.limit, row[r].weight);
                    float* to = wide.get() + (g.first + i + r) * m.inner + first + n;
                    std::memcpy(to, &value, 4 * columns);
                }
            }
        }
    }

    // Hidden values in the type of the activations, then rounded as inputs are.
    void round(int64_t row) {
        float* buffer = scratch<float>(static_cast<size_t>(m.inner + W));
        float* value = wide.get() + row * m.inner;
        if (m.type == Float::bf16)
            for (int64_t i = 0; i < m.inner; i++) value[i] = overleap::OVERLEAP_ISA::wide(narrow(value[i]));
        prepare_row(value, m.inner, m.round_input, buffer, hidden.get() + row * inner_stride);
    }

    // A panel of the outputs of all tokens: experts in turn onto the running sums.
    void down(int64_t first, int64_t count, int64_t panel) {
        float* sums = scratch<float>(static_cast<size_t>(m.tokens * panel));
        std::memset(sums, 0, 4 * static_cast<size_t>(m.tokens * panel));
        thread_local std::vector<E> room;
        if (room.size() < static_cast<size_t>((panel + kCols) * inner_stride))
            room.resize(static_cast<size_t>((panel + kCols) * inner_stride));
        for (const Group& g : made.groups) {
            const ExpertBytes& bytes = m.table[g.expert];
            Stored w2 = stored(m, bytes.w2, bytes.w2_scale, m.width, m.inner);
            const E* weights = decode_panel(w2, first, count, room.data());
            for (int64_t i = 0; i < g.count; i += kRows) {
                int rows = static_cast<int>(g.count - i < kRows ? g.count - i : kRows);
                const Row* row = made.rows.data() + g.first + i;
                const E* xs[kRows];
                for (int r = 0; r < rows; r++)
                    xs[r] = hidden.get() + (g.first + i + r) * inner_stride;
                for (int64_t n = 0; n < count; n += kCols) {
                    four part[kRows];
                    dot_rows(rows, xs, weights + n * inner_stride, inner_stride, inner_stride,
                             part);
                    for (int r = 0; r < rows; r++) {
                        float* to = sums + row[r].token * panel + n;
                        for (int j = 0; j < kCols; j++) to[j] += part[r][j];
                    }
                }
            }
        }
        for (int64_t t = 0; t < m.tokens; t++)
            for (int64_t n = 0; n < count; n++) {
                int64_t at = t * m.width + first + n;
                if (m.type == Float::bf16) static_cast<bf16*>(m.out)[at] = narrow(sums[t * panel + n]);
                else static_cast<float*>(m.out)[at] = sums[t * panel + n];
            }
    }
};

template <class E>
void mixture_as(const Mixture& m) {
    int64_t stride = padded<E>(m.width), inner_stride = padded<E>(m.inner);
    bool same = m.type == (sizeof(E) == 2 ? Float::bf16 : Float::f32);
    std::unique_ptr<E[]> prepared;
    const E* x = static_cast<const E*>(m.x);
    if (!same || stride != m.width || m.round_input) {
        prepared.reset(new E[static_cast<size_t>(m.tokens * stride)]);
        x = prepared.get();
        parallel_ranges(m.threads, m.tokens, 1 + 16384 / (m.width + 1), [&](int64_t a, int64_t b) {
            float* row = scratch<float>(static_cast<size_t>(m.width + W));
            for (int64_t i = a; i < b; i++) {
                E* to = prepared.get() + i * stride;
                if (m.type == Float::bf16)
                    prepare_row(static_cast<const bf16*>(m.x) + i * m.width, m.width,
                                m.round_input, row, to);
                else
                    prepare_row(static_cast<const float*>(m.x) + i * m.width, m.width,
                                m.round_input, row, to);
            }
        });
    }
    Run<E> run{m, plan(m), x, stride, inner_stride, nullptr, nullptr};
    const Plan& made = run.made;
    size_t rows = made.rows.size();
    run.wide.reset(new float[rows * static_cast<size_t>(m.inner)]);
    run.hidden.reset(new E[rows * static_cast<size_t>(inner_stride)]);
    int64_t groups = static_cast<int64_t>(made.groups.size());
    int64_t size = static_cast<int64_t>(sizeof(E)), pieces = 2 * m.threads;

    int64_t panel = panel_rows(stride * size, made.longest, m.inner, (pieces + groups) / (groups + 1) + 1);
    int64_t panels = (m.inner + panel - 1) / panel;
    parallel(m.threads, groups * panels, [&](int64_t task) {
        int64_t first = task % panels * panel;
        int64_t count = m.inner - first < panel ? m.inner - first : panel;
        run.up(made.groups[static_cast<size_t>(task / panels)], first, count, panel);
    });
    parallel_ranges(m.threads, static_cast<int64_t>(rows), 1 + 8192 / (m.inner + 1),
                    [&](int64_t a, int64_t b) { for (int64_t i = a; i < b; i++) run.round(i); });
    panel = panel_rows(inner_stride * size, made.longest, m.width, pieces);
    panels = (m.width + panel - 1) / panel;
    parallel(m.threads, panels, [&](int64_t task) {
        int64_t first = task * panel;
        int64_t count = m.width - first < panel ? m.width - first : panel;
        run.down(first, count, panel);
    });
}

}  // namespace

void mixture(const Mixture& m) {
    bool narrow_enough = m.type == Float::bf16 || (m.round_input && m.form >= Form::fp8);
    if constexpr (kPairs) {
        if (narrow_enough) return mixture_as<bf16>(m);
    }
    mixture_as<float>(m);
}

}  // namespace overleap::OVERLEAP_ISA
