// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// What a call returns, without running it: the same call on meta tensors.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <set>

#include "MycelyaSignature.h"

namespace mycelya {
namespace {

// Ops whose metadata function says something else than the CPU kernel does,
// found by the OpInfo sweep; whatever has none joins at run time.
const std::set<std::string>& probed() {
  static const std::set<std::string> names{
      "aten::native_batch_norm",
      "aten::_native_batch_norm_legit",
      "aten::_native_batch_norm_legit_no_training",
      "aten::_batch_norm_with_update",
      "aten::_embedding_bag",
      "aten::_embedding_bag_forward_only",
  };
  return names;
}

// Ops whose results depend on values, without a tag that says so.
const std::set<std::string>& value_dependent() {
  static const std::set<std::string> names{"aten::linalg_lstsq",
                                           "aten::_ctc_loss",
                                           "aten::repeat_interleave.Tensor"};
  return names;
}

// Only here may a number change without a new signature. Elsewhere it may
// decide a shape: arange(0., x, step, out=...).
bool numbers_are_free(const c10::OperatorHandle& op) {
  static const std::set<std::string> names{
      "aten::addmm",
      "aten::baddbmm",
      "aten::addbmm",
      "aten::addmv",
      "aten::addr",
      "aten::normal_",
      "aten::uniform_",
      "aten::bernoulli_",
      "aten::exponential_",
      "aten::log_normal_",
      "aten::cauchy_",
      "aten::geometric_",
      "aten::native_dropout",
      "aten::native_layer_norm",
      "aten::native_group_norm",
      "aten::_fused_rms_norm",
      "aten::native_batch_norm",
      "aten::_native_batch_norm_legit",
      "aten::_softmax",
      "aten::fill_",
      "aten::masked_fill",
      "aten::masked_fill_",
      "aten::nll_loss_forward",
      "aten::smooth_l1_loss",
      "aten::huber_loss",
      "aten::_scaled_dot_product_flash_attention_for_cpu",
      "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
      "aten::renorm",
      "aten::eq",
  };
  const auto& name = op.operator_name().name;
  return op.hasTag(at::Tag::pointwise) || names.count(name) != 0 ||
         name.rfind("aten::_foreach_", 0) == 0 ||
         name.rfind("aten::_fused_", 0) == 0;
}

bool is_number(const c10::Type& type) {
  if (auto optional = type.castRaw<c10::OptionalType>()) {
    return is_number(*optional->getElementType());
  }
  return type.kind() == c10::TypeKind::NumberType ||
         type.kind() == c10::TypeKind::FloatType;
}

// Nothing but `self` is written, and in place: such a call changes no metadata.
bool only_in_place(const c10::FunctionSchema& schema) {
  const auto& name = schema.operator_name().name;
  bool foreach_in_place = (name.rfind("aten::_foreach_", 0) == 0 ||
                           name.rfind("aten::_fused_", 0) == 0) &&
                          name.back() == '_' && schema.returns().empty();
  return foreach_in_place;
}

// Meta tensors in place of the device's, sharing storages as those do.
class MetaArguments {
 public:
  explicit MetaArguments(const Call& call) : call_(call) {
    storages_.reserve(call.storages.size());
    for (auto* storage : call.storages) {
      storages_.emplace_back(c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), storage->nbytes(),
          c10::DataPtr(nullptr, at::kMeta), c10::GetAllocator(at::kMeta),
          true));
    }
  }

  c10::IValue convert(const c10::IValue& value) {
    if (value.isTensor()) return tensor(value.toTensor());
    if (value.isDevice()) return c10::Device(at::kMeta);
    if (value.isGenerator()) return {};
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const auto& item : value.toListRef()) {
        list.push_back(tensor(item.toTensor()));
      }
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& item : value.toListRef()) {
        if (item.isNone() || !item.toTensor().defined()) {
          list.push_back(std::nullopt);
        } else {
          list.push_back(tensor(item.toTensor()));
        }
      }
      return list;
    }
    return value;
  }

  const std::vector<at::Tensor>& tensors() const { return tensors_; }
  const std::vector<c10::Storage>& storages() const { return storages_; }

 private:
  at::Tensor tensor(const at::Tensor& real) {
    if (!real.defined() || real.device().type() != kDeviceType) return real;
    auto* storage =
        real.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
    auto at = std::find(call_.storages.begin(), call_.storages.end(), storage) -
              call_.storages.begin();
    tensors_.push_back(make_tensor(storages_[static_cast<size_t>(at)],
                                   c10::DispatchKeySet(c10::DispatchKey::Meta),
                                   view_of(real)));
    return tensors_.back();
  }

  const Call& call_;
  std::vector<c10::Storage> storages_;
  std::vector<at::Tensor> tensors_;  // in the order of the call's
};

// A torch function mode, such as a default device, must not reach into the
// metadata functions that are written in Python.
class NoTorchFunction {
 public:
  NoTorchFunction()
      : former_(at::impl::PythonTorchFunctionTLS::get_disabled_state()) {
    at::impl::PythonTorchFunctionTLS::set_disabled_state(
        at::impl::TorchFunctionDisabledState::ALL_DISABLED);
  }
  ~NoTorchFunction() {
    at::impl::PythonTorchFunctionTLS::set_disabled_state(former_);
  }
  NoTorchFunction(const NoTorchFunction&) = delete;
  NoTorchFunction& operator=(const NoTorchFunction&) = delete;

 private:
  at::impl::TorchFunctionDisabledState former_;
};

// Calls a metadata function; where it complains of two devices, the one that it
// knows as meta has the name that the user knows.
template <class Function>
void call_meta(Function&& function) {
  try {
    function();
  } catch (const c10::Error& error) {
    std::string text = error.what_without_backtrace();
    if (text.find("found at least two devices") == text.npos) throw;
    for (size_t at = 0; (at = text.find("meta", at)) != text.npos;) {
      text.replace(at, 4, "mycelya");
      at += 7;
    }
    TORCH_CHECK(false, text);
  }
}

// Runs the metadata function; false if there is none.
bool run_meta(OpTraits& traits, torch::jit::Stack& stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (traits.rule != nullptr) {
    try {
      traits.rule(stack);
      return true;
    } catch (const AskWorker&) {
      return false;
    }
  }
  if (traits.direct != nullptr) {
    call_meta([&] {
      traits.direct->callBoxed(
          traits.op, c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
    });
    return true;
  }
  NoTorchFunction guard;
  try {
    call_meta([&] { traits.op.callBoxed(&stack); });
    return true;
  } catch (const c10::NotImplementedError&) {
    traits.probe.store(true);
    return false;
  } catch (const c10::Error&) {
    throw;
  } catch (const std::exception&) {
    // A metadata function written in Python refuses the call. The CPU may see
    // it otherwise, or with another error: the worker's word counts.
    return false;
  }
}

template <class List, class Same>
int index_where(const List& list, Same&& same) {
  auto found = std::find_if(list.begin(), list.end(), same);
  return found == list.end() ? -1 : static_cast<int>(found - list.begin());
}

Output describe(const at::Tensor& tensor, const MetaArguments& meta,
                std::vector<c10::StorageImpl*>& fresh, Signature& signature) {
  Output output;
  if (!tensor.defined()) return output;
  TORCH_CHECK_NOT_IMPLEMENTED(is_known_dtype(tensor.scalar_type()),
                              "mycelya: tensors of dtype ",
                              tensor.scalar_type(), " are not sent");
  output.view = view_of(tensor);
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  int same = index_where(meta.tensors(),
                         [&](const auto& t) { return t.is_same(tensor); });
  int alias = index_where(meta.storages(), [&](const auto& s) {
    return s.unsafeGetStorageImpl() == storage;
  });
  if (same >= 0) {
    output.kind = Output::Kind::kSame;
    output.index = static_cast<uint16_t>(same);
  } else if (alias >= 0) {
    output.kind = Output::Kind::kAlias;
    output.index = static_cast<uint16_t>(alias);
  } else {
    int at = index_where(fresh, [&](auto* s) { return s == storage; });
    if (at < 0) {
      at = static_cast<int>(fresh.size());
      fresh.push_back(storage);
      signature.fresh_bytes.push_back(storage->nbytes());
    }
    output.kind = Output::Kind::kFresh;
    output.index = static_cast<uint16_t>(at);
  }
  output.view.storage = output.index;
  return output;
}

bool any_changed(const Call& call, const MetaArguments& meta) {
  for (size_t i = 0; i < meta.tensors().size(); ++i) {
    const auto& now = meta.tensors()[i];
    const auto& before = *call.tensors[i];
    if (now.sizes() == before.sizes() && now.strides() == before.strides() &&
        now.storage_offset() == before.storage_offset()) {
      continue;
    }
    return true;
  }
  return false;
}

}  // namespace

OpTraits::OpTraits(const c10::OperatorHandle& op) : op(op) {
  const auto& schema = op.schema();
  name = schema.name();
  if (!schema.overload_name().empty()) name += "." + schema.overload_name();
  arguments = schema.arguments().size();
  is_mutable = schema.is_mutable();
  in_place_only = only_in_place(schema);
  bool free = numbers_are_free(op);
  for (const auto& argument : schema.arguments()) {
    free_number.push_back(free && is_number(*argument.type()));
  }
  cpu_indices = schema.name() == "aten::index" ||
                schema.name() == "aten::index_put" ||
                schema.name() == "aten::index_put_" ||
                schema.name() == "aten::_unsafe_index" ||
                schema.name() == "aten::_unsafe_index_put" ||
                schema.name() == "aten::_index_put_impl_";
  dynamic = (op.hasTag(at::Tag::dynamic_output_shape) ||
             op.hasTag(at::Tag::data_dependent_output) ||
             value_dependent().count(name) != 0) &&
            schema.name() != "aten::index";
  probe.store(probed().count(schema.name()) != 0);
  direct = direct_meta(name);
  rule = own_rule(name);
}

std::shared_ptr<Signature> infer(const Call& call,
                                 const torch::jit::Stack& stack) {
  auto& traits = call.traits;
  auto signature = std::make_shared<Signature>();
  if (traits.in_place_only) return signature;
  MetaArguments meta(call);
  torch::jit::Stack meta_stack;
  size_t first = stack.size() - traits.arguments;
  for (size_t i = 0; i < traits.arguments; ++i) {
    meta_stack.push_back(meta.convert(stack[first + i]));
  }
  if (!run_meta(traits, meta_stack)) return nullptr;
  std::vector<c10::StorageImpl*> fresh;
  for (const auto& result : meta_stack) {
    if (result.isTensor()) {
      signature->returns.push_back(-1);
      signature->outputs.push_back(
          describe(result.toTensor(), meta, fresh, *signature));
    } else if (result.isTensorList()) {
      auto list = result.toTensorVector();
      signature->returns.push_back(static_cast<int>(list.size()));
      for (const auto& item : list) {
        signature->outputs.push_back(describe(item, meta, fresh, *signature));
      }
    } else {
      traits.dynamic = true;  // a number: the worker says it each time
      return nullptr;
    }
  }
  // Where an out= tensor is resized, kernels choose strides of their own, which
  // the worker tells.
  if (any_changed(call, meta)) return nullptr;
  signature->local = !traits.is_mutable && signature->fresh_bytes.empty() &&
                     !signature->outputs.empty();
  return signature;
}

}  // namespace mycelya
