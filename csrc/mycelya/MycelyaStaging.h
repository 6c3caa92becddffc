// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Between the socket and memory that the CPU cannot address: two pinned
// buffers, of which one is copied while the other is filled or sent.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Event.h>

#include <array>
#include <functional>
#include <optional>

namespace mycelya::worker {

class Staging {
 public:
  explicit Staging(c10::Device device) : device_(device) {}

  static constexpr size_t kBytes = size_t{8} << 20;

  // Fills `to`, a tensor of bytes on the device, piece by piece.
  void upload(const at::Tensor& to,
              const std::function<void(char* to, size_t count)>& fetch);
  // Gives the bytes of `from`, in order, in pieces of at most kBytes.
  void download(
      const at::Tensor& from,
      const std::function<void(const char* from, size_t count)>& emit);

 private:
  struct Half {
    at::Tensor buffer;
    std::optional<c10::Event> copied;
  };

  Half& half(size_t index);
  static void wait(Half& half);
  void mark(Half& half);

  c10::Device device_;
  std::array<Half, 2> halves_;
};

}  // namespace mycelya::worker
