// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// One client's session on the worker: its storages, its calls, and the loop
// that reads frames and acts on them in order. One thread; only the heartbeat
// (MycelyaWorkerLink.h) runs beside it, so that a long kernel does not look
// like silence.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "MycelyaDecode.h"
#include "MycelyaStaging.h"
#include "MycelyaWorkerLink.h"

namespace mycelya::worker {

constexpr size_t kMaxStorages = size_t{16} << 20;
constexpr size_t kMaxGenerators = 65536;
constexpr size_t kMaxDefinitions = 2 * kMaxSignatures;
constexpr size_t kMaxDefinitionBytes = size_t{128} << 20;  // of those alive

// A map from numbers the client chose: open addressing, linear probing. The
// place depends on a secret, so that no choice of numbers makes it slow. Zero
// is no key. Pointers are valid until the next insertion or removal.
template <class T>
class Table {
 public:
  Table() : slots_(16), factor_(c10::detail::getNonDeterministicRandom() | 1) {}

  T* find(uint64_t key) {
    for (size_t i = place(key);; i = (i + 1) & (slots_.size() - 1)) {
      if (slots_[i].key == key) return key == 0 ? nullptr : &slots_[i].value;
      if (slots_[i].key == 0) return nullptr;
    }
  }
  // The key must be new and not 0.
  T& insert(uint64_t key, T value) {
    if (2 * ++size_ > slots_.size()) grow();
    auto& slot = slots_[empty_place(key)];
    slot.key = key;
    slot.value = std::move(value);
    return slot.value;
  }
  void erase(uint64_t key) {
    size_t mask = slots_.size() - 1;
    size_t hole = place(key);
    while (slots_[hole].key != key) hole = (hole + 1) & mask;
    --size_;
    // What was pushed beyond the hole moves back.
    for (size_t i = (hole + 1) & mask; slots_[i].key != 0; i = (i + 1) & mask) {
      size_t home = place(slots_[i].key);
      if (((i - home) & mask) < ((i - hole) & mask)) continue;
      slots_[hole] = std::move(slots_[i]);
      hole = i;
    }
    slots_[hole] = Slot();
  }
  size_t size() const { return size_; }

 private:
  struct Slot {
    uint64_t key = 0;
    T value;
  };
  size_t place(uint64_t key) const {
    return ((key * factor_) >> 20) & (slots_.size() - 1);
  }
  size_t empty_place(uint64_t key) const {
    size_t i = place(key);
    while (slots_[i].key != 0) i = (i + 1) & (slots_.size() - 1);
    return i;
  }
  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (auto& slot : old) {
      if (slot.key != 0) slots_[empty_place(slot.key)] = std::move(slot);
    }
  }

  std::vector<Slot> slots_;
  size_t size_ = 0;
  uint64_t factor_;
};

using Poison = std::shared_ptr<const RemoteFailure>;

struct Stored {
  c10::Storage storage;
  Poison poison;         // the failure that spoiled it, or null
  uint64_t counted = 0;  // its part of the session's bytes
};

// A result that the client expects.
struct Promise {
  bool fresh = false;  // else there is nothing to do with it
  View view;           // storage: index among the fresh ones
};

struct Fresh {
  uint64_t nbytes = 0;
  size_t users = 0;  // results that share it
};

// A call with a number.
struct Known {
  std::unique_ptr<Prepared> call;
  std::vector<Promise> results;
  std::vector<Fresh> fresh;
  size_t definition_bytes = 0;
};

// What `serve` returned for.
struct Served {
  enum Event : int64_t { kBye, kLost, kControl, kViolation };
  Event event = kBye;
  uint64_t correlation = 0;
  std::string payload;
};

struct Options {
  c10::Device device = c10::Device(c10::kCPU);
  bool own_generator = false;  // leave the process's default generator alone
  bool resumable = false;
  uint64_t max_bytes = 0;  // of storages; 0: no limit
  double beat = 5;         // seconds
};

class Session {
 public:
  Session(int fd, const Options& options);

  Served serve();
  void reply(uint64_t correlation, uint8_t status, const std::string& payload);
  void adopt(uint64_t id, const at::Tensor& tensor);
  Link& link() { return link_; }
  uint64_t storages() const { return storages_.size(); }
  uint64_t bytes() const { return bytes_; }
  uint64_t peak_bytes() const { return peak_bytes_; }
  void reset_peak() { peak_bytes_ = bytes_; }

 private:
  // A call's storages, looked up.
  struct Bound {
    c10::SmallVector<Stored*, 8> stored;
    c10::SmallVector<const c10::Storage*, 8> storages;
    bool tainted = false;
  };
  using Ids = c10::SmallVector<uint64_t, 8>;
  using Tensors = c10::SmallVector<at::Tensor, 4>;

  // ---- frames (MycelyaWorker.cpp) ----
  bool frame(const FrameHeader& header, Served& served);
  Served violation(const std::string& text);
  void begin_upload();
  void more_upload();
  void end_upload();
  void ask(uint64_t correlation, const std::string& body);
  void answer_read(uint64_t correlation, Reader& in);
  std::string answer(Question question, Reader& in);
  void reply_failure(uint64_t correlation, const RemoteFailure& failure);
  at::Generator generator(uint64_t number);
  std::string generator_state(uint64_t number);
  void set_generator_state(uint64_t number, const std::string& state);

  // ---- records (MycelyaExecute.cpp) ----
  void record(Reader& in);
  void record_alloc(Reader& in);
  void record_free(Reader& in);
  void record_resize(Reader& in);
  void define(Reader& in);
  void read_promises(Reader& in, Known& known);
  void drop_signatures(Reader& in);
  void execute(Reader& in);
  std::string run(Reader& in);

  // ---- one call ----
  void bind(Bound& bound, const StorageUse& use, uint64_t id);
  void check_new(const Ids& ids);
  Poison poison_of(const Prepared& call, const Bound& bound) const;
  void perform(Prepared& call, Bound& bound, const char* dyn);
  void settle(const Prepared& call, Bound& bound);
  void spread(const Prepared& call, Bound& bound, const Ids& ids,
              const Poison& poison);
  void take_results(const Known& known, const Ids& ids);
  void collect(Tensors& tensors);
  c10::Storage place(const Known& known, const Tensors& results, size_t index);
  void check_limit(uint64_t more) const;
  // Refuses a copy of a view's elements that is too large for this worker.
  void check_temporary(const View& view) const;
  std::string run_now(Prepared& call, Bound& bound,
                      const std::vector<uint64_t>& ids, const std::string& dyn,
                      std::pair<uint64_t, uint64_t> offered);

  // ---- storages ----
  Stored& stored(uint64_t id);
  c10::Storage allocate(uint64_t nbytes) const;
  void insert(uint64_t id, Stored stored);
  void count(Stored& stored);
  void revive(Stored& stored, uint64_t nbytes);
  at::Tensor on(const c10::Storage& storage, const View& view) const;

  // ---- failures; to be called while the exception is being handled ----
  RemoteFailure failure(const Prepared* call);
  Poison report(const Prepared* call);

  struct Upload {
    bool active = false;  // its first frame is here, its last is not
    uint64_t id = 0;
    View view;
    at::Tensor target;     // contiguous; undefined: the data are dropped
    bool through = false;  // `target` is copied into the storage at the end
    uint64_t total = 0, done = 0;
  };

  const Options options_;
  Target target_;
  Link link_;
  Staging staging_;
  Table<Stored> storages_;
  Table<Known> signatures_;  // by number + 1
  std::unordered_map<uint64_t, at::Generator> generators_;
  Prepared::FindGenerator find_generator_;
  Upload upload_;
  Stack stack_;
  uint64_t newest_ = 0;  // storage id
  uint64_t op_number_ = 0, serial_ = 0, relayouts_ = 0;
  uint64_t bytes_ = 0, peak_bytes_ = 0, definition_bytes_ = 0;
};

// Puts a call's storages back when it is over, however it ended.
struct Releaser {
  Prepared& call;
  const Target& target;
  Stack& stack;
  ~Releaser() {
    stack.clear();
    call.release(target);
  }
};

// Bytes that a view's elements take without gaps.
uint64_t bytes_in(const View& view);

at::Generator new_generator(c10::Device device);

// Throws unless a result lies within its storage, which what the client asks
// for can make untrue.
void check_inside(const at::Tensor& result);

// A tensor of bytes on a storage's first `count` bytes after `offset`.
at::Tensor bytes_of(const c10::Storage& storage, c10::DispatchKeySet keys,
                    uint64_t offset, uint64_t count);

}  // namespace mycelya::worker
