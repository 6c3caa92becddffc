// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// All that the library knows of Python: a few addresses that the package hands
// over at import. It links neither Python nor torch_python, so one build serves
// every Python (D5).
#pragma once

#include <string>

#include "Mycelya.h"

namespace mycelya {

// Addresses of PyGILState_Ensure, PyGILState_Release, PyErr_CheckSignals,
// PyErr_Occurred, PyErr_Clear, PyGILState_Check, PyEval_SaveThread,
// PyEval_RestoreThread, and of a function `void (const char* reason,
// double seconds, int machine)` for the sync-point report.
void set_hooks(c10::IntArrayRef addresses);

// Addresses of the exception classes, one for each ErrorKind, in its order. The
// classes must live for ever.
void set_error_types(c10::IntArrayRef addresses);

// Throws what Python sees as the class for `kind`; its constructor gets the
// text.
[[noreturn]] void raise_error(ErrorKind kind, const std::string& text);

// "aten::gather failed on local-1: index 9 is out of bounds [arguments ...; op
// 12; set MYCELYA_BLOCKING=1 to raise at the calling line]"
std::string failure_text(const RemoteFailure& failure,
                         const std::string& machine);

// Throws KeyboardInterrupt, or what a signal handler raised, if a signal
// arrived. Only Python's main thread ever sees one. Takes the GIL; to be called
// without locks.
void check_signals();

// Some of torch's functions call a device with the GIL held (the copy of an
// untyped storage does). Whoever waits lets go of it, as the thread that
// connects the machine needs it. To be made and to end without any lock of
// ours.
class WithoutGil {
 public:
  WithoutGil();
  ~WithoutGil();
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  void* thread_ = nullptr;
};

// To be called before a wait: throws SyncForbiddenError inside `forbid_sync`.
void about_to_wait(const std::string& reason);
// After it; calls Python, if a callback is set.
void report_wait(const std::string& reason, double seconds, int machine);
bool forbid_sync(bool forbid);  // of this thread; the former value

// MYCELYA_BLOCKING=1
bool is_blocking();

}  // namespace mycelya
