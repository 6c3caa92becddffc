// SPDX-License-Identifier: Apache-2.0
//
// Reading and writing rows of either type, and packing keys and values.

INLINE float from_bfloat16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, sizeof(y));
  return y;
}

// Round to nearest, ties to even; a NaN stays one.
INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (x != x) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static void KP(read_row)(const kp_args* a, const void* base, int64_t at,
                         float* to) {
  if (a->dtype == KP_FLOAT32) {
    memcpy(to, (const float*)base + at, a->dim * sizeof(float));
    return;
  }
  const uint16_t* from = (const uint16_t*)base + at;
  for (int64_t d = 0; d < a->dim; d++) to[d] = from_bfloat16(from[d]);
}

static void KP(write_row)(const kp_args* a, const float* from, float factor,
                          void* base, int64_t at) {
  if (a->dtype == KP_FLOAT32) {
    float* to = (float*)base + at;
    for (int64_t d = 0; d < a->dim; d++) to[d] = from[d] * factor;
    return;
  }
  uint16_t* to = (uint16_t*)base + at;
  for (int64_t d = 0; d < a->dim; d++) to[d] = to_bfloat16(from[d] * factor);
}

// Is there a NaN or an infinity among n floats?
static int KP(is_odd)(const float* x, int64_t n) {
  int found = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof(bits));
    found |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return found;
}

// dim rounded up to whole vectors: the length of a packed row.
INLINE int64_t padded(const kp_args* a) { return kp_ceil(a->dim, W) * W; }

// What a panel of keys is read from: the keys, or the remainder's behind them.
typedef struct {
  const void *k, *v;
  int64_t k_at, v_at, k_row, v_row, count;
  uint64_t shown;
} KP(source);

static KP(source)
    KP(find)(const kp_plan* p, int64_t b, int64_t head, int64_t panel) {
  const kp_args* a = p->a;
  KP(source) s = {.shown = ~(uint64_t)0};
  if (panel < p->panels) {
    int64_t k0 = panel * KP_PANEL;
    s.k = a->k, s.v = a->v;
    s.k_row = a->k_stride[2], s.v_row = a->v_stride[2];
    s.k_at = b * a->k_stride[0] + head * a->k_stride[1] + k0 * s.k_row;
    s.v_at = b * a->v_stride[0] + head * a->v_stride[1] + k0 * s.v_row;
    s.count = kp_min(KP_PANEL, a->kv_len - k0);
    if (p->shown) s.shown = p->shown[b * p->panels + panel];
    return s;
  }
  int64_t k0 = (panel - p->panels) * KP_PANEL;
  s.k = a->extra_k, s.v = a->extra_v;
  s.k_row = s.v_row = a->dim;
  s.k_at = s.v_at = ((b * a->kv_heads + head) * p->kv_blocks + k0) * a->dim;
  s.count = kp_min(KP_PANEL, p->kv_blocks - k0);
  return s;
}

// Reads 16 rows of ld floats; zeros for keys that padding hides or that do not
// exist.
static void KP(read_panel)(const kp_args* a, const KP(source) * s, int values,
                           float* to, int64_t ld) {
  for (int64_t i = 0; i < KP_PANEL; i++, to += ld) {
    int64_t used = 0;
    if (i < s->count && (s->shown >> i & 1)) {
      used = a->dim;
      if (values)
        KP(read_row)(a, s->v, s->v_at + i * s->v_row, to);
      else
        KP(read_row)(a, s->k, s->k_at + i * s->k_row, to);
    }
    memset(to + used, 0, (ld - used) * sizeof(float));
  }
}

// to[d][ld] gets the panel's 16 columns, times factor.
static void KP(turn_panel)(const float* from, int64_t from_ld, int64_t dim,
                           float factor, float* to, int64_t ld) {
  for (int64_t d = 0; d < dim; d++)
    for (int64_t i = 0; i < KP_PANEL; i++)
      to[d * ld + i] = from[i * from_ld + d] * factor;
}
