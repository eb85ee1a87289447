// What every family of ops binds with.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

#include "rows.h"
#include "tape.h"

namespace overleap {

// An address as Python passes it: Tensor.data_ptr(), 0 for none.
using Address = uint64_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Kernels never touch Python objects, so other threads may run Python meanwhile.
using Unlocked = nanobind::call_guard<nanobind::gil_scoped_release>;

// An op that a step calls.
template <class... A>
void op(nanobind::module_& m, const char* name, void (*call)(A...)) {
    m.def(name, taped(call), Unlocked());
}

// Sequences come by reference, since a step that is played again has moved on: tape.h.

// The last `capacity` rows of every sequence into its ring; rows of `bytes`.
void window_write(Address ring, int64_t capacity, int64_t bytes, Address rows,
                  Sequences* sequences);

// What ../linear.py and ../rows.py call, and ../attention.py in one go.
void call_project(Address x, int x_type, int64_t tokens, int64_t columns, Address norm,
                  int norm_type, float eps, const std::vector<Address>& tables,
                  const std::vector<int>& counts, const std::vector<Address>& out,
                  const std::vector<int>& out_type, int threads);
void call_norm_rope_quantize(Address x, int type, int64_t count, int64_t heads, int64_t width,
                             bool normed, Address weight, int weight_type, float eps,
                             Address position, Address frequency, int64_t rotary, bool mixed,
                             bool packed, bool key, int64_t rope, int64_t bytes, Address out,
                             int threads);

void bind_linear(nanobind::module_& m);     // matmul, grouped_matmul, experts
void bind_attention(nanobind::module_& m);  // index_topk, attend
void bind_rows(nanobind::module_& m);       // norms, rotation, rows, compress, route, streams
void bind_sampling(nanobind::module_& m);   // sample
void bind_ceiling(nanobind::module_& m);    // reading memory, nothing else

}  // namespace overleap
