// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// What never leaves the client: views; and what leaves it as a single small
// record: creation and resizing.
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/native/Resize.h>
#include <torch/library.h>

#include <algorithm>

#include "MycelyaAllocator.h"
#include "MycelyaConnection.h"
#include "MycelyaDispatch.h"
#include "MycelyaStorageImpl.h"

namespace mycelya {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalInt = std::optional<int64_t>;

int machine_for(std::optional<c10::Device> device) {
  int index =
      device && device->has_index() ? device->index() : current_device();
  TORCH_CHECK(index < kMaxMachines, "mycelya: device index ", index,
              " is not in 0..", kMaxMachines - 1);
  return index;
}

void check_options(std::optional<c10::Layout> layout,
                   std::optional<bool> pinned) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !layout || *layout == at::kStrided,
      "mycelya: only strided tensors can be made on this device, not ",
      layout.value_or(at::kStrided));
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
}

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides,
                     std::optional<at::ScalarType> dtype,
                     std::optional<c10::Layout> layout,
                     std::optional<c10::Device> device,
                     std::optional<bool> pinned) {
  check_options(layout, pinned);
  at::detail::check_size_nonnegative(sizes);
  View view;
  view.dtype = c10::dtype_or_default(dtype);
  TORCH_CHECK_NOT_IMPLEMENTED(is_known_dtype(view.dtype),
                              "mycelya: tensors of dtype ", view.dtype,
                              " can't be made on this device");
  view.nbytes = at::detail::computeStorageNbytes(sizes, strides,
                                                 c10::elementSize(view.dtype));
  view.sizes.assign(sizes.begin(), sizes.end());
  view.strides.assign(strides.begin(), strides.end());
  auto storage = new_storage(machine_for(device), view.nbytes, true);
  return make_tensor(std::move(storage), kKeys, view);
}

Tensor empty(IntArrayRef sizes, std::optional<at::ScalarType> dtype,
             std::optional<c10::Layout> layout,
             std::optional<c10::Device> device, std::optional<bool> pinned,
             std::optional<at::MemoryFormat> format) {
  at::detail::check_size_nonnegative(sizes);
  auto tensor = empty_strided(sizes, c10::contiguous_strides(sizes), dtype,
                              layout, device, pinned);
  if (format && *format != at::MemoryFormat::Preserve &&
      *format != at::MemoryFormat::Contiguous) {
    tensor.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  }
  return tensor;
}

// The CPU's answer has a ZeroTensor key and no memory; here it is plain zeros.
Tensor efficient_zeros(IntArrayRef sizes, std::optional<at::ScalarType> dtype,
                       std::optional<c10::Layout> layout,
                       std::optional<c10::Device> device,
                       std::optional<bool> pinned) {
  return empty_strided(sizes, c10::contiguous_strides(sizes), dtype, layout,
                       device, pinned)
      .zero_();
}

Tensor as_view(const Tensor& self, IntArrayRef sizes, IntArrayRef strides,
               int64_t offset) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(),
      self.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return result;
}

// The worker refuses what reaches outside; this says so at the guilty line.
void check_inside(const Tensor& self, IntArrayRef sizes, IntArrayRef strides,
                  int64_t offset) {
  TORCH_CHECK(sizes.size() == strides.size(),
              "mismatch in length of strides and shape");
  for (auto stride : strides) {
    TORCH_CHECK(stride >= 0,
                "as_strided: Negative strides are not supported at the "
                "moment, got strides: ",
                strides);
  }
  at::detail::check_size_nonnegative(sizes);
  TORCH_CHECK(offset >= 0, "Tensor: invalid storage offset ", offset);
  auto needed = at::detail::computeStorageNbytes(
      sizes, strides, self.itemsize(), static_cast<size_t>(offset));
  auto has = self.storage().nbytes();
  TORCH_CHECK(needed == 0 || needed <= has, "setStorage: sizes ", sizes,
              ", strides ", strides, ", storage offset ", offset,
              ", and itemsize ", self.itemsize(),
              " requiring a storage size of ", needed,
              " are out of bounds for storage of size ", has);
}

Tensor as_strided(const Tensor& self, IntArrayRef sizes, IntArrayRef strides,
                  OptionalInt offset) {
  auto start = offset.value_or(self.storage_offset());
  check_inside(self, sizes, strides, start);
  return as_view(self, sizes, strides, start);
}

Tensor view(const Tensor& self, IntArrayRef sizes) {
  auto inferred = at::infer_size_dv(sizes, self.numel());
  auto strides =
      at::detail::computeStride(self.sizes(), self.strides(), inferred);
  TORCH_CHECK(strides.has_value(),
              "view size is not compatible with input tensor's size and stride "
              "(at least one dimension spans across two contiguous subspaces). "
              "Use .reshape(...) instead.");
  return as_view(self, inferred, *strides, self.storage_offset());
}

Tensor reshape_alias(const Tensor& self, IntArrayRef sizes,
                     IntArrayRef strides) {
  return as_view(self, sizes, strides, self.storage_offset());
}

Tensor alias(const Tensor& self) {
  return as_view(self, self.sizes(), self.strides(), self.storage_offset());
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset,
                    IntArrayRef sizes, IntArrayRef strides) {
  TORCH_CHECK(source.device() == self.device(),
              "Attempted to set the storage of a tensor on device \"",
              self.device(), "\" to a storage on different device \"",
              source.device(), "\".");
  at::detail::check_size_nonnegative(sizes);
  TORCH_CHECK(offset >= 0, "Storage offset must be non-negative, got ", offset);
  TORCH_CHECK(std::all_of(strides.begin(), strides.end(),
                          [](int64_t stride) { return stride >= 0; }),
              "set_: negative strides are not supported, got ", strides);
  TORCH_CHECK(strides.empty() || strides.size() == sizes.size(),
              "set_: ", sizes.size(), " sizes with ", strides.size(),
              " strides");
  auto* impl = self.unsafeGetTensorImpl();
  IntArrayRef filled = strides;
  c10::DimVector contiguous;
  if (strides.empty() && !sizes.empty()) {
    contiguous = c10::contiguous_strides(sizes);
    filled = contiguous;
  }
  auto needed = at::detail::computeStorageNbytes(sizes, filled, self.itemsize(),
                                                 static_cast<size_t>(offset));
  if (needed > source.nbytes()) resize_storage(source, needed);
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(sizes, filled, offset);
  return self;
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(),
                     source.sizes(), source.strides());
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  auto count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {count}, {1});
}

Tensor& set_empty(Tensor& self) {
  auto storage = new_storage(machine_of(self), 0, true);
  return set_storage(self, std::move(storage), 0, {0}, {1});
}

const Tensor& resize_(const Tensor& self, IntArrayRef sizes,
                      std::optional<at::MemoryFormat> format) {
  if (self.sizes() == sizes && !format) return self;
  at::detail::check_size_nonnegative(sizes);
  auto* impl = self.unsafeGetTensorImpl();
  auto needed = at::detail::computeStorageNbytesContiguous(
      sizes, self.itemsize(), static_cast<size_t>(self.storage_offset()));
  if (needed > self.storage().nbytes()) resize_storage(self.storage(), needed);
  impl->set_sizes_and_strides(sizes, c10::contiguous_strides(sizes),
                              self.storage_offset());
  if (format && *format != at::MemoryFormat::Preserve) {
    impl->empty_tensor_restride(*format);
  }
  return self;
}

}  // namespace

void register_views(torch::Library& library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_efficientzerotensor", efficient_zeros);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_unsafe_view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("alias", alias);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("set_", set_empty);
  library.impl("resize_", resize_);
}

}  // namespace mycelya
