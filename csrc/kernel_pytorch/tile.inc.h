// SPDX-License-Identifier: Apache-2.0
//
// One source for every instruction set. The including file defines KP(name),
// the vector width W, the vectors in a micro-tile NV, the type vf and the
// functions v_*.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "plan.h"

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num(void) { return 0; }
#endif

#define INLINE static inline __attribute__((always_inline))
#define TILE 64  // keys, and in the backward pass queries, of one tile

// Each file defines what the next one uses, so the order matters.
// clang-format off
#include "gemm.inc.h"
#include "rows.inc.h"
#include "forward.inc.h"
#include "backward.inc.h"
#include "choose.inc.h"
#include "survey.inc.h"
#include "select.inc.h"
// clang-format on
