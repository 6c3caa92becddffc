// SPDX-License-Identifier: Apache-2.0
//
// Backward pass, in one sweep over the keys: for a tile of 64 keys and 64
// queries
//   P = exp(S - lse), dS = P (dP - delta + dlse), delta = sum(dO * O),
//   dV += P^T dO, dK += dS^T Q, dQ += dS K,
// five products. A thread owns a kv head, or every `parts`-th block of its
// keys, and with them dK and dV; each part has its own dQ, and they are added
// up at the end. So nothing is written by two threads, and the result does not
// depend on timing.

typedef struct {
  const kp_plan* p;
  int64_t parts;
  int direct;  // the sums are the results: float32, and rows of whole vectors
  float* dq;   // [batch][heads][parts][q_len][padded]
  float *dk, *dv;              // [batch][kv_heads][kv_len][padded]
  float *dextra_k, *dextra_v;  // [batch][kv_heads][kv_blocks][padded]
} KP(sums);

typedef struct {
  float *q, *dout;    // [q_len][padded] of one head
  float* lse;         // [q_len] in units of log 2; +inf where no key is seen
  float* delta;       // [q_len] (delta - dlse) * scale
  uint8_t* odd_rows;  // [q_len / 16] q or dout not all finite
  float* keys_t;      // [dim][TILE] keys * scale * log2(e)
  float* values_t;    // [dim][TILE] values * scale
  float* keys;        // [TILE][padded]
  float* weight;      // [TILE] of the remainder
  float *p, *ds;      // [TILE][TILE]
  uint64_t* bits;     // [TILE]
  int odd_keys;
} KP(space);

// The keys at work: which, and where their gradients go.
typedef struct {
  int64_t b, head, count, panels;  // head: of q; count: keys
  float *dq, *dk, *dv;
  int extra;
} KP(keys);

static void KP(load_head)(const KP(sums) * s, KP(space) * w, int64_t b,
                          int64_t h) {
  const kp_args* a = s->p->a;
  int64_t ld = padded(a), row = (b * a->heads + h) * a->q_len;
  int64_t q_at = b * a->q_stride[0] + h * a->q_stride[1];
  int64_t g_at = b * a->dout_stride[0] + h * a->dout_stride[1];
  float out[KP_MAX_DIM];
  memset(w->odd_rows, 0, kp_ceil(a->q_len, KP_PANEL));
  for (int64_t i = 0; i < a->q_len; i++) {
    float *q = w->q + i * ld, *dout = w->dout + i * ld, sum = 0.0f;
    memset(q, 0, ld * sizeof(float));
    memset(dout, 0, ld * sizeof(float));
    KP(read_row)(a, a->q, q_at + i * a->q_stride[2], q);
    KP(read_row)(a, a->dout, g_at + i * a->dout_stride[2], dout);
    KP(read_row)(a, a->out, (row + i) * a->dim, out);
    for (int64_t d = 0; d < a->dim; d++) sum += dout[d] * out[d];
    if (a->dlse) sum -= a->dlse[row + i];
    float lse = a->lse[row + i];
    w->lse[i] = lse == -INFINITY ? INFINITY : lse * KP_LOG2E;
    w->delta[i] = sum * (float)a->scale;
    w->odd_rows[i / KP_PANEL] |=
        (uint8_t)(KP(is_odd)(q, ld) | KP(is_odd)(dout, ld));
  }
}

static void KP(load_keys)(const KP(sums) * s, KP(space) * w,
                          const KP(keys) * keys, int64_t panel) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  int64_t ld = padded(a), group = a->heads / a->kv_heads;
  float values[KP_PANEL * KP_MAX_DIM];
  for (int64_t i = 0; i < keys->panels; i++) {
    KP(source) from = KP(find)(p, keys->b, keys->head / group, panel + i);
    float* rows = w->keys + i * KP_PANEL * ld;
    KP(read_panel)(a, &from, 0, rows, ld);
    KP(turn_panel)(rows, ld, a->dim, (float)(a->scale * (double)KP_LOG2E),
                   w->keys_t + i * KP_PANEL, TILE);
    KP(read_panel)(a, &from, 1, values, a->dim);
    KP(turn_panel)(values, a->dim, a->dim, (float)a->scale,
                   w->values_t + i * KP_PANEL, TILE);
  }
  w->odd_keys = KP(is_odd)(w->keys, keys->panels * KP_PANEL * ld);
}

// P from logits, and dS from dP, for row i of the tile.
INLINE void weigh(KP(space) * w, int64_t columns, int64_t i, float lse,
                  const uint64_t* bits, int extra) {
  float* x = w->p + i * TILE;
  vf top = v_set(lse), zero = v_set(0.0f);
  for (int64_t j = 0; j < columns; j += W) {
    vf logit = v_load(x + j);
    if (extra) logit = logit + v_load(w->weight + j);
    vf y = v_exp2(logit - top);
    v_store(x + j, bits ? v_keep((unsigned)(bits[i] >> j), y, zero) : y);
  }
}

INLINE void slope(KP(space) * w, int64_t columns, int64_t i, float delta,
                  const uint64_t* bits) {
  float *x = w->ds + i * TILE, *p = w->p + i * TILE;
  vf less = v_set(delta), zero = v_set(0.0f);
  for (int64_t j = 0; j < columns; j += W) {
    vf y = v_load(p + j) * (v_load(x + j) - less);
    v_store(x + j, bits ? v_keep((unsigned)(bits[i] >> j), y, zero) : y);
  }
}

static void KP(tile_sums)(const kp_args* a, KP(space) * w,
                          const KP(keys) * keys, int64_t q0, int64_t rows,
                          int careful_rows, int careful_keys) {
  int64_t ld = padded(a);
  const float *q = w->q + q0 * ld, *dout = w->dout + q0 * ld, *k = w->keys;
  float* dq = keys->dq + q0 * ld;
  if (careful_keys)
    KP(gemm_careful)(rows, w->ds, TILE, 1, &k, 1, keys->count, ld, dq, ld, ld);
  else
    KP(gemm_tile)(rows, w->ds, &k, 1, keys->count, ld, dq, ld, ld);
  if (careful_rows) {
    KP(gemm_careful)(keys->count, w->p, 1, TILE, &dout, 1, rows, ld, keys->dv,
                     ld, ld);
    KP(gemm_careful)(keys->count, w->ds, 1, TILE, &q, 1, rows, ld, keys->dk, ld,
                     ld);
  } else {
    KP(gemm_turned)(keys->count, w->p, dout, rows, ld, keys->dv, ld, ld);
    KP(gemm_turned)(keys->count, w->ds, q, rows, ld, keys->dk, ld, ld);
  }
}

static void KP(backward_tile)(const kp_args* a, KP(space) * w,
                              const KP(keys) * keys, int64_t q0, int64_t rows,
                              const uint64_t* bits) {
  int64_t ld = padded(a), columns = keys->panels * KP_PANEL;
  int odd = 0;
  for (int64_t i = q0 / KP_PANEL; i <= (q0 + rows - 1) / KP_PANEL; i++)
    odd |= w->odd_rows[i];
  KP(gemm_score)(rows, w->q + q0 * ld, ld, w->keys_t, a->dim, w->p, columns);
  for (int64_t i = 0; i < rows; i++) {
    if (bits || keys->extra || columns < TILE)
      weigh(w, columns, i, w->lse[q0 + i], bits, keys->extra);
    else
      weigh(w, TILE, i, w->lse[q0 + i], NULL, 0);
  }
  KP(gemm_score)(rows, w->dout + q0 * ld, ld, w->values_t, a->dim, w->ds,
                 columns);
  for (int64_t i = 0; i < rows; i++) {
    if (bits || columns < TILE)
      slope(w, columns, i, w->delta[q0 + i], bits);
    else
      slope(w, TILE, i, w->delta[q0 + i], NULL);
  }
  KP(tile_sums)(a, w, keys, q0, rows, bits && odd, bits && w->odd_keys);
}

// The queries [q0, q1), at most 256, against the keys from k0 on.
static void KP(backward_block)(const kp_plan* p, KP(space) * w,
                               const KP(keys) * keys, int64_t k0, int64_t q0,
                               int64_t q1) {
  for (; q0 < q1; q0 += TILE) {
    int64_t rows = kp_min(TILE, q1 - q0);
    int kind = kp_kind(p, keys->b, q0, q0 + rows, k0, k0 + keys->count);
    if (kind == KP_EMPTY) continue;
    if (kind == KP_MIXED) {
      memset(w->bits, 0, rows * sizeof(uint64_t));
      for (int64_t n = 0; n < keys->count; n += KP_PANEL)
        kp_add_bits(p, keys->b, q0, q0 + rows, k0 + n, n, w->bits);
    }
    KP(backward_tile)(p->a, w, keys, q0, rows,
                      kind == KP_MIXED ? w->bits : NULL);
  }
}

static void KP(backward_keys)(const KP(sums) * s, KP(space) * w,
                              KP(keys) * keys, int64_t part) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  int64_t group = a->heads / a->kv_heads, ld = padded(a);
  int64_t row = (keys->b * a->kv_heads + keys->head / group) * a->kv_len;
  int64_t list = (a->index_batch == 1 ? 0 : keys->b * a->heads) + keys->head;
  const int64_t* start = p->turned_start + list * (p->kv_blocks + 1);
  keys->extra = 0;
  for (int64_t n = part; n < p->kv_blocks; n += s->parts) {
    int64_t k0 = n * a->block, end = kp_min(k0 + a->block, a->kv_len);
    for (; k0 < end; k0 += TILE) {
      keys->count = kp_min(TILE, end - k0);
      keys->panels = kp_ceil(keys->count, KP_PANEL);
      keys->dk = s->dk + (row + k0) * ld;
      keys->dv = s->dv + (row + k0) * ld;
      if (keys->head % group == 0) {
        memset(keys->dk, 0, keys->count * ld * sizeof(float));
        memset(keys->dv, 0, keys->count * ld * sizeof(float));
      }
      if (start[n] == start[n + 1]) continue;
      KP(load_keys)(s, w, keys, k0 / KP_PANEL);
      for (int64_t i = start[n]; i < start[n + 1]; i++) {
        int64_t q0 = p->turned[i] * a->block;
        KP(backward_block)(p, w, keys, k0, q0, kp_min(q0 + a->block, a->q_len));
      }
    }
  }
}

// The remainder's keys n0 ... against every block of queries that uses one of
// them.
static void KP(backward_extra_tile)(const kp_plan* p, KP(space) * w,
                                    const KP(keys) * keys, int64_t n0) {
  const kp_args* a = p->a;
  for (int64_t i = 0; i < TILE; i++)
    w->weight[i] =
        n0 + i < p->kv_blocks ? a->extra_weight[n0 + i] * KP_LOG2E : 0.0f;
  int64_t row = (keys->b * a->heads + keys->head) * p->q_blocks;
  for (int64_t t = 0; t < p->q_blocks; t++) {
    uint64_t bits = p->rest[(row + t) * p->words + n0 / 64];
    if (!bits) continue;
    for (int64_t i = 0; i < TILE; i++) w->bits[i] = bits;
    int64_t q0 = t * a->block, q1 = kp_min(q0 + a->block, a->q_len);
    for (; q0 < q1; q0 += TILE)
      KP(backward_tile)(a, w, keys, q0, kp_min(TILE, q1 - q0), w->bits);
  }
}

static void KP(backward_extra)(const KP(sums) * s, KP(space) * w,
                               KP(keys) * keys, int64_t part) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  int64_t group = a->heads / a->kv_heads, ld = padded(a);
  int64_t row = (keys->b * a->kv_heads + keys->head / group) * p->kv_blocks;
  keys->extra = 1;
  for (int64_t n = part * TILE; n < p->kv_blocks; n += s->parts * TILE) {
    keys->count = kp_min(TILE, p->kv_blocks - n);
    keys->panels = kp_ceil(keys->count, KP_PANEL);
    keys->dk = s->dextra_k + (row + n) * ld;
    keys->dv = s->dextra_v + (row + n) * ld;
    if (keys->head % group == 0) {
      memset(keys->dk, 0, keys->count * ld * sizeof(float));
      memset(keys->dv, 0, keys->count * ld * sizeof(float));
    }
    KP(load_keys)(s, w, keys, p->panels + n / KP_PANEL);
    KP(backward_extra_tile)(p, w, keys, n);
  }
}

static void KP(backward_item)(const KP(sums) * s, KP(space) * w, int64_t item) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  int64_t part = item % s->parts, head = item / s->parts,
          size = a->q_len * padded(a);
  int64_t group = a->heads / a->kv_heads;
  KP(keys) keys = {.b = head / a->kv_heads};
  for (int64_t g = 0; g < group; g++) {
    keys.head = head % a->kv_heads * group + g;
    keys.dq =
        s->dq + ((keys.b * a->heads + keys.head) * s->parts + part) * size;
    memset(keys.dq, 0, size * sizeof(float));
    KP(load_head)(s, w, keys.b, keys.head);
    KP(backward_keys)(s, w, &keys, part);
    if (p->rest) KP(backward_extra)(s, w, &keys, part);
  }
}

static KP(space)
    KP(backward_space)(const kp_plan* p, char* at, int64_t* bytes) {
  const kp_args* a = p->a;
  int64_t ld = padded(a), used = 0;
  KP(space) w;
#define TAKE(field, count)      \
  w.field = (void*)(at + used); \
  used += kp_ceil((count) * (int64_t)sizeof(*w.field), 64) * 64
  TAKE(q, a->q_len * ld);
  TAKE(dout, a->q_len * ld);
  TAKE(lse, a->q_len);
  TAKE(delta, a->q_len);
  TAKE(odd_rows, kp_ceil(a->q_len, KP_PANEL));
  TAKE(keys_t, a->dim * TILE);
  TAKE(values_t, a->dim * TILE);
  TAKE(keys, TILE * ld);
  TAKE(weight, TILE);
  TAKE(p, TILE * TILE);
  TAKE(ds, TILE * TILE);
  TAKE(bits, TILE);
#undef TAKE
  w.odd_keys = 0;
  *bytes = used;
  return w;
}

// Adds up the parts of row i, in their order, and writes it as dtype.
static void KP(write_sum)(const kp_args* a, float* sum, int64_t parts,
                          int64_t part, int64_t i, void* to) {
  int64_t ld = padded(a), rows = part / ld;
  float* first = sum + i / rows * parts * part + i % rows * ld;
  for (int64_t n = 1; n < parts; n++)
    for (int64_t d = 0; d < a->dim; d++) first[d] += first[n * part + d];
  KP(write_row)(a, first, 1.0f, to, i * a->dim);
}

static void KP(backward_run)(KP(sums) * s, char* memory) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  int64_t items = a->batch * a->kv_heads * s->parts, ld = padded(a);
  int64_t q_rows = a->batch * a->heads * a->q_len;
  int64_t k_rows = a->batch * a->kv_heads * a->kv_len;
  int64_t e_rows = p->rest ? a->batch * a->kv_heads * p->kv_blocks : 0;
#pragma omp parallel num_threads((int)p->threads) if (p->threads > 1)
  {
    int64_t bytes;
    KP(backward_space)(p, memory, &bytes);
    KP(space)
    w = KP(backward_space)(p, memory + omp_get_thread_num() * bytes, &bytes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < items; i++) KP(backward_item)(s, &w, i);
    if (s->dq != a->dq) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < q_rows; i++)
        KP(write_sum)(a, s->dq, s->parts, a->q_len * ld, i, a->dq);
    }
    if (!s->direct) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < k_rows; i++) {
        KP(write_row)(a, s->dk + i * ld, 1.0f, a->dk, i * a->dim);
        KP(write_row)(a, s->dv + i * ld, 1.0f, a->dv, i * a->dim);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < e_rows; i++) {
        KP(write_row)(a, s->dextra_k + i * ld, 1.0f, a->dextra_k, i * a->dim);
        KP(write_row)(a, s->dextra_v + i * ld, 1.0f, a->dextra_v, i * a->dim);
      }
    }
  }
}

static int KP(make_sums)(KP(sums) * s) {
  const kp_args* a = s->p->a;
  int64_t row = padded(a) * (int64_t)sizeof(float),
          heads = a->batch * a->kv_heads;
  s->dq = a->dq, s->dk = a->dk, s->dv = a->dv;
  s->dextra_k = a->dextra_k, s->dextra_v = a->dextra_v;
  s->direct = a->dtype == KP_FLOAT32 && padded(a) == a->dim;
  if (!s->direct || s->parts > 1)
    s->dq = kp_alloc(a->batch * a->heads * s->parts * a->q_len, row);
  if (s->direct) return s->dq != NULL;
  s->dk = kp_alloc(heads * a->kv_len, row);
  s->dv = kp_alloc(heads * a->kv_len, row);
  if (!s->p->rest) return s->dq && s->dk && s->dv;
  s->dextra_k = kp_alloc(heads * s->p->kv_blocks, row);
  s->dextra_v = kp_alloc(heads * s->p->kv_blocks, row);
  return s->dq && s->dk && s->dv && s->dextra_k && s->dextra_v;
}

int KP(backward)(const kp_plan* p) {
  const kp_args* a = p->a;
  int64_t heads = a->batch * a->kv_heads, bytes;
  int whole = heads % p->threads == 0 || heads >= 4 * p->threads;
  KP(sums) s = {.p = p};
  s.parts = whole ? 1 : kp_min(p->kv_blocks, kp_ceil(2 * p->threads, heads));
  KP(backward_space)(p, NULL, &bytes);
  char* memory = kp_alloc(p->threads, bytes);
  int ok = KP(make_sums)(&s) && memory;
  if (ok) KP(backward_run)(&s, memory);
  if (s.dq != a->dq) free(s.dq);
  if (!s.direct) {
    free(s.dk);
    free(s.dv);
    if (p->rest) free(s.dextra_k);
    if (p->rest) free(s.dextra_v);
  }
  free(memory);
  return ok ? KP_OK : KP_NO_MEMORY;
}
