// SPDX-License-Identifier: Apache-2.0
//
// Choosing blocks; see choose.h.
#include "choose.h"

#include <float.h>
#include <math.h>
#include <string.h>

int kp_choice_ok(const kp_plan* p, const kp_choice* c) {
  if (!c || !c->counts || !c->missed) return 0;
  if (!(c->keep >= 0.0 && c->keep <= 1.0)) return 0;
  if (!(c->coverage >= 0.0 && c->coverage <= 1.0)) return 0;
  int64_t most = p->kv_blocks;
  if (c->coverage == 0.0)
    most = kp_max(1, (int64_t)nearbyint(c->keep * (double)most));
  return p->a->index_batch == p->a->batch && p->a->width >= most && c->blocks;
}

void kp_mark_best(const uint32_t* rank, int64_t n, int64_t count,
                  uint8_t* chosen) {
  memset(chosen, 0, n);
  if (count < 1) return;
  // The greatest bound that at least `count` ranks reach, bit by bit.
  uint32_t bound = 0;
  for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
    uint32_t high = bound | bit;
    int32_t reached = 0;
    for (int64_t i = 0; i < n; i++) reached += rank[i] >= high;
    if (reached >= count) bound = high;
  }
  int64_t left = count;
  for (int64_t i = 0; i < n; i++) {
    chosen[i] = rank[i] > bound;
    left -= chosen[i];
  }
  for (int64_t i = 0; i < n && left > 0 && bound; i++)
    if (rank[i] == bound) chosen[i] = 1, left--;
}

// Does some query in [q0, q1) see some key in [k0, k1)?
static int any_seen(const kp_plan* p, int64_t b, int64_t q0, int64_t q1,
                    int64_t k0, int64_t k1) {
  int kind = kp_kind(p, b, q0, q1, k0, k1);
  if (kind != KP_MIXED) return kind == KP_FULL;
  for (int64_t i = q1 - 1; i >= q0; i--)
    for (int64_t k = k0; k < k1; k += KP_PANEL)
      if (kp_bits(p, b, i, k)) return 1;
  return 0;
}

static int64_t open_blocks(const kp_plan* p, int64_t b, int64_t t,
                           uint8_t* open) {
  const kp_args* a = p->a;
  int64_t q0 = t * a->block, q1 = kp_min(q0 + a->block, a->q_len), count = 0;
  for (int64_t n = 0; n < p->kv_blocks; n++) {
    int64_t k0 = n * a->block, k1 = kp_min(k0 + a->block, a->kv_len);
    open[n] = (uint8_t)any_seen(p, b, q0, q1, k0, k1);
    count += open[n];
  }
  return count;
}

// Scales the scores by exp(logits), the largest of a row's factors being 1.
static void add_logits(const kp_plan* p, const float* logits, kp_row* row) {
  float top = -INFINITY;
  for (int64_t n = 0; n < p->kv_blocks; n++)
    if (row->open[n] && !(logits[n] <= top)) top = logits[n];
  for (int64_t n = 0; n < p->kv_blocks; n++) {
    float x = row->score[n] < FLT_MIN ? FLT_MIN : row->score[n];
    row->score[n] = row->open[n] ? x * expf(logits[n] - top) : x;
  }
}

static void by_budget(const kp_plan* p, int64_t count, int64_t diagonal,
                      kp_row* row, double keep) {
  int64_t n = p->kv_blocks;
  int64_t budget = (int64_t)nearbyint(keep * (double)count);
  budget = kp_min(kp_max(budget, 1), count);
  for (int64_t i = 0; i < n; i++)
    row->rank[i] = row->open[i] ? kp_rank(row->score[i]) : 0;
  if (diagonal >= 0 && row->open[diagonal]) {
    // What can't be judged comes first, but after what is kept in any case.
    for (int64_t i = 0; i < n; i++)
      row->rank[i] -= row->rank[i] == UINT32_MAX;
    row->rank[diagonal] = UINT32_MAX;
  }
  kp_mark_best(row->rank, n, budget - (budget + 5) / 10, row->chosen);
  for (int64_t i = 0; i < n; i++) {
    row->rank[i] = row->open[i] ? kp_rank(row->peak[i]) : 0;
    row->rank[i] -= row->rank[i] == UINT32_MAX;
    if (row->chosen[i]) row->rank[i] = UINT32_MAX;
  }
  kp_mark_best(row->rank, n, budget, row->chosen);
}

static double sum_from(const kp_row* row, int64_t n, uint32_t bound) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; i++)
    if (row->rank[i] >= bound) sum += (double)row->score[i];
  return sum;
}

// The fewest blocks whose scores reach the share. A NaN, and a row without a
// score, keep everything.
static void by_coverage(const kp_plan* p, int64_t diagonal, kp_row* row,
                        double share) {
  int64_t n = p->kv_blocks;
  double total = 0.0, sum = 0.0;
  for (int64_t i = 0; i < n; i++) {
    row->rank[i] = row->open[i] ? kp_rank(row->score[i]) : 0;
    if (row->open[i]) total += (double)row->score[i];
  }
  memcpy(row->chosen, row->open, n);
  if (!(total > 0.0)) return;
  if (diagonal >= 0 && row->open[diagonal]) row->rank[diagonal] = UINT32_MAX;
  uint32_t bound = 0;
  for (uint32_t bit = 0x80000000u; bit; bit >>= 1)
    if (sum_from(row, n, bound | bit) >= share * total) bound |= bit;
  // Without the blocks at the bound the share isn't reached.
  if (bound < UINT32_MAX) sum = sum_from(row, n, bound + 1);
  for (int64_t i = 0; i < n; i++) {
    row->chosen[i] = row->open[i] && row->rank[i] > bound;
    if (!row->open[i] || row->rank[i] != bound) continue;
    row->chosen[i] = bound == UINT32_MAX || sum < share * total;
    sum += (double)row->score[i];
  }
}

void kp_choose_row(const kp_plan* p, const kp_choice* c, int64_t b, int64_t h,
                   int64_t t, kp_row* row) {
  const kp_args* a = p->a;
  int64_t at = (b * a->heads + h) * p->q_blocks + t, n = p->kv_blocks;
  int64_t diagonal = a->causal && t < n ? t : -1;
  int64_t count = open_blocks(p, b, t, row->open);
  if (c->coverage > 0.0) memcpy(row->score, row->mass, n * sizeof(float));
  if (c->logits) add_logits(p, c->logits + at * n, row);
  if (c->coverage > 0.0)
    by_coverage(p, diagonal, row, c->coverage);
  else
    by_budget(p, count, diagonal, row, c->keep);
  int32_t* list = c->blocks + at * a->width;
  int32_t kept = 0;
  double total = 0.0, missed = 0.0;
  for (int64_t i = 0; i < n; i++) {
    total += (double)row->mass[i];
    if (!row->chosen[i]) missed += (double)row->mass[i];
    if (row->chosen[i] && kept < a->width) list[kept++] = (int32_t)i;
  }
  c->counts[at] = kept;
  c->missed[at] = (float)(missed / (total < FLT_MIN ? (double)FLT_MIN : total));
}
