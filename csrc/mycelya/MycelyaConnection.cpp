// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
#include "MycelyaConnection.h"

#include <array>
#include <limits>

#include "MycelyaPython.h"
#include "MycelyaSocket.h"

namespace mycelya {
namespace {

constexpr size_t kSealBytes = size_t{64} << 10;
constexpr size_t kFreesPerRecord = 4096;
constexpr size_t kNever = std::numeric_limits<size_t>::max();
// A worker acknowledges after 1 MiB; a smaller bound would wait for ever.
constexpr size_t kLeastRetained = size_t{4} << 20;

std::atomic<bool> g_forked{false};

std::chrono::nanoseconds seconds_to_time(double seconds) {
  // A hundred years are as good as for ever, and do not overflow.
  return std::chrono::nanoseconds(
      static_cast<int64_t>(std::min(std::max(seconds, 0.0), 3e9) * 1e9));
}

}  // namespace

bool in_bad_fork() { return g_forked.load(std::memory_order_relaxed); }

Connection& Connection::at(int index) {
  static auto* all = [] {
    auto* made = new std::array<Connection, kMaxMachines>();
    for (int i = 0; i < kMaxMachines; ++i) {
      (*made)[static_cast<size_t>(i)].index_ = i;
    }
    return made;
  }();
  return all->at(static_cast<size_t>(index));
}

void Connection::check_fork() {
  TORCH_CHECK(!in_bad_fork(),
              "mycelya: this process was forked from one that uses a machine, "
              "whose connection it cannot share; use the 'spawn' start method "
              "of multiprocessing");
}

// ---- life cycle ----
void Connection::open(Settings settings) {
  check_fork();
  // The child has no threads, and must not keep the worker's connection alive.
  static const int registered = ::pthread_atfork(nullptr, nullptr, [] {
    g_forked.store(true);
    for (int i = 0; i < kMaxMachines; ++i) {
      int descriptor = at(i).descriptor_.exchange(-1);
      if (descriptor >= 0) ::close(descriptor);
    }
  });
  TORCH_CHECK(registered == 0, "pthread_atfork failed");
  std::lock_guard<std::mutex> life(life_);
  TORCH_CHECK(!is_open(), "machine ", settings_.name, " is open already");
  join();
  Lock lock(mutex_);
  while (sending_ || receiving_) wait_changed(lock, 0.1);
  recycle_freed();
  reset(std::move(settings));
  state_ = State::kStarting;
  update_slow();
}

void Connection::reset(Settings settings) {
  settings_ = std::move(settings);
  if (settings_.resumable) {
    settings_.max_inflight = std::max(settings_.max_inflight, kLeastRetained);
  }
  broken_ = has_cuda_ = draining_ = urgent_ = uploading_ = false;
  ping_due_ = ack_due_ = false;
  end_kind_ = ErrorKind::kMachineDied;
  end_reason_.clear();
  opened_ = Clock::now();
  queue_.clear();
  retained_.clear();
  control_.clear();
  fresh_block();
  later_.clear();
  newest_ = numbered_ = acknowledged_ = received_ = 0;
  queued_ = retained_bytes_ = front_sent_ = 0;
  placed_ = sent_place_ = 0;
  wake_at_ = kNever;
  pending_.reset();
  raised_serial_ = relayouts_ = 0;
  unacknowledged_ = unacknowledged_bytes_ = 0;
  incoming_ = Incoming();
}

void Connection::connect(int fd, bool has_cuda, uint64_t peer_received) {
  auto socket = std::make_shared<Socket>(fd);
  check_fork();
  Lock lock(mutex_);
  // Those who used the lost connection leave within a slice.
  while (sending_ || receiving_) wait_changed(lock, 0.1);
  if (!is_open()) raise_ended(lock);
  TORCH_CHECK(socket_ == nullptr, "machine ", name(), " is connected already");
  auto oldest = numbered_ - retained_.size();
  if (peer_received > numbered_ || peer_received < oldest) {
    end(lock, State::kDead, ErrorKind::kProtocol,
        "protocol violation: the worker says that it received " +
            std::to_string(peer_received) + " frames, " +
            std::to_string(numbered_) + " were sent");
    raise_ended(lock);
  }
  if (!reader_.joinable()) {
    writer_ = std::thread([this] { write_loop(); });
    reader_ = std::thread([this] { read_loop(); });
  }
  resend(peer_received);
  incoming_ = Incoming();
  incoming_.buffer = std::make_unique<char[]>(Incoming::kBytes);
  socket_ = std::move(socket);
  descriptor_ = fd;
  broken_ = false;
  has_cuda_ = has_cuda;
  last_heard_ = last_sent_ = last_look_ = Clock::now();
  state_ = State::kRunning;
  update_slow();
  wake_all();
}

std::string Connection::wait_lost(double seconds) {
  if (in_bad_fork()) return "dead";
  auto deadline = Clock::now() + seconds_to_time(seconds);
  Lock lock(mutex_);
  for (;;) {
    auto state = state_.load();
    if (state == State::kDead) return "dead";
    if (state == State::kStopped || state == State::kNew) return "stopped";
    if (state == State::kResuming) return "lost";
    if (Clock::now() >= deadline) return "";
    moved_.wait_until(lock, deadline);
  }
}

uint64_t Connection::received() const {
  if (in_bad_fork()) return 0;
  auto& self = const_cast<Connection&>(*this);
  Lock lock(self.mutex_);
  return received_;
}

void Connection::fail(const std::string& reason) {
  if (in_bad_fork()) return;
  Lock lock(mutex_);
  if (state_ == State::kDead) end_reason_ = reason;
  end(lock, State::kDead, ErrorKind::kMachineDied, reason);
  wake_all();
}

std::string Connection::stop(double grace) {
  if (in_bad_fork()) return "";
  std::lock_guard<std::mutex> life(life_);
  std::exception_ptr interrupted;
  Lock lock(mutex_);
  if (is_open()) {
    draining_ = slow_ = true;
    if (state_ != State::kStarting) {
      auto deadline = Clock::now() + seconds_to_time(grace);
      bool said = false;
      Patience patience;
      try {
        while (is_open() && Clock::now() < deadline) {
          if (!said && !uploading_) {
            push_bye();
            said = true;
          }
          wait_changed(lock, 0.1);
          patience.pause(lock);
        }
      } catch (...) {
        interrupted = std::current_exception();
        lock.lock();
      }
    }
    end(lock, State::kStopped, ErrorKind::kRuntime, "");
  }
  auto unseen = std::move(pending_);
  lock.unlock();
  join();
  if (interrupted) std::rethrow_exception(interrupted);
  return unseen ? failure_text(*unseen, name()) : "";
}

void Connection::push_bye() {
  seal();
  Block bye;
  bye.bytes.resize(kHeaderBytes);
  put_header(bye.bytes.data(), {0, Frame::kBye, 0});
  push(std::move(bye));
  urge();
}

bool Connection::has_cuda() {
  check_fork();
  WithoutGil without;
  Lock lock(mutex_);
  Patience patience;
  while (state_ != State::kRunning) {
    if (!is_open()) raise_ended(lock);
    check_start(lock);
    wait_changed(lock, 0.1);
    patience.pause(lock);
  }
  return has_cuda_;
}

bool Connection::is_open() const {
  auto state = state_.load();
  return state == State::kStarting || state == State::kRunning ||
         state == State::kResuming;
}

void Connection::end(Lock& lock, State state, ErrorKind kind,
                     const std::string& reason) {
  if (!is_open()) return;
  end_kind_ = kind;
  end_reason_ = reason;
  if (pending_ && pending_->op.empty() && state == State::kDead) {
    // The worker's last word says why it left.
    end_reason_ += ": " + pending_->text;
    pending_.reset();
  }
  state_ = state;
  slow_ = true;
  descriptor_ = -1;
  if (socket_) socket_->shut();
  socket_.reset();
  for (auto& [correlation, waiter] : waiters_) {
    waiter->ended = true;
    waiter->ready.notify_all();
  }
  waiters_.clear();
  std::deque<Block> dropped;
  if (!sending_) dropped.swap(queue_);
  retained_.clear();
  queued_ = retained_bytes_ = 0;
  counters.queue_bytes = 0;
  wake_all();
  lock.unlock();
  dropped.clear();
  recycle_freed();
  lock.lock();
}

void Connection::lose(Lock& lock, const std::string& reason) {
  if (draining_) {
    end(lock, State::kStopped, ErrorKind::kRuntime, "");
  } else if (!settings_.resumable) {
    end(lock, State::kDead, ErrorKind::kMachineDied, reason);
  } else if (state_ == State::kRunning) {
    state_ = State::kResuming;
    end_reason_ = reason;
    lost_ = Clock::now();
    descriptor_ = -1;
    socket_->shut();
    socket_.reset();
    wake_all();
  }
}

void Connection::wake_all() {
  for (auto& [correlation, waiter] : waiters_) waiter->ready.notify_all();
  changed_.notify_all();
  moved_.notify_all();
  wake_at_ = kNever;
  work_.notify_all();
  parked_.notify_all();
}

void Connection::wait_changed(Lock& lock, double seconds) {
  ++watchers_;
  changed_.wait_for(lock, seconds_to_time(seconds));
  --watchers_;
}

void Connection::join() {
  if (writer_.joinable()) writer_.join();
  if (reader_.joinable()) reader_.join();
}

void Connection::raise_ended(Lock& lock) {
  auto state = state_.load();
  auto kind = end_kind_;
  auto text = "machine " + name();
  text += state == State::kDead ? " died: " + end_reason_ : " is stopped";
  lock.unlock();
  TORCH_CHECK(state != State::kNew,
              "mycelya: no machine was started for this device");
  TORCH_CHECK(state == State::kDead, text);
  raise_error(kind, text);
}

void Connection::raise_pending(Lock& lock) {
  if (!pending_) return;
  auto failure = std::move(pending_);
  raised_serial_ = failure->serial;
  update_slow();
  lock.unlock();
  raise_error(failure->kind, failure_text(*failure, name()));
}

void Connection::check_start(Lock& lock) {
  if (state_ != State::kStarting) return;
  if (Clock::now() < opened_ + seconds_to_time(settings_.connect_timeout)) {
    return;
  }
  lock.unlock();
  raise_error(ErrorKind::kMachineDied,
              c10::str("machine ", name(), " died: it did not start within ",
                       settings_.connect_timeout, " s"));
}

// ---- queueing ----
bool Connection::is_full() const {
  return queued_ + block_.size() - kHeaderBytes + retained_bytes_ >
         settings_.max_inflight;
}

void Connection::update_slow() {
  slow_ =
      !is_open() || draining_ || pending_ != nullptr || uploading_ || is_full();
}

Connection::Lock Connection::begin_append(bool raises) {
  check_fork();
  Lock lock(mutex_);
  if (C10_UNLIKELY(slow_)) settle(lock, raises);
  if (freed_.load(std::memory_order_relaxed) != nullptr) write_freed();
  if (C10_UNLIKELY(!later_.empty())) {
    block_ += later_;
    later_.clear();
  }
  before_ = block_.size();
  newest_before_ = newest_;
  return lock;
}

void Connection::settle(Lock& lock, bool raises) {
  for (;;) {
    if (!is_open() || draining_) raise_ended(lock);
    if (raises) raise_pending(lock);
    if (!uploading_ && !is_full()) break;
    lock.unlock();
    wait_for_room(raises);
    lock.lock();
  }
  update_slow();
}

void Connection::wait_for_room(bool raises) {
  WithoutGil without;
  Lock lock(mutex_);
  Patience patience;
  while (is_open() && !draining_ && (uploading_ || is_full())) {
    if (raises && pending_ != nullptr) return;
    check_start(lock);
    urge();
    wait_changed(lock, 0.1);
    patience.pause(lock);
  }
}

void Connection::end_append(Lock lock, int ops) {
  constexpr auto kRelaxed = std::memory_order_relaxed;
  if (ops != 0) {
    counters.ops.store(counters.ops.load(kRelaxed) + ops, kRelaxed);
  }
  if (C10_UNLIKELY(block_.size() >= kSealBytes)) {
    if (block_.size() > kMaxPayload) split_block(lock);
    seal();
  }
  size_t bytes = queued_ + block_.size() - kHeaderBytes;
  counters.queue_bytes.store(static_cast<int64_t>(bytes), kRelaxed);
  if (C10_UNLIKELY(bytes + retained_bytes_ > settings_.max_inflight)) {
    slow_ = true;
  }
  if (C10_UNLIKELY(!settings_.batching)) {
    seal();
    urge();
  }
  if (bytes > wake_at_) {
    wake_at_ = kNever;
    lock.unlock();
    work_.notify_one();
  }
}

void Connection::undo_append() {
  block_.resize(before_);
  newest_ = newest_before_;
}

void Connection::append_later(const std::string& record) noexcept {
  if (in_bad_fork() || !is_open()) return;
  Lock lock(mutex_);
  if (is_open()) later_ += record;
}

void Connection::free(StorageRecord* record) noexcept {
  if (in_bad_fork()) return;
  counters.storages_live.fetch_sub(1, std::memory_order_relaxed);
  counters.bytes_live.fetch_sub(static_cast<int64_t>(record->nbytes),
                                std::memory_order_relaxed);
  record->next = nullptr;
  if (!is_open()) {
    recycle(record);
    return;
  }
  auto* head = freed_.load(std::memory_order_relaxed);
  do {
    record->next = head;
  } while (!freed_.compare_exchange_weak(head, record));
  if (!is_open()) recycle_freed();  // it ended in between
}

void Connection::recycle_freed() { recycle(freed_.exchange(nullptr)); }

void Connection::write_freed() {
  auto* list = freed_.exchange(nullptr);
  for (auto* next = list; next != nullptr;) {
    uint64_t count = 0;
    for (auto* at = next; at != nullptr && count < kFreesPerRecord;
         at = at->next) {
      ++count;
    }
    put(block_, Rec::kFree);
    put_var(block_, count);
    for (; count > 0; --count, next = next->next) {
      put_id(block_, next->id, newest_);
    }
    if (block_.size() >= kSealBytes) seal();
  }
  recycle(list);
}

}  // namespace mycelya
