// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Kernels for operators that torch picks for devices other than the CPU and
// does not implement on the worker's. They belong to the worker, not to the
// dispatcher: the client may live in the same process.
#include "MycelyaWorkerOps.h"

#include <unordered_map>

namespace mycelya::worker {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

bool is_given(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined();
}

Tensor with_bias(const Tensor& gates, const OptionalTensor& bias) {
  return is_given(bias) ? at::add(gates, *bias) : gates;
}

Tensor sum_of_rows(const Tensor& gates, bool has_bias) {
  return has_bias ? at::sum(gates, {0}, /*keepdim=*/false) : Tensor();
}

// ---- LSTM and GRU cells: the CPU's own steps (aten/src/ATen/native/RNN.cpp),
// in its order, so that the numbers are the CPU's ----
// The workspace holds the four gates after their activations.
std::tuple<Tensor, Tensor, Tensor> lstm_cell(
    const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& cx,
    const OptionalTensor& input_bias, const OptionalTensor& hidden_bias) {
  auto gates = at::add(with_bias(hidden_gates, hidden_bias),
                       with_bias(input_gates, input_bias));
  auto parts = gates.unsafe_chunk(4, 1);
  auto in = parts[0].sigmoid_(), forget = parts[1].sigmoid_();
  auto cell = parts[2].tanh_(), out = parts[3].sigmoid_();
  auto cy = at::mul(forget, cx).add_(at::mul(in, cell));
  auto hy = at::mul(out, at::tanh(cy));
  return {hy, cy, gates};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(
    const OptionalTensor& grad_hy, const OptionalTensor& grad_cy,
    const Tensor& cx, const Tensor& cy, const Tensor& workspace,
    bool has_bias) {
  if (!is_given(grad_hy) && !is_given(grad_cy)) return {};
  auto parts = workspace.unsafe_chunk(4, 1);
  const auto &in = parts[0], &forget = parts[1], &cell = parts[2],
             &out = parts[3];
  Tensor grad = is_given(grad_cy) ? *grad_cy : Tensor();
  auto grad_out = at::zeros_like(out);
  if (is_given(grad_hy)) {
    auto state = at::tanh(cy);
    grad_out = at::sigmoid_backward(at::mul(*grad_hy, state), out);
    auto through = at::tanh_backward(at::mul(*grad_hy, out), state);
    grad = grad.defined() ? at::add(grad, through) : through;
  }
  auto gates = at::cat({at::sigmoid_backward(at::mul(grad, cell), in),
                        at::sigmoid_backward(at::mul(grad, cx), forget),
                        at::tanh_backward(at::mul(grad, in), cell), grad_out},
                       1);
  return {gates, at::mul(grad, forget), sum_of_rows(gates, has_bias)};
}

// The workspace holds reset, input and new gate, the hidden state, and the
// hidden part of the new gate before the reset gate.
std::tuple<Tensor, Tensor> gru_cell(const Tensor& input_gates,
                                    const Tensor& hidden_gates,
                                    const Tensor& hx,
                                    const OptionalTensor& input_bias,
                                    const OptionalTensor& hidden_bias) {
  auto from_input = with_bias(input_gates, input_bias).unsafe_chunk(3, 1);
  auto from_hidden = with_bias(hidden_gates, hidden_bias).unsafe_chunk(3, 1);
  auto reset = at::add(from_hidden[0], from_input[0]).sigmoid_();
  auto in = at::add(from_hidden[1], from_input[1]).sigmoid_();
  auto fresh = at::add(from_input[2], at::mul(from_hidden[2], reset)).tanh_();
  auto hy = at::sub(hx, fresh).mul_(in).add_(fresh);
  return {hy, at::cat({reset, in, fresh, hx, from_hidden[2]}, 1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(
    const Tensor& grad_hy, const Tensor& workspace, bool has_bias) {
  auto parts = workspace.unsafe_chunk(5, 1);
  const auto &reset = parts[0], &in = parts[1], &fresh = parts[2],
             &hx = parts[3], &hidden = parts[4];
  auto difference = at::mul(grad_hy, in);
  auto grad_in = at::sigmoid_backward(at::mul(grad_hy, at::sub(hx, fresh)), in);
  auto grad_fresh = at::tanh_backward(at::sub(grad_hy, difference), fresh);
  auto grad_reset = at::sigmoid_backward(at::mul(grad_fresh, hidden), reset);
  auto for_input = at::cat({grad_reset, grad_in, grad_fresh}, 1);
  auto for_hidden =
      at::cat({grad_reset, grad_in, at::mul(grad_fresh, reset)}, 1);
  return {for_input, for_hidden, difference, sum_of_rows(for_input, has_bias),
          sum_of_rows(for_hidden, has_bias)};
}

// ---- attention on the CPU: torch's own kernel, which trusts its caller ----
void check_heads(const Tensor& query, const Tensor& key, const Tensor& value) {
  for (const auto* tensor : {&query, &key, &value}) {
    TORCH_CHECK(tensor->dim() == 4, "attention takes tensors of 4 dimensions");
    TORCH_CHECK(tensor->size(1) > 0 && tensor->size(2) > 0,
                "attention takes no empty tensors");
    TORCH_CHECK(tensor->stride(3) == 1 || tensor->size(3) <= 1,
                "attention takes tensors with stride 1 in the last dimension");
  }
  TORCH_CHECK(
      query.size(0) == key.size(0) && query.size(0) == value.size(0) &&
          key.size(1) == value.size(1) && key.size(2) == value.size(2) &&
          query.size(1) % key.size(1) == 0 && query.size(3) == key.size(3),
      "attention of ", query.sizes(), " to ", key.sizes(), " and ",
      value.sizes());
}

std::tuple<Tensor, Tensor> cpu_attention(const Tensor& query, const Tensor& key,
                                         const Tensor& value, double dropout,
                                         bool causal,
                                         const OptionalTensor& mask,
                                         std::optional<double> scale) {
  check_heads(query, key, value);
  return at::_scaled_dot_product_flash_attention_for_cpu(
      query, key, value, dropout, causal, mask, scale);
}

std::tuple<Tensor, Tensor, Tensor> cpu_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& logsumexp,
    double dropout, bool causal, const OptionalTensor& mask,
    std::optional<double> scale) {
  check_heads(query, key, value);
  TORCH_CHECK(grad.sizes() == query.sizes() && out.sizes() == query.sizes() &&
                  logsumexp.sizes() == query.sizes().slice(0, 3),
              "attention of ", query.sizes(), " has a result of ", out.sizes(),
              ", its gradient ", grad.sizes());
  return at::_scaled_dot_product_flash_attention_for_cpu_backward(
      grad, query, key, value, out, logsumexp, dropout, causal, mask, scale);
}

using Kernels = std::unordered_map<std::string, c10::KernelFunction>;

template <class Function>
c10::KernelFunction kernel(Function* function) {
  return c10::KernelFunction::makeFromUnboxedRuntimeFunction(function);
}

const Kernels& cpu_kernels() {
  static const auto* kernels = new Kernels{
      {"aten::_thnn_fused_lstm_cell", kernel(&lstm_cell)},
      {"aten::_thnn_fused_lstm_cell_backward_impl",
       kernel(&lstm_cell_backward)},
      {"aten::_thnn_fused_gru_cell", kernel(&gru_cell)},
      {"aten::_thnn_fused_gru_cell_backward", kernel(&gru_cell_backward)},
      {"aten::_scaled_dot_product_flash_attention_for_cpu",
       kernel(&cpu_attention)},
      {"aten::_scaled_dot_product_flash_attention_for_cpu_backward",
       kernel(&cpu_attention_backward)},
  };
  return *kernels;
}

const Kernels& cuda_kernels() {
  static const auto* kernels = new Kernels{
      {"aten::_scaled_dot_product_fused_attention_overrideable",
       kernel(&attention)},
      {"aten::_scaled_dot_product_fused_attention_overrideable_backward",
       kernel(&attention_backward)},
  };
  return *kernels;
}

}  // namespace

const c10::KernelFunction* own_kernel(const c10::OperatorName& name,
                                      c10::DeviceType device) {
  if (!name.overload_name.empty()) return nullptr;
  const auto& kernels = device == c10::kCPU ? cpu_kernels() : cuda_kernels();
  auto found = kernels.find(name.name);
  return found == kernels.end() ? nullptr : &found->second;
}

}  // namespace mycelya::worker
