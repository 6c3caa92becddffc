// SPDX-License-Identifier: Apache-2.0
//
// Argument checks and the mask's tables; see plan.h.
#include "plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void* kp_alloc(int64_t count, int64_t size) {
  int64_t bytes;
  if (count < 0 || __builtin_mul_overflow(count, size, &bytes)) return NULL;
  if (bytes > INT64_MAX - 64) return NULL;
  return aligned_alloc(64, (size_t)(bytes / 64 * 64 + 64));
}

// Sizes are bounded so that no product of them below leaves 64 bits.
static int sizes_ok(const kp_args* a) {
  const int64_t most = INT32_MAX - 1024;
  if (a->batch < 1 || a->batch > most || a->heads < 1 || a->heads > most)
    return 0;
  if (a->kv_heads < 1 || a->heads % a->kv_heads) return 0;
  if (a->q_len < 1 || a->q_len > most) return 0;
  if (a->kv_len < 1 || a->kv_len > most) return 0;
  if (a->dim < 1 || a->dim > KP_MAX_DIM) return 0;
  if (a->block < 16 || a->block > 256 || a->block % KP_PANEL) return 0;
  if (a->width < 0 || a->width > most) return 0;
  if (a->window < 0 || a->window > INT64_MAX / 4) return 0;
  if (a->index_batch != 1 && a->index_batch != a->batch) return 0;
  if (a->dtype != KP_FLOAT32 && a->dtype != KP_BFLOAT16) return 0;
  if (a->threads < 1 || a->threads > 65536 || !isfinite(a->scale)) return 0;
  if (a->documents) {
    if (a->positions < a->q_len || a->positions < a->kv_len) return 0;
    if (a->positions > most) return 0;
  }
  int64_t all, rows = kp_max(a->q_len, a->kv_len) + 256;
  if (__builtin_mul_overflow(a->batch, a->heads, &all)) return 0;
  if (__builtin_mul_overflow(all, rows, &all)) return 0;
  if (__builtin_mul_overflow(all, (int64_t)KP_MAX_DIM * 8, &all)) return 0;
  return !__builtin_mul_overflow(a->index_batch * a->heads * rows,
                                 a->width * 4 + 4, &all);
}

static int pointers_ok(const kp_args* a, kp_pass pass) {
  if (pass == KP_DO_SELECT) return a->q && a->k && !a->extra_k;
  if (!a->q || !a->k || !a->v || !a->out || !a->lse || !a->counts) return 0;
  if (a->width && !a->blocks) return 0;
  if (a->extra_k && (!a->extra_v || !a->extra_weight)) return 0;
  if (pass == KP_DO_FORWARD) return 1;
  if (!a->dout || !a->dq || !a->dk || !a->dv) return 0;
  return !a->extra_k || (a->dextra_k && a->dextra_v);
}

static int lists_ok(const kp_args* a, const kp_plan* p) {
  int64_t rows = a->index_batch * a->heads * p->q_blocks;
  for (int64_t row = 0; row < rows; row++) {
    int32_t count = a->counts[row], before = -1;
    if (count < 0 || count > a->width) return 0;
    const int32_t* list = a->blocks + row * a->width;
    for (int32_t i = 0; i < count; i++) {
      if (list[i] <= before || list[i] >= p->kv_blocks) return 0;
      before = list[i];
    }
  }
  return 1;
}

static int make_padding(kp_plan* p) {
  const kp_args* a = p->a;
  if (!a->key_padding) return KP_OK;
  p->hidden = kp_alloc(a->batch * (a->kv_len + 1), sizeof(int32_t));
  p->shown = kp_alloc(a->batch * p->panels, sizeof(uint16_t));
  if (!p->hidden || !p->shown) return KP_NO_MEMORY;
  memset(p->shown, 0, a->batch * p->panels * sizeof(uint16_t));
  for (int64_t b = 0; b < a->batch; b++) {
    const uint8_t* keep = a->key_padding + b * a->kv_len;
    int32_t* before = p->hidden + b * (a->kv_len + 1);
    before[0] = 0;
    for (int64_t j = 0; j < a->kv_len; j++) {
      before[j + 1] = before[j] + !keep[j];
      uint16_t bit = (uint16_t)((keep[j] != 0) << (j % KP_PANEL));
      p->shown[b * p->panels + j / KP_PANEL] |= bit;
    }
  }
  return KP_OK;
}

static int make_documents(kp_plan* p) {
  const kp_args* a = p->a;
  if (!a->documents) return KP_OK;
  p->same = kp_alloc(a->batch * a->positions, sizeof(int32_t));
  if (!p->same) return KP_NO_MEMORY;
  for (int64_t b = 0; b < a->batch; b++) {
    const int64_t* id = a->documents + b * a->positions;
    int32_t* end = p->same + b * a->positions;
    for (int64_t j = a->positions - 1; j >= 0; j--) {
      int joined = j + 1 < a->positions && id[j] == id[j + 1];
      end[j] = joined ? end[j + 1] : (int32_t)(j + 1);
    }
  }
  return KP_OK;
}

static void rest_of_row(const kp_plan* p, int64_t b, int64_t h, int64_t row) {
  const kp_args* a = p->a;
  int64_t q0 = row * a->block, q1 = kp_min(q0 + a->block, a->q_len);
  uint64_t* bits =
      p->rest + ((b * a->heads + h) * p->q_blocks + row) * p->words;
  memset(bits, 0, p->words * sizeof(uint64_t));
  for (int64_t n = 0; n < p->kv_blocks; n++) {
    int64_t k0 = n * a->block, k1 = kp_min(k0 + a->block, a->kv_len);
    uint64_t full = kp_kind(p, b, q0, q1, k0, k1) == KP_FULL;
    bits[n / 64] |= full << (n % 64);
  }
  int64_t b_index = a->index_batch == 1 ? 0 : b;
  int64_t at = (b_index * a->heads + h) * p->q_blocks + row;
  for (int32_t i = 0; i < a->counts[at]; i++) {
    int32_t n = a->blocks[at * a->width + i];
    bits[n / 64] &= ~((uint64_t)1 << (n % 64));
  }
}

// A dropped block stands in the remainder when every query sees every key of
// it.
static int make_rest(kp_plan* p) {
  const kp_args* a = p->a;
  if (!a->extra_k) return KP_OK;
  p->words = kp_ceil(p->kv_blocks, 64);
  int64_t rows = a->batch * a->heads * p->q_blocks;
  p->rest = kp_alloc(rows, p->words * (int64_t)sizeof(uint64_t));
  if (!p->rest) return KP_NO_MEMORY;
  for (int64_t b = 0; b < a->batch; b++)
    for (int64_t h = 0; h < a->heads; h++)
      for (int64_t row = 0; row < p->q_blocks; row++) rest_of_row(p, b, h, row);
  return KP_OK;
}

// Long rows first, by a counting sort inside each head: threads end together,
// and one head's keys stay in the cache.
static int make_order(kp_plan* p) {
  const kp_args* a = p->a;
  int64_t heads = a->index_batch * a->heads;
  p->order = kp_alloc(heads * p->q_blocks, sizeof(int32_t));
  int64_t* start = kp_alloc(a->width + 2, sizeof(int64_t));
  if (!p->order || !start) {
    free(start);
    return KP_NO_MEMORY;
  }
  for (int64_t h = 0; h < heads; h++) {
    const int32_t* counts = a->counts + h * p->q_blocks;
    memset(start, 0, (a->width + 2) * sizeof(int64_t));
    for (int64_t t = 0; t < p->q_blocks; t++) start[a->width - counts[t] + 1]++;
    for (int64_t c = 0; c <= a->width; c++) start[c + 1] += start[c];
    for (int64_t t = 0; t < p->q_blocks; t++)
      p->order[h * p->q_blocks + start[a->width - counts[t]]++] = (int32_t)t;
  }
  free(start);
  return KP_OK;
}

// The row list transposed; walking the rows in order leaves each list sorted.
static void turn_list(const kp_plan* p, int64_t head, int64_t* start) {
  const kp_args* a = p->a;
  for (int64_t t = 0; t < p->q_blocks; t++) {
    int64_t at = head * p->q_blocks + t;
    for (int32_t i = 0; i < a->counts[at]; i++)
      p->turned[start[a->blocks[at * a->width + i]]++] = (int32_t)t;
  }
  // Each start now stands where the next one began.
  for (int64_t n = p->kv_blocks; n > 0; n--) start[n] = start[n - 1];
}

static int make_turned(kp_plan* p) {
  const kp_args* a = p->a;
  int64_t heads = a->index_batch * a->heads, all = 0, each = p->kv_blocks + 1;
  for (int64_t i = 0; i < heads * p->q_blocks; i++) all += a->counts[i];
  p->turned_start = kp_alloc(heads * each, sizeof(int64_t));
  p->turned = kp_alloc(all, sizeof(int32_t));
  if (!p->turned_start || !p->turned) return KP_NO_MEMORY;
  memset(p->turned_start, 0, heads * each * sizeof(int64_t));
  all = 0;
  for (int64_t h = 0; h < heads; h++) {
    int64_t *start = p->turned_start + h * each, first = all;
    for (int64_t t = h * p->q_blocks; t < (h + 1) * p->q_blocks; t++)
      for (int32_t i = 0; i < a->counts[t]; i++)
        start[a->blocks[t * a->width + i]]++;
    for (int64_t n = 0; n < each; n++) {
      int64_t count = start[n];
      start[n] = all;
      all += count;
    }
    turn_list(p, h, start);
    start[0] = first;
  }
  return KP_OK;
}

int kp_plan_make(const kp_args* a, kp_pass pass, kp_plan* p) {
  memset(p, 0, sizeof(*p));
  if (!a || !sizes_ok(a) || !pointers_ok(a, pass)) return KP_BAD_ARGUMENT;
  p->a = a;
  p->threads = a->threads;
  p->q_blocks = kp_ceil(a->q_len, a->block);
  p->kv_blocks = kp_ceil(a->kv_len, a->block);
  p->panels = kp_ceil(a->kv_len, KP_PANEL);
  p->extra_panels = a->extra_k ? kp_ceil(p->kv_blocks, KP_PANEL) : 0;
  if (pass != KP_DO_SELECT && !lists_ok(a, p)) return KP_BAD_ARGUMENT;
  int code = make_padding(p);
  if (!code) code = make_documents(p);
  if (!code) code = make_rest(p);
  if (!code && pass == KP_DO_FORWARD) code = make_order(p);
  if (!code && pass == KP_DO_BACKWARD) code = make_turned(p);
  if (code) kp_plan_free(p);
  return code;
}

int kp_choice_ok(const kp_plan* p, const kp_choice* c) {
  if (!c || !c->counts || !c->missed) return 0;
  if (!(c->keep >= 0.0 && c->keep <= 1.0)) return 0;
  if (!(c->coverage >= 0.0 && c->coverage <= 1.0)) return 0;
  int64_t most = p->kv_blocks;
  if (c->coverage == 0.0)
    most = kp_max(1, (int64_t)nearbyint(c->keep * (double)most));
  return p->a->index_batch == p->a->batch && p->a->width >= most && c->blocks;
}

void kp_plan_free(kp_plan* p) {
  free(p->hidden);
  free(p->shown);
  free(p->same);
  free(p->rest);
  free(p->turned_start);
  free(p->turned);
  free(p->order);
}
