// matmul and grouped_matmul over plain and packed weights, one row to thousands.
// Weights are decoded a panel at a time into a buffer that fits the cache, never as a whole.
#include <memory>

#include "dot.h"
#include "linear.h"
#include "threads.h"

namespace overleap::OVERLEAP_ISA {
namespace {

constexpr int64_t kPanelBytes = 192 * 1024;  // of a core's second-level cache, many rows
constexpr int64_t kFewBytes = 16 * 1024;     // of its first, few rows: decoded and used at once
constexpr int64_t kBlock = 192;              // activation rows of a task, where panels are few

// Activations as elements [tokens * groups, padded columns]: the given ones where they serve.
template <class E>
const E* prepare(const Product& p, std::unique_ptr<E[]>& buffer) {
    int64_t columns = p.weight.columns, stride = padded<E>(columns), rows = p.tokens * p.groups;
    bool same = p.x_type == (sizeof(E) == 2 ? Float::bf16 : Float::f32);
    if (same && stride == columns && !p.round_input) return static_cast<const E*>(p.x);
    buffer.reset(new E[static_cast<size_t>(rows * stride)]);
    int64_t grain = 1 + 16384 / (columns + 1);
    parallel_ranges(p.threads, rows, grain, [&](int64_t begin, int64_t end) {
        float* row = scratch<float>(static_cast<size_t>(columns + W));
        for (int64_t i = begin; i < end; i++) {
            E* out = buffer.get() + i * stride;
            if (p.x_type == Float::bf16)
                prepare_row(static_cast<const bf16*>(p.x) + i * columns, columns, p.round_input,
                            row, out);
            else
                prepare_row(static_cast<const float*>(p.x) + i * columns, columns, p.round_input,
                            row, out);
        }
    });
    return buffer.get();
}

void put_four(void* out, Float type, int64_t at, four sums, int64_t count) {
    if (type == Float::bf16) {
        bf16 rounded[kCols];
        narrow4(rounded, sums);
        std::memcpy(static_cast<bf16*>(out) + at, rounded, 2 * static_cast<size_t>(count));
    } else {
        std::memcpy(static_cast<float*>(out) + at, &sums, 4 * static_cast<size_t>(count));
    }
}

template <class E>
void product_as(const Product& p) {
    std::unique_ptr<E[]> buffer;
    const E* x = prepare(p, buffer);
    const Stored& w = p.weight;
    int64_t stride = padded<E>(w.columns), per_group = w.rows / p.groups;
    int64_t bytes = p.tokens <= kRows ? kFewBytes : kPanelBytes;
    int64_t fit = bytes / (stride * static_cast<int64_t>(sizeof(E)) + 1) / kCols * kCols;
    int64_t panel = fit < kCols ? kCols : fit;
    int64_t even = (per_group / (2 * p.threads) + kCols - 1) / kCols * kCols;
    if (even >= kCols && even < panel) panel = even;
    int64_t panels = (per_group + panel - 1) / panel;
    int64_t blocks = 1;
    if (panels * p.groups < 2 * p.threads) blocks = (p.tokens + kBlock - 1) / kBlock;
    parallel(p.threads, p.groups * panels * blocks, [&](int64_t task) {
        int64_t block = task % blocks, at = task / blocks % panels, group = task / blocks / panels;
        int64_t row = group * per_group + at * panel;
        int64_t count = per_group - at * panel < panel ? per_group - at * panel : panel;
        E* room = scratch<E>(static_cast<size_t>((panel + kCols) * stride));
        const E* weights = decode_panel(w, row, count, room);
        int64_t first = block * ((p.tokens + blocks - 1) / blocks);
        int64_t last = (block + 1) * ((p.tokens + blocks - 1) / blocks);
        if (last > p.tokens) last = p.tokens;
        for (int64_t t = first; t < last; t += kRows) {
            int rows = static_cast<int>(last - t < kRows ? last - t : kRows);
            const E* xs[kRows];
            for (int r = 0; r < rows; r++) xs[r] = x + ((t + r) * p.groups + group) * stride;
            for (int64_t n = 0; n < count; n += kCols) {
                four sums[kRows];
                dot_rows(rows, xs, weights + n * stride, stride, stride, sums);
                int64_t columns = count - n < kCols ? count - n : kCols;
                for (int r = 0; r < rows; r++)
                    put_four(p.out, p.out_type, (t + r) * w.rows + row + n, sums[r], columns);
            }
        }
    });
}

}  // namespace

void product(const Product& p) {
    bool narrow_enough = p.x_type == Float::bf16 || (p.round_input && p.weight.form >= Form::fp8);
    if constexpr (kPairs) {
        if (narrow_enough) return product_as<bf16>(p);
    }
    product_as<float>(p);
}

}  // namespace overleap::OVERLEAP_ISA
