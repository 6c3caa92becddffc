// SPDX-License-Identifier: Apache-2.0
//
// Estimates what each block of keys weighs for each block of queries, and
// chooses. One thread takes the examined queries of some blocks together, so
// that the micro-kernel is full, walks the keys once with an online maximum,
// and keeps for each query one sum for each block of keys.

#define EVERY 11     // one query of so many is examined, but at least two
#define TOGETHER 36  // examined queries of one walk, about

typedef struct {
  const float* rows;  // one block of queries, `ld` apart
  int64_t ld;
  float* copy;       // [block][dim] of them, unless they can be read in place
  float* far_score;  // [block][TILE]
  uint32_t* rank;    // [block]
  uint8_t* chosen;   // [block]
  float* q;          // [examined / 6][dim][6]
  int64_t* at;       // [examined] positions
  float* top;        // [examined]
  float* total;      // [examined] sum of a query's softmax, in units of 2^top
  float* sum;        // [examined][kv_blocks] parts of it
  float* mean;       // [examined][mean_panels * 16] logits of the means
  float* score;      // [6][TILE]
  uint64_t* bits;    // [examined]
  KP(row) row;
  int64_t examined;
} KP(ground);

static int64_t KP(examined)(int64_t length) {
  return kp_min(length, kp_max(2, kp_ceil(length, EVERY)));
}

// Last position of group i of `count` in a block of `length`.
INLINE int64_t group_end(int64_t length, int64_t count, int64_t i) {
  return (i + 1) * length / count - 1;
}

INLINE void put_query(const kp_args* a, KP(ground) * w, int64_t at,
                      const float* from) {
  int64_t n = w->examined++;
  float* to = w->q + n / 6 * 6 * a->dim + n % 6;
  for (int64_t d = 0; d < a->dim; d++) to[6 * d] = from[d];
  w->at[n] = at;
}

static void KP(read_queries)(const kp_args* a, KP(ground) * w, int64_t b,
                             int64_t h, int64_t q0, int64_t length) {
  int64_t at = b * a->q_stride[0] + h * a->q_stride[1] + q0 * a->q_stride[2];
  if (a->dtype == KP_FLOAT32) {
    w->rows = (const float*)a->q + at;
    w->ld = a->q_stride[2];
    return;
  }
  for (int64_t i = 0; i < length; i++)
    KP(read_row)(a, a->q, at + i * a->q_stride[2], w->copy + i * a->dim);
  w->rows = w->copy;
  w->ld = a->dim;
}

// Adds the means of groups of the queries in w->rows.
static void KP(examine_groups)(const kp_args* a, KP(ground) * w, int64_t q0,
                               int64_t length) {
  float mean[KP_MAX_DIM];
  int64_t count = KP(examined)(length), i = 0;
  for (int64_t n = 0; n < count; n++) {
    int64_t first = i, end = group_end(length, count, n) + 1;
    memset(mean, 0, a->dim * sizeof(float));
    for (; i < end; i++)
      for (int64_t d = 0; d < a->dim; d++) mean[d] += w->rows[i * w->ld + d];
    for (int64_t d = 0; d < a->dim; d++) mean[d] /= (float)(end - first);
    put_query(a, w, q0 + end - 1, mean);
  }
}

// Adds some that are spread evenly, and as many that are furthest from the
// block's mean.
static void KP(examine_single)(const kp_args* a, KP(ground) * w, int64_t q0,
                               int64_t length) {
  float mean[KP_MAX_DIM] = {0};
  int64_t all = KP(examined)(length), count = all - all / 2;
  for (int64_t i = 0; i < length; i++)
    for (int64_t d = 0; d < a->dim; d++) mean[d] += w->rows[i * w->ld + d];
  for (int64_t d = 0; d < a->dim; d++) mean[d] /= (float)length;
  for (int64_t i = 0; i < length; i++) {
    const float* row = w->rows + i * w->ld;
    float sum = 0.0f;
    vf part = v_set(0.0f);
    int64_t d = 0;
    for (; d + W <= a->dim; d += W) {
      vf x = v_load(row + d) - v_load(mean + d);
      part = v_fma(x, x, part);
    }
    for (; d < a->dim; d++) sum += (row[d] - mean[d]) * (row[d] - mean[d]);
    w->rank[i] = rank_of(sum + v_hsum(part));
  }
  for (int64_t i = 0; i < count; i++) {
    int64_t at = group_end(length, count, i);
    w->rank[at] = 0;
    put_query(a, w, q0 + at, w->rows + at * w->ld);
  }
  KP(mark_best)(w->rank, length, all / 2, w->chosen);
  for (int64_t i = 0; i < length; i++)
    if (w->chosen[i]) put_query(a, w, q0 + i, w->rows + i * w->ld);
}

static void KP(lift)(KP(ground) * w, int64_t i, float top, int64_t blocks) {
  float* sum = w->sum + i * blocks;
  if (w->top[i] != LOWEST) {
    float factor = exp2f(w->top[i] - top);
    for (int64_t n = 0; n < blocks; n++) sum[n] *= factor;
  }
  w->top[i] = top;
}

// Adds the weights of n vectors of logits to the sums of query i, of which
// every `each` panels belong to the next block, in[] says to which.
INLINE void add_weights(const int64_t n, const int64_t each, KP(ground) * w,
                        int64_t i, int64_t blocks, const int64_t* in,
                        const float* s) {
  vf high = v_load(s);
  for (int64_t j = 1; j < n; j++) high = v_max(high, v_load(s + j * W));
  if (v_any_above(high, v_set(w->top[i] + SLACK)))
    KP(lift)(w, i, v_hmax(high), blocks);
  vf top = v_set(w->top[i]);
  float* sum = w->sum + i * blocks;
  for (int64_t j = 0; j < n; j += each * (KP_PANEL / W)) {
    vf part = v_exp2(v_load(s + j * W) - top);
    for (int64_t m = 1; m < each * (KP_PANEL / W); m++)
      part = part + v_exp2(v_load(s + (j + m) * W) - top);
    sum[in[j * W / KP_PANEL]] += v_hsum(part);
  }
}

// The examined queries against the panels [panel, panel + count).
static void KP(select_tile)(const KP(survey) * s, KP(ground) * w, int64_t base,
                            int64_t panel, int64_t count, int masked) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  KP(tile) t = {.count = count};
  int64_t in[4];
  for (int64_t n = 0; n < count; n++) in[n] = (panel + n) * KP_PANEL / a->block;
  for (int64_t n = 0; n < count; n++)
    t.keys[n] = s->keys + (base + panel + n) * KP_PANEL * a->dim;
  for (int64_t i = 0, r; i < w->examined; i += r) {
    r = next_rows(w->examined - i);
    uint64_t any = !masked;
    for (int64_t j = 0; masked && j < r; j++) any |= w->bits[i + j];
    if (!any) continue;
    KP(scores)(&t, r, w->q + i / 6 * 6 * a->dim + i % 6, a->dim, w->score);
    for (int64_t j = 0; j < r; j++) {
      float* x = w->score + j * TILE;
      if (masked) KP(hide)(&t, x, w->bits[i + j]);
      if (count == 4 && in[0] == in[3])
        add_weights(TILE / W, 4, w, i + j, p->kv_blocks, in, x);
      else
        add_weights(count * KP_PANEL / W, 1, w, i + j, p->kv_blocks, in, x);
    }
  }
}

// All keys that the queries [q0, q1) may see.
static void KP(select_walk)(const KP(survey) * s, KP(ground) * w, int64_t b,
                            int64_t base, int64_t q0, int64_t q1) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  memset(w->sum, 0, w->examined * p->kv_blocks * sizeof(float));
  for (int64_t i = 0; i < w->examined; i++) w->top[i] = LOWEST;
  for (int64_t panel = 0; panel < p->panels; panel += 4) {
    int64_t count = kp_min(4, p->panels - panel), k0 = panel * KP_PANEL;
    int64_t k1 = kp_min(k0 + TILE, a->kv_len);
    int kind = kp_kind(p, b, q0, q1, k0, k1);
    if (kind == KP_EMPTY) continue;
    int masked = kind == KP_MIXED || k1 - k0 < count * KP_PANEL;
    if (masked) {
      memset(w->bits, 0, w->examined * sizeof(uint64_t));
      for (int64_t i = 0; i < w->examined; i++)
        for (int64_t n = 0; n < count; n++)
          w->bits[i] |= kp_bits(p, b, w->at[i], k0 + n * KP_PANEL)
                        << (n * KP_PANEL);
    }
    KP(select_tile)(s, w, base, panel, count, masked);
  }
}

// Logits of the examined queries with the means of the blocks.
static void KP(select_means)(const KP(survey) * s, KP(ground) * w,
                             int64_t head) {
  int64_t dim = s->p->a->dim, width = s->mean_panels * KP_PANEL;
  for (int64_t panel = 0; panel < s->mean_panels; panel += 4) {
    KP(tile) t = {.count = kp_min(4, s->mean_panels - panel)};
    for (int64_t n = 0; n < t.count; n++)
      t.keys[n] =
          s->means + (head * s->mean_panels + panel + n) * KP_PANEL * dim;
    for (int64_t i = 0, r; i < w->examined; i += r) {
      r = next_rows(w->examined - i);
      KP(scores)(&t, r, w->q + i / 6 * 6 * dim + i % 6, dim, w->score);
      for (int64_t j = 0; j < r; j++)
        memcpy(w->mean + (i + j) * width + panel * KP_PANEL,
               w->score + j * TILE, t.count * KP_PANEL * sizeof(float));
    }
  }
}

// Takes from the scores what the remainder would stand for.
static void KP(less_means)(const KP(survey) * s, KP(ground) * w, int64_t b,
                           int64_t t, int64_t i, float share) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  int64_t q0 = t * a->block, q1 = kp_min(q0 + a->block, a->q_len);
  const float* mean = w->mean + i * s->mean_panels * KP_PANEL;
  const float* sum = w->sum + i * p->kv_blocks;
  for (int64_t n = 0; n < p->kv_blocks; n++) {
    int64_t k0 = n * a->block, k1 = kp_min(k0 + a->block, a->kv_len);
    float x = sum[n];
    if (kp_kind(p, b, q0, q1, k0, k1) == KP_FULL) {
      x -= (float)(k1 - k0) * exp2f(mean[n] - w->top[i]);
      if (x < 0.0f) x = 0.0f;
    }
    w->row.score[n] += x * share;
  }
}

// Mean and greatest weights of the queries [first, end) of the walk.
static void KP(select_row)(const KP(survey) * s, KP(ground) * w, int64_t b,
                           int64_t t, int64_t first, int64_t end,
                           float* least) {
  int64_t n = s->p->kv_blocks, alive = 0;
  KP(row)* row = &w->row;
  memset(row->mass, 0, n * sizeof(float));
  memset(row->score, 0, n * sizeof(float));
  memset(row->peak, 0, n * sizeof(float));
  for (int half = 0; half < 2; half++)
    memset(row->half[half], 0, n * sizeof(float));
  *least = INFINITY;
  for (int64_t i = first; i < end; i++) {
    const float* sum = w->sum + i * n;
    float total = 0.0f;
    for (int64_t j = 0; j < n; j++) total += sum[j];
    w->total[i] = total;
    if (total != 0.0f) alive++;
  }
  for (int64_t i = first; i < end; i++) {
    if (w->total[i] == 0.0f) continue;
    const float* sum = w->sum + i * n;
    float share = 1.0f / w->total[i], part = share / (float)alive;
    float* half = row->half[(i - first) % 2];
    for (int64_t j = 0; j < n; j++) {
      float x = sum[j] * share;
      half[j] += x;
      row->mass[j] += sum[j] * part;
      row->peak[j] = x > row->peak[j] || x != x ? x : row->peak[j];
    }
    if (s->c->remainder) KP(less_means)(s, w, b, t, i, part);
    float lse = w->top[i] + log2f(w->total[i]);
    *least = lse < *least || lse != lse ? lse : *least;
  }
  if (!s->c->remainder) memcpy(row->score, row->mass, n * sizeof(float));
}

// The far keys that query i sees, one bit for each.
static uint64_t KP(far_bits)(const kp_plan* p, int64_t b, int64_t i,
                             const int64_t* at, int64_t count) {
  const kp_args* a = p->a;
  int64_t low, high;
  kp_span(a, i, &low, &high);
  uint64_t bits = 0;
  for (int64_t j = 0; j < count; j++)
    bits |= (uint64_t)(at[j] >= low && at[j] <= high) << j;
  if (!p->same) return bits;
  const int64_t* id = a->documents + b * a->positions;
  for (int64_t j = 0; j < count; j++)
    if (id[at[j]] != id[i]) bits &= ~((uint64_t)1 << j);
  return bits;
}

// Raises the peaks to what any query of the block gives to a far key. The sum
// of a query's softmax is only known to be at least its largest weight here,
// and about that of the examined queries, of which the smallest counts.
static void KP(far_peaks)(const KP(survey) * s, KP(ground) * w, int64_t b,
                          int64_t head, int64_t q0, int64_t q1, float least) {
  const kp_plan* p = s->p;
  const int64_t* at = s->far_at + head * FAR;
  int64_t count = s->far_count[head], dim = p->a->dim;
  uint64_t all = ((uint64_t)1 << count) - 1;
  int plain = !p->a->causal && !p->a->window && !p->same;
  if (least == INFINITY) least = -INFINITY;
  float best[FAR];
  for (int64_t j = 0; j < FAR; j++) best[j] = -INFINITY;
  KP(gemm_score)(q1 - q0, w->rows, w->ld, s->far + head * dim * TILE, dim,
                 w->far_score, FAR);
  for (int64_t i = q0; i < q1; i++) {
    uint64_t bits = plain ? all : KP(far_bits)(p, b, i, at, count);
    float* x = w->far_score + (i - q0) * TILE;
    vf high = v_set(-INFINITY), none = v_set(-INFINITY);
    for (int64_t j = 0; j < FAR; j += W) {
      vf y = v_keep((unsigned)(bits >> j), v_load(x + j), none);
      v_store(x + j, y);
      high = v_max(high, y);
    }
    float top = v_hmax(high);
    if (!(top > least)) top = least;
    if (top == -INFINITY) continue;
    for (int64_t j = 0; j < FAR; j += W)
      v_store(best + j, v_max(v_load(x + j) - v_set(top), v_load(best + j)));
  }
  for (int64_t j = 0; j < count; j++) {
    float x = exp2f(best[j]), *peak = w->row.peak + at[j] / p->a->block;
    if (x > *peak) *peak = x;
  }
}

// Item: some blocks of queries of one head, of those that begin with kv head
// `first`. Long rows come first.
static void KP(select_item)(const KP(survey) * s, KP(ground) * w, int64_t first,
                            int64_t item, int64_t each) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  int64_t items = kp_ceil(p->q_blocks, each), group = a->heads / a->kv_heads;
  int64_t bh = first * group + item / items, head = bh / group - first;
  int64_t b = bh / a->heads, h = bh % a->heads;
  int64_t t0 = (items - 1 - item % items) * each;
  int64_t t1 = kp_min(t0 + each, p->q_blocks);
  w->examined = 0;
  for (int64_t t = t0; t < t1; t++) {
    int64_t q0 = t * a->block, length = kp_min(a->block, a->q_len - q0);
    KP(read_queries)(a, w, b, h, q0, length);
    if (s->c->remainder)
      KP(examine_groups)(a, w, q0, length);
    else
      KP(examine_single)(a, w, q0, length);
  }
  KP(select_walk)(s, w, b, head * p->panels, t0 * a->block,
                  kp_min(t1 * a->block, a->q_len));
  if (s->c->remainder) KP(select_means)(s, w, head);
  int64_t i = 0;
  for (int64_t t = t0; t < t1; t++) {
    int64_t q0 = t * a->block, q1 = kp_min(q0 + a->block, a->q_len);
    int64_t count = KP(examined)(q1 - q0);
    float least;
    KP(select_row)(s, w, b, t, i, i + count, &least);
    KP(read_queries)(a, w, b, h, q0, q1 - q0);
    KP(far_peaks)(s, w, b, head, q0, q1, least);
    KP(choose_row)(p, s->c, b, h, t, &w->row);
    i += count;
  }
}

static KP(ground) KP(select_ground)(const KP(survey) * s, int64_t each,
                                    char* at, int64_t* bytes) {
  const kp_args* a = s->p->a;
  int64_t n = s->p->kv_blocks, block = a->block, used = 0;
  int64_t most = each * KP(examined)(block);
  KP(ground) w;
#define TAKE(field, count)      \
  w.field = (void*)(at + used); \
  used += kp_ceil((count) * (int64_t)sizeof(*w.field), 64) * 64
  TAKE(copy, block * a->dim);
  TAKE(far_score, block * TILE);
  TAKE(rank, block);
  TAKE(chosen, block);
  TAKE(q, kp_ceil(most, 6) * 6 * a->dim);
  TAKE(at, most);
  TAKE(top, most);
  TAKE(total, most);
  TAKE(sum, most * n);
  TAKE(mean, most * s->mean_panels * KP_PANEL);
  TAKE(score, 6 * TILE);
  TAKE(bits, most);
  TAKE(row.mass, n);
  TAKE(row.score, n);
  TAKE(row.peak, n);
  TAKE(row.half[0], n);
  TAKE(row.half[1], n);
  TAKE(row.factor, n);
  TAKE(row.rank, n);
  TAKE(row.open, n);
  TAKE(row.chosen, n);
#undef TAKE
  w.rows = w.copy;
  w.ld = a->dim;
  w.examined = 0;
  *bytes = used;
  return w;
}

static void KP(select_run)(const KP(survey) * s, int64_t each, char* memory) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  int64_t heads = a->batch * a->kv_heads, group = a->heads / a->kv_heads;
#pragma omp parallel num_threads((int)p->threads) if (p->threads > 1)
  {
    int64_t bytes;
    KP(select_ground)(s, each, memory, &bytes);
    KP(ground)
    w = KP(select_ground)(s, each, memory + omp_get_thread_num() * bytes,
                          &bytes);
    for (int64_t first = 0; first < heads; first += s->heads) {
      int64_t count = kp_min(s->heads, heads - first);
      KP(survey_heads)(s, first, count);
      int64_t items = count * group * kp_ceil(p->q_blocks, each);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < items; i++)
        KP(select_item)(s, &w, first, i, each);
    }
  }
}

int KP(select)(const kp_plan* p, const kp_choice* c) {
  const kp_args* a = p->a;
  int64_t each = kp_max(1, TOGETHER / KP(examined)(a->block)), bytes;
  int64_t items = a->heads / a->kv_heads * kp_ceil(p->q_blocks, each);
  KP(survey) s = {.p = p, .c = c};
  s.heads = kp_min(kp_ceil(16 * p->threads, items), a->batch * a->kv_heads);
  int ok = KP(survey_make)(&s);
  KP(select_ground)(&s, each, NULL, &bytes);
  char* memory = kp_alloc(p->threads, bytes);
  if (ok && memory) KP(select_run)(&s, each, memory);
  ok = ok && memory;
  KP(survey_free)(&s);
  free(memory);
  return ok ? KP_OK : KP_NO_MEMORY;
}
