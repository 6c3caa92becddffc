// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Calls of operators from C++, and what the files of the client share.
#pragma once

#include "MycelyaSignature.h"

namespace mycelya {

// Runs an operator on the device: the boxed fallback's body. The arguments are
// the last items of the stack and are replaced by the results.
void run(OpTraits& traits, torch::jit::Stack* stack);

// Finds an operator by name, for kernels that send another one than was called.
OpTraits& traits_of(const char* name, const char* overload);
OpTraits& traits_of(const c10::OperatorHandle& op);

// Sends one operator with these arguments; returns its results.
template <class... Arguments>
torch::jit::Stack send(OpTraits& traits, Arguments&&... arguments) {
  torch::jit::Stack stack;
  torch::jit::push(stack, std::forward<Arguments>(arguments)...);
  run(traits, &stack);
  return stack;
}

// ---- the steps of `run` ----
// The call as the worker gets it.
void put_call(std::string& out, const Call& call);
// Tells the worker of a signature, and keeps it.
void remember(const Call& call, std::shared_ptr<Signature> signature);
// Asks the worker to run a call, and takes its word for what came out; with
// `keep` also for the next calls with this signature.
void run_on_worker(const Call& call, torch::jit::Stack* stack, bool keep);
// Gives argument tensors the sizes that the call left them with.
void change_arguments(const Call& call, const Signature& signature);
at::Tensor result(const Call& call, const Output& output,
                  c10::ArrayRef<c10::Storage> fresh);
// Replaces the arguments by the results.
void finish(const Call& call, const Signature& signature,
            c10::ArrayRef<c10::Storage> fresh, torch::jit::Stack* stack);

// Refuses a tensor that reaches outside its storage, which was shrunk: the
// worker would end the session.
void check_inside_storage(const at::Tensor& tensor);

// Grows or shrinks a storage, here and on the worker.
void resize_storage(const c10::Storage& storage, size_t nbytes);

// Device index of a tensor of ours.
inline int machine_of(const at::Tensor& tensor) {
  return tensor.device().index();
}

// Downloads the elements of a view, nothing else of its storage.
at::Tensor download(const at::Tensor& tensor, const std::string& reason);
// Writes a CPU tensor of any dtype into a device tensor, with broadcasting.
void upload(const at::Tensor& from, const at::Tensor& to, bool non_blocking);

void register_hooks();

extern const c10::DispatchKeySet kKeys;

}  // namespace mycelya
