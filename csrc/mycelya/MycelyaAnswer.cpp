// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// What the worker answers: elements of tensors, calls whose results only it can
// know, states of generators.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "MycelyaWorker.h"

namespace mycelya::worker {
namespace {

// Writes a call's results, and gives ids to storages that it made.
class Answer {
 public:
  Answer(const Prepared& call, c10::ArrayRef<uint64_t> ids,
         c10::ArrayRef<const c10::Storage*> storages, const Target& target,
         uint64_t first, uint64_t count)
      : call_(call),
        ids_(ids),
        storages_(storages),
        target_(target),
        first_(first),
        count_(count) {}

  std::string write(const Stack& stack) {
    put<uint16_t>(out, static_cast<uint16_t>(stack.size()));
    for (const auto& value : stack) one(value);
    changed();
    return std::move(out);
  }
  c10::ArrayRef<c10::Storage> fresh() const { return fresh_; }

 private:
  void one(const c10::IValue& value) {
    if (value.isTensor()) return tensor(value.toTensor());
    if (value.isNone()) return put(out, Result::kUndefined);
    if (value.isTensorList()) {
      auto list = value.toTensorVector();
      TORCH_CHECK(list.size() <= kMaxListItems, list.size(), " results");
      put(out, Result::kList);
      put<uint32_t>(out, static_cast<uint32_t>(list.size()));
      for (const auto& item : list) tensor(item);
    } else if (value.isInt()) {
      put(out, Result::kInt);
      put<int64_t>(out, value.toInt());
    } else if (value.isBool()) {
      put(out, Result::kBool);
      put<uint8_t>(out, value.toBool());
    } else if (value.isDouble()) {
      put(out, Result::kDouble);
      put<double>(out, value.toDouble());
    } else if (value.isComplexDouble()) {
      auto number = value.toComplexDouble();
      put(out, Result::kComplex);
      put<double>(out, number.real());
      put<double>(out, number.imag());
    } else {
      TORCH_CHECK_TYPE(false, "a result of kind ", value.tagKind(),
                       " cannot be sent");
    }
  }

  void tensor(const at::Tensor& result) {
    if (!result.defined()) return put(out, Result::kUndefined);
    uint16_t index = 0;
    for (const auto& argument : call_.tensors()) {
      if (argument.scalar) continue;
      if (argument.tensor.is_same(result)) {
        put(out, Result::kArgument);
        return put<uint16_t>(out, index);
      }
      ++index;
    }
    put(out, Result::kTensor);
    auto kept = keepable(result);
    put<uint64_t>(out, id_of(kept.storage()));
    put_view(out, kept, 0);
  }

  // A plain strided tensor on the device, that shares memory with nothing that
  // the client does not know.
  at::Tensor keepable(const at::Tensor& result) const {
    TORCH_CHECK_NOT_IMPLEMENTED(
        result.layout() == at::kStrided && result.has_storage() &&
            !result.is_quantized(),
        "the result is no plain strided tensor, it cannot be kept");
    check_inside(result);
    if (result.device() != target_.device) return result.to(target_.device);
    return result._is_zerotensor() ? result.clone() : result;
  }

  uint64_t id_of(const c10::Storage& storage) {
    for (size_t i = 0; i < storages_.size(); ++i) {
      if (storages_[i]->is_alias_of(storage)) return ids_[i];
    }
    size_t at = 0;
    while (at < fresh_.size() && !fresh_[at].is_alias_of(storage)) ++at;
    if (at == fresh_.size()) {
      TORCH_CHECK(at < count_,
                  "more results than the client has ids for: ", count_);
      fresh_.push_back(storage);
    }
    return first_ + at;
  }

  void changed() {
    std::string changes;
    uint16_t count = 0, index = 0;
    for (const auto& argument : call_.tensors()) {
      if (argument.scalar) continue;
      if (argument.writes && differs(argument)) {
        put<uint16_t>(changes, index);
        put_view(changes, argument.tensor, argument.view.storage);
        ++count;
      }
      ++index;
    }
    put<uint16_t>(out, count);
    out += changes;
  }

  static bool differs(const TensorArgument& argument) {
    const auto* now = argument.tensor.unsafeGetTensorImpl();
    const auto& was = argument.view;
    return now->sizes() != c10::IntArrayRef(was.sizes) ||
           now->strides() != c10::IntArrayRef(was.strides) ||
           now->storage_offset() != was.offset ||
           now->unsafe_storage().nbytes() != was.nbytes;
  }

  std::string out;
  const Prepared& call_;
  c10::ArrayRef<uint64_t> ids_;
  c10::ArrayRef<const c10::Storage*> storages_;
  const Target& target_;
  uint64_t first_, count_;
  std::vector<c10::Storage> fresh_;
};

}  // namespace

at::Generator new_generator(c10::Device device) {
  if (device.is_cpu()) return at::detail::createCPUGenerator();
  return at::globalContext()
      .getAcceleratorHooksInterface(device.type())
      .getNewGenerator(device.index());
}

void Session::ask(uint64_t correlation, const std::string& body) {
  Reader in(body);
  auto question = in.get<Question>();
  if (question == Question::kRead) return answer_read(correlation, in);
  std::string data;
  try {
    data = answer(question, in);
  } catch (const ProtocolViolation&) {
    throw;
  } catch (const Poison& poison) {
    return reply_failure(correlation, *poison);
  } catch (...) {
    return reply_failure(correlation, failure(nullptr));
  }
  link_.reply(correlation, 0, data);
}

std::string Session::answer(Question question, Reader& in) {
  switch (question) {
    case Question::kRun:
      return run(in);
    case Question::kSync: {
      in.expect_end();
      if (!options_.device.is_cpu()) {
        c10::impl::VirtualGuardImpl device(options_.device.type());
        device.synchronizeDevice(options_.device.index());
      }
      std::string data;
      put<uint64_t>(data, relayouts_);
      return data;
    }
    case Question::kGetState: {
      auto number = in.get<uint64_t>();
      in.expect_end();
      return generator_state(number);
    }
    default:
      MYCELYA_PROTOCOL(false, "unknown question ", static_cast<int>(question));
  }
}

void Session::reply_failure(uint64_t correlation,
                            const RemoteFailure& failure) {
  std::string body;
  put_failure(body, failure);
  link_.reply(correlation, 1, body);
}

void Session::answer_read(uint64_t correlation, Reader& in) {
  auto id = in.get<uint64_t>();
  auto view = in.view();
  in.expect_end();
  const auto& entry = stored(id);
  if (entry.poison != nullptr) {
    return reply_failure(correlation, *entry.poison);
  }
  MYCELYA_PROTOCOL(entry.storage.nbytes() >= view.nbytes, "storage ", id,
                   " has ", entry.storage.nbytes(), " bytes, not ",
                   view.nbytes);
  at::Tensor plain;
  try {
    auto there = on(entry.storage, view);
    if (!there.is_contiguous()) check_temporary(view);
    plain = there.resolve_conj().resolve_neg().contiguous();
  } catch (const std::exception&) {
    return reply_failure(correlation, failure(nullptr));
  }
  auto nbytes = plain.nbytes();
  if (plain.is_cpu() || nbytes == 0) {
    const auto* data =
        nbytes > 0 ? static_cast<const char*>(plain.const_data_ptr()) : "";
    return link_.reply(correlation, 0, {data, nbytes});
  }
  auto first = static_cast<uint64_t>(plain.storage_offset()) * plain.itemsize();
  bool begun = false;
  staging_.download(bytes_of(plain.storage(), target_.keys, first, nbytes),
                    [&](const char* from, size_t count) {
                      if (std::exchange(begun, true)) {
                        return link_.send(Frame::kReplyData, correlation,
                                          {{{from, count}}});
                      }
                      link_.begin_reply(correlation, 0, nbytes, {from, count});
                    });
}

std::string Session::run(Reader& in) {
  Prepared call(in, target_);
  auto count = in.get<uint16_t>();
  MYCELYA_PROTOCOL(count == call.storages().size(), "a call with ",
                   call.storages().size(), " storages, not ", count);
  std::vector<uint64_t> ids;
  Bound bound;
  for (const auto& use : call.storages()) {
    ids.push_back(in.get<uint64_t>());
    bind(bound, use, ids.back());
  }
  auto dyn = in.str32();
  MYCELYA_PROTOCOL(dyn.size() == call.dyn_bytes(), "dyn has ", dyn.size(),
                   " bytes, not ", call.dyn_bytes());
  auto first = in.get<uint64_t>(), offered = in.get<uint64_t>();
  in.expect_end();
  MYCELYA_PROTOCOL(
      first != 0 && first < (uint64_t{1} << 62) && offered <= kMaxStorages,
      "impossible ids");
  auto poison = poison_of(call, bound);
  if (poison == nullptr) {
    try {
      return run_now(call, bound, ids, dyn, {first, offered});
    } catch (const ProtocolViolation&) {
      throw;
    } catch (const Poison& earlier) {
      poison = earlier;
    } catch (...) {
      poison = std::make_shared<const RemoteFailure>(failure(&call));
    }
  }
  spread(call, bound, {}, poison);
  throw poison;
}

std::string Session::run_now(Prepared& call, Bound& bound,
                             const std::vector<uint64_t>& ids,
                             const std::string& dyn,
                             std::pair<uint64_t, uint64_t> offered) {
  Releaser releaser{call, target_, stack_};
  perform(call, bound, dyn.data());
  Answer answer(call, ids, bound.storages, target_, offered.first,
                offered.second);
  auto body = answer.write(stack_);
  settle(call, bound);
  uint64_t more = 0;
  for (const auto& storage : answer.fresh()) more += storage.nbytes();
  check_limit(more);
  auto id = offered.first;
  for (const auto& storage : answer.fresh()) {
    MYCELYA_PROTOCOL(storages_.find(id) == nullptr, "storage ", id,
                     " exists already");
    insert(id++, {storage, nullptr});
  }
  return body;
}

// ---- generators ----
at::Generator Session::generator(uint64_t number) {
  if (number == 0) {
    if (target_.own_generator.defined()) return target_.own_generator;
    return options_.device.is_cpu()
               ? at::detail::getDefaultCPUGenerator()
               : at::globalContext().defaultGenerator(options_.device);
  }
  auto& generator = generators_[number];
  if (!generator.defined()) {
    MYCELYA_PROTOCOL(generators_.size() <= kMaxGenerators,
                     "too many generators");
    generator = new_generator(options_.device);
  }
  return generator;
}

std::string Session::generator_state(uint64_t number) {
  auto chosen = generator(number);
  std::lock_guard<std::mutex> lock(chosen.mutex());
  auto state = chosen.get_state();
  return {static_cast<const char*>(state.const_data_ptr()), state.nbytes()};
}

void Session::set_generator_state(uint64_t number, const std::string& state) {
  if (state.empty()) {
    if (number != 0) generators_.erase(number);
    return;
  }
  auto chosen = generator(number);
  auto tensor = at::empty({static_cast<int64_t>(state.size())}, at::kByte);
  std::memcpy(tensor.mutable_data_ptr(), state.data(), state.size());
  try {
    std::lock_guard<std::mutex> lock(chosen.mutex());
    chosen.set_state(tensor);
  } catch (const std::exception&) {
    report(nullptr);
  }
}

}  // namespace mycelya::worker
