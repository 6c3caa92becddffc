// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// What the records of an OPS frame do. A record is read and checked as a whole
// before any of it happens; a failing operator spoils what it would have
// written, and the session goes on.
#include <c10/core/DefaultDtype.h>

#include <algorithm>

#include "MycelyaWorker.h"

namespace mycelya::worker {
namespace {

using c10::IntArrayRef;

void expect_shape(const at::Tensor& result, const View& view) {
  TORCH_CHECK(result.defined(), "the result is undefined, the client expected ",
              IntArrayRef(view.sizes));
  TORCH_CHECK_NOT_IMPLEMENTED(
      result.layout() == at::kStrided && result.has_storage(),
      "the result has layout ", result.layout(),
      ", only strided tensors can be kept");
  TORCH_CHECK(result.sizes() == IntArrayRef(view.sizes), "result has shape ",
              result.sizes(), ", the client expected ",
              IntArrayRef(view.sizes));
  TORCH_CHECK(result.scalar_type() == view.dtype, "result has dtype ",
              c10::getDtypeNames(result.scalar_type()).first,
              ", the client expected ", c10::getDtypeNames(view.dtype).first);
}

// Whether each element lies where the client believes it does.
bool lies_as_promised(const at::Tensor& result, const View& view) {
  const auto* impl = result.unsafeGetTensorImpl();
  if ((result.is_conj() | result.is_neg() << 1) != view.bits) return false;
  if (impl->unsafe_storage().nbytes() < view.nbytes) return false;
  if (result._is_zerotensor()) return false;
  if (result.numel() == 0) return true;
  if (impl->storage_offset() != view.offset) return false;
  auto strides = impl->strides();
  if (strides == IntArrayRef(view.strides)) return true;
  for (size_t i = 0; i < strides.size(); ++i) {
    if (view.sizes[i] > 1 && strides[i] != view.strides[i]) return false;
  }
  return true;
}

}  // namespace

void Session::record(Reader& in) {
  switch (auto kind = in.get<Rec>()) {
    case Rec::kExec:
      return execute(in);
    case Rec::kFree:
      return record_free(in);
    case Rec::kAlloc:
      return record_alloc(in);
    case Rec::kResize:
      return record_resize(in);
    case Rec::kDefSig:
      return define(in);
    case Rec::kDropSig:
      return drop_signatures(in);
    case Rec::kSeed: {
      auto chosen = generator(in.var());
      auto seed = in.get<uint64_t>();
      std::lock_guard<std::mutex> lock(chosen.mutex());
      return chosen.set_current_seed(seed);
    }
    case Rec::kGenState: {
      auto number = in.var();
      return set_generator_state(number, in.str32());
    }
    case Rec::kDefaultDtype: {
      auto dtype = static_cast<at::ScalarType>(in.get<uint8_t>());
      MYCELYA_PROTOCOL(dtype == at::kFloat || dtype == at::kDouble ||
                           dtype == at::kHalf || dtype == at::kBFloat16,
                       "no such default dtype");
      // In the client's own process it is what it is.
      if (!options_.own_generator) {
        c10::set_default_dtype(c10::scalarTypeToTypeMeta(dtype));
      }
      return;
    }
    default:
      MYCELYA_PROTOCOL(false, "unknown record ", static_cast<int>(kind));
  }
}

void Session::record_alloc(Reader& in) {
  auto id = in.id(newest_);
  auto nbytes = in.var();
  MYCELYA_PROTOCOL(nbytes <= kMaxStorageBytes, "a storage of ", nbytes,
                   " bytes");
  MYCELYA_PROTOCOL(storages_.find(id) == nullptr, "storage ", id,
                   " exists already");
  try {
    insert(id, {allocate(nbytes), nullptr});
  } catch (const std::exception&) {
    insert(id, {target_.nothing, report(nullptr)});
  }
}

void Session::record_free(Reader& in) {
  for (auto count = in.var(); count > 0; --count) {
    auto id = in.id(newest_);
    bytes_ -= stored(id).counted;
    storages_.erase(id);
  }
}

void Session::record_resize(Reader& in) {
  auto& entry = stored(in.id(newest_));
  auto nbytes = in.var();
  MYCELYA_PROTOCOL(nbytes <= kMaxStorageBytes, "a storage of ", nbytes,
                   " bytes");
  if (entry.poison != nullptr) return;
  try {
    auto larger = allocate(nbytes);
    auto common = std::min<uint64_t>(nbytes, entry.storage.nbytes());
    bytes_of(larger, target_.keys, 0, common)
        .copy_(bytes_of(entry.storage, target_.keys, 0, common));
    auto* impl = entry.storage.unsafeGetStorageImpl();
    impl->set_data_ptr_noswap(
        larger.unsafeGetStorageImpl()->set_data_ptr(c10::DataPtr()));
    impl->set_nbytes(nbytes);
    count(entry);
  } catch (const std::exception&) {
    entry.poison = report(nullptr);
  }
}

void Session::define(Reader& in) {
  auto number = in.var();
  auto bytes = in.get<uint32_t>();
  Reader body(in.take(bytes), bytes);
  MYCELYA_PROTOCOL(
      number < UINT64_MAX && signatures_.find(number + 1) == nullptr,
      "signature ", number, " exists already");
  definition_bytes_ += bytes;
  MYCELYA_PROTOCOL(signatures_.size() < kMaxDefinitions &&
                       definition_bytes_ <= kMaxDefinitionBytes,
                   "too many signatures");
  Known known;
  known.definition_bytes = bytes;
  known.call = std::make_unique<Prepared>(body, target_);
  read_promises(body, known);
  body.expect_end();
  signatures_.insert(number + 1, std::move(known));
}

void Session::read_promises(Reader& in, Known& known) {
  auto count = in.get<uint16_t>();
  bool lists = false;
  size_t tensors = 0;  // numbers among the results are nothing to keep
  for (const auto& type : known.call->op().schema().returns()) {
    lists |= type.type()->kind() == c10::TypeKind::ListType;
    tensors += type.type()->kind() == c10::TypeKind::TensorType;
  }
  MYCELYA_PROTOCOL(lists || count == tensors, "an operator with ", tensors,
                   " results, not ", count);
  known.results.resize(count);
  for (auto& promise : known.results) {
    auto kind = in.get<uint8_t>();
    MYCELYA_PROTOCOL(kind <= 1, "unknown kind of result");
    if (kind == 0) continue;
    promise.fresh = true;
    promise.view = in.view();
    auto& fresh = known.fresh;
    MYCELYA_PROTOCOL(promise.view.storage <= fresh.size(),
                     "fresh storages are counted from 0 at first use");
    if (promise.view.storage == fresh.size()) fresh.emplace_back();
    auto& mine = fresh[promise.view.storage];
    mine.nbytes = std::max(mine.nbytes, promise.view.nbytes);
    mine.users += 1;
  }
}

void Session::drop_signatures(Reader& in) {
  for (auto count = in.var(); count > 0; --count) {
    auto number = in.var();
    auto* known = number < UINT64_MAX ? signatures_.find(number + 1) : nullptr;
    MYCELYA_PROTOCOL(known != nullptr, "no signature ", number);
    definition_bytes_ -= known->definition_bytes;
    signatures_.erase(number + 1);
  }
}

void Session::execute(Reader& in) {
  auto number = in.var();
  auto* known = number < UINT64_MAX ? signatures_.find(number + 1) : nullptr;
  MYCELYA_PROTOCOL(known != nullptr, "no signature ", number);
  auto& call = *known->call;
  Bound bound;
  for (const auto& use : call.storages()) bind(bound, use, in.id(newest_));
  const char* dyn = in.take(call.dyn_bytes());
  Ids ids;
  for (size_t i = 0; i < known->fresh.size(); ++i) {
    ids.push_back(in.id(newest_));
  }
  check_new(ids);
  ++op_number_;
  if (C10_UNLIKELY(bound.tainted)) {
    if (auto poison = poison_of(call, bound)) {
      return spread(call, bound, ids, poison);
    }
  }
  try {
    Releaser releaser{call, target_, stack_};
    perform(call, bound, dyn);
    if (call.mutates()) settle(call, bound);
    take_results(*known, ids);
  } catch (const ProtocolViolation&) {
    throw;
  } catch (const Poison& earlier) {
    spread(call, bound, ids, earlier);
  } catch (...) {
    spread(call, bound, ids, report(&call));
  }
}

// ---- one call ----
void Session::bind(Bound& bound, const StorageUse& use, uint64_t id) {
  auto* entry = &stored(id);
  if (C10_UNLIKELY(entry->poison != nullptr)) {
    bound.tainted = true;
  } else {
    MYCELYA_PROTOCOL(entry->storage.nbytes() >= use.nbytes, "storage ", id,
                     " has ", entry->storage.nbytes(), " bytes, not ",
                     use.nbytes);
  }
  bound.stored.push_back(entry);
  bound.storages.push_back(&entry->storage);
}

void Session::check_new(const Ids& ids) {
  uint64_t last = 0;
  bool rising = true;
  for (auto id : ids) {
    MYCELYA_PROTOCOL(storages_.find(id) == nullptr, "storage ", id,
                     " exists already");
    rising &= id > last;
    last = id;
  }
  if (rising) return;
  std::vector<uint64_t> sorted(ids.begin(), ids.end());
  std::sort(sorted.begin(), sorted.end());
  MYCELYA_PROTOCOL(
      std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(),
      "a storage is made twice");
}

Poison Session::poison_of(const Prepared& call, const Bound& bound) const {
  for (size_t i = 0; i < bound.stored.size(); ++i) {
    const auto& poison = bound.stored[i]->poison;
    if (poison != nullptr && call.storages()[i].reads) return poison;
  }
  return nullptr;
}

void Session::perform(Prepared& call, Bound& bound, const char* dyn) {
  if (C10_UNLIKELY(bound.tainted)) {
    for (size_t i = 0; i < bound.stored.size(); ++i) {
      revive(*bound.stored[i], call.storages()[i].nbytes);
    }
  }
  call.fill(bound.storages, dyn, find_generator_);
  call.run(stack_);
}

// After a call that writes arguments: what it overwrote is sound again, what it
// resized has another size.
void Session::settle(const Prepared& call, Bound& bound) {
  for (size_t i = 0; i < bound.stored.size(); ++i) {
    const auto& use = call.storages()[i];
    if (!use.writes) continue;
    auto& entry = *bound.stored[i];
    if (!use.reads) entry.poison = nullptr;
    if (C10_LIKELY(entry.storage.nbytes() == entry.counted)) continue;
    count(entry);
    if (options_.max_bytes == 0 || bytes_ <= options_.max_bytes) continue;
    entry.storage = target_.nothing;
    count(entry);
    TORCH_CHECK_WITH(
        OutOfMemoryError, false,
        "out of memory: a tensor grew over this worker's limit of ",
        options_.max_bytes, " bytes");
  }
}

void Session::spread(const Prepared& call, Bound& bound, const Ids& ids,
                     const Poison& poison) {
  for (size_t i = 0; i < bound.stored.size(); ++i) {
    if (call.storages()[i].writes) bound.stored[i]->poison = poison;
  }
  for (auto id : ids) insert(id, {target_.nothing, poison});
}

void Session::take_results(const Known& known, const Ids& ids) {
  Tensors results;
  collect(results);
  TORCH_CHECK(results.size() == known.results.size(), "there are ",
              results.size(), " results, the client expected ",
              known.results.size());
  c10::SmallVector<c10::Storage, 4> fresh;
  uint64_t more = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    const auto& promise = known.results[i];
    if (!promise.fresh) continue;
    expect_shape(results[i], promise.view);
    if (promise.view.storage < fresh.size()) continue;
    fresh.push_back(place(known, results, i));
    more += fresh.back().nbytes();
  }
  check_limit(more);
  for (size_t i = 0; i < ids.size(); ++i) {
    insert(ids[i], {std::move(fresh[i]), nullptr});
  }
}

// Takes the tensors from the stack.
void Session::collect(Tensors& tensors) {
  for (auto& value : stack_) {
    if (value.isTensor()) {
      tensors.push_back(std::move(value).toTensor());
    } else if (value.isTensorList()) {
      for (const auto& item : value.toTensorVector()) tensors.push_back(item);
    }
  }
  stack_.clear();
}

// The storage for the fresh storage that result `first` is the first to use: as
// the operator left it if it is nobody else's and all lies where the client
// believes, else a copy.
c10::Storage Session::place(const Known& known, const Tensors& results,
                            size_t first) {
  auto number = known.results[first].view.storage;
  const auto& fresh = known.fresh[number];
  const auto& real = results[first].storage();
  bool same = real.use_count() == fresh.users &&
              results[first].device() == target_.device;
  for (size_t i = first; i < results.size() && same; ++i) {
    const auto& promise = known.results[i];
    if (!promise.fresh || promise.view.storage != number) continue;
    expect_shape(results[i], promise.view);
    same = results[i].storage().is_alias_of(real) &&
           lies_as_promised(results[i], promise.view);
    if (fresh.users == 1) break;
  }
  if (same) return real;
  auto storage = allocate(fresh.nbytes);
  for (size_t i = first; i < results.size(); ++i) {
    const auto& promise = known.results[i];
    if (!promise.fresh || promise.view.storage != number) continue;
    expect_shape(results[i], promise.view);
    check_inside(results[i]);
    on(storage, promise.view).copy_(results[i]);
    ++relayouts_;
  }
  return storage;
}

// ---- storages ----
Stored& Session::stored(uint64_t id) {
  auto* found = storages_.find(id);
  MYCELYA_PROTOCOL(found != nullptr, "no storage ", id);
  return *found;
}

void Session::check_limit(uint64_t more) const {
  if (options_.max_bytes == 0) return;
  TORCH_CHECK_WITH(OutOfMemoryError, bytes_ + more <= options_.max_bytes,
                   "out of memory: ", more, " bytes more than the ", bytes_,
                   " in use are over this worker's limit of ",
                   options_.max_bytes);
}

void Session::check_temporary(const View& view) const {
  auto nbytes = bytes_in(view);
  TORCH_CHECK_WITH(OutOfMemoryError, nbytes <= kMaxStorageBytes,
                   "out of memory: ", nbytes, " bytes in one tensor");
  check_limit(nbytes);
}

c10::Storage Session::allocate(uint64_t nbytes) const {
  TORCH_CHECK_WITH(OutOfMemoryError, nbytes <= kMaxStorageBytes,
                   "out of memory: ", nbytes, " bytes in one storage");
  check_limit(nbytes);
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), static_cast<size_t>(nbytes),
      c10::GetAllocator(target_.device.type()), true);
}

void Session::insert(uint64_t id, Stored stored) {
  MYCELYA_PROTOCOL(storages_.size() < kMaxStorages, "too many storages");
  stored.counted = stored.storage.nbytes();
  bytes_ += stored.counted;
  peak_bytes_ = std::max(peak_bytes_, bytes_);
  storages_.insert(id, std::move(stored));
}

void Session::count(Stored& stored) {
  bytes_ += stored.storage.nbytes() - stored.counted;
  peak_bytes_ = std::max(peak_bytes_, bytes_);
  stored.counted = stored.storage.nbytes();
}

// Gives memory to a storage whose allocation or making failed; what it holds is
// about to be overwritten. Memory that could not be had before, and still
// can't, is one failure: throws the earlier one, a Poison.
void Session::revive(Stored& stored, uint64_t nbytes) {
  bool shared = stored.storage.is_alias_of(target_.nothing);
  if (stored.storage.nbytes() >= nbytes && !shared) return;
  try {
    stored.storage = allocate(nbytes);
  } catch (const std::exception&) {
    const auto& earlier = stored.poison;
    if (earlier != nullptr && earlier->kind == ErrorKind::kOutOfMemory) {
      throw Poison(earlier);
    }
    throw;
  }
  count(stored);
}

at::Tensor Session::on(const c10::Storage& storage, const View& view) const {
  return make_tensor(storage, target_.keys, view);
}

void check_inside(const at::Tensor& result) {
  if (result.numel() == 0 || result._is_zerotensor()) return;
  auto needed = at::detail::computeStorageNbytes(
      result.sizes(), result.strides(), result.itemsize(),
      static_cast<size_t>(result.storage_offset()));
  TORCH_CHECK(
      result.storage_offset() >= 0 && needed <= result.storage().nbytes(),
      "a result of ", needed, " bytes in a storage of ",
      result.storage().nbytes());
}

at::Tensor bytes_of(const c10::Storage& storage, c10::DispatchKeySet keys,
                    uint64_t offset, uint64_t count) {
  View view;
  view.dtype = at::kByte;
  view.nbytes = storage.nbytes();
  view.offset = static_cast<int64_t>(offset);
  view.sizes = {static_cast<int64_t>(count)};
  view.strides = {1};
  return make_tensor(storage, keys, view);
}

}  // namespace mycelya::worker
