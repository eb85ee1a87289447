// What ../linear.py calls.
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "linear.h"

namespace overleap {
namespace {

// A row of the table that linear.py makes of several weights: data, scale, form, rows, rounded.
struct Entry {
    int64_t data, scale, form, rows, round_input;
};

Stored stored(const Entry& e, int64_t columns) {
    return {at<void>(e.data), at<uint8_t>(e.scale), static_cast<Form>(e.form), e.rows, columns};
}

void call_product(Address x, int x_type, int64_t tokens, int64_t groups, Address data,
                  Address scale, int form, int64_t rows, int64_t columns, bool round_input,
                  Address out, int out_type, int threads) {
    Stored weight{at<void>(data), at<uint8_t>(scale), static_cast<Form>(form), rows, columns};
    Linear linear{weight, round_input, at<void>(out), static_cast<Float>(out_type), rows};
    Product p{at<void>(x), static_cast<Float>(x_type), tokens, groups, columns, nullptr,
              Float::f32, 0, {linear}, threads};
    OVERLEAP_CALL(product)(p);
}

void call_project_back(Address x, int x_type, int64_t tokens, int64_t groups, Address data,
                       Address scale, int form, int64_t rows, int64_t columns, Address outer,
                       Address out, int out_type, int threads) {
    const auto type = static_cast<Float>(x_type);
    std::vector<uint8_t> latent(static_cast<size_t>(tokens * rows * (type == Float::bf16 ? 2 : 4)));
    Stored weight{at<void>(data), at<uint8_t>(scale), static_cast<Form>(form), rows, columns};
    OVERLEAP_CALL(product)(Product{at<void>(x), type, tokens, groups, columns, nullptr, Float::f32,
                                   0, {{weight, false, latent.data(), type, rows}}, threads});
    const Entry& entry = *at<Entry>(outer);
    Linear last{stored(entry, rows), entry.round_input != 0, at<void>(out),
                static_cast<Float>(out_type), entry.rows};
    OVERLEAP_CALL(product)(Product{latent.data(), type, tokens, 1, rows, nullptr, Float::f32, 0,
                                   {last}, threads});
}

void call_mixture(Address x, int type, int64_t tokens, int64_t width, int64_t chosen, Address ids,
                  Address weight, Address routed, int64_t experts, int64_t inner, int form,
                  bool round_input, Address shared, int64_t shared_experts, int64_t shared_inner,
                  int shared_form, bool shared_round_input, float limit, Address out,
                  int threads) {
    Expertise many{at<ExpertBytes>(routed), experts, inner, static_cast<Form>(form), round_input};
    Expertise every{at<ExpertBytes>(shared), shared_experts, shared_inner,
                    static_cast<Form>(shared_form), shared_round_input};
    Mixture m{at<void>(x), static_cast<Float>(type), tokens, width, chosen, at<int64_t>(ids),
              at<float>(weight), many, every, limit, at<void>(out), threads};
    OVERLEAP_CALL(mixture)(m);
}

}  // namespace

// `tables` of the parts, how many weights each has, and where their results go.
void call_project(Address x, int x_type, int64_t tokens, int64_t columns, Address norm,
                  int norm_type, float eps, const std::vector<Address>& tables,
                  const std::vector<int>& counts, const std::vector<Address>& out,
                  const std::vector<int>& out_type, int threads) {
    Product p{at<void>(x), static_cast<Float>(x_type), tokens, 1, columns, at<void>(norm),
              static_cast<Float>(norm_type), eps, {}, threads};
    for (size_t i = 0; i < out.size(); i++) {
        const Entry* entry = at<Entry>(tables[i]);
        const auto type = static_cast<Float>(out_type[i]);
        int64_t width = 0, offset = 0;
        for (int j = 0; j < counts[i]; j++) width += entry[j].rows;
        for (int j = 0; j < counts[i]; j++) {
            void* to = at<uint8_t>(out[i]) + offset * (type == Float::bf16 ? 2 : 4);
            p.linears.push_back(
                {stored(entry[j], columns), entry[j].round_input != 0, to, type, width});
            offset += entry[j].rows;
        }
    }
    OVERLEAP_CALL(product)(p);
}

void bind_linear(nanobind::module_& m) {
    op(m, "product", call_product);
    op(m, "project", call_project);
    op(m, "project_back", call_project_back);
    op(m, "mixture", call_mixture);
}

}  // namespace overleap
