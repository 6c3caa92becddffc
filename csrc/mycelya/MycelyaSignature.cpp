// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
#include "MycelyaSignature.h"

#include <c10/core/DefaultDtype.h>

#include <algorithm>
#include <mutex>

#include "MycelyaAllocator.h"
#include "MycelyaGenerator.h"
#include "MycelyaStorageImpl.h"

namespace mycelya {
namespace {

struct BufferPool {
  std::vector<std::unique_ptr<Buffers>> all;
  size_t used = 0;
};
thread_local BufferPool t_pool;

Buffers& lease() {
  if (t_pool.used == t_pool.all.size()) {
    t_pool.all.push_back(std::make_unique<Buffers>());
  }
  auto& buffers = *t_pool.all[t_pool.used++];
  buffers.key.clear();
  buffers.dyn.clear();
  return buffers;
}

[[noreturn]] void refuse_device(const OpTraits& traits, int machine,
                                const at::Tensor& other) {
  auto index = static_cast<c10::DeviceIndex>(std::max(machine, 0));
  auto first = c10::Device(kDeviceType, index).str();
  auto second = other.device().str();
  TORCH_CHECK(other.device().type() != kDeviceType,
              "Expected all tensors to be on the same machine, but ",
              traits.name, " got tensors on ", first, " and ", second,
              ". Copy one over with .to(\"", first,
              "\"); the copy goes through this process.");
  TORCH_CHECK(false,
              "Expected all tensors to be on the same device, but found at "
              "least two devices, ",
              first, " and ", second, "! (", traits.name,
              "; move it with .to(\"", first,
              "\"): only 0-dimensional CPU tensors are taken as they are.)");
}

}  // namespace

BufferLease::BufferLease() : buffers(lease()) {}
BufferLease::~BufferLease() { --t_pool.used; }

Call::Call(OpTraits& traits, const torch::jit::Stack& stack)
    : traits(traits), key_(lease_.buffers.key), dyn_(lease_.buffers.dyn) {
  auto identity = reinterpret_cast<uintptr_t>(&traits);
  put<uint64_t>(key_, identity);
  put<uint8_t>(key_,
               static_cast<uint8_t>(c10::get_default_dtype_as_scalartype()));
  size_t first = stack.size() - traits.arguments;
  for (size_t i = 0; i < traits.arguments; ++i) {
    value(stack[first + i], traits.free_number[i]);
  }
  if (machine < 0) machine = current_device();
}

void Call::belongs_to(int index, const at::Tensor* tensor) {
  if (machine < 0) machine = index;
  if (machine == index) return;
  if (tensor != nullptr) refuse_device(traits, machine, *tensor);
  auto device_at = [](int at) {
    return c10::Device(kDeviceType, static_cast<c10::DeviceIndex>(at)).str();
  };
  TORCH_CHECK(false, "Expected all of ", traits.name,
              " to be on the same machine, but it got a tensor or device on ",
              device_at(machine), " and a device or generator on ",
              device_at(index));
}

void Call::value(const c10::IValue& value, bool free) {
  if (value.isTensor()) {
    tensor(value.toTensor());
  } else if (value.isNone()) {
    put<char>(key_, 'N');
  } else if (value.isInt() || value.isSymInt()) {
    auto number = value.isInt() ? value.toInt() : value.toSymInt().expect_int();
    put<char>(key_, free ? 'J' : 'I');
    put<int64_t>(free ? dyn_ : key_, number);
  } else if (value.isDouble() || value.isSymFloat()) {
    auto number =
        value.isDouble() ? value.toDouble() : value.toSymFloat().expect_float();
    put<char>(key_, free ? 'D' : 'E');
    put<double>(free ? dyn_ : key_, number);
  } else if (value.isBool() || value.isSymBool()) {
    put<char>(key_, 'B');
    put<uint8_t>(key_, value.isBool() ? value.toBool()
                                      : value.toSymBool().expect_bool());
  } else if (value.isComplexDouble()) {
    auto number = value.toComplexDouble();
    put<char>(key_, 'C');
    put<double>(key_, number.real());
    put<double>(key_, number.imag());
  } else if (value.isString()) {
    put<char>(key_, 'S');
    put_str32(key_, value.toStringRef());
  } else if (value.isDevice()) {
    auto device = value.toDevice();
    put<char>(key_, 'V');
    if (device.type() == kDeviceType && device.has_index()) {
      belongs_to(device.index(), nullptr);
    }
  } else if (value.isGenerator()) {
    generator(value.toGenerator());
  } else {
    list(value, free);
  }
}

void Call::list(const c10::IValue& value, bool free) {
  TORCH_CHECK_TYPE(value.isList(), "mycelya: ", traits.name,
                   " has an argument of kind ", value.tagKind(),
                   ", which cannot be sent to another process");
  auto list = value.toListRef();
  TORCH_CHECK(list.size() <= kMaxListItems, "mycelya: ", traits.name,
              " has a list of ", list.size(), " items, at most ", kMaxListItems,
              " can be sent");
  bool tensors = value.isTensorList(), optional = value.isOptionalTensorList();
  bool numbers = value.isIntList(), doubles = value.isDoubleList();
  bool flags = value.isBoolList();
  char tag = tensors    ? 'L'
             : optional ? 'O'
             : numbers  ? 'i'
             : doubles  ? 'd'
             : flags    ? 'b'
                        : 's';
  put<char>(key_, tag);
  put<uint32_t>(key_, static_cast<uint32_t>(list.size()));
  for (const auto& item : list) {
    if (tag == 'L') {
      tensor(item.toTensor());
    } else if (tag == 'i') {
      put<int64_t>(key_, item.toInt());
    } else if (tag == 'd') {
      put<double>(key_, item.toDouble());
    } else if (tag == 'b') {
      put<uint8_t>(key_, item.toBool());
    } else {
      TORCH_CHECK_TYPE(tag == 'O' || item.isScalar() || item.isSymInt(),
                       "mycelya: ", traits.name, " has a list of ",
                       item.tagKind(), ", which cannot be sent");
      this->value(item, free);
    }
  }
}

void Call::tensor(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    put<char>(key_, 'U');
    return;
  }
  if (tensor.device().type() != kDeviceType) return cpu_scalar(tensor);
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.layout() == at::kStrided,
                              "mycelya: ", traits.name,
                              " on a tensor of layout ", tensor.layout(),
                              "; only strided ones are sent");
  belongs_to(tensor.device().index(), &tensor);
  TORCH_CHECK(tensor.numel() <=
                  static_cast<int64_t>(kMaxStorageBytes / tensor.itemsize()),
              "mycelya: ", traits.name, " on a view of ", tensor.numel(),
              " elements; at most ", kMaxStorageBytes,
              " bytes can be computed on");
  auto* storage =
      tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  size_t at = 0;
  while (at < storages.size() && storages[at] != storage) ++at;
  if (at == storages.size()) {
    TORCH_CHECK(at < UINT16_MAX, "mycelya: too many tensors in one call");
    storages.push_back(storage);
    ids.push_back(record_of(*storage).id);
  }
  put<char>(key_, 'T');
  put_view(key_, tensor, static_cast<uint16_t>(at));
  tensors.push_back(&tensor);
}

void Call::cpu_scalar(const at::Tensor& tensor) {
  if (!tensor.is_cpu() || tensor.dim() != 0 ||
      tensor.layout() != at::kStrided) {
    refuse_device(traits, machine, tensor);
  }
  put<char>(key_, 'W');
  put<int8_t>(key_, static_cast<int8_t>(tensor.scalar_type()));
  put<uint8_t>(key_, tensor.unsafeGetTensorImpl()->is_wrapped_number());
  auto plain = tensor.resolve_conj().resolve_neg();
  char bytes[kScalarBytes] = {};
  std::memcpy(bytes, plain.const_data_ptr(), plain.itemsize());
  dyn_.append(bytes, sizeof(bytes));
}

void Call::generator(const at::Generator& generator) {
  TORCH_CHECK(generator.device().type() == kDeviceType, "Expected a '",
              c10::Device(kDeviceType).str(),
              "' device type for generator but found '",
              generator.device().type(), "'");
  belongs_to(generator.device().index(), nullptr);
  put<char>(key_, 'G');
  put<uint64_t>(dyn_, generator_number(generator));
}

SignatureCache& SignatureCache::at(int machine) {
  static auto* caches = new std::array<SignatureCache, kMaxMachines>();
  return (*caches)[static_cast<size_t>(machine)];
}

std::shared_ptr<Signature> SignatureCache::find(const std::string& key) {
  std::shared_lock<std::shared_mutex> lock(mutex_);
  auto found = signatures_.find(std::string_view(key));
  if (found == signatures_.end()) return nullptr;
  found->second->last_used.store(clock_.fetch_add(1, std::memory_order_relaxed),
                                 std::memory_order_relaxed);
  return found->second;
}

std::vector<std::shared_ptr<Signature>> SignatureCache::insert(
    const std::string& key, std::shared_ptr<Signature> signature) {
  std::vector<std::shared_ptr<Signature>> evicted;
  std::unique_lock<std::shared_mutex> lock(mutex_);
  if (signatures_.size() >= kMaxSignatures) {
    std::vector<uint64_t> ages;
    for (auto& [_, s] : signatures_) ages.push_back(s->last_used.load());
    auto quarter = ages.begin() + static_cast<int64_t>(ages.size() / 4);
    std::nth_element(ages.begin(), quarter, ages.end());
    for (auto it = signatures_.begin(); it != signatures_.end();) {
      if (it->second->last_used.load() > *quarter) {
        ++it;
        continue;
      }
      evicted.push_back(it->second);
      it = signatures_.erase(it);
    }
  }
  signature->last_used.store(clock_.load());
  auto& place = signatures_[key];
  if (place) evicted.push_back(place);
  place = std::move(signature);
  return evicted;
}

void SignatureCache::clear() {
  std::unique_lock<std::shared_mutex> lock(mutex_);
  signatures_.clear();
  default_dtype.store(static_cast<int>(at::kFloat));
}

}  // namespace mycelya
