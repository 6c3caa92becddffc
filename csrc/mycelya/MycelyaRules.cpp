// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Metadata of ops that are hot in training and generation and have no function
// in at::meta. Each gets the call's arguments on meta tensors and leaves its
// results.
#include <ATen/ExpandUtils.h>
#include <ATen/InferSize.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/native/ConvUtils.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/sum_meta_dispatch.h>
#include <c10/core/DefaultDtype.h>

#include <unordered_map>

#include "MycelyaSignature.h"

namespace mycelya {
namespace {

using at::IntArrayRef;
using at::Tensor;
using torch::jit::Stack;

template <class... Results>
void give(Stack& stack, Results&&... results) {
  stack.clear();
  (stack.emplace_back(std::forward<Results>(results)), ...);
}

Tensor fresh(IntArrayRef sizes, const Tensor& like,
             std::optional<at::ScalarType> dtype = std::nullopt) {
  View view;
  view.dtype = dtype.value_or(like.scalar_type());
  view.sizes.assign(sizes.begin(), sizes.end());
  auto strides = c10::contiguous_strides(sizes);
  view.strides.assign(strides.begin(), strides.end());
  view.nbytes = at::detail::computeStorageNbytes(sizes, strides,
                                                 c10::elementSize(view.dtype));
  return make_tensor(c10::Storage(c10::make_intrusive<c10::StorageImpl>(
                         c10::StorageImpl::use_byte_size_t(), view.nbytes,
                         c10::DataPtr(nullptr, at::kMeta),
                         c10::GetAllocator(at::kMeta), true)),
                     c10::DispatchKeySet(c10::DispatchKey::Meta), view);
}

// A result as `like`, with its strides where they are dense, as empty_like
// gives.
Tensor fresh_like(const Tensor& like,
                  std::optional<at::ScalarType> dtype = std::nullopt) {
  if (like.is_contiguous()) return fresh(like.sizes(), like, dtype);
  return at::empty_like(
      like, like.options().dtype(dtype.value_or(like.scalar_type())));
}

// Writes into its first argument and returns it.
void returns_self(Stack& stack) {
  Tensor self = stack[0].toTensor();
  give(stack, std::move(self));
}

void copy_(Stack& stack) {
  Tensor self = stack[0].toTensor();
  const auto& source = stack[1].toTensor();
  TORCH_CHECK(at::is_expandable_to(source.sizes(), self.sizes()),
              "The size of tensor a ", self.sizes(),
              " must match the size of tensor b ", source.sizes());
  give(stack, std::move(self));
}

void embedding(Stack& stack) {
  const auto &weight = stack[0].toTensor(), &indices = stack[1].toTensor();
  TORCH_CHECK(weight.dim() == 2, "'weight' must be 2-D");
  TORCH_CHECK(
      indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt,
      "Expected tensor for argument #1 'indices' to have one of the "
      "following scalar types: Long, Int; but got ",
      indices.scalar_type(), " instead");
  auto sizes = indices.sizes().vec();
  sizes.push_back(weight.size(1));
  give(stack, fresh(sizes, weight));
}

void embedding_dense_backward(Stack& stack) {
  const auto& grad = stack[0].toTensor();
  auto rows = stack[2].toInt();
  give(stack, fresh({rows, grad.size(-1)}, grad));
}

void clone(Stack& stack) {
  Tensor self = stack[0].toTensor();
  auto format = stack[1].isNone()
                    ? at::MemoryFormat::Preserve
                    : static_cast<at::MemoryFormat>(stack[1].toInt());
  if (format == at::MemoryFormat::Contiguous ||
      (format == at::MemoryFormat::Preserve && self.is_contiguous())) {
    give(stack, fresh(self.sizes(), self));
    return;
  }
  give(stack, at::empty_like(self, self.options(), format));
}

// Copies where no view is possible, unlike `view`.
void view_copy(Stack& stack) {
  Tensor self = stack[0].toTensor();
  auto sizes = at::infer_size_dv(stack[1].toIntVector(), self.numel());
  give(stack, fresh(sizes, self));
}

// Over a batch of `normalized_shape`: the statistics have the leading
// dimensions.
void native_layer_norm(Stack& stack) {
  Tensor input = stack[0].toTensor();
  auto normalized = stack[1].toIntVector();
  TORCH_CHECK(!normalized.empty(),
              "Expected normalized_shape to be at least "
              "1-dimensional, but got normalized_shape = ",
              IntArrayRef(normalized));
  auto sizes = input.sizes();
  bool fits = sizes.size() >= normalized.size() &&
              sizes.slice(sizes.size() - normalized.size()).equals(normalized);
  TORCH_CHECK(fits, "Given normalized_shape=", IntArrayRef(normalized),
              ", expected input with shape [*, ", IntArrayRef(normalized),
              "], but got input of size", sizes);
  for (size_t i : {size_t{2}, size_t{3}}) {
    if (stack[i].isNone() || !stack[i].toTensor().defined()) continue;
    TORCH_CHECK(stack[i].toTensor().sizes().equals(normalized),
                "Expected weight and bias to be of the same shape as "
                "normalized_shape, but got ",
                stack[i].toTensor().sizes(),
                " and normalized_shape = ", IntArrayRef(normalized));
  }
  auto leading = sizes.slice(0, sizes.size() - normalized.size()).vec();
  leading.resize(sizes.size(), 1);
  auto mixed = stack[2].isNone() || !stack[2].toTensor().defined()
                   ? input.scalar_type()
                   : stack[2].toTensor().scalar_type();
  give(stack, fresh(sizes, input), fresh(leading, input, mixed),
       fresh(leading, input, mixed));
}

void native_dropout(Stack& stack) {
  Tensor input = stack[0].toTensor();
  give(stack, fresh_like(input), fresh_like(input, at::kBool));
}

void native_dropout_backward(Stack& stack) {
  Tensor grad = stack[0].toTensor();
  bool whole = c10::isIntegralType(grad.scalar_type(), /*includeBool=*/true);
  auto dtype =
      whole ? c10::get_default_dtype_as_scalartype() : grad.scalar_type();
  give(stack, fresh_like(grad, dtype));
}

// Dense convolution in the default layout; the rest goes through the
// dispatcher.
void convolution(Stack& stack) {
  const auto &input = stack[0].toTensor(), &weight = stack[1].toTensor();
  bool transposed = stack[6].toBool();
  auto padding = stack[4].toIntVector(), stride = stack[3].toIntVector();
  auto dilation = stack[5].toIntVector();
  TORCH_CHECK(input.dim() == weight.dim() && input.dim() >= 3, "Expected ",
              weight.dim(), "-dimensional input for ", weight.dim(),
              "-dimensional weight ", weight.sizes(), ", but got ", input.dim(),
              "-dimensional input of size ", input.sizes(), " instead");
  // The layout of the result depends on the library that computes it.
  if (!input.is_contiguous() || !weight.is_contiguous()) throw AskWorker();
  std::vector<int64_t> sizes;
  if (transposed) {
    sizes = at::native::conv_input_size(input.sizes(), weight.sizes(), padding,
                                        stack[7].toIntVector(), stride,
                                        dilation, stack[8].toInt());
  } else {
    int64_t channels = weight.size(1) * stack[8].toInt();
    TORCH_CHECK(input.size(1) == channels, "Given groups=", stack[8].toInt(),
                ", weight of size ", weight.sizes(), ", expected input",
                input.sizes(), " to have ", channels, " channels, but got ",
                input.size(1), " channels instead");
    sizes = at::native::conv_output_size(input.sizes(), weight.sizes(), padding,
                                         stride, dilation);
  }
  give(stack, fresh(sizes, input));
}

// One result for each tensor of the first list, laid out as that one.
void logsumexp(Stack& stack) {
  const auto& self = stack[0].toTensor();
  auto dims = stack[1].toDimVector();
  bool keep = stack[2].toBool();
  bool whole = c10::isIntegralType(self.scalar_type(), /*includeBool=*/true);
  auto dtype =
      whole ? c10::get_default_dtype_as_scalartype() : self.scalar_type();
  auto result = at::meta::sum(self, IntArrayRef(dims), keep, dtype);
  give(stack, std::move(result));
}

void foreach_like_first(Stack& stack) {
  c10::List<Tensor> results;
  for (const auto& item : stack[0].toListRef()) {
    results.push_back(fresh_like(item.toTensor()));
  }
  give(stack, std::move(results));
}

void flash_attention_for_cpu(Stack& stack) {
  const auto &query = stack[0].toTensor(), &value = stack[2].toTensor();
  auto batch = query.size(0), heads = query.size(1), length = query.size(2);
  // The kernel writes [batch, length, heads, size] and returns it transposed.
  auto output = fresh({batch, length, heads, value.size(3)}, query);
  auto statistics =
      query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto logsumexp = fresh({batch, length, heads}, query, statistics);
  output = output.transpose(1, 2);
  logsumexp = logsumexp.transpose(1, 2);
  give(stack, std::move(output), std::move(logsumexp));
}

const std::unordered_map<std::string, Rule>& rules() {
  static const auto* all = new std::unordered_map<std::string, Rule>{
      {"aten::copy_", copy_},
      {"aten::fill_.Scalar", returns_self},
      {"aten::zero_", returns_self},
      {"aten::uniform_", returns_self},
      {"aten::normal_", returns_self},
      {"aten::bernoulli_.float", returns_self},
      {"aten::random_", returns_self},
      {"aten::random_.to", returns_self},
      {"aten::random_.from", returns_self},
      {"aten::exponential_", returns_self},
      {"aten::embedding", embedding},
      {"aten::embedding_dense_backward", embedding_dense_backward},
      {"aten::clone", clone},
      {"aten::logsumexp", logsumexp},
      {"aten::view_copy", view_copy},
      {"aten::native_layer_norm", native_layer_norm},
      {"aten::native_dropout", native_dropout},
      {"aten::native_dropout_backward", native_dropout_backward},
      {"aten::convolution", convolution},
      {"aten::_foreach_sqrt", foreach_like_first},
      {"aten::_foreach_neg", foreach_like_first},
      {"aten::_foreach_mul.Scalar", foreach_like_first},
      {"aten::_foreach_add.Scalar", foreach_like_first},
      {"aten::_foreach_div.Scalar", foreach_like_first},
      {"aten::_scaled_dot_product_flash_attention_for_cpu",
       flash_attention_for_cpu},
  };
  return *all;
}

}  // namespace

Rule own_rule(const std::string& name) {
  auto found = rules().find(name);
  return found == rules().end() ? nullptr : found->second;
}

}  // namespace mycelya
