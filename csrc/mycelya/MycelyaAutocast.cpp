// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// torch.autocast("mycelya"): CUDA's lists of ops. Without the fallthrough every
// op inside raises.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

namespace at::autocast {
namespace {

#define MYCELYA_LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define MYCELYA_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define MYCELYA_OPTIONAL(...) \
  KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define MYCELYA_APPEND(...)                                           \
  KERNEL_DIFFERENT_REDISPATCH_SIGNATURE(c10::DeviceType::PrivateUse1, \
                                        __VA_ARGS__)
#define MYCELYA_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, library) {
  auto& m = library;
  AT_FORALL_LOWER_PRECISION_FP(MYCELYA_LOWER)
  AT_FORALL_FP32(MYCELYA_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(MYCELYA_OPTIONAL)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(MYCELYA_APPEND)
  AT_FORALL_PROMOTE(MYCELYA_PROMOTE)
}

}  // namespace
}  // namespace at::autocast
