// SPDX-License-Identifier: Apache-2.0
//
// The tile for AVX-512: 16 floats in a vector, 32 registers, micro-tile 6 x 64.
#if defined(__x86_64__)
#include <immintrin.h>

#include "plan.h"

#define KP(name) kp_##name##_avx512
#define W 16
#define NV 4
typedef __m512 vf;

static inline vf v_load(const float* p) { return _mm512_loadu_ps(p); }
static inline void v_store(float* p, vf x) { _mm512_storeu_ps(p, x); }
static inline vf v_set(float x) { return _mm512_set1_ps(x); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline float v_hmax(vf x) { return _mm512_reduce_max_ps(x); }
static inline float v_hsum(vf x) { return _mm512_reduce_add_ps(x); }
static inline int v_any_above(vf a, vf b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
}
static inline vf v_keep(unsigned bits, vf x, vf other) {
  return _mm512_mask_mov_ps(other, (__mmask16)bits, x);
}
static inline vf v_round(vf x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// The mask does the clamping: a NaN passes, -inf gives 0.
static inline vf v_clamp(vf x) { return x; }
static inline vf v_scale(vf p, vf r, vf x) {
  __mmask16 live = _mm512_cmp_ps_mask(x, v_set(SMALLEST), _CMP_NLE_UQ);
  return _mm512_maskz_scalef_ps(live, p, r);
}

#include "tile.inc.h"
#else
typedef int kp_no_avx512;  // a file may not be empty
#endif
