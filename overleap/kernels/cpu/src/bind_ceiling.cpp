// What ../../conformance/ceilings.py calls.
#include "bind.h"
#include "ceiling.h"

namespace overleap {

void bind_ceiling(nanobind::module_& m) {
    m.def(
        "read_all",
        [](Address from, int64_t bytes, Address out, int threads) {
            Reading r{at<uint8_t>(from), bytes, at<uint32_t>(out), threads};
            OVERLEAP_CALL(read_all)(r);
        },
        Unlocked());
}

}  // namespace overleap
