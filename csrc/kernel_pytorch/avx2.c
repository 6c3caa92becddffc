// SPDX-License-Identifier: Apache-2.0
//
// The tile for AVX2 with FMA: 8 floats in a vector, 16 registers, micro-tile 6
// x 16.
#if defined(__x86_64__)
#include <immintrin.h>

#include "plan.h"

#define KP(name) kp_##name##_avx2
#define W 8
#define NV 2
typedef __m256 vf;

static inline vf v_load(const float* p) { return _mm256_loadu_ps(p); }
static inline void v_store(float* p, vf x) { _mm256_storeu_ps(p, x); }
static inline vf v_set(float x) { return _mm256_set1_ps(x); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline float v_hmax(vf x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
static inline float v_hsum(vf x) {
  __m128 m = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}
static inline int v_any_above(vf a, vf b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
static inline vf v_keep(unsigned bits, vf x, vf other) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  __m256i on = _mm256_and_si256(_mm256_set1_epi32((int)bits), lane);
  on = _mm256_cmpeq_epi32(on, lane);
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(on));
}
static inline vf v_round(vf x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// The exponent is put together by hand, so x must stay in the normal range. max
// passes a NaN in its second operand on.
static inline vf v_clamp(vf x) {
  return _mm256_max_ps(_mm256_set1_ps(SMALLEST), x);
}
static inline vf v_scale(vf p, vf r, vf x) {
  __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(r), _mm256_set1_epi32(127));
  vf power = _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
  vf live = _mm256_cmp_ps(x, _mm256_set1_ps(SMALLEST), _CMP_NLE_UQ);
  return _mm256_and_ps(_mm256_mul_ps(p, power), live);
}

#include "tile.inc.h"
#else
typedef int kp_no_avx2;  // a file may not be empty
#endif
