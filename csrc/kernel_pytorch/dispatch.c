// SPDX-License-Identifier: Apache-2.0
//
// Entry points: check, choose the instruction set, run. A new one is added to
// the tables here and to `kp_best_isa`.
#include "plan.h"

typedef int (*kernel)(const kp_plan* p);
typedef int (*chooser)(const kp_plan* p, const kp_choice* c);

#if defined(__x86_64__)
static const kernel forward[] = {kp_forward_generic, kp_forward_avx2,
                                 kp_forward_avx512};
static const kernel backward[] = {kp_backward_generic, kp_backward_avx2,
                                  kp_backward_avx512};
static const chooser selection[] = {kp_select_generic, kp_select_avx2,
                                    kp_select_avx512};
#else
static const kernel forward[] = {kp_forward_generic};
static const kernel backward[] = {kp_backward_generic};
static const chooser selection[] = {kp_select_generic};
#endif

int kp_best_isa(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return KP_AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return KP_AVX2;
#endif
  return KP_GENERIC;
}

int kp_abi(int64_t* size) {
  if (size) *size = (int64_t)(sizeof(kp_args) + sizeof(kp_choice));
  return KP_ABI;
}

static int run(const kp_args* a, const kp_choice* c, kp_pass pass) {
  int best = kp_best_isa();
  if (!a || a->isa < KP_AUTO || a->isa > best) return KP_BAD_ARGUMENT;
  kp_plan plan;
  int code = kp_plan_make(a, pass, &plan);
  if (code) return code;
  int isa = a->isa == KP_AUTO ? best : (int)a->isa;
  if (pass == KP_DO_FORWARD)
    code = forward[isa](&plan);
  else if (pass == KP_DO_BACKWARD)
    code = backward[isa](&plan);
  else
    code = kp_choice_ok(&plan, c) ? selection[isa](&plan, c) : KP_BAD_ARGUMENT;
  kp_plan_free(&plan);
  return code;
}

int kp_bs_forward(const kp_args* a) { return run(a, NULL, KP_DO_FORWARD); }

int kp_bs_backward(const kp_args* a) { return run(a, NULL, KP_DO_BACKWARD); }

int kp_bs_select(const kp_args* a, const kp_choice* c) {
  return run(a, c, KP_DO_SELECT);
}
