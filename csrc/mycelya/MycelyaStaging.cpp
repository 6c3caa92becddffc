// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
#include "MycelyaStaging.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

namespace mycelya::worker {

Staging::Half& Staging::half(size_t index) {
  auto& half = halves_[index % 2];
  if (!half.buffer.defined()) {
    half.buffer = at::empty(
        {static_cast<int64_t>(kBytes)},
        at::TensorOptions().dtype(at::kByte).device(at::kCPU).pinned_memory(
            !device_.is_cpu()));
  }
  return half;
}

void Staging::wait(Half& half) {
  if (half.copied.has_value()) half.copied->synchronize();
  half.copied.reset();
}

void Staging::mark(Half& half) {
  if (device_.is_cpu()) return;  // copies are done when they return
  c10::impl::VirtualGuardImpl device(device_.type());
  half.copied.emplace(device_.type());
  half.copied->record(device.getStream(device_));
}

void Staging::upload(const at::Tensor& to,
                     const std::function<void(char*, size_t)>& fetch) {
  auto total = to.numel();
  size_t index = 0;
  for (int64_t at = 0; at < total; ++index) {
    auto& piece = half(index);
    auto count = std::min(total - at, static_cast<int64_t>(kBytes));
    wait(piece);
    fetch(static_cast<char*>(piece.buffer.mutable_data_ptr()),
          static_cast<size_t>(count));
    to.narrow(0, at, count).copy_(piece.buffer.narrow(0, 0, count), true);
    mark(piece);
    at += count;
  }
}

void Staging::download(const at::Tensor& from,
                       const std::function<void(const char*, size_t)>& emit) {
  auto total = from.numel();
  auto size_at = [&](int64_t at) {
    return std::min(total - at, static_cast<int64_t>(kBytes));
  };
  auto start = [&](size_t index, int64_t at) {
    auto& piece = half(index);
    auto count = size_at(at);
    wait(piece);
    piece.buffer.narrow(0, 0, count).copy_(from.narrow(0, at, count), true);
    mark(piece);
  };
  if (total > 0) start(0, 0);
  size_t index = 0;
  for (int64_t at = 0; at < total; ++index) {
    auto count = size_at(at);
    if (at + count < total) start(index + 1, at + count);
    auto& piece = half(index);
    wait(piece);
    emit(static_cast<const char*>(piece.buffer.const_data_ptr()),
         static_cast<size_t>(count));
    at += count;
  }
}

}  // namespace mycelya::worker
