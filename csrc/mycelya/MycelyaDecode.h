// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Calls as the worker keeps them. A call is checked against its operator's
// schema once, completely, before anything of it runs; the arguments become a
// stack in which later only storages and numbers are exchanged.
#pragma once

#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <functional>
#include <string>
#include <vector>

#include "MycelyaWire.h"

namespace mycelya::worker {

// Whether a client may have this operator run. The client asks, too, as a
// worker ends the session for others.
bool is_allowed(const c10::OperatorHandle& op);

using torch::jit::Stack;

// Where calls run.
struct Target {
  c10::Device device = c10::Device(c10::kCPU);
  c10::DispatchKeySet keys;  // of tensors on the device
  // Replaces the process's default generator, which belongs to the client if it
  // shares the process. Undefined: the process's own.
  at::Generator own_generator;
  c10::Storage nothing;  // empty; stands in for storages between calls
};

// What a call does to one of its storages.
struct StorageUse {
  uint64_t nbytes = 0;  // that its views were checked against
  bool reads = false;   // false: all of it is overwritten
  bool writes = false;
};

// A tensor argument: a view of a storage, or a scalar on the CPU.
struct TensorArgument {
  at::Tensor tensor;
  bool scalar = false;
  bool writes = false;
  View view;  // its metadata before a call; also of a scalar
};

class Prepared {
 public:
  // Reads a call; ProtocolViolation if anything is wrong with it.
  Prepared(Reader& in, const Target& target);
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

  const c10::OperatorHandle& op() const { return *op_; }
  c10::ArrayRef<StorageUse> storages() const { return storages_; }
  c10::ArrayRef<TensorArgument> tensors() const { return tensors_; }
  size_t dyn_bytes() const { return dyn_bytes_; }
  bool mutates() const { return mutates_; }

  // ---- one execution: `set_storage` for each, `fill`, `run`, `release` ----
  // `dyn` has `dyn_bytes()` bytes.
  using FindGenerator = std::function<at::Generator(uint64_t number)>;
  void fill(c10::ArrayRef<const c10::Storage*> storages, const char* dyn,
            const FindGenerator& find_generator);
  // Leaves the results on the stack; throws what the operator throws.
  void run(Stack& stack);
  // Lets go of the storages, and undoes changes of the arguments' metadata.
  void release(const Target& target);

  // "float32[64,64], int64", for messages.
  std::string describe() const;

 private:
  friend class Decoder;

  // A place that `dyn` fills.
  struct Slot {
    char tag;  // 'J' 'D' 'W' 'G'
    uint16_t argument;
    int64_t item;  // in a list of scalars, else -1
    void* data;    // of a scalar tensor
    at::ScalarType dtype;
  };

  std::optional<c10::OperatorHandle> op_;
  const c10::KernelFunction* kernel_ = nullptr;  // instead of torch's
  Stack values_;
  std::vector<StorageUse> storages_;
  std::vector<TensorArgument> tensors_;
  std::vector<Slot> slots_;
  size_t dyn_bytes_ = 0;
  bool mutates_ = false;
  // Which argument holds indices that torch uses unchecked; 0: none.
  size_t trusted_indices_ = 0;
};

}  // namespace mycelya::worker
