// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Scaled dot product attention on a CUDA worker. Which kernel ran is kept in
// the shape of `cum_seq_q`, [0, backend], which costs no memory and no wait to
// read; ordinary attention does not use that tensor.
#include <ATen/SDPBackend.h>

#include <cmath>

#include "MycelyaWorkerOps.h"

namespace mycelya::worker {
namespace {

using at::SDPBackend;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Saved = std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, int64_t,
                         Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

SDPBackend choose(const Tensor& query, const Tensor& key, const Tensor& value,
                  const OptionalTensor& bias, double dropout, bool causal,
                  std::optional<double> scale) {
  auto choice = static_cast<SDPBackend>(at::_fused_sdp_choice(
      query, key, value, bias, dropout, causal, scale, /*enable_gqa=*/false));
  bool fits = query.size(-1) % 8 == 0 && value.size(-1) % 8 == 0;
  switch (choice) {
    case SDPBackend::flash_attention:
    case SDPBackend::cudnn_attention:
      // Other head sizes need padding that the backward would have to know of.
      return fits ? choice : SDPBackend::math;
    case SDPBackend::efficient_attention:
      // The kernel wants rows of the bias aligned to 16 elements.
      return !bias.has_value() || bias->size(-1) % 16 == 0 ? choice
                                                           : SDPBackend::math;
    default:
      return SDPBackend::math;
  }
}

Tensor mark(SDPBackend backend, const Tensor& like) {
  return at::empty({0, static_cast<int64_t>(backend)}, like.options());
}

OptionalTensor expanded(const OptionalTensor& bias, const Tensor& query,
                        const Tensor& key) {
  if (!bias.has_value() || !bias->defined()) return std::nullopt;
  return bias->expand(
      {query.size(0), query.size(1), query.size(2), key.size(2)});
}

// ---- plain matrix products, in at least float32 ----
Tensor wide(const Tensor& tensor) {
  auto dtype = tensor.scalar_type();
  bool half = dtype == at::kHalf || dtype == at::kBFloat16;
  return half ? tensor.to(at::kFloat) : tensor;
}

double scale_of(const Tensor& query, std::optional<double> scale) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(query.size(-1))));
}

Tensor weights(const Tensor& query, const Tensor& key,
               const OptionalTensor& bias, bool causal, double scale) {
  auto scores = at::matmul(wide(query), wide(key).transpose(-2, -1)) * scale;
  if (causal) {
    auto allowed = at::ones({query.size(-2), key.size(-2)},
                            query.options().dtype(at::kBool))
                       .tril();
    scores = scores.masked_fill(allowed.logical_not(), -INFINITY);
  }
  if (bias.has_value() && bias->defined()) scores = scores + wide(*bias);
  return at::softmax(scores, -1);
}

Saved plain(const Tensor& query, const Tensor& key, const Tensor& value,
            const OptionalTensor& bias, double dropout, bool causal,
            std::optional<double> scale) {
  auto attended = weights(query, key, bias, causal, scale_of(query, scale));
  auto kept = mark(SDPBackend::math, query);
  if (dropout > 0) {
    kept = at::empty_like(attended, attended.options().dtype(at::kBool))
               .bernoulli_(1 - dropout);
    attended = attended * kept / (1 - dropout);
  }
  auto out = at::matmul(attended, wide(value)).to(query.scalar_type());
  auto none = mark(SDPBackend::math, query);
  return {out,          none, none.clone(), none.clone(), query.size(-2),
          key.size(-2), kept, none.clone(), none.clone()};
}

Gradients plain_backward(const Tensor& grad, const Tensor& query,
                         const Tensor& key, const Tensor& value,
                         const Tensor& bias, std::array<bool, 4> mask,
                         const Tensor& kept, double dropout, bool causal,
                         std::optional<double> scale) {
  double factor = scale_of(query, scale);
  auto upper = wide(grad);
  auto attended = weights(query, key, bias, causal, factor);
  auto used = dropout > 0 ? attended * kept / (1 - dropout) : attended;
  auto grad_value = at::matmul(used.transpose(-2, -1), upper);
  auto grad_used = at::matmul(upper, wide(value).transpose(-2, -1));
  if (dropout > 0) grad_used = grad_used * kept / (1 - dropout);
  auto scores = at::_softmax_backward_data(grad_used, attended, -1,
                                           attended.scalar_type());
  auto grad_query = at::matmul(scores, wide(key)) * factor;
  auto grad_key = at::matmul(scores.transpose(-2, -1), wide(query)) * factor;
  Tensor grad_bias;
  if (mask[3] && bias.defined()) {
    grad_bias = at::sum_to(scores, bias.sizes()).to(bias.scalar_type());
  }
  return {grad_query.to(query.scalar_type()), grad_key.to(key.scalar_type()),
          grad_value.to(value.scalar_type()), grad_bias};
}

}  // namespace

Saved attention(const Tensor& query, const Tensor& key, const Tensor& value,
                const OptionalTensor& bias, double dropout, bool causal,
                bool debug, std::optional<double> scale) {
  TORCH_CHECK_NOT_IMPLEMENTED(!debug, "attention with return_debug_mask");
  auto backend = choose(query, key, value, bias, dropout, causal, scale);
  auto none = mark(backend, query);
  if (backend == SDPBackend::flash_attention) {
    auto saved = at::_scaled_dot_product_flash_attention(
        query, key, value, dropout, causal, false, scale);
    return {std::get<0>(saved), std::get<1>(saved), none,
            none.clone(),       query.size(-2),     key.size(-2),
            std::get<6>(saved), std::get<7>(saved), none.clone()};
  }
  if (backend == SDPBackend::cudnn_attention) {
    auto saved = at::_scaled_dot_product_cudnn_attention(
        query, key, value, bias, true, dropout, causal, false, scale);
    return {std::get<0>(saved), std::get<1>(saved), none,
            none.clone(),       query.size(-2),     key.size(-2),
            std::get<6>(saved), std::get<7>(saved), none.clone()};
  }
  if (backend == SDPBackend::efficient_attention) {
    auto saved = at::_scaled_dot_product_efficient_attention(
        query, key, value, expanded(bias, query, key), true, dropout, causal,
        scale);
    return {std::get<0>(saved), std::get<1>(saved), none,
            none.clone(),       query.size(-2),     key.size(-2),
            std::get<2>(saved), std::get<3>(saved), none.clone()};
  }
  return plain(query, key, value, bias, dropout, causal, scale);
}

Gradients attention_backward(const Tensor& grad, const Tensor& query,
                             const Tensor& key, const Tensor& value,
                             const Tensor& bias, std::array<bool, 4> mask,
                             const Tensor& out, const Tensor& logsumexp,
                             const Tensor& cum_seq_q, const Tensor& cum_seq_k,
                             int64_t max_q, int64_t max_k, double dropout,
                             bool causal, const Tensor& philox_seed,
                             const Tensor& philox_offset,
                             std::optional<double> scale) {
  TORCH_CHECK(cum_seq_q.dim() == 2 && cum_seq_q.size(0) == 0,
              "the forward of this attention ran elsewhere");
  auto backend = static_cast<SDPBackend>(cum_seq_q.size(1));
  if (backend == SDPBackend::flash_attention) {
    auto [q, k, v] = at::_scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, logsumexp, Tensor(), Tensor(), max_q,
        max_k, dropout, causal, philox_seed, philox_offset, scale);
    return {q, k, v, Tensor()};
  }
  if (backend == SDPBackend::cudnn_attention) {
    auto [q, k, v] = at::_scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, out, logsumexp, philox_seed, philox_offset,
        bias, Tensor(), Tensor(), max_q, max_k, dropout, causal, scale);
    return {q, k, v, Tensor()};
  }
  if (backend == SDPBackend::efficient_attention) {
    OptionalTensor given = bias.defined() ? OptionalTensor(bias) : std::nullopt;
    auto full = expanded(given, query, key).value_or(Tensor());
    auto [q, k, v, b] = at::_scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, full, out, logsumexp, philox_seed,
        philox_offset, dropout, mask, causal, scale);
    if (b.defined() && bias.defined()) b = at::sum_to(b, bias.sizes());
    return {q, k, v, b};
  }
  return plain_backward(grad, query, key, value, bias, mask, philox_seed,
                        dropout, causal, scale);
}

}  // namespace mycelya::worker
