// SPDX-License-Identifier: Apache-2.0
//
// Forward pass. One thread takes one block of queries, walks its keys in tiles
// of four panels, and keeps a running maximum, sum and output for each query
// (online softmax). Logits are in units of log 2: scale * log2(e) is packed
// into the keys.

// The maximum of a row is raised only when a logit exceeds it by more than
// this, so that outputs are seldom rescaled; weights then stay below 2^8.
#define SLACK 8.0f
// Stands for "no key yet"; finite, so that it can be subtracted from -inf.
#define LOWEST -1e30f

// Keys and values are packed for some kv heads at a time: enough to keep the
// threads busy, and no more, because long inputs would fill the memory.
typedef struct {
  const kp_plan* p;
  int64_t heads;        // kv heads, of all batch entries, packed at a time
  float* keys;          // [heads][panels + extra][dim][16]
  float* values;        // [heads][panels + extra][16][padded]
  uint8_t* odd;         // [heads][panels + extra] values not all finite
  float* extra_weight;  // [extra_panels * 16], in units of log 2
} KP(packed);

// What one thread works in.
typedef struct {
  float* q;        // [rows / 6][dim][6]
  float* out;      // [rows][padded]
  float* sum;      // [rows][W] parts of the softmax's sum
  float* top;      // [rows]
  float* score;    // [6][TILE]
  uint64_t* bits;  // [rows] keys of the tile that a query sees
  int64_t* list;   // panels: those seen whole, then those seen in part
  int64_t rows;
} KP(work);

// Panels of a tile; `bits` is null when every query sees every key.
typedef struct {
  int64_t count;
  const float *keys[4], *values[4], *weight[4];
  const float *next_keys[4], *next_values[4];
  const uint64_t* bits;
  int odd;
} KP(tile);

// Packs panel `at` of those that begin with kv head `first`.
static void KP(pack)(const KP(packed) * s, int64_t first, int64_t at) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  int64_t each = p->panels + p->extra_panels, ld = padded(a);
  int64_t head = first + at / each;
  KP(source)
  from = KP(find)(p, head / a->kv_heads, head % a->kv_heads, at % each);
  float rows[KP_PANEL * KP_MAX_DIM], *values = s->values + at * KP_PANEL * ld;
  KP(read_panel)(a, &from, 0, rows, a->dim);
  float factor = (float)(a->scale * (double)KP_LOG2E);
  KP(turn_panel)(rows, a->dim, a->dim, factor, s->keys + at * KP_PANEL * a->dim,
                 KP_PANEL);
  KP(read_panel)(a, &from, 1, values, ld);
  s->odd[at] = (uint8_t)KP(is_odd)(values, KP_PANEL * ld);
}

static void KP(load_queries)(const kp_args* a, int64_t at, KP(work) * w) {
  float row[KP_MAX_DIM];
  for (int64_t i = 0; i < w->rows; i++) {
    KP(read_row)(a, a->q, at + i * a->q_stride[2], row);
    float* to = w->q + i / 6 * 6 * a->dim + i % 6;
    for (int64_t d = 0; d < a->dim; d++) to[6 * d] = row[d];
  }
}

// The next tile's panels come from the second-level cache or beyond; they are
// asked for a slice with each group of queries.
INLINE void prefetch(const KP(tile) * t, int64_t dim, int64_t ld, int64_t group,
                     int64_t groups) {
  for (int64_t n = 0; n < 4 && t->next_keys[n]; n++) {
    int64_t end = dim * (group + 1) / groups;
    for (int64_t i = dim * group / groups; i < end; i++)
      __builtin_prefetch(t->next_keys[n] + i * KP_PANEL, 0, 2);
    end = ld * (group + 1) / groups;
    for (int64_t i = ld * group / groups; i < end; i++)
      __builtin_prefetch(t->next_values[n] + i * KP_PANEL, 0, 2);
  }
}

// score[rows][TILE] for one group of at most 6 queries.
static void KP(scores)(const KP(tile) * t, int64_t rows, const float* q,
                       int64_t dim, float* score) {
#if NV * W == TILE
#define CALL(R)                                 \
  switch (t->count) {                           \
    case 4:                                     \
      score_tile(R, 4, q, t->keys, score, dim); \
      break;                                    \
    case 3:                                     \
      score_tile(R, 3, q, t->keys, score, dim); \
      break;                                    \
    case 2:                                     \
      score_tile(R, 2, q, t->keys, score, dim); \
      break;                                    \
    default:                                    \
      score_tile(R, 1, q, t->keys, score, dim); \
  }
  SWITCH_R(rows, CALL)
#undef CALL
#else
  for (int64_t n = 0; n < t->count; n++)
    for (int64_t j = 0; j < KP_PANEL; j += NV * W) {
      const float* b[NV];
      for (int i = 0; i < NV; i++) b[i] = t->keys[n] + j + i * W;
#define CALL(R) score_tile(R, NV, q, b, score + n * KP_PANEL + j, dim)
      SWITCH_R(rows, CALL)
#undef CALL
    }
#endif
}

static void KP(raise_top)(float top, float* old, float* sum, float* out,
                          int64_t ld) {
  if (*old != LOWEST) {
    vf factor = v_set(exp2f(*old - top));
    v_store(sum, v_load(sum) * factor);
    for (int64_t j = 0; j < ld; j += W)
      v_store(out + j, v_load(out + j) * factor);
  }
  *old = top;
}

// Turns `n` vectors of logits into weights, for query i.
INLINE void soften(const int64_t n, float* s, KP(work) * w, int64_t i,
                   int64_t ld) {
  vf high = v_load(s);
  for (int64_t j = 1; j < n; j++) high = v_max(high, v_load(s + j * W));
  if (v_any_above(high, v_set(w->top[i] + SLACK)))
    KP(raise_top)(v_hmax(high), w->top + i, w->sum + i * W, w->out + i * ld,
                  ld);
  vf top = v_set(w->top[i]), sum = v_load(w->sum + i * W);
  for (int64_t j = 0; j < n; j++) {
    vf x = v_exp2(v_load(s + j * W) - top);
    v_store(s + j * W, x);
    sum = sum + x;
  }
  v_store(w->sum + i * W, sum);
}

// The remainder's weights are added and hidden keys get -inf, so weight 0.
static void KP(hide)(const KP(tile) * t, float* s, uint64_t bits) {
  for (int64_t j = 0; j < t->count * KP_PANEL; j += W) {
    vf x = v_load(s + j);
    if (t->weight[0]) x = x + v_load(t->weight[j / KP_PANEL] + j % KP_PANEL);
    v_store(s + j, v_keep((unsigned)(bits >> j), x, v_set(-INFINITY)));
  }
}

static void KP(attend)(const KP(tile) * t, KP(work) * w, const kp_args* a) {
  int64_t ld = padded(a), n = t->count * KP_PANEL / W;
  int64_t groups = kp_ceil(w->rows, 6);
  for (int64_t i = 0, r; i < w->rows; i += r) {
    r = next_rows(w->rows - i);
    prefetch(t, a->dim, ld, i / 6, groups);
    if (t->bits) {
      uint64_t any = 0;
      for (int64_t j = 0; j < r; j++) any |= t->bits[i + j];
      if (!any) continue;
    }
    KP(scores)(t, r, w->q + i / 6 * 6 * a->dim + i % 6, a->dim, w->score);
    for (int64_t j = 0; j < r; j++) {
      float* s = w->score + j * TILE;
      if (t->bits) KP(hide)(t, s, t->bits[i + j]);
      if (t->count == 4)
        soften(TILE / W, s, w, i + j, ld);
      else
        soften(n, s, w, i + j, ld);
    }
    if (t->odd && t->bits)
      KP(gemm_careful)(r, w->score, TILE, 1, t->values, t->count, KP_PANEL, ld,
                       w->out + i * ld, ld, a->dim);
    else
      KP(gemm_tile)(r, w->score, t->values, t->count, KP_PANEL, ld,
                    w->out + i * ld, ld, ld);
  }
}

static uint64_t KP(rest_bits)(const kp_plan* p, int64_t row, int64_t panel) {
  int64_t n = (panel - p->panels) * KP_PANEL;
  return p->rest[row * p->words + n / 64] >> (n % 64) & 0xffff;
}

// What the walk over a list of panels asks for.
enum { WHOLE, MASKED, REST };

static void KP(tile_bits)(const kp_plan* p, KP(work) * w, int64_t b,
                          int64_t row, int kind, int64_t panel, int64_t shift) {
  if (kind == MASKED) {
    kp_add_bits(p, b, row, row + w->rows, panel * KP_PANEL, shift, w->bits);
    return;
  }
  uint64_t bits = KP(rest_bits)(p, row, panel) << shift;
  for (int64_t j = 0; j < w->rows; j++) w->bits[j] |= bits;
}

// Walks the panels list[from:to]. `row` is the first query, or for the
// remainder the row of `rest`; `base` is the first panel of the head.
static void KP(walk)(const KP(packed) * s, KP(work) * w, int64_t b,
                     int64_t base, int64_t row, int64_t from, int64_t to,
                     int kind) {
  const kp_plan* p = s->p;
  int64_t ld = padded(p->a), k = KP_PANEL * p->a->dim, v = KP_PANEL * ld;
  for (int64_t n = from; n < to; n += 4) {
    KP(tile) t = {.count = kp_min(4, to - n)};
    if (kind != WHOLE) {
      t.bits = w->bits;
      memset(w->bits, 0, w->rows * sizeof(uint64_t));
    }
    for (int64_t i = 0; i < t.count; i++) {
      int64_t panel = w->list[n + i], extra = panel - p->panels;
      t.keys[i] = s->keys + (base + panel) * k;
      t.values[i] = s->values + (base + panel) * v;
      t.weight[i] = kind == REST ? s->extra_weight + extra * KP_PANEL : NULL;
      t.odd |= s->odd[base + panel];
      if (kind != WHOLE) KP(tile_bits)(p, w, b, row, kind, panel, KP_PANEL * i);
    }
    for (int64_t i = 0; i < kp_min(4, to - n - t.count); i++) {
      t.next_keys[i] = s->keys + (base + w->list[n + t.count + i]) * k;
      t.next_values[i] = s->values + (base + w->list[n + t.count + i]) * v;
    }
    KP(attend)(&t, w, p->a);
  }
}

// Fills w->list with the panels of a row that some query sees: from the front
// those seen whole, from *mixed to *end the others.
static void KP(list_panels)(const kp_plan* p, KP(work) * w, int64_t b,
                            int64_t at, int64_t q0, int64_t* mixed,
                            int64_t* end) {
  const kp_args* a = p->a;
  int64_t full = 0, some = p->panels;
  for (int32_t i = 0; i < a->counts[at]; i++) {
    int64_t k0 = a->blocks[at * a->width + i] * a->block;
    int64_t stop = kp_min(k0 + a->block, a->kv_len);
    for (; k0 < stop; k0 += KP_PANEL) {
      int64_t k1 = kp_min(k0 + KP_PANEL, a->kv_len);
      int kind = kp_kind(p, b, q0, q0 + w->rows, k0, k1);
      if (kind == KP_FULL && k1 - k0 < KP_PANEL) kind = KP_MIXED;
      if (kind == KP_FULL) w->list[full++] = k0 / KP_PANEL;
      if (kind == KP_MIXED) w->list[some++] = k0 / KP_PANEL;
    }
  }
  memmove(w->list + full, w->list + p->panels,
          (some - p->panels) * sizeof(int64_t));
  *mixed = full;
  *end = full + some - p->panels;
}

static void KP(finish)(const kp_args* a, KP(work) * w, int64_t row) {
  int64_t ld = padded(a);
  for (int64_t i = 0; i < w->rows; i++) {
    float sum = v_hsum(v_load(w->sum + i * W));
    float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    KP(write_row)(a, w->out + i * ld, factor, a->out, (row + i) * a->dim);
    a->lse[row + i] =
        sum == 0.0f ? -INFINITY : (w->top[i] + log2f(sum)) * KP_LN2;
  }
}

// Row `item` of those that begin with kv head `first`.
static void KP(forward_row)(const KP(packed) * s, KP(work) * w, int64_t first,
                            int64_t item) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  int64_t group = a->heads / a->kv_heads;
  int64_t bh = first * group + item / p->q_blocks;
  int64_t b = bh / a->heads, h = bh % a->heads;
  int64_t list = a->index_batch == 1 ? h : bh;
  int64_t block = p->order[list * p->q_blocks + item % p->q_blocks];
  int64_t q0 = block * a->block, ld = padded(a), mixed, end;
  int64_t base = (bh / group - first) * (p->panels + p->extra_panels);
  w->rows = kp_min(a->block, a->q_len - q0);
  KP(load_queries)(
      a, b * a->q_stride[0] + h * a->q_stride[1] + q0 * a->q_stride[2], w);
  memset(w->out, 0, w->rows * ld * sizeof(float));
  memset(w->sum, 0, w->rows * W * sizeof(float));
  for (int64_t i = 0; i < w->rows; i++) w->top[i] = LOWEST;
  KP(list_panels)(p, w, b, list * p->q_blocks + block, q0, &mixed, &end);
  KP(walk)(s, w, b, base, q0, 0, mixed, WHOLE);
  KP(walk)(s, w, b, base, q0, mixed, end, MASKED);
  if (p->rest) {
    int64_t row = bh * p->q_blocks + block, n = 0;
    for (int64_t i = p->panels; i < p->panels + p->extra_panels; i++)
      if (KP(rest_bits)(p, row, i)) w->list[n++] = i;
    KP(walk)(s, w, b, base, row, 0, n, REST);
  }
  KP(finish)(a, w, bh * a->q_len + q0);
}

static KP(work) KP(forward_work)(const kp_plan* p, char* at, int64_t* bytes) {
  const kp_args* a = p->a;
  int64_t rows = a->block, ld = padded(a), used = 0;
  KP(work) w;
#define TAKE(field, count)      \
  w.field = (void*)(at + used); \
  used += kp_ceil((count) * (int64_t)sizeof(*w.field), 64) * 64
  TAKE(q, kp_ceil(rows, 6) * 6 * a->dim);
  TAKE(out, rows * ld);
  TAKE(sum, rows * W);
  TAKE(top, rows);
  TAKE(score, 6 * TILE);
  TAKE(bits, rows);
  TAKE(list, 2 * p->panels + p->extra_panels);
#undef TAKE
  w.rows = 0;
  *bytes = used;
  return w;
}

static void KP(forward_run)(KP(packed) * s, char* memory) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  int64_t heads = a->batch * a->kv_heads, group = a->heads / a->kv_heads;
  for (int64_t i = 0; i < p->extra_panels * KP_PANEL; i++)
    s->extra_weight[i] =
        i < p->kv_blocks ? a->extra_weight[i] * KP_LOG2E : 0.0f;
#pragma omp parallel num_threads((int)p->threads) if (p->threads > 1)
  {
    int64_t bytes;
    KP(forward_work)(p, memory, &bytes);
    KP(work)
    w = KP(forward_work)(p, memory + omp_get_thread_num() * bytes, &bytes);
    for (int64_t first = 0; first < heads; first += s->heads) {
      int64_t count = kp_min(s->heads, heads - first);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count * (p->panels + p->extra_panels); i++)
        KP(pack)(s, first, i);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count * group * p->q_blocks; i++)
        KP(forward_row)(s, &w, first, i);
    }
  }
}

int KP(forward)(const kp_plan* p) {
  const kp_args* a = p->a;
  KP(packed) s = {.p = p};
  int64_t rows = a->heads / a->kv_heads * p->q_blocks, bytes;
  s.heads = kp_min(kp_ceil(128 * p->threads, rows), a->batch * a->kv_heads);
  int64_t panels = s.heads * (p->panels + p->extra_panels);
  KP(forward_work)(p, NULL, &bytes);
  s.keys = kp_alloc(panels * KP_PANEL, a->dim * (int64_t)sizeof(float));
  s.values = kp_alloc(panels * KP_PANEL, padded(a) * (int64_t)sizeof(float));
  s.odd = kp_alloc(panels, 1);
  s.extra_weight = kp_alloc(p->extra_panels * KP_PANEL, sizeof(float));
  char* memory = kp_alloc(p->threads, bytes);
  int ok = s.keys && s.values && s.odd && s.extra_weight && memory;
  if (ok) KP(forward_run)(&s, memory);
  free(s.keys);
  free(s.values);
  free(s.odd);
  free(s.extra_weight);
  free(memory);
  return ok ? KP_OK : KP_NO_MEMORY;
}
