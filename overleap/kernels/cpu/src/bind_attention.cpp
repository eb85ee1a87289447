// Bindings of index_topk; ../attention.py has checked shapes and dtypes.
#include "bind.h"

#include <nanobind/stl/vector.h>

#include "attention.h"

namespace overleap {
namespace {

using Counts = std::vector<int64_t>;

std::vector<Stretch> stretches(const Counts& start, const Counts& count) {
    std::vector<Stretch> found(start.size());
    int64_t first = 0;
    for (size_t b = 0; b < start.size(); b++) {
        found[b] = {start[b], count[b], first};
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
           int64_t k, const Counts& start, const Counts& count, Address out, int threads) {
            Pages pages{at<const uint8_t>(keys), layout(kind, width, 0, bytes), per_page,
                        at<const int64_t>(table), table_width};
            Choice choice{at<const uint8_t>(q), at<const float>(weight), heads, pages, ratio, k,
                          stretches(start, count), at<int64_t>(out), threads};
            OVERLEAP_CALL(choose)(choice);
        },
        Unlocked());
}

}  // namespace overleap
