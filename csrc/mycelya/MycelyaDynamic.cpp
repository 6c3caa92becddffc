// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Calls whose results only the worker knows: shapes that depend on values, and
// ops whose metadata function is wrong or missing.
#include <algorithm>

#include "MycelyaConnection.h"
#include "MycelyaDispatch.h"
#include "MycelyaPython.h"
#include "MycelyaStorageImpl.h"

namespace mycelya {
namespace {

using torch::jit::Stack;

constexpr uint64_t kFreshIdsOfList = 4096;
constexpr int kPlain = -2;  // in Signature::returns: a result that is no tensor

// What the worker said of a call: a signature, and the storages that it made.
struct Answer {
  std::shared_ptr<Signature> signature = std::make_shared<Signature>();
  std::vector<uint64_t> fresh_ids;
  std::vector<c10::IValue> plain;
};

class AnswerReader {
 public:
  AnswerReader(const Call& call, const std::string& body, uint64_t first,
               uint64_t count)
      : call_(call), reader_(body), first_(first), count_(count) {}

  Answer read() {
    auto returns = reader_.get<uint16_t>();
    MYCELYA_PROTOCOL(returns == call_.traits.op.schema().returns().size(),
                     "a wrong number of results");
    for (const auto& result : call_.traits.op.schema().returns()) {
      one(*result.type());
    }
    auto changed = reader_.get<uint16_t>();
    for (int i = 0; i < changed; ++i) {
      auto index = reader_.get<uint16_t>();
      MYCELYA_PROTOCOL(index < call_.tensors.size(), "no such argument");
      auto view = reader_.view();
      MYCELYA_PROTOCOL(view.dtype == call_.tensors[index]->scalar_type(),
                       "an argument changed its dtype");
      answer_.signature->changed.emplace_back(index, std::move(view));
    }
    reader_.expect_end();
    return std::move(answer_);
  }

 private:
  // Whether a result of this kind is what the schema says.
  static bool fits(Result kind, const c10::Type& type) {
    switch (type.kind()) {
      case c10::TypeKind::TensorType:
        return kind == Result::kTensor || kind == Result::kUndefined ||
               kind == Result::kArgument;
      case c10::TypeKind::OptionalType:
        return kind == Result::kUndefined ||
               fits(kind, *type.castRaw<c10::OptionalType>()->getElementType());
      case c10::TypeKind::ListType:
        return kind == Result::kList;
      case c10::TypeKind::IntType:
      case c10::TypeKind::SymIntType:
        return kind == Result::kInt;
      case c10::TypeKind::BoolType:
      case c10::TypeKind::SymBoolType:
        return kind == Result::kBool;
      case c10::TypeKind::FloatType:
      case c10::TypeKind::SymFloatType:
        return kind == Result::kDouble;
      case c10::TypeKind::NumberType:
        return kind == Result::kInt || kind == Result::kBool ||
               kind == Result::kDouble || kind == Result::kComplex;
      default:
        return false;
    }
  }

  void one(const c10::Type& type) {
    auto kind = reader_.get<Result>();
    MYCELYA_PROTOCOL(fits(kind, type), "a result of kind ",
                     static_cast<int>(kind), " where the operator returns ",
                     type.str());
    auto& returns = answer_.signature->returns;
    switch (kind) {
      case Result::kUndefined:
      case Result::kTensor:
      case Result::kArgument:
        returns.push_back(-1);
        return tensor(kind);
      case Result::kList: {
        auto count = reader_.count32(1);
        returns.push_back(static_cast<int>(count));
        for (size_t i = 0; i < count; ++i) tensor(reader_.get<Result>());
        return;
      }
      default:
        returns.push_back(kPlain);
        return number(kind);
    }
  }

  void number(Result kind) {
    auto& plain = answer_.plain;
    if (kind == Result::kInt) {
      plain.emplace_back(reader_.get<int64_t>());
    } else if (kind == Result::kBool) {
      plain.emplace_back(reader_.get<uint8_t>() != 0);
    } else if (kind == Result::kDouble) {
      plain.emplace_back(reader_.get<double>());
    } else {
      MYCELYA_PROTOCOL(kind == Result::kComplex, "an unknown kind of result");
      auto real = reader_.get<double>(), imaginary = reader_.get<double>();
      plain.emplace_back(c10::complex<double>(real, imaginary));
    }
  }

  void tensor(Result kind) {
    Output output;
    if (kind == Result::kArgument) {
      output.kind = Output::Kind::kSame;
      output.index = reader_.get<uint16_t>();
      MYCELYA_PROTOCOL(output.index < call_.tensors.size(), "no such argument");
    } else if (kind == Result::kTensor) {
      auto id = reader_.get<uint64_t>();
      output.view = reader_.view();
      place(id, output);
    } else {
      MYCELYA_PROTOCOL(kind == Result::kUndefined, "an unknown kind of result");
    }
    answer_.signature->outputs.push_back(std::move(output));
  }

  void place(uint64_t id, Output& output) {
    auto& ids = call_.ids;
    auto known = std::find(ids.begin(), ids.end(), id);
    if (known != ids.end()) {
      output.kind = Output::Kind::kAlias;
      output.index = static_cast<uint16_t>(known - ids.begin());
      MYCELYA_PROTOCOL(
          output.view.nbytes <= call_.storages[output.index]->nbytes(),
          "a view of an argument reaches outside it");
      return;
    }
    MYCELYA_PROTOCOL(id >= first_ && id - first_ < count_,
                     "a storage id that was not offered");
    auto& fresh = answer_.fresh_ids;
    auto at = std::find(fresh.begin(), fresh.end(), id) - fresh.begin();
    auto& sizes = answer_.signature->fresh_bytes;
    if (at == static_cast<int64_t>(fresh.size())) {
      fresh.push_back(id);
      sizes.push_back(output.view.nbytes);
    }
    MYCELYA_PROTOCOL(sizes[static_cast<size_t>(at)] == output.view.nbytes,
                     "two sizes of one storage");
    output.kind = Output::Kind::kFresh;
    output.index = static_cast<uint16_t>(at);
    output.view.storage = output.index;
  }

  const Call& call_;
  Reader reader_;
  uint64_t first_, count_;
  Answer answer_;
};

uint64_t offered_ids(const c10::FunctionSchema& schema) {
  uint64_t count = schema.returns().size();
  for (const auto& result : schema.returns()) {
    if (result.type()->kind() == c10::TypeKind::ListType) {
      count += kFreshIdsOfList;
    }
  }
  return count;
}

Answer ask_worker(const Call& call, const char* why) {
  auto& connection = Connection::at(call.machine);
  auto count = offered_ids(call.traits.op.schema());
  auto first = reserve_ids(count);
  std::string body;
  put_call(body, call);
  put<uint16_t>(body, static_cast<uint16_t>(call.ids.size()));
  for (auto id : call.ids) put<uint64_t>(body, id);
  put_str32(body, call.dyn());
  put<uint64_t>(body, first);
  put<uint64_t>(body, count);
  auto reply =
      connection.ask(Question::kRun, body, why + (": " + call.traits.name));
  try {
    return AnswerReader(call, reply, first, count).read();
  } catch (const ProtocolViolation& violation) {
    connection.fail(violation.what());
    raise_error(ErrorKind::kProtocol, violation.what());
  }
}

// Results of which some are plain numbers; those come with every answer anew.
void finish_mixed(const Call& call, const Answer& answer,
                  c10::ArrayRef<c10::Storage> fresh, Stack* stack) {
  std::vector<c10::IValue> results;
  size_t at = 0, plain = 0;
  for (int kind : answer.signature->returns) {
    TORCH_CHECK_NOT_IMPLEMENTED(kind < 0, "mycelya: ", call.traits.name,
                                " returns numbers and lists of tensors");
    if (kind == kPlain) {
      results.push_back(answer.plain[plain++]);
    } else {
      results.emplace_back(
          result(call, answer.signature->outputs[at++], fresh));
    }
  }
  torch::jit::drop(*stack, call.traits.arguments);
  for (auto& value : results) stack->push_back(std::move(value));
}

}  // namespace

void run_on_worker(const Call& call, Stack* stack, bool keep) {
  auto& counters = Connection::at(call.machine).counters;
  counters.ops.fetch_add(1, std::memory_order_relaxed);
  (keep ? counters.probes : counters.dynamic_ops)
      .fetch_add(1, std::memory_order_relaxed);
  auto answer = ask_worker(call, keep ? "probe" : "dynamic shape");
  const auto& signature = *answer.signature;
  c10::SmallVector<c10::Storage, 4> fresh;
  for (size_t i = 0; i < answer.fresh_ids.size(); ++i) {
    fresh.push_back(storage_with_id(call.machine, answer.fresh_ids[i],
                                    signature.fresh_bytes[i]));
    record_of(*fresh.back().unsafeGetStorageImpl()).announced = true;
  }
  bool only_tensors = answer.plain.empty();
  if (keep && only_tensors) remember(call, answer.signature);
  change_arguments(call, signature);
  if (only_tensors) {
    finish(call, signature, fresh, stack);
  } else {
    finish_mixed(call, answer, fresh, stack);
  }
}

}  // namespace mycelya
