// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
#include "MycelyaPython.h"

#include <array>
#include <cstdlib>
#include <cstring>

struct _object;  // PyObject

// torch turns exceptions of this class into `python_type()(what())`. Declared
// here as in torch/csrc/Exceptions.h (2.11 to 2.13), which would bring in
// Python.h; C++ matches the two by name. tests/test_errors.py holds torch to
// it.
namespace torch {
struct PyTorchError : public std::exception {
  explicit PyTorchError(std::string text) : msg(std::move(text)) {}
  virtual _object* python_type() = 0;
  const char* what() const noexcept override { return msg.c_str(); }
  std::string msg;
};
}  // namespace torch

namespace mycelya {
namespace {

using EnsureGil = int (*)();
using ReleaseGil = void (*)(int);
using CheckSignals = int (*)();
using Occurred = _object* (*)();
using Clear = void (*)();
using SaveThread = void* (*)();
using RestoreThread = void (*)(void*);
using SyncCallback = void (*)(const char*, double, int);

EnsureGil g_ensure_gil = nullptr;
ReleaseGil g_release_gil = nullptr;
CheckSignals g_check_signals = nullptr;
Occurred g_occurred = nullptr;
Clear g_clear = nullptr;
CheckSignals g_has_gil = nullptr;
SaveThread g_save_thread = nullptr;
RestoreThread g_restore_thread = nullptr;
SyncCallback g_sync_callback = nullptr;
std::array<_object*, static_cast<size_t>(ErrorKind::kCount)> g_types{};
thread_local bool t_forbid_sync = false;

class PythonError : public torch::PyTorchError {
 public:
  PythonError(_object* type, std::string text)
      : torch::PyTorchError(std::move(text)), type_(type) {}
  _object* python_type() override { return type_; }

 private:
  _object* type_;
};

template <class Function>
void take_address(Function& function, int64_t address) {
  function = reinterpret_cast<Function>(static_cast<uintptr_t>(address));
}

}  // namespace

void set_hooks(c10::IntArrayRef addresses) {
  TORCH_CHECK(addresses.size() == 9, "set_hooks takes 9 addresses, got ",
              addresses.size());
  take_address(g_ensure_gil, addresses[0]);
  take_address(g_release_gil, addresses[1]);
  take_address(g_check_signals, addresses[2]);
  take_address(g_occurred, addresses[3]);
  take_address(g_clear, addresses[4]);
  take_address(g_has_gil, addresses[5]);
  take_address(g_save_thread, addresses[6]);
  take_address(g_restore_thread, addresses[7]);
  take_address(g_sync_callback, addresses[8]);
}

void set_error_types(c10::IntArrayRef addresses) {
  TORCH_CHECK(addresses.size() == g_types.size(), "set_error_types takes ",
              g_types.size(), " addresses, got ", addresses.size());
  for (size_t i = 0; i < g_types.size(); ++i) {
    take_address(g_types[i], addresses[i]);
  }
}

void raise_error(ErrorKind kind, const std::string& text) {
  auto* type = g_types.at(static_cast<size_t>(kind));
  TORCH_CHECK(type != nullptr, text);
  throw PythonError(type, text);
}

std::string failure_text(const RemoteFailure& failure,
                         const std::string& machine) {
  std::string text = failure.op.empty() ? "a request" : failure.op;
  text += " failed on " + machine + ": " + failure.text;
  if (failure.op.empty()) return text;
  return text + " [arguments " + failure.arguments + "; op " +
         std::to_string(failure.op_number) +
         "; set MYCELYA_BLOCKING=1 to raise at the calling line]";
}

void check_signals() {
  if (g_check_signals == nullptr) return;
  int gil = g_ensure_gil();
  _object* type = g_check_signals() != 0 ? g_occurred() : nullptr;
  // The class outlives the cleared error: Python keeps its own exceptions for
  // ever, and a handler's are referred to by the handler.
  if (type != nullptr) g_clear();
  g_release_gil(gil);
  if (type != nullptr) {
    throw PythonError(type, "interrupted while waiting for a machine");
  }
}

WithoutGil::WithoutGil() {
  if (g_has_gil != nullptr && g_has_gil() == 1) thread_ = g_save_thread();
}
WithoutGil::~WithoutGil() {
  if (thread_ != nullptr) g_restore_thread(thread_);
}

void about_to_wait(const std::string& reason) {
  if (t_forbid_sync) {
    raise_error(ErrorKind::kSyncForbidden,
                "this needs an answer from the machine (" + reason +
                    "), which forbid_sync() does not allow here");
  }
}

void report_wait(const std::string& reason, double seconds, int machine) {
  if (g_sync_callback == nullptr) return;
  g_sync_callback(reason.c_str(), seconds, machine);
}

bool forbid_sync(bool forbid) { return std::exchange(t_forbid_sync, forbid); }

bool is_blocking() {
  static const bool blocking = [] {
    const char* value = std::getenv("MYCELYA_BLOCKING");
    return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
  }();
  return blocking;
}

}  // namespace mycelya
