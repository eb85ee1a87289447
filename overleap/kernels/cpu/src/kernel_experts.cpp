// The chosen experts of every token: only their bytes are read, rows are gathered by expert.
// A token's sum runs over its experts in order of their numbers, the shared ones last, whatever else is
// in the call.
#include <algorithm>
#include <stdexcept>

#include "inputs.h"

namespace overleap::OVERLEAP_ISA {
namespace {

constexpr int64_t kTaskPanels = 4;  // that few rows of activations make worth a task

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
    for (int64_t i = 0; i < pairs; i++) {
        if (m.ids[i] < 0 || m.ids[i] >= m.routed.count)
            throw std::out_of_range("an expert was chosen that is not there");
        start[static_cast<size_t>(m.ids[i]) + 1]++;
    }
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
    // A NaN stays one where it stands second.
    vf a = min(all(limit), gate), b = max(all(-limit), min(all(limit), up));
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
        if (kMatrix<E> && longest_ > kFew) tile(rows);
    }

    void run() {
        const int64_t rows = static_cast<int64_t>(plan_.rows.size());
        const int64_t tall = (inner_ + W - 1) / W, broad = (m_.width + W - 1) / W;
        const int64_t groups = static_cast<int64_t>(plan_.groups.size());
        parallel_ranges(m_.threads, groups * tall, grain(groups * tall), [&](int64_t a, int64_t b) {
            for (int64_t i = a; i < b; i++) up(i, i + 1 < b ? i + 1 : i, tall);
        });
        parallel_ranges(m_.threads, rows, 1 + 8192 / (inner_ + 1), [&](int64_t a, int64_t b) {
            for (const Group& g : plan_.groups)
                for (int64_t i = std::max(a, g.first); i < std::min(b, g.first + g.count); i++)
                    round(i, *g.expertise);
        });
        parallel_ranges(m_.threads, broad, grain(broad), [&](int64_t a, int64_t b) {
            for (int64_t i = a; i < b; i++) down(i * W, (i + 1 < b ? i + 1 : i) * W);
        });
    }

  private:
    // Rows of activations side by side for the matrix unit, expert by expert.
    void tile(int64_t rows) {
        tiled_.resize(rows, m_.width, kTileRows);
        tiled_hidden_.resize(rows, inner_, kTileRows);
        parallel_ranges(m_.threads, rows, 1 + 16384 / (m_.width + 1), [&](int64_t a, int64_t b) {
            for (const Group& g : plan_.groups)
                for (int64_t i = std::max(a, g.first); i < std::min(b, g.first + g.count); i++)
                    tiled_.put(i, x(i, g), m_.width);
        });
    }

    const E* x(int64_t i, const Group& g) const {
        return x_.row(plan_.rows[static_cast<size_t>(i)].token, g.expertise->round_input);
    }

    // One panel a task where it meets many rows; where few, a thread has several in a row.
    int64_t grain(int64_t panels) const {
        if (longest_ > kTall) return 1;
        return std::max<int64_t>(kTaskPanels, (panels + 2 * m_.threads - 1) / (2 * m_.threads));
    }

    // W rows of w1, w2 or w3 of a group's expert.
    Panel panel(const Group& g, int which, int64_t first) const {
        const ExpertBytes& b = *g.bytes;
        const int64_t inner = g.expertise->inner, width = m_.width;
        const uint64_t data = which == 1 ? b.w1 : which == 2 ? b.w2 : b.w3;
        const uint64_t scale = which == 1 ? b.w1_scale : which == 2 ? b.w2_scale : b.w3_scale;
        const int64_t rows = which == 2 ? width : inner, columns = which == 2 ? inner : width;
        return {stored(data, scale, g.expertise->form, rows, columns), first,
                static_cast<int>(std::min<int64_t>(rows - first, W))};
    }

    bool wants(bool rounded) const {
        return m_.routed.round_input == rounded || (m_.shared.count && m_.shared.round_input == rounded);
    }

    // W inner values of all rows of an expert: the number-th such panel of all groups.
    void up(int64_t number, int64_t next_number, int64_t tall) {
        const Group& g = plan_.groups[static_cast<size_t>(number / tall)];
        const Group& then = plan_.groups[static_cast<size_t>(next_number / tall)];
        const int64_t first = number % tall * W;
        if (first >= g.expertise->inner) return;
        const Panel gate = panel(g, 1, first), other = panel(g, 3, first);
        const Panel next = panel(then, 1, next_number % tall * W);
        const int count = gate.count;
        float* gates = room<float, 2>(g.count * W) - g.first * W;
        const Rows rows{[&](int64_t i) { return x(i, g); }, tiled_.row(0), tiled_.apart()};
        meet(gate, &other, g.first, g.first + g.count, rows,
             [&](int64_t i, vf value) { store(gates + i * W, value); });
        meet(other, number == next_number || next.count <= 0 ? nullptr : &next, g.first,
             g.first + g.count, rows, [&](int64_t i, vf up) {
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
        if (tiled_hidden_.apart()) tiled_hidden_.put(i, to, of.inner);
    }

    // W outputs of all tokens: experts in turn onto the running sums.
    void down(int64_t first, int64_t next_first) {
        const int count = static_cast<int>(std::min<int64_t>(m_.width - first, W));
        float* sums = room<float, 3>(m_.tokens * W);
        std::memset(sums, 0, 4 * static_cast<size_t>(m_.tokens * W));
        for (size_t i = 0; i < plan_.groups.size(); i++) {
            const Group& g = plan_.groups[i];
            const bool last = i + 1 == plan_.groups.size();
            const Panel next = panel(plan_.groups[last ? 0 : i + 1], 2, last ? next_first : first);
            const Rows rows{[&](int64_t j) -> const E* { return hidden_.data() + j * stride_; },
                            tiled_hidden_.row(0), tiled_hidden_.apart()};
            meet(panel(g, 2, first), last && first == next_first ? nullptr : &next, g.first,
                 g.first + g.count, rows, [&](int64_t j, vf part) {
                     float* to = sums + plan_.rows[static_cast<size_t>(j)].token * W;
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
    Tiled<E> tiled_, tiled_hidden_;  // the rows of x and hidden_, where many meet an expert
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
