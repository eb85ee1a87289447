// matmul, project and grouped_matmul over plain and packed weights, one row to thousands. Weights are
// decoded W rows at a time into a panel that fits a core's cache, never as a whole.
#include <algorithm>

#include "inputs.h"

namespace overleap::OVERLEAP_ISA {
namespace {

constexpr int64_t kBlock = 192;  // activation rows of a task, where there are few panels
constexpr int64_t kTaskElements = 1 << 14;  // of weights, that are worth a task of their own

// W outputs of a row, or as many as there are.
void put_outputs(void* out, Float type, int64_t at, vf sums, int count) {
    typed(type, [&](auto e) {
        auto* to = static_cast<decltype(e)*>(out) + at;
        if (count == W) store(to, sums);
        else store_part(to, sums, count);
    });
}

// A weight's panels, in the order of its rows: those of a group follow one another.
struct Work {
    const Linear* linear;
    int64_t rows, panels;  // of a group; of all groups
};

template <class E>
class Run {
  public:
    Run(const Product& p, const std::vector<const Linear*>& linears)
        : p_(p), x_(given(p), any(linears, false), any(linears, true), p.threads) {
        for (const Linear* linear : linears) {
            int64_t rows = linear->weight.rows / p.groups;
            work_.push_back({linear, rows, p.groups * ((rows + W - 1) / W)});
            panels_ += work_.back().panels;
        }
        if (kMatrix<E> && p.tokens > kFew)
            for (bool rounded : {false, true})
                if (any(linears, rounded)) tile(rounded);
    }

    void run() {
        const int64_t enough = 2 * p_.threads;
        int64_t blocks = 1;
        if (panels_ < enough) blocks = (p_.tokens + kBlock - 1) / kBlock;
        const int64_t size = (p_.tokens + blocks - 1) / blocks;
        // One panel a task where it meets many rows; of few rows, a task has several.
        const int64_t fit = kTaskElements / (W * x_.stride() * ((p_.tokens + kTall - 1) / kTall)) + 1;
        auto shared_by = [&](int64_t tasks) { return (panels_ + tasks - 1) / tasks; };
        const int64_t grain = p_.tokens <= kFew ? std::max(fit, shared_by(enough))
                                                : std::min(fit, shared_by(2 * enough));
        const int64_t tasks = (panels_ + grain - 1) / grain * blocks;
        parallel(p_.threads, tasks, [&](int64_t task) {
            const int64_t from = task % blocks * size;
            const int64_t to = from + size < p_.tokens ? from + size : p_.tokens;
            const int64_t first = task / blocks * grain;
            const int64_t last = first + grain < panels_ ? first + grain : panels_;
            some(first, last, from, to);
        });
    }

  private:
    static Given given(const Product& p) {
        return {p.x, p.x_type, p.tokens * p.groups, p.columns, p.norm, p.norm_type, p.eps};
    }

    static bool any(const std::vector<const Linear*>& linears, bool rounded) {
        for (const Linear* linear : linears)
            if (linear->round_input == rounded) return true;
        return false;
    }

    void tile(bool rounded) {
        Tiled<E>& to = tiled_[rounded];
        const int64_t rows = p_.tokens * p_.groups;
        to.resize(rows, p_.columns, kTileRows * p_.groups);
        parallel_ranges(p_.threads, rows, 1 + 16384 / (x_.stride() + 1), [&](int64_t a, int64_t b) {
            for (int64_t i = a; i < b; i++) to.put(i, x_.row(i, rounded), p_.columns);
        });
    }

    // The number-th panel of all, with its linear and the group of activations that it meets.
    struct Place {
        const Linear* linear;
        int64_t group;
        Panel panel;
    };

    Place place(int64_t number) const {
        const Work* work = work_.data();
        while (number >= work->panels) number -= work++->panels;
        const int64_t of_group = (work->rows + W - 1) / W, group = number / of_group;
        const int64_t within = number % of_group * W;
        const int count = static_cast<int>(std::min<int64_t>(work->rows - within, W));
        return {work->linear, group, {work->linear->weight, group * work->rows + within, count}};
    }

    // Panels [first, last) against activation rows [from, to).
    void some(int64_t first, int64_t last, int64_t from, int64_t to) const {
        Place here = place(first);
        for (int64_t number = first; number < last; number++) {
            const bool more = number + 1 < last;
            const Place next = more ? place(number + 1) : here;
            const Linear& linear = *here.linear;
            const Tiled<E>& tiled = tiled_[linear.round_input];
            const Rows rows{
                [&](int64_t t) { return x_.row(t * p_.groups + here.group, linear.round_input); },
                tiled.row(here.group), tiled.apart() * p_.groups};
            meet(here.panel, more ? &next.panel : nullptr, from, to, rows,
                [&](int64_t t, vf sums) {
                    put_outputs(linear.out, linear.out_type, t * linear.out_stride + here.panel.first,
                                sums, here.panel.count);
                });
            here = next;
        }
    }

    const Product& p_;
    Inputs<E> x_;
    Tiled<E> tiled_[2];  // of many rows for the matrix unit: plain, rounded
    std::vector<Work> work_;
    int64_t panels_ = 0;
};

}  // namespace

void product(const Product& p) {
    if (!p.tokens) return;
    std::vector<const Linear*> narrow, wide;
    for (const Linear& linear : p.linears) {
        bool is = narrow_enough(p.x_type, linear.round_input, linear.weight.form);
        (is ? narrow : wide).push_back(&linear);
    }
    if constexpr (kPairs) {
        if (!narrow.empty()) Run<bf16>(p, narrow).run();
    }
    if (!wide.empty()) Run<float>(p, wide).run();
}

}  // namespace overleap::OVERLEAP_ISA
