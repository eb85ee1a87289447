// Products with stored weights. See ../linear.py for the ops.
#pragma once

#include "isa.h"

namespace overleap {

OVERLEAP_EVERY_ISA(int vector_width();)

}  // namespace overleap
