// What ../linear.py calls.
#include "bind.h"
#include "linear.h"

namespace overleap {

static void call_product(Address x, int x_type, int64_t tokens, int64_t groups, Address data,
                         Address scale, int form, int64_t rows, int64_t columns, bool round_input,
                         Address out, int out_type, int threads) {
    Stored weight{at<void>(data), at<uint8_t>(scale), static_cast<Form>(form), rows, columns};
    Product p{at<void>(x), static_cast<Float>(x_type), tokens, groups, weight, round_input,
              at<void>(out), static_cast<Float>(out_type), threads};
    OVERLEAP_CALL(product)(p);
}

static void call_mixture(Address x, int type, int64_t tokens, int64_t width, int64_t inner,
                         int64_t chosen, int64_t experts, Address ids, Address weight,
                         Address table, int form, float limit, bool round_input, Address out,
                         int threads) {
    Mixture m{at<void>(x), static_cast<Float>(type), tokens, width, inner, chosen, experts,
              at<int64_t>(ids), at<float>(weight), at<ExpertBytes>(table),
              static_cast<Form>(form), limit, round_input, at<void>(out), threads};
    OVERLEAP_CALL(mixture)(m);
}

void bind_linear(nanobind::module_& m) {
    m.def("product", call_product, Unlocked());
    m.def("mixture", call_mixture, Unlocked());
}

}  // namespace overleap
