// SPDX-License-Identifier: Apache-2.0
//
// Choosing blocks from estimated weights, whatever the instruction set.
#ifndef KERNEL_PYTORCH_CHOOSE_H_
#define KERNEL_PYTORCH_CHOOSE_H_

#include "plan.h"

// Checks what kp_plan_make doesn't.
int kp_choice_ok(const kp_plan* p, const kp_choice* c);

// A float as an unsigned number of the same order, above 0; NaN counts as the
// greatest.
static inline uint32_t kp_rank(float x) {
  union {
    float f;
    uint32_t u;
  } both = {x};
  if (x != x) return UINT32_MAX;
  return both.u >> 31 ? ~both.u : both.u | 0x80000000u;
}

// Marks the `count` greatest ranks above 0 in chosen[n]; the first of equal
// ones win.
void kp_mark_best(const uint32_t* rank, int64_t n, int64_t count,
                  uint8_t* chosen);

// What one row of blocks is chosen by, and the space for it; [kv_blocks] each.
typedef struct {
  float *mass, *score, *peak;
  uint32_t* rank;
  uint8_t *open, *chosen;
} kp_row;

// Chooses for row t of head h, and writes its list.
void kp_choose_row(const kp_plan* p, const kp_choice* c, int64_t b, int64_t h,
                   int64_t t, kp_row* row);

#endif  // KERNEL_PYTORCH_CHOOSE_H_
