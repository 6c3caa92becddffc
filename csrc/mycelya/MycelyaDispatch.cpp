// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Every operation on the device: encode the call, look it up, send a record.
// Ops are cut where the CPU cuts (D2): what the CPU implements as one kernel
// goes as one op, so that results are bit-equal to the CPU's.
#include "MycelyaDispatch.h"

#include <c10/core/DefaultDtype.h>
#include <torch/library.h>

#include <mutex>
#include <set>

#include "MycelyaConnection.h"
#include "MycelyaDecode.h"
#include "MycelyaPython.h"
#include "MycelyaStorageImpl.h"

namespace mycelya {

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

namespace {

using torch::jit::Stack;

}  // namespace

void put_call(std::string& out, const Call& call) {
  const auto& name = call.traits.op.operator_name();
  put_str16(out, name.name);
  put_str16(out, name.overload_name);
  put<uint16_t>(out, static_cast<uint16_t>(call.traits.arguments));
  put_str32(out, call.values());
}

namespace {

std::string definition(const Call& call, const Signature& signature) {
  std::string body;
  put_call(body, call);
  put<uint16_t>(body, static_cast<uint16_t>(signature.outputs.size()));
  for (const auto& output : signature.outputs) {
    bool fresh = output.kind == Output::Kind::kFresh;
    put<uint8_t>(body, fresh);
    if (fresh) put_view(body, output.view);
  }
  return body;
}

void put_definition(std::string& out, uint64_t number,
                    const std::string& body) {
  put(out, Rec::kDefSig);
  put_var(out, number);
  put_str32(out, body);
}

// The default dtype decides what int / int gives; the worker has to know it.
void sync_default_dtype(int machine) {
  auto now = static_cast<int>(c10::get_default_dtype_as_scalartype());
  auto& told = SignatureCache::at(machine).default_dtype;
  if (C10_LIKELY(told.load(std::memory_order_relaxed) == now)) return;
  Connection::at(machine).append([&](std::string& out, uint64_t&) {
    put(out, Rec::kDefaultDtype);
    put<uint8_t>(out, static_cast<uint8_t>(now));
  });
  told.store(now);
}

void drop(int machine, const std::vector<std::shared_ptr<Signature>>& gone) {
  std::vector<uint64_t> numbers;
  for (const auto& signature : gone) {
    if (signature->number != 0) numbers.push_back(signature->number);
  }
  if (numbers.empty()) return;
  Connection::at(machine).append([&](std::string& out, uint64_t&) {
    for (const auto& signature : gone) signature->dropped = true;
    put(out, Rec::kDropSig);
    put_var(out, numbers.size());
    for (auto number : numbers) put_var(out, number);
  });
}

}  // namespace

void remember(const Call& call, std::shared_ptr<Signature> signature) {
  auto& cache = SignatureCache::at(call.machine);
  if (!signature->local) {
    signature->number = cache.next_number();
    auto body = definition(call, *signature);
    Connection::at(call.machine).append([&](std::string& out, uint64_t&) {
      put_definition(out, signature->number, body);
    });
  }
  drop(call.machine, cache.insert(call.key(), std::move(signature)));
}

namespace {}  // namespace

void change_arguments(const Call& call, const Signature& signature) {
  for (const auto& [index, view] : signature.changed) {
    auto* impl = call.tensors[index]->unsafeGetTensorImpl();
    auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
    if (view.nbytes > storage->nbytes()) storage->set_nbytes(view.nbytes);
    impl->set_sizes_and_strides(view.sizes, view.strides, view.offset);
  }
}

at::Tensor result(const Call& call, const Output& output,
                  c10::ArrayRef<c10::Storage> fresh) {
  switch (output.kind) {
    case Output::Kind::kUndefined:
      return {};
    case Output::Kind::kSame:
      return *call.tensors[output.index];
    case Output::Kind::kAlias:
      return make_tensor(
          c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(
              call.storages[output.index])),
          kKeys, output.view);
    case Output::Kind::kFresh:
      return make_tensor(fresh[output.index], kKeys, output.view);
  }
  return {};
}

void finish(const Call& call, const Signature& signature,
            c10::ArrayRef<c10::Storage> fresh, Stack* stack) {
  c10::SmallVector<c10::IValue, 4> results;
  size_t at = 0;
  for (int kind : signature.returns) {
    if (kind < 0) {
      results.emplace_back(result(call, signature.outputs[at++], fresh));
      continue;
    }
    c10::List<at::Tensor> list;
    list.reserve(static_cast<size_t>(kind));
    for (int i = 0; i < kind; ++i) {
      list.push_back(result(call, signature.outputs[at++], fresh));
    }
    results.emplace_back(std::move(list));
  }
  torch::jit::drop(*stack, call.traits.arguments);
  for (auto& value : results) stack->push_back(std::move(value));
}

namespace {

// Sends a call with a known signature. False if the signature was dropped
// meanwhile.
bool execute(const Call& call, const Signature& signature, Stack* stack) {
  c10::SmallVector<c10::Storage, 4> fresh;
  c10::SmallVector<StorageRecord*, 4> records;
  for (auto nbytes : signature.fresh_bytes) {
    fresh.push_back(new_storage(call.machine, nbytes, false));
    records.push_back(static_cast<StorageRecord*>(
        fresh.back().unsafeGetStorageImpl()->data_ptr().get_context()));
  }
  if (!signature.local) {
    bool sent = false;
    auto write = [&](std::string& out, uint64_t& newest) {
      if (signature.dropped) return;
      sent = true;
      put(out, Rec::kExec);
      put_var(out, signature.number);
      for (auto id : call.ids) put_id(out, id, newest);
      out += call.dyn();
      for (auto* record : records) {
        put_id(out, record->id, newest);
        record->announced = true;
      }
    };
    auto& connection = Connection::at(call.machine);
    connection.append(write, 1);
    if (!sent) return false;
    if (is_blocking()) connection.synchronize("MYCELYA_BLOCKING");
  }
  change_arguments(call, signature);
  finish(call, signature, fresh, stack);
  return true;
}

// Indices on the CPU are taken as CUDA takes them.
void move_indices(OpTraits& traits, Stack* stack) {
  size_t first = stack->size() - traits.arguments;
  const auto& self = (*stack)[first].toTensor();
  auto& indices = (*stack)[first + 1];
  bool moved = false;
  c10::List<std::optional<at::Tensor>> list;
  for (const auto& item : indices.toListRef()) {
    if (item.isNone() || !item.toTensor().defined()) {
      list.push_back(std::nullopt);
    } else if (item.toTensor().is_cpu() &&
               self.device().type() == kDeviceType) {
      moved = true;
      list.push_back(item.toTensor().to(self.device()));
    } else {
      list.push_back(item.toTensor());
    }
  }
  if (moved) indices = std::move(list);
}

// `index` is static unless a mask decides the number of rows.
bool has_mask(const Stack& stack, const OpTraits& traits) {
  const auto& indices = stack[stack.size() - traits.arguments + 1];
  for (const auto& item : indices.toListRef()) {
    if (item.isNone() || !item.toTensor().defined()) continue;
    auto dtype = item.toTensor().scalar_type();
    if (dtype == at::kBool || dtype == at::kByte) return true;
  }
  return false;
}

bool must_ask(const OpTraits& traits, const Stack& stack) {
  if (traits.dynamic) return true;
  return traits.cpu_indices && !traits.is_mutable && has_mask(stack, traits);
}

}  // namespace

namespace {
// What a worker would end the session for. Once a signature is enough, as all
// of it stands in the key.
void check_sendable(const Call& call, const Stack& stack) {
  TORCH_CHECK_NOT_IMPLEMENTED(worker::is_allowed(call.traits.op),
                              "mycelya: ", call.traits.name,
                              " is not run in another process");
  for (const auto* tensor : call.tensors) check_inside_storage(*tensor);
  const auto& arguments = call.traits.op.schema().arguments();
  size_t first = stack.size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = stack[first + i];
    if (arguments[i].name() != "dtype" || !value.isInt()) continue;
    auto dtype = static_cast<at::ScalarType>(value.toInt());
    TORCH_CHECK_NOT_IMPLEMENTED(is_known_dtype(dtype),
                                "mycelya: ", call.traits.name, " to ", dtype,
                                ", a dtype that is not sent");
  }
}
}  // namespace

void run(OpTraits& traits, Stack* stack) {
  if (traits.cpu_indices) move_indices(traits, stack);
  Call call(traits, *stack);
  auto& counters = Connection::at(call.machine).counters;
  sync_default_dtype(call.machine);
  if (must_ask(traits, *stack)) {
    check_sendable(call, *stack);
    return run_on_worker(call, stack, false);
  }
  auto& cache = SignatureCache::at(call.machine);
  for (;;) {
    auto signature = cache.find(call.key());
    if (signature) {
      counters.cache_hits.fetch_add(1, std::memory_order_relaxed);
    } else {
      counters.cache_misses.fetch_add(1, std::memory_order_relaxed);
      check_sendable(call, *stack);
      if (!traits.probe.load()) signature = infer(call, *stack);
      if (!signature) return run_on_worker(call, stack, !traits.dynamic);
      remember(call, signature);
    }
    if (execute(call, *signature, stack)) return;
  }
}

OpTraits& traits_of(const c10::OperatorHandle& op) {
  static auto* mutex = new std::shared_mutex();
  static auto* all =
      new std::unordered_map<const void*, std::unique_ptr<OpTraits>>();
  const void* key = &op.operator_name();
  {
    std::shared_lock<std::shared_mutex> lock(*mutex);
    auto found = all->find(key);
    if (found != all->end()) return *found->second;
  }
  auto made = std::make_unique<OpTraits>(op);
  std::unique_lock<std::shared_mutex> lock(*mutex);
  return *all->emplace(key, std::move(made)).first->second;
}

OpTraits& traits_of(const char* name, const char* overload) {
  return traits_of(
      c10::Dispatcher::singleton().findSchemaOrThrow(name, overload));
}

namespace {

// The kernel of one operator; finds the traits once.
class Forward final : public c10::OperatorKernel {
 public:
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet,
                  Stack* stack) {
    auto* traits = traits_.load(std::memory_order_acquire);
    if (C10_UNLIKELY(traits == nullptr)) {
      traits = &traits_of(op);
      traits_.store(traits, std::memory_order_release);
    }
    run(*traits, stack);
  }

 private:
  std::atomic<OpTraits*> traits_{nullptr};
};

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet,
              Stack* stack) {
  run(traits_of(op), stack);
}

// Has a kernel of its own in MycelyaViews.cpp, MycelyaMem.cpp or
// MycelyaSpecial.cpp.
bool is_ours(const c10::OperatorHandle& op) {
  return op.hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1);
}

// Composite ops that go as one op all the same: those that allocate a result of
// no size and fill it by their out= overload, which would have to be asked for
// its strides; those that refuse devices they do not know; those for which the
// CPU has a kernel that is not the composite's.
bool also_forwarded(const c10::OperatorHandle& op) {
  static const std::set<std::string> any_overload{
      "aten::abs",           "aten::angle",        "aten::arange",
      "aten::bernoulli",     "aten::complex",      "aten::eye",
      "aten::frexp",         "aten::linspace",     "aten::logical_and",
      "aten::logical_not",   "aten::logical_or",   "aten::logical_xor",
      "aten::logspace",      "aten::nan_to_num",   "aten::polar",
      "aten::randperm",      "aten::range",        "aten::huber_loss_backward",
      "aten::mish_backward", "aten::silu_backward"};
  const auto& name = op.operator_name();
  if (name.name == "aten::mode") return name.overload_name == "values";
  if (name.name == "aten::logsumexp") return name.overload_name.empty();
  return any_overload.count(name.name) != 0 && !op.schema().is_mutable();
}

void forward(torch::Library& library, const c10::OperatorName& name) {
  auto full = name.name.substr(6);
  if (!name.overload_name.empty()) full += "." + name.overload_name;
  library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunctor(
                                 std::make_unique<Forward>()));
}

// A backend fallback loses against composite kernels: add would become an empty
// tensor and add.out. So every op that the CPU implements as one kernel is
// registered by name.
void forward_whole_ops(torch::Library& library) {
  using c10::DispatchKey;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    auto op = dispatcher.findOp(name);
    if (!op || !op->hasSchema() || is_ours(*op)) continue;
    if (also_forwarded(*op)) {
      forward(library, name);
      continue;
    }
    bool structured = op->hasKernelForDispatchKey(
        DispatchKey::CompositeExplicitAutogradNonFunctional);
    bool composite =
        op->hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd);
    bool cpu = op->hasKernelForDispatchKey(DispatchKey::CPU);
    if (!structured && !(composite && cpu)) continue;
    forward(library, name);
  }
}

}  // namespace

// The kernels of this device are registered at once and in this order, as the
// loop leaves out what has one; called when the library is used as a client (a
// worker only executes).
void register_views(torch::Library& library);
void register_memory(torch::Library& library);
void register_special(torch::Library& library);

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  register_views(library);
  register_memory(library);
  register_special(library);
  forward_whole_ops(library);
}

}  // namespace mycelya
