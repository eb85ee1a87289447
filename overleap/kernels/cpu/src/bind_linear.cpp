#include "bind.h"
#include "linear.h"

namespace overleap {

void bind_linear(nanobind::module_& m) {
    m.def("vector_width", [] { return OVERLEAP_CALL(vector_width)(); });
}

}  // namespace overleap
