// Bindings of index_topk and attend; ../attention.py has checked shapes and dtypes.
#include "bind.h"

#include <nanobind/stl/vector.h>

#include "attention.h"
#include "rows.h"

namespace overleap {
namespace {

using Counts = std::vector<int64_t>;

std::vector<Stretch> stretches(const Counts& start, const Counts& count, const Counts& slot) {
    std::vector<Stretch> found(start.size());
    int64_t first = 0;
    for (size_t b = 0; b < start.size(); b++) {
        found[b] = {start[b], count[b], first, slot[b]};
        first += count[b];
    }
    return found;
}

RowLayout layout(int kind, int64_t width, int64_t rope, int64_t bytes) {
    return {static_cast<RowKind>(kind), width, rope, bytes};
}

}  // namespace

void bind_attention(nanobind::module_& m) {
    m.def(
        "index_topk",
        [](Address q, Address weight, int64_t heads, Address keys, int kind, int64_t width,
           int64_t bytes, int64_t per_page, Address table, int64_t table_width, int64_t ratio,
           int64_t k, const Counts& start, const Counts& count, const Counts& slot, Address out,
           int threads) {
            Pages pages{at<const uint8_t>(keys), layout(kind, width, 0, bytes), per_page,
                        at<const int64_t>(table), table_width};
            Choice choice{at<const uint8_t>(q), at<const float>(weight), heads, pages, ratio, k,
                          stretches(start, count, slot), at<int64_t>(out), threads};
            OVERLEAP_CALL(choose)(choice);
        },
        Unlocked());
    m.def(
        "attend",
        [](Address q, bool half, int64_t heads, Address fresh, Address ring, int64_t ring_rows,
           int kind, int64_t width, int64_t rope, int64_t bytes, Address entries, int64_t per_page,
           Address table, int64_t table_width, Address chosen, int64_t k, int64_t ratio,
           Address sink, float scale, int64_t window, const Counts& start, const Counts& count,
           const Counts& slot, Address out, Address log, Address frequency, int64_t rotary,
           Address position, int threads) {
            RowLayout rows = layout(kind, width, rope, bytes);
            Pages pages{at<const uint8_t>(entries), rows, per_page, at<const int64_t>(table),
                        table_width};
            Attention attention{at<const void>(q), half ? Float::bf16 : Float::f32, heads, width,
                                at<const uint8_t>(fresh), at<const uint8_t>(ring), ring_rows, rows,
                                pages, at<const int64_t>(chosen), k, ratio, at<const float>(sink),
                                scale, window, stretches(start, count, slot), at<void>(out),
                                at<float>(log), threads};
            OVERLEAP_CALL(attend)(attention);
            if (!frequency) return;
            const int64_t tokens = attention.sequences.back().first + count.back();
            Rows turned{at<void>(out), attention.type, tokens * heads, heads, width, at<void>(out),
                        threads};
            OVERLEAP_CALL(rotate)(turned, Turn{at<int64_t>(position), at<float>(frequency), rotary, true});
            window_write(ring, ring_rows, bytes, fresh, start, count, slot);
        },
        Unlocked());
}

}  // namespace overleap
