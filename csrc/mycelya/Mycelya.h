// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// What both halves share: limits, the description of a view, and errors.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace mycelya {

constexpr auto kDeviceType = c10::DeviceType::PrivateUse1;
constexpr int kMaxMachines = 32;
constexpr size_t kMaxPayload = size_t{16} << 20;  // of one frame
constexpr size_t kMaxDims = 64;
constexpr size_t kMaxSignatures = 65536;  // alive at a time, per machine
constexpr size_t kMaxName = 255;          // bytes of an operator's name
constexpr size_t kMaxListItems = size_t{1} << 20;
constexpr size_t kMaxStorageBytes = size_t{1} << 38;

// What went wrong, on the wire and towards Python. The order is the one in
// which `set_error_types` gets Python's classes (src/mycelya_torch/_errors.py).
enum class ErrorKind : uint8_t {
  kRuntime = 0,
  kIndex,
  kValue,
  kType,
  kNotImplemented,
  kLinAlg,
  kOutOfMemory,
  kRemoteLast = kOutOfMemory,  // kinds up to here may come from a worker
  kMachineDied,
  kProtocol,
  kSyncForbidden,
  kKeyboardInterrupt,
  kCount,
};

// Somebody broke the protocol: the session ends. Never crosses into torch as it
// is; the client turns it into a RemoteError.
class ProtocolViolation : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

#define MYCELYA_PROTOCOL(condition, ...)                           \
  do {                                                             \
    if (C10_UNLIKELY(!(condition))) {                              \
      throw ::mycelya::ProtocolViolation(::c10::str(__VA_ARGS__)); \
    }                                                              \
  } while (false)

// A strided view of one storage. `storage` is an index whose meaning depends on
// the place: among an operation's storages, or among its fresh results.
struct View {
  at::ScalarType dtype = at::kFloat;
  uint8_t bits = 0;  // 1 conjugate, 2 negative
  uint16_t storage = 0;
  uint64_t nbytes = 0;  // of the whole storage
  int64_t offset = 0;   // in elements
  c10::SmallVector<int64_t, 5> sizes;
  c10::SmallVector<int64_t, 5> strides;
};

// The description of a failure on the worker.
struct RemoteFailure {
  uint64_t serial = 0;     // of this failure in its session, from 1
  uint64_t op_number = 0;  // counted over EXEC records, from 1
  ErrorKind kind = ErrorKind::kRuntime;
  std::string op;         // "aten::gather"; empty if it was no operator
  std::string arguments;  // "float32[64,64], int64, int64[64,64]"
  std::string text;
};

View view_of(const at::Tensor& tensor);

// Makes a tensor of plain TensorImpl type on a storage, without any check.
at::Tensor make_tensor(c10::Storage storage, c10::DispatchKeySet keys,
                       const View& view);

}  // namespace mycelya
