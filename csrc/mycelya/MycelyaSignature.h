// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// A call's arguments as canonical bytes, and the cache from those bytes to what
// the call returns. A known call costs one hash lookup and a record of a few
// dozen bytes.
#pragma once

#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <atomic>
#include <memory>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "MycelyaWire.h"

namespace mycelya {

// Thrown by a rule that does not know: the worker is asked, once a signature.
struct AskWorker {};

// Computes results on meta tensors: a function of the stack, as a kernel is.
using Rule = void (*)(torch::jit::Stack& stack);

// What is known of an operator, found once.
struct OpTraits {
  explicit OpTraits(const c10::OperatorHandle& op);

  c10::OperatorHandle op;
  std::string name;  // "aten::add.Tensor"
  size_t arguments = 0;
  // Results can depend on values: each call asks the worker.
  bool dynamic = false;
  // Indices may lie on the CPU, as CUDA allows.
  bool cpu_indices = false;
  bool is_mutable = false;
  // A call returns its first argument or nothing, and changes no metadata.
  bool in_place_only = false;
  // Which arguments are numbers that cannot decide a shape or dtype.
  std::vector<bool> free_number;
  const c10::KernelFunction* direct = nullptr;  // at::meta::X, if in the table
  Rule rule = nullptr;
  // The metadata function is wrong or missing: the first call with a signature
  // asks the worker. Found at run time, or in the list.
  std::atomic<bool> probe{false};
};

// One result of a call.
struct Output {
  enum class Kind : uint8_t { kUndefined, kSame, kAlias, kFresh };
  Kind kind = Kind::kUndefined;
  uint16_t index =
      0;  // of the argument tensor, its storage, or the fresh storage
  View view;
};

// What a call with certain arguments returns and changes.
struct Signature {
  uint64_t number = 0;       // towards the worker; 0 if `local`
  std::vector<int> returns;  // -1 a tensor, n >= 0 a list of n
  std::vector<Output> outputs;
  std::vector<uint64_t> fresh_bytes;
  std::vector<std::pair<uint16_t, View>>
      changed;           // argument tensors: resize, out=
  bool local = false;    // a view: nothing to send
  bool dropped = false;  // guarded by the connection's lock
  mutable std::atomic<uint64_t> last_used{0};
};

// Bytes that a call is encoded into; kept per thread, since a fresh string for
// each call costs more than the encoding. A stack of them: metadata functions
// may call operations on the device again.
struct Buffers {
  std::string key, dyn;
};
class BufferLease {
 public:
  BufferLease();
  ~BufferLease();
  BufferLease(const BufferLease&) = delete;
  BufferLease& operator=(const BufferLease&) = delete;
  Buffers& buffers;
};

// A call being encoded. Points into the stack, which must not change meanwhile.
class Call {
 public:
  Call(OpTraits& traits, const torch::jit::Stack& stack);

  OpTraits& traits;
  const std::string& key() const { return key_; }
  const std::string& dyn() const { return dyn_; }
  // The part of the key that the worker gets.
  std::string values() const { return key_.substr(kKeyPrefix); }
  int machine = -1;
  c10::SmallVector<const at::Tensor*, 8> tensors;
  c10::SmallVector<c10::StorageImpl*, 8> storages;
  c10::SmallVector<uint64_t, 8> ids;

 private:
  static constexpr size_t kKeyPrefix = sizeof(void*) + 1;

  void value(const c10::IValue& value, bool free);
  void list(const c10::IValue& value, bool free);
  void tensor(const at::Tensor& tensor);
  void cpu_scalar(const at::Tensor& tensor);
  void generator(const at::Generator& generator);
  void belongs_to(int index, const at::Tensor* tensor);

  BufferLease lease_;
  std::string& key_;
  std::string& dyn_;
};

// The cache of one machine.
class SignatureCache {
 public:
  static SignatureCache& at(int machine);

  std::shared_ptr<Signature> find(const std::string& key);
  // Two threads may insert the same key; both signatures stay valid. Returns
  // what had to be evicted: the worker must forget those.
  std::vector<std::shared_ptr<Signature>> insert(
      const std::string& key, std::shared_ptr<Signature> signature);
  uint64_t next_number() { return ++numbers_; }
  void clear();  // a new session
  // The default dtype that the worker was told.
  std::atomic<int> default_dtype{static_cast<int>(at::kFloat)};

 private:
  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view key) const {
      return std::hash<std::string_view>{}(key);
    }
  };

  std::shared_mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<Signature>, Hash,
                     std::equal_to<>>
      signatures_;
  std::atomic<uint64_t> numbers_{0}, clock_{0};
};

// Finds out what a call returns by running it on meta tensors that share
// storages as the arguments do. Null if only the worker can know. Errors of the
// metadata function (shapes that do not match) are torch's own.
std::shared_ptr<Signature> infer(const Call& call,
                                 const torch::jit::Stack& stack);

// Tables of MycelyaMeta.cpp and MycelyaRules.cpp; null if absent.
const c10::KernelFunction* direct_meta(const std::string& name);
Rule own_rule(const std::string& name);

}  // namespace mycelya
