// What ../sampling.py calls.
#include "bind.h"

#include <nanobind/stl/vector.h>

#include "sampling.h"

namespace overleap {

void bind_sampling(nanobind::module_& m) {
    using Values = std::vector<double>;
    m.def(
        "sample",
        [](Address logits, int64_t rows, int64_t vocabulary, const Values& temperature,
           const std::vector<int64_t>& top_k, const Values& top_p, const Values& min_p,
           const Values& number, Address allowed, int64_t best, Address ids, Address logprob,
           int threads) {
            Sampling s{at<float>(logits), rows, vocabulary,
                       {temperature, top_p, min_p, number, top_k},
                       at<uint8_t>(allowed), best, at<int64_t>(ids), at<double>(logprob), threads};
            OVERLEAP_CALL(sample)(s);
        },
        Unlocked());
}

}  // namespace overleap
