// SPDX-License-Identifier: Apache-2.0
//
// Choosing blocks from estimated weights. Nothing here names a vector type; it
// is compiled for each instruction set because its loops are over many blocks.
#include <float.h>

// A float as an unsigned number of the same order, above 0; NaN counts as the
// greatest.
static inline uint32_t rank_of(float x) {
  union {
    float f;
    uint32_t u;
  } both = {x};
  if (x != x) return UINT32_MAX;
  return both.u >> 31 ? ~both.u : both.u | 0x80000000u;
}

// Marks the `count` greatest ranks above 0 in chosen[n]; the first of equal
// ones win.
static void KP(mark_best)(const uint32_t* rank, int64_t n, int64_t count,
                          uint8_t* chosen) {
  for (int64_t i = 0; i < n; i++) chosen[i] = 0;
  if (count < 1) return;
  // The greatest bound that at least `count` ranks reach, bit by bit; a bound
  // that just so many reach is as good.
  uint32_t bound = 0;
  int64_t reached = n;
  for (uint32_t bit = 0x80000000u; bit && reached != count; bit >>= 1) {
    int32_t above = 0;
    for (int64_t i = 0; i < n; i++) above += rank[i] >= (bound | bit);
    if (above >= count) bound |= bit, reached = above;
  }
  if (reached == count) {
    for (int64_t i = 0; i < n; i++) chosen[i] = rank[i] >= bound && rank[i];
    return;
  }
  int64_t left = count;
  for (int64_t i = 0; i < n; i++) {
    chosen[i] = rank[i] > bound;
    left -= chosen[i];
  }
  for (int64_t i = 0; i < n && left > 0 && bound; i++)
    if (rank[i] == bound) chosen[i] = 1, left--;
}

// What one row of blocks is chosen by, and the space for it; [kv_blocks] each.
typedef struct {
  float *mass, *score, *peak;
  float* half[2];  // sums over each half of the examined queries
  float* factor;   // of the gate
  uint32_t* rank;
  uint8_t *open, *chosen;
} KP(row);

// Does some query in [q0, q1) see some key in [k0, k1)?
static int KP(any_seen)(const kp_plan* p, int64_t b, int64_t q0, int64_t q1,
                        int64_t k0, int64_t k1) {
  int kind = kp_kind(p, b, q0, q1, k0, k1);
  if (kind != KP_MIXED) return kind == KP_FULL;
  for (int64_t i = q1 - 1; i >= q0; i--)
    for (int64_t k = k0; k < k1; k += KP_PANEL)
      if (kp_bits(p, b, i, k)) return 1;
  return 0;
}

static int64_t KP(open_blocks)(const kp_plan* p, int64_t b, int64_t t,
                               uint8_t* open) {
  const kp_args* a = p->a;
  int64_t q0 = t * a->block, q1 = kp_min(q0 + a->block, a->q_len), count = 0;
  for (int64_t n = 0; n < p->kv_blocks; n++) {
    int64_t k0 = n * a->block, k1 = kp_min(k0 + a->block, a->kv_len);
    open[n] = (uint8_t)KP(any_seen)(p, b, q0, q1, k0, k1);
    count += open[n];
  }
  return count;
}

// Scales the scores by exp(logits), the largest of a row's factors being 1.
static void KP(add_logits)(const kp_plan* p, const float* logits,
                           KP(row) * row) {
  float top = -INFINITY;
  for (int64_t n = 0; n < p->kv_blocks; n++)
    if (row->open[n] && !(logits[n] <= top)) top = logits[n];
  for (int64_t n = 0; n < p->kv_blocks; n++) {
    row->factor[n] = row->open[n] ? expf(logits[n] - top) : 0.0f;
    float x = row->score[n] < FLT_MIN ? FLT_MIN : row->score[n];
    row->score[n] = x * row->factor[n];
  }
}

// Ranks the open blocks by x; the diagonal comes first, and then what can't be
// judged.
static void KP(rank_row)(const kp_plan* p, KP(row) * row, const float* x,
                         int64_t diagonal) {
  for (int64_t i = 0; i < p->kv_blocks; i++) {
    uint32_t rank = rank_of(x[i]);
    row->rank[i] = row->open[i] ? rank - (rank == UINT32_MAX) : 0;
  }
  if (diagonal >= 0 && row->open[diagonal]) row->rank[diagonal] = UINT32_MAX;
}

// The share of the mass that the best `count` blocks hold, where those of one
// half of the queries are measured by the other: judged by the queries that
// chose them, they would look better than they are.
static double KP(held)(const kp_plan* p, const kp_choice* c, int64_t count,
                       int64_t diagonal, KP(row) * row) {
  int64_t n = p->kv_blocks;
  double share = 0.0;
  for (int half = 0; half < 2; half++) {
    float *ours = row->half[half], *theirs = row->half[1 - half];
    double kept = 0.0, total = 0.0;
    KP(rank_row)(p, row, ours, diagonal);
    for (int64_t i = 0; c->logits && i < n; i++) {
      float x = (ours[i] < FLT_MIN ? FLT_MIN : ours[i]) * row->factor[i];
      uint32_t rank = rank_of(x);
      if (row->open[i] && i != diagonal)
        row->rank[i] = rank - (rank == UINT32_MAX);
    }
    KP(mark_best)(row->rank, n, count, row->chosen);
    for (int64_t i = 0; i < n; i++) {
      total += (double)theirs[i];
      if (row->chosen[i]) kept += (double)theirs[i];
    }
    share += kept / total / 2;
  }
  return share;
}

static void KP(by_budget)(const kp_plan* p, int64_t budget, int64_t diagonal,
                          KP(row) * row) {
  int64_t n = p->kv_blocks;
  KP(rank_row)(p, row, row->score, diagonal);
  KP(mark_best)(row->rank, n, budget - (budget + 5) / 10, row->chosen);
  KP(rank_row)(p, row, row->peak, -1);
  for (int64_t i = 0; i < n; i++)
    if (row->chosen[i]) row->rank[i] = UINT32_MAX;
  KP(mark_best)(row->rank, n, budget, row->chosen);
}

// The fewest blocks that hold the share; all where there is no mass, or a NaN.
static int64_t KP(covering)(const kp_plan* p, const kp_choice* c, int64_t count,
                            int64_t diagonal, KP(row) * row) {
  int64_t low = kp_min(1, count), high = count;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (KP(held)(p, c, middle, diagonal, row) >= c->coverage)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Where one half of the queries sees nothing, both are the whole.
static double KP(halve)(const kp_plan* p, KP(row) * row) {
  double sum[2] = {0.0, 0.0}, total = 0.0;
  for (int64_t i = 0; i < p->kv_blocks; i++) {
    for (int half = 0; half < 2; half++)
      sum[half] += (double)row->half[half][i];
    total += (double)row->mass[i];
  }
  if (!(sum[0] > 0.0) || !(sum[1] > 0.0))
    for (int half = 0; half < 2; half++)
      memcpy(row->half[half], row->mass, p->kv_blocks * sizeof(float));
  return total;
}

// Chooses for row t of head h, and writes its list.
static void KP(choose_row)(const kp_plan* p, const kp_choice* c, int64_t b,
                           int64_t h, int64_t t, KP(row) * row) {
  const kp_args* a = p->a;
  int64_t at = (b * a->heads + h) * p->q_blocks + t, n = p->kv_blocks;
  int64_t diagonal = a->causal && t < n ? t : -1;
  int64_t count = KP(open_blocks)(p, b, t, row->open);
  int64_t budget = (int64_t)nearbyint(c->keep * (double)count);
  budget = kp_min(kp_max(budget, 1), count);
  if (c->coverage > 0.0) memcpy(row->score, row->mass, n * sizeof(float));
  if (c->logits) KP(add_logits)(p, c->logits + at * n, row);
  double total = KP(halve)(p, row);
  if (c->coverage > 0.0)
    budget = total > 0.0 ? KP(covering)(p, c, count, diagonal, row) : count;
  c->missed[at] = total == 0.0 ? 0.0f : (float)total;
  if (total > 0.0)
    c->missed[at] = (float)(1.0 - KP(held)(p, c, budget, diagonal, row));
  if (c->coverage > 0.0) {
    KP(rank_row)(p, row, row->score, diagonal);
    KP(mark_best)(row->rank, n, budget, row->chosen);
  } else {
    KP(by_budget)(p, budget, diagonal, row);
  }
  int32_t* list = c->blocks + at * a->width;
  int32_t kept = 0;
  for (int64_t i = 0; i < n; i++)
    if (row->chosen[i] && kept < a->width) list[kept++] = (int32_t)i;
  c->counts[at] = kept;
}
