#include "formats.h"
#include "linear.h"

namespace overleap::OVERLEAP_ISA {

int vector_width() { return W; }

}  // namespace overleap::OVERLEAP_ISA
