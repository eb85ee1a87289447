// The chosen experts of every token: only their bytes are read, rows are gathered by expert.
// A token's sum runs over its experts in order of their numbers, the shared ones last, whatever else is
// in the call.
#include <algorithm>

#include "inputs.h"

namespace overleap::OVERLEAP_ISA {
namespace {

constexpr int64_t kTaskRows = 64;  // of weights, that few rows of activations make worth a task

// One chosen pair (token, expert), in order of experts, tokens ascending within.
struct Row {
    int64_t token;
    float weight;
};

// Rows of one expert that has any.
struct Group {
    const ExpertBytes* bytes;
    const Expertise* expertise;
    int64_t first, count;
};

struct Plan {
    std::vector<Row> rows;
    std::vector<Group> groups;
};

Plan plan(const Mixture& m) {
    Plan made;
    std::vector<int64_t> start(static_cast<size_t>(m.routed.count) + 1, 0);
    const int64_t pairs = m.tokens * m.chosen;
    for (int64_t i = 0; i < pairs; i++) start[static_cast<size_t>(m.ids[i]) + 1]++;
    for (int64_t e = 0; e < m.routed.count; e++) {
        int64_t count = start[static_cast<size_t>(e) + 1], first = start[static_cast<size_t>(e)];
        if (count) made.groups.push_back({m.routed.table + e, &m.routed, first, count});
        start[static_cast<size_t>(e) + 1] = first + count;
    }
    made.rows.resize(static_cast<size_t>(pairs));
    for (int64_t i = 0; i < pairs; i++) {
        int64_t at = start[static_cast<size_t>(m.ids[i])]++;
        made.rows[static_cast<size_t>(at)] = {i / m.chosen, m.weight[i]};
    }
    for (int64_t e = 0; e < m.shared.count && m.tokens; e++) {
        int64_t first = static_cast<int64_t>(made.rows.size());
        made.groups.push_back({m.shared.table + e, &m.shared, first, m.tokens});
        for (int64_t t = 0; t < m.tokens; t++) made.rows.push_back({t, 1.0f});
    }
    return made;
}

Stored stored(uint64_t data, uint64_t scale, Form form, int64_t rows, int64_t columns) {
    return {reinterpret_cast<const void*>(data), reinterpret_cast<const uint8_t*>(scale), form,
            rows, columns};
}

// silu(min(gate, limit)) * clamp(up, +-limit) * weight
vf gated(vf gate, vf up, float limit, float weight) {
    vf a = min(gate, all(limit)), b = max(min(up, all(limit)), all(-limit));
    return a * sigmoid(a) * b * weight;
}

template <class E>
class Run {
  public:
    explicit Run(const Mixture& m)
        : m_(m), plan_(plan(m)), x_({m.x, m.type, m.tokens, m.width, nullptr, m.type, 0}, wants(false),
                                    wants(true), m.threads) {
        for (const Group& g : plan_.groups) {
            inner_ = std::max(inner_, g.expertise->inner);
            longest_ = std::max(longest_, g.count);
        }
        stride_ = whole_columns(inner_);
        const int64_t rows = static_cast<int64_t>(plan_.rows.size());
        wide_.resize(rows * stride_);
        hidden_.resize(rows * stride_);
    }

    void run() {
        const int64_t rows = static_cast<int64_t>(plan_.rows.size());
        // One panel a task where it meets many rows; of few rows, a task has several.
        const int64_t fit = longest_ > kTall ? 1 : std::max<int64_t>(1, kTaskRows / W);
        const int64_t tall = (inner_ + W - 1) / W, broad = (m_.width + W - 1) / W;
        const int64_t groups = static_cast<int64_t>(plan_.groups.size());
        parallel_ranges(m_.threads, groups * tall, fit, [&](int64_t a, int64_t b) {
            for (int64_t i = a; i < b; i++) up(plan_.groups[static_cast<size_t>(i / tall)], i % tall * W);
        });
        parallel_ranges(m_.threads, rows, 1 + 8192 / (inner_ + 1), [&](int64_t a, int64_t b) {
            for (const Group& g : plan_.groups)
                for (int64_t i = std::max(a, g.first); i < std::min(b, g.first + g.count); i++)
                    round(i, *g.expertise);
        });
        parallel(m_.threads, broad, [&](int64_t i) { down(i * W); });
    }

  private:
    bool wants(bool rounded) const {
        return m_.routed.round_input == rounded || (m_.shared.count && m_.shared.round_input == rounded);
    }

    // W inner values of all rows of an expert, from `first` on.
    void up(const Group& g, int64_t first) {
        const int64_t inner = g.expertise->inner, left = inner - first;
        if (left <= 0) return;
        const int count = static_cast<int>(std::min<int64_t>(left, W));
        const Form form = g.expertise->form;
        float* gates = room<float, 2>(g.count * W) - g.first * W;
        auto x = [&](int64_t i) {
            return x_.row(plan_.rows[static_cast<size_t>(i)].token, g.expertise->round_input);
        };
        meet<E>(stored(g.bytes->w1, g.bytes->w1_scale, form, inner, m_.width), first, count, g.first,
                g.first + g.count, x, [&](int64_t i, vf gate) { store(gates + i * W, gate); });
        meet<E>(stored(g.bytes->w3, g.bytes->w3_scale, form, inner, m_.width), first, count, g.first,
                g.first + g.count, x, [&](int64_t i, vf up) {
                    const float weight = plan_.rows[static_cast<size_t>(i)].weight;
                    vf value = gated(load(gates + i * W), up, m_.limit, weight);
                    float* to = wide_.data() + i * stride_ + first;
                    if (count == W) store(to, value);
                    else store_part(to, value, count);
                });
    }

    // Hidden values in the type of the activations, then rounded as inputs are.
    void round(int64_t i, const Expertise& of) {
        float* value = wide_.data() + i * stride_;
        E* to = hidden_.data() + i * stride_;
        if (m_.type == Float::bf16)
            vectors(of.inner, [&](int64_t j, auto lanes) {
                bf16 few[W];
                lanes.write(few, lanes.read(value + j));
                lanes.write(value + j, lanes.read(few));
            });
        Given given{value, Float::f32, 1, of.inner, nullptr, Float::f32, 0};
        prepare_given(given, value, of.round_input ? nullptr : to, of.round_input ? to : nullptr);
    }

    // W outputs of all tokens: experts in turn onto the running sums.
    void down(int64_t first) {
        const int count = static_cast<int>(std::min<int64_t>(m_.width - first, W));
        float* sums = room<float, 3>(m_.tokens * W);
        std::memset(sums, 0, 4 * static_cast<size_t>(m_.tokens * W));
        for (const Group& g : plan_.groups) {
            const Expertise& of = *g.expertise;
            meet<E>(stored(g.bytes->w2, g.bytes->w2_scale, of.form, m_.width, of.inner), first, count,
                    g.first, g.first + g.count,
                    [&](int64_t i) { return hidden_.data() + i * stride_; },
                    [&](int64_t i, vf part) {
                        float* to = sums + plan_.rows[static_cast<size_t>(i)].token * W;
                        store(to, load(to) + part);
                    });
        }
        typed(m_.type, [&](auto e) {
            auto* out = static_cast<decltype(e)*>(m_.out) + first;
            for (int64_t t = 0; t < m_.tokens; t++)
                if (count == W) store(out + t * m_.width, load(sums + t * W));
                else store_part(out + t * m_.width, load(sums + t * W), count);
        });
    }

    const Mixture& m_;
    Plan plan_;
    Inputs<E> x_;
    int64_t inner_ = 0, longest_ = 0, stride_ = 0;
    RawBuffer<float> wide_;  // hidden values before they are rounded, [rows, stride]
    RawBuffer<E> hidden_;    // [rows, stride]
};

}  // namespace

void mixture(const Mixture& m) {
    bool narrow = narrow_enough(m.type, m.routed.round_input, m.routed.form) &&
                  (!m.shared.count || narrow_enough(m.type, m.shared.round_input, m.shared.form));
    if constexpr (kPairs) {
        if (narrow) return Run<bf16>(m).run();
    }
    Run<float>(m).run();
}

}  // namespace overleap::OVERLEAP_ISA
