// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Ops for which torch looks at the device's type and takes another path than on
// the CPU: they are sent as what the worker's device has.
#include <ATen/SDPBackend.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <torch/library.h>

#include "MycelyaConnection.h"
#include "MycelyaDispatch.h"

namespace at::native {
// Exported by libtorch_cpu: the CPU's own choice.
TORCH_API int64_t _fused_sdp_choice_cpp(const Tensor& query, const Tensor& key,
                                        const Tensor& value,
                                        const std::optional<Tensor>& attn_mask,
                                        double dropout_p, bool is_causal,
                                        std::optional<double> scale,
                                        bool enable_gqa);
}  // namespace at::native

namespace mycelya {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Composite convolution picks "overrideable" for every device it does not know.
Tensor convolution(const Tensor& input, const Tensor& weight,
                   const OptionalTensor& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed,
                   IntArrayRef output_padding, int64_t groups) {
  static auto& traits = traits_of("aten::convolution", "");
  return send(traits, input, weight, bias, stride, padding, dilation,
              transposed, output_padding, groups)[0]
      .toTensor();
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    bool transposed, IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> mask) {
  static auto& traits = traits_of("aten::convolution_backward", "");
  int64_t channels = transposed ? weight.size(1) * groups : weight.size(0);
  c10::List<bool> flags;
  for (bool flag : mask) flags.push_back(flag);
  auto out = send(traits, grad, input, weight,
                  c10::IValue(std::vector<int64_t>{channels}), stride, padding,
                  dilation, transposed, output_padding, groups, flags);
  return {out[0].toTensor(), out[1].toTensor(), out[2].toTensor()};
}

// Without a choice, attention falls apart into about 15 ops (D4). A CPU worker
// chooses as the CPU does; a CUDA worker gets the op for devices with a kernel
// of their own, and chooses there.
int64_t attention_choice(const Tensor& query, const Tensor& key,
                         const Tensor& value, const OptionalTensor& mask,
                         double dropout, bool causal,
                         std::optional<double> scale, bool grouped) {
  if (!Connection::at(machine_of(query)).has_cuda()) {
    return at::native::_fused_sdp_choice_cpp(query, key, value, mask, dropout,
                                             causal, scale, grouped);
  }
  return static_cast<int64_t>(at::SDPBackend::math);
}

// Lets `Module.to` put device memory into a CPU parameter, so that it stays the
// same object: tied weights stay tied, and optimizers keep it. Both are plain
// TensorImpl.
bool has_compatible_shallow_copy_type(const Tensor& self, const Tensor& from) {
  auto plain = [](const Tensor& tensor) {
    return tensor.layout() == at::kStrided &&
           (tensor.is_cpu() || tensor.device().type() == kDeviceType) &&
           !tensor.key_set().has(c10::DispatchKey::Python);
  };
  return plain(self) && plain(from);
}

// Nested tensors are not sent; nn.TransformerEncoder asks this before it makes
// one.
bool never_left_aligned(const Tensor&, const Tensor&) { return false; }

}  // namespace

void register_special(torch::Library& library) {
  library.impl("_has_compatible_shallow_copy_type",
               has_compatible_shallow_copy_type);
  library.impl("_nested_tensor_from_mask_left_aligned", never_left_aligned);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
}

}  // namespace mycelya

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub,
                              &mycelya::attention_choice)
}  // namespace at::native
