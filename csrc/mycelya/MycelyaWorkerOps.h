// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Operators that only the worker implements; see MycelyaWorkerOps.cpp.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/operator_name.h>

#include <array>
#include <optional>
#include <tuple>

namespace mycelya::worker {

// Our kernel for an operator that torch does not implement on the worker's kind
// of device, or null.
const c10::KernelFunction* own_kernel(const c10::OperatorName& name,
                                      c10::DeviceType device);

// Attention as devices with a fused kernel of their own implement it: the
// worker chooses among CUDA's kernels, and the backward finds the choice in
// what the forward saved. MycelyaWorkerAttention.cpp.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, int64_t, int64_t,
           at::Tensor, at::Tensor, at::Tensor>
attention(const at::Tensor& query, const at::Tensor& key,
          const at::Tensor& value, const std::optional<at::Tensor>& bias,
          double dropout, bool causal, bool debug, std::optional<double> scale);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& bias, std::array<bool, 4> mask,
    const at::Tensor& out, const at::Tensor& logsumexp,
    const at::Tensor& cum_seq_q, const at::Tensor& cum_seq_k, int64_t max_q,
    int64_t max_k, double dropout, bool causal, const at::Tensor& philox_seed,
    const at::Tensor& philox_offset, std::optional<double> scale);

}  // namespace mycelya::worker
