// SPDX-License-Identifier: Apache-2.0
//
// The tile for any machine: the compiler's own vectors of 4 floats, micro-tile
// 6 x 8.
#include <math.h>
#include <string.h>

#include "plan.h"

#define KP(name) kp_##name##_generic
#define W 4
#define NV 2
typedef float vf __attribute__((vector_size(16)));
typedef int vi __attribute__((vector_size(16)));

static inline vf v_load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof(x));
  return x;
}
static inline void v_store(float* p, vf x) { memcpy(p, &x, sizeof(x)); }
static inline vf v_set(float x) { return (vf){x, x, x, x}; }
static inline vf v_fma(vf a, vf b, vf c) { return a * b + c; }
static inline vf v_pick(vi on, vf a, vf b) {
  return (vf)((on & (vi)a) | (~on & (vi)b));
}
static inline vf v_max(vf a, vf b) { return v_pick(a > b, a, b); }
static inline float v_hmax(vf x) {
  return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
}
static inline float v_hsum(vf x) { return (x[0] + x[1]) + (x[2] + x[3]); }
static inline int v_any_above(vf a, vf b) {
  vi on = a > b;
  return (on[0] | on[1] | on[2] | on[3]) != 0;
}
static inline vf v_keep(unsigned bits, vf x, vf other) {
  const vi lane = {1, 2, 4, 8};
  vi all = {(int)bits, (int)bits, (int)bits, (int)bits};
  return v_pick((all & lane) == lane, x, other);
}
// Adding 1.5 * 2^23 leaves the nearest whole number in a float.
static inline vf v_round(vf x) {
  const vf magic = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};
  return (x + magic) - magic;
}
static inline vf v_clamp(vf x) { return v_max(v_set(SMALLEST), x); }
static inline vf v_scale(vf p, vf r, vf x) {
  // A NaN has no whole part: 0 stands in for it, and p brings the NaN.
  vi e = __builtin_convertvector(v_pick(r == r, r, v_set(0.0f)), vi);
  vf power = (vf)((e + 127) << 23);
  return v_pick(~(vi)(x <= v_set(SMALLEST)), p * power, v_set(0.0f));
}

#include "tile.inc.h"
