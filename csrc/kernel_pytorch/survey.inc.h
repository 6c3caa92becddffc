// SPDX-License-Identifier: Apache-2.0
//
// What choosing blocks asks of the keys: their panels, packed as in the forward
// pass; each head's keys furthest from the mean key; and with the remainder the
// mean key of each block.

#define FAR 32  // far keys of a head

typedef struct {
  const kp_plan* p;
  const kp_choice* c;
  int64_t heads;       // kv heads, of all batch entries, packed at a time
  float* keys;         // [heads][panels][dim][16]
  float* sums;         // [heads][panels][dim] sum of a panel's keys
  float* mean;         // [heads][dim]
  uint32_t* rank;      // [heads][panels * 16] of the distance from the mean
  uint8_t* chosen;     // [heads][panels * 16]
  float* far;          // [heads][dim][TILE], of which FAR are used
  int64_t* far_at;     // [heads][FAR] positions, ascending
  int64_t* far_count;  // [heads]
  float* means;        // [heads][mean_panels][dim][16]
  int64_t mean_panels;
} KP(survey);

static void KP(survey_panel)(const KP(survey) * s, int64_t first, int64_t at) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  int64_t head = first + at / p->panels;
  KP(source)
  from = KP(find)(p, head / a->kv_heads, head % a->kv_heads, at % p->panels);
  float rows[KP_PANEL * KP_MAX_DIM], *sum = s->sums + at * a->dim;
  KP(read_panel)(a, &from, 0, rows, a->dim);
  float factor = (float)(a->scale * (double)KP_LOG2E);
  KP(turn_panel)(rows, a->dim, a->dim, factor, s->keys + at * KP_PANEL * a->dim,
                 KP_PANEL);
  memset(sum, 0, a->dim * sizeof(float));
  for (int64_t i = 0; i < KP_PANEL; i++)
    for (int64_t d = 0; d < a->dim; d++)
      sum[d] += rows[i * a->dim + d] * factor;
}

static void KP(survey_mean)(const KP(survey) * s, int64_t first, int64_t head) {
  const kp_plan* p = s->p;
  int64_t dim = p->a->dim, b = (first + head) / p->a->kv_heads;
  int64_t count = p->a->kv_len;
  if (p->hidden) count -= p->hidden[b * (p->a->kv_len + 1) + p->a->kv_len];
  float* mean = s->mean + head * dim;
  memset(mean, 0, dim * sizeof(float));
  for (int64_t i = 0; i < p->panels; i++)
    for (int64_t d = 0; d < dim; d++)
      mean[d] += s->sums[(head * p->panels + i) * dim + d];
  for (int64_t d = 0; d < dim; d++) mean[d] /= (float)kp_max(count, 1);
}

static void KP(survey_distances)(const KP(survey) * s, int64_t first,
                                 int64_t at) {
  const kp_plan* p = s->p;
  int64_t dim = p->a->dim, head = at / p->panels, panel = at % p->panels;
  int64_t b = (first + head) / p->a->kv_heads;
  const float *keys = s->keys + at * KP_PANEL * dim,
              *mean = s->mean + head * dim;
  float far[KP_PANEL] = {0};
  for (int64_t d = 0; d < dim; d++)
    for (int64_t i = 0; i < KP_PANEL; i++) {
      float x = keys[d * KP_PANEL + i] - mean[d];
      far[i] += x * x;
    }
  int64_t count = kp_min(KP_PANEL, p->a->kv_len - panel * KP_PANEL);
  unsigned shown = p->shown ? p->shown[b * p->panels + panel] : 0xffffu;
  for (int64_t i = 0; i < KP_PANEL; i++)
    s->rank[at * KP_PANEL + i] =
        i < count && (shown >> i & 1) ? rank_of(far[i]) : 0;
}

static void KP(survey_far)(const KP(survey) * s, int64_t head) {
  const kp_plan* p = s->p;
  int64_t dim = p->a->dim, all = p->panels * KP_PANEL, n = 0;
  uint8_t* chosen = s->chosen + head * all;
  int64_t* at = s->far_at + head * FAR;
  float* far = s->far + head * dim * TILE;
  const float* keys = s->keys + head * all * dim;
  KP(mark_best)(s->rank + head * all, all, FAR, chosen);
  memset(far, 0, dim * TILE * sizeof(float));
  for (int64_t j = 0; j < all && n < FAR; j++) {
    if (!chosen[j]) continue;
    const float* key = keys + j / KP_PANEL * KP_PANEL * dim + j % KP_PANEL;
    for (int64_t d = 0; d < dim; d++) far[d * TILE + n] = key[d * KP_PANEL];
    at[n++] = j;
  }
  s->far_count[head] = n;
}

// The means of 16 blocks; hidden keys count as 0 in them.
static void KP(survey_means)(const KP(survey) * s, int64_t at) {
  const kp_plan* p = s->p;
  const kp_args* a = p->a;
  int64_t head = at / s->mean_panels, each = a->block / KP_PANEL;
  float* to = s->means + at * KP_PANEL * a->dim;
  memset(to, 0, KP_PANEL * a->dim * sizeof(float));
  for (int64_t i = 0; i < KP_PANEL; i++) {
    int64_t block = at % s->mean_panels * KP_PANEL + i;
    int64_t end = kp_min((block + 1) * each, p->panels);
    int64_t count = kp_min(a->block, a->kv_len - block * a->block);
    for (int64_t n = block * each; n < end; n++)
      for (int64_t d = 0; d < a->dim; d++)
        to[d * KP_PANEL + i] +=
            s->sums[(head * p->panels + n) * a->dim + d] / (float)count;
  }
}

// Surveys `count` heads from kv head `first` on; all threads come here.
static void KP(survey_heads)(const KP(survey) * s, int64_t first,
                             int64_t count) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < count * s->p->panels; i++)
    KP(survey_panel)(s, first, i);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < count; i++) KP(survey_mean)(s, first, i);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < count * s->p->panels; i++)
    KP(survey_distances)(s, first, i);
#pragma omp for schedule(static) nowait
  for (int64_t i = 0; i < count; i++) KP(survey_far)(s, i);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < count * s->mean_panels; i++) KP(survey_means)(s, i);
}

static int KP(survey_make)(KP(survey) * s) {
  const kp_plan* p = s->p;
  int64_t n = s->heads, dim = p->a->dim, f = (int64_t)sizeof(float);
  s->mean_panels = s->c->remainder ? kp_ceil(p->kv_blocks, KP_PANEL) : 0;
  s->keys = kp_alloc(n * p->panels * KP_PANEL, dim * f);
  s->sums = kp_alloc(n * p->panels, dim * f);
  s->mean = kp_alloc(n, dim * f);
  s->rank = kp_alloc(n * p->panels * KP_PANEL, sizeof(uint32_t));
  s->chosen = kp_alloc(n * p->panels * KP_PANEL, 1);
  s->far = kp_alloc(n * TILE, dim * f);
  s->far_at = kp_alloc(n * FAR, sizeof(int64_t));
  s->far_count = kp_alloc(n, sizeof(int64_t));
  s->means = kp_alloc(n * s->mean_panels * KP_PANEL, dim * f);
  return s->keys && s->sums && s->mean && s->rank && s->chosen && s->far &&
         s->far_at && s->far_count && s->means;
}

static void KP(survey_free)(KP(survey) * s) {
  free(s->keys);
  free(s->sums);
  free(s->mean);
  free(s->rank);
  free(s->chosen);
  free(s->far);
  free(s->far_at);
  free(s->far_count);
  free(s->means);
}
