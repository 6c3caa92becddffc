// SPDX-License-Identifier: Apache-2.0
//
// What both passes know before they start: checked arguments, and the mask and
// the lists in the form that the inner loops ask for.
//
// Keys are handled in panels of 16, so that a row list of small blocks fills
// the vectors as well as one of large blocks.
#ifndef KERNEL_PYTORCH_PLAN_H_
#define KERNEL_PYTORCH_PLAN_H_

#include <stddef.h>
#include <stdint.h>

#include "block_sparse.h"

// Below this exp2 gives 0. Weights so small change no sum in float32, and a
// little further down subnormal numbers make the arithmetic a hundred times
// slower.
#define SMALLEST -100.0f

#define KP_PANEL 16
#define KP_MAX_DIM 256
#define KP_LOG2E 1.44269504088896340736f
#define KP_LN2 0.69314718055994530942f

enum { KP_EMPTY, KP_FULL, KP_MIXED };

typedef struct kp_plan {
  const kp_args* a;
  int64_t q_blocks, kv_blocks, threads;
  int64_t panels, extra_panels;  // of keys, and of the remainder's
  int32_t* hidden;  // [batch][kv_len + 1] padded keys before, or null
  uint16_t* shown;  // [batch][panels] one bit for each key that padding leaves
  int32_t*
      same;  // [batch][positions] end of the run of equal documents, or null
  int64_t words;   // of 64 bits in a row of `rest`
  uint64_t* rest;  // [batch][heads][q_blocks][words] blocks in the remainder
  int64_t* turned_start;  // [index_batch][heads][kv_blocks + 1] into `turned`
  int32_t* turned;        // blocks of queries that attend to a block of keys
  int32_t* order;  // [index_batch][heads][q_blocks] rows, the longest first
} kp_plan;

typedef enum { KP_DO_FORWARD, KP_DO_BACKWARD, KP_DO_SELECT } kp_pass;

// Checks every argument and index, then allocates. Returns a KP_* code.
int kp_plan_make(const kp_args* a, kp_pass pass, kp_plan* p);
void kp_plan_free(kp_plan* p);

// Checks what kp_plan_make doesn't.
int kp_choice_ok(const kp_plan* p, const kp_choice* c);

// 64-byte aligned; null when there is no memory or the size overflows.
void* kp_alloc(int64_t count, int64_t size);

int kp_forward_generic(const kp_plan* p);
int kp_forward_avx2(const kp_plan* p);
int kp_forward_avx512(const kp_plan* p);
int kp_backward_generic(const kp_plan* p);
int kp_backward_avx2(const kp_plan* p);
int kp_backward_avx512(const kp_plan* p);
int kp_select_generic(const kp_plan* p, const kp_choice* c);
int kp_select_avx2(const kp_plan* p, const kp_choice* c);
int kp_select_avx512(const kp_plan* p, const kp_choice* c);

static inline int64_t kp_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t kp_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t kp_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Do queries [q0, q1) see none, all or some of the keys [k0, k1), padding
// aside? Where the answer is not KP_MIXED, all these queries see the same keys.
static inline int kp_kind_unpadded(const kp_plan* p, int64_t batch, int64_t q0,
                                   int64_t q1, int64_t k0, int64_t k1) {
  const kp_args* a = p->a;
  int kind = KP_FULL;
  if (a->causal) {
    if (k0 > q1 - 1) return KP_EMPTY;
    if (k1 - 1 > q0) kind = KP_MIXED;
  }
  if (a->window) {
    if (k1 - 1 <= q0 - a->window) return KP_EMPTY;
    if (k0 >= q1 - 1 + a->window) return KP_EMPTY;
    if (k0 <= q1 - 1 - a->window) kind = KP_MIXED;
    if (!a->causal && k1 - 1 >= q0 + a->window) kind = KP_MIXED;
  }
  if (p->same) {
    const int32_t* end = p->same + batch * a->positions;
    const int64_t* id = a->documents + batch * a->positions;
    if (end[q0] < q1 || end[k0] < k1) return KP_MIXED;
    if (id[q0] != id[k0]) return KP_EMPTY;
  }
  return kind;
}

// The same with padding.
static inline int kp_kind(const kp_plan* p, int64_t batch, int64_t q0,
                          int64_t q1, int64_t k0, int64_t k1) {
  int kind = kp_kind_unpadded(p, batch, q0, q1, k0, k1);
  if (kind == KP_EMPTY || !p->hidden) return kind;
  const int32_t* before = p->hidden + batch * (p->a->kv_len + 1);
  int64_t count = before[k1] - before[k0];
  if (count == k1 - k0) return KP_EMPTY;
  return count ? KP_MIXED : kind;
}

// The first and last key that the window and causality show to query i.
static inline void kp_span(const kp_args* a, int64_t i, int64_t* low,
                           int64_t* high) {
  *low = 0, *high = a->kv_len - 1;
  if (a->window) {
    *low = i - a->window + 1;
    *high = kp_min(*high, i + a->window - 1);
  }
  if (a->causal) *high = kp_min(*high, i);
}

// One bit for each key of the panel at k0 that query i sees.
static inline uint64_t kp_bits(const kp_plan* p, int64_t batch, int64_t i,
                               int64_t k0) {
  const kp_args* a = p->a;
  int64_t low, high;
  kp_span(a, i, &low, &high);
  low = kp_max(low - k0, 0);
  high = kp_min(high - k0, KP_PANEL - 1);
  if (low > high) return 0;
  uint64_t bits = (0xffffu >> (KP_PANEL - 1 - high)) & (0xffffu << low);
  if (p->shown) bits &= p->shown[batch * p->panels + k0 / KP_PANEL];
  if (p->same) {
    const int64_t* id = a->documents + batch * a->positions;
    for (int64_t j = low; j <= high; j++)
      if (id[k0 + j] != id[i]) bits &= ~((uint64_t)1 << j);
  }
  return bits;
}

// Adds the bits of one panel, times 2^shift, to those of queries [q0, q1).
static inline void kp_add_bits(const kp_plan* p, int64_t batch, int64_t q0,
                               int64_t q1, int64_t k0, int64_t shift,
                               uint64_t* bits) {
  int64_t k1 = kp_min(k0 + KP_PANEL, p->a->kv_len);
  int each = kp_kind_unpadded(p, batch, q0, q1, k0, k1) == KP_MIXED;
  uint64_t found = kp_bits(p, batch, q0, k0);
  for (int64_t i = q0; i < q1; i++) {
    if (each) found = kp_bits(p, batch, i, k0);
    bits[i - q0] |= found << shift;
  }
}

#endif  // KERNEL_PYTORCH_PLAN_H_
