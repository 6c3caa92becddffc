// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// The queue of one machine on its way into the socket.
#include <sys/socket.h>
#include <sys/uio.h>

#include <array>
#include <cerrno>
#include <limits>

#include "MycelyaConnection.h"
#include "MycelyaPython.h"
#include "MycelyaSocket.h"

namespace mycelya {
namespace {

constexpr size_t kBlockBytes = size_t{68} << 10;   // 64 KiB and one record
constexpr size_t kSpareBytes = size_t{160} << 10;  // larger ones are not kept
constexpr size_t kSpares = 8;
constexpr size_t kWakeBytes = size_t{16} << 10;
// How long records wait for more of them: while questions come, the worker
// should begin early; without questions, fewer frames cost less.
constexpr auto kLinger = std::chrono::microseconds(200);
constexpr auto kLongLinger = std::chrono::milliseconds(2);
constexpr auto kConversation = std::chrono::milliseconds(10);
constexpr size_t kNever = std::numeric_limits<size_t>::max();
constexpr size_t kCopyBytes = size_t{256} << 10;  // uploads that are copied
constexpr size_t kChunkBytes = size_t{1} << 20;   // of larger ones
constexpr size_t kStepBytes = size_t{4} << 20;    // of one sendmsg
constexpr size_t kStepParts = 64;

// What is sent instead of data whose owner left. Never written, so it takes no
// memory.
char g_zeros[kChunkBytes];

struct Parts {
  std::array<iovec, kStepParts> parts;
  size_t count = 0;
  size_t bytes = 0;

  bool has_room() const {
    return count + 2 <= kStepParts && bytes < kStepBytes;
  }
  // Leaves out the first `skip` bytes, and takes those off `skip`.
  void add(const char* data, size_t size, size_t& skip) {
    size_t left_out = std::min(skip, size);
    skip -= left_out;
    if (left_out == size) return;
    parts[count++] = {const_cast<char*>(data) + left_out, size - left_out};
    bytes += size - left_out;
  }
};

// The header and the beginning of a frame that has `more_bytes` after it.
std::string frame(Frame type, const std::string& payload,
                  size_t more_bytes = 0) {
  std::string bytes;
  auto size = static_cast<uint32_t>(payload.size() + more_bytes);
  bytes.resize(kHeaderBytes);
  put_header(bytes.data(), {size, type, 0});
  return bytes += payload;
}

}  // namespace

// ---- the queue ----
void Connection::fresh_block() {
  block_.clear();
  if (block_.capacity() < kBlockBytes && !spare_.empty()) {
    block_ = std::move(spare_.back());
    spare_.pop_back();
    block_.clear();
  }
  block_.reserve(kBlockBytes);
  block_.resize(kHeaderBytes);
}

void Connection::seal() {
  if (block_.size() <= kHeaderBytes) return;
  auto size = static_cast<uint32_t>(block_.size() - kHeaderBytes);
  put_header(block_.data(), {size, Frame::kOps, 0});
  Block block;
  block.bytes = std::move(block_);
  push(std::move(block));
  fresh_block();
}

// A frame holds 16 MiB: what is before this append goes first.
void Connection::split_block(Lock& lock) {
  std::string record = block_.substr(before_);
  block_.resize(before_);
  seal();
  if (record.size() + kHeaderBytes > kMaxPayload) {
    newest_ = newest_before_;
    lock.unlock();
    TORCH_CHECK(false, "mycelya: the description of an operation takes ",
                record.size(), " bytes, the limit is ", kMaxPayload);
  }
  block_ += record;
}

uint64_t Connection::push(Block block) {
  queued_ += block.cost();
  block.place = ++placed_;
  queue_.push_back(std::move(block));
  return placed_;
}

bool Connection::has_output() const {
  return !queue_.empty() || block_.size() > kHeaderBytes || ping_due_ ||
         ack_due_ || !control_.empty();
}

bool Connection::is_due() const {
  return urgent_ || ping_due_ || ack_due_ || !control_.empty() ||
         front_sent_ > 0 ||
         queued_ + block_.size() - kHeaderBytes >= kWakeBytes;
}

void Connection::urge() {
  urgent_ = true;
  wake_at_ = kNever;
  work_.notify_one();
}

// ---- the sender's role ----
class Connection::Sending {
 public:
  Sending(Connection& connection, Lock& lock)
      : connection_(connection), lock_(lock) {
    connection_.sending_ = true;
  }
  ~Sending() {
    if (!lock_.owns_lock()) lock_.lock();
    auto& self = connection_;
    self.sending_ = false;
    std::deque<Block> dropped;
    if (!self.is_open()) dropped.swap(self.queue_);
    if (self.writer_parked_ || self.has_output()) {
      self.writer_parked_ = false;
      self.work_.notify_one();
    }
    if (self.watchers_ > 0) self.changed_.notify_all();
    if (dropped.empty()) return;
    lock_.unlock();
    dropped.clear();
    lock_.lock();
  }
  Sending(const Sending&) = delete;
  Sending& operator=(const Sending&) = delete;

 private:
  Connection& connection_;
  Lock& lock_;
};

void Connection::add_control() {
  if (front_sent_ > 0 || !control_.empty()) return;
  if (std::exchange(ping_due_, false)) control_ = frame(Frame::kPing, "");
  if (std::exchange(ack_due_, false)) {
    std::string count;
    put<uint64_t>(count, received_);
    control_ += frame(Frame::kAck, count);
  }
}

// Sends a part of the queue; the role is ours. False: a signal came.
bool Connection::send_once(Lock& lock) {
  add_control();
  Parts parts;
  size_t skip = 0;
  parts.add(control_.data(), control_.size(), skip);
  skip = front_sent_;
  for (auto& block : queue_) {
    if (!parts.has_room()) break;
    parts.add(block.bytes.data(), block.bytes.size(), skip);
    parts.add(block.outside, block.outside_bytes, skip);
  }
  if (parts.count == 0) return true;
  msghdr message{};
  message.msg_iov = parts.parts.data();
  message.msg_iovlen = static_cast<decltype(message.msg_iovlen)>(parts.count);
  auto socket = socket_;
  stepping_ = true;
  lock.unlock();
  ssize_t count = ::sendmsg(socket->descriptor(), &message, kNoSignal);
  int error = errno;
  lock.lock();
  stepping_ = false;
  ++steps_;
  std::vector<Block> sent;
  if (count > 0 && is_open()) {
    // Also if the connection is lost by now: the worker may have these bytes.
    advance(static_cast<size_t>(count), sent);
  } else if (count < 0 && socket_ == socket && error != EAGAIN &&
             error != EWOULDBLOCK && error != EINTR) {
    // The receiver notices the end, after the worker's last words.
    broken_ = true;
    socket->shut();
  }
  if (watchers_ > 0) changed_.notify_all();  // the step is over
  if (!sent.empty()) {
    lock.unlock();
    sent.clear();
    lock.lock();
  }
  return count >= 0 || error != EINTR;
}

void Connection::advance(size_t count, std::vector<Block>& sent) {
  counters.bytes_sent.fetch_add(static_cast<int64_t>(count),
                                std::memory_order_relaxed);
  sent_bytes_ += count;
  size_t of_control = std::min(count, control_.size());
  control_.erase(0, of_control);
  count -= of_control;
  while (count > 0) {
    size_t left = queue_.front().size() - front_sent_;
    if (count < left) {
      front_sent_ += count;
      break;
    }
    count -= left;
    finish_front(sent);
  }
  if (queue_.empty() && block_.size() <= kHeaderBytes) urgent_ = false;
  counters.queue_bytes.store(
      static_cast<int64_t>(queued_ + block_.size() - kHeaderBytes),
      std::memory_order_relaxed);
  drop_acknowledged();
}

void Connection::finish_front(std::vector<Block>& sent) {
  Block block = std::move(queue_.front());
  queue_.pop_front();
  front_sent_ = 0;
  ++numbered_;
  queued_ -= block.cost();
  sent_place_ = std::max(sent_place_, block.place);
  bool is_ops = static_cast<Frame>(block.bytes[4]) == Frame::kOps;
  if (is_ops) counters.frames_sent.fetch_add(1, std::memory_order_relaxed);
  if (settings_.resumable) {
    retained_bytes_ += block.cost();
    retained_.push_back(std::move(block));
  } else if (is_ops && block.bytes.capacity() <= kSpareBytes &&
             spare_.size() < kSpares) {
    spare_.push_back(std::move(block.bytes));
  } else {
    sent.push_back(std::move(block));
  }
}

// Until the block at `place` is sent, or somebody else has the role.
void Connection::send_until(Lock& lock, uint64_t place) {
  Patience patience;
  while (sent_place_ < place && can_send() && !sending_) {
    {
      Sending role(*this, lock);
      while (sent_place_ < place && can_send() && !patience.is_over()) {
        if (!send_once(lock)) patience.interrupt();
      }
    }
    patience.pause(lock);
  }
}

void Connection::write_loop() {
  begin_thread("mycelya-w");
  Lock lock(mutex_);
  while (is_open()) {
    if (!can_send() || sending_) {
      wake_at_ = kNever;
      writer_parked_ = true;
      work_.wait(lock);
    } else if (!has_output()) {
      urgent_ = false;
      wake_at_ = 0;
      work_.wait(lock);
    } else if (!is_due()) {
      wake_at_ = settings_.batching ? kWakeBytes - 1 : 0;
      auto now = Clock::now();
      bool talks = now - asked_ < kConversation;
      auto due = talks ? now + kLinger : now + kLongLinger;
      auto why = work_.wait_until(lock, due);
      if (why == std::cv_status::timeout) urgent_ = true;
    } else {
      Sending role(*this, lock);
      seal();
      send_once(lock);
    }
    wake_at_ = kNever;
  }
}

// ---- resuming ----
void Connection::resend(uint64_t peer_received) {
  acknowledge(peer_received);
  numbered_ -= retained_.size();
  while (!retained_.empty()) {
    queued_ += retained_.back().cost();
    queue_.push_front(std::move(retained_.back()));
    retained_.pop_back();
  }
  retained_bytes_ = 0;
  front_sent_ = 0;
  control_.clear();
  urgent_ = true;
}

void Connection::acknowledge(uint64_t count) {
  // What a running sendmsg has sent may be acknowledged before it is counted.
  uint64_t sent = numbered_ + (stepping_ ? queue_.size() : 0);
  MYCELYA_PROTOCOL(count <= sent, "the worker acknowledges frame ", count,
                   " of ", sent);
  acknowledged_ = std::max(acknowledged_, count);
  drop_acknowledged();
}

void Connection::drop_acknowledged() {
  while (!retained_.empty() && numbered_ - retained_.size() < acknowledged_) {
    retained_bytes_ -= retained_.front().cost();
    retained_.pop_front();
  }
  if (slow_) update_slow();
  if (watchers_ > 0) changed_.notify_all();
}

// ---- uploads ----
void Connection::upload(uint64_t id, const View& view, const void* data,
                        size_t count, std::shared_ptr<void> keep) {
  std::string prefix;
  put<uint64_t>(prefix, id);
  put_view(prefix, view);
  put<uint64_t>(prefix, count);
  const auto* from = static_cast<const char*>(data);
  Block block;
  if (count <= kCopyBytes) {
    block.bytes = frame(Frame::kUpload, prefix, count);
    put_bytes(block.bytes, data, count);
  }
  WithoutGil without;
  Lock lock = begin_append();
  seal();
  if (count <= kCopyBytes) {
    push(std::move(block));
    end_append(std::move(lock), 0);
  } else if (settings_.resumable) {
    upload_copied(std::move(lock), prefix, from, count);
  } else {
    upload_outside(std::move(lock), prefix, from, count, std::move(keep));
  }
}

void Connection::upload_outside(Lock lock, const std::string& prefix,
                                const char* data, size_t count,
                                std::shared_ptr<void> keep) {
  bool wait = keep == nullptr;
  uint64_t first = placed_ + 1, last = 0;
  for (size_t at = 0; at < count; at += kChunkBytes) {
    Block block;
    block.outside = data + at;
    block.outside_bytes = std::min(kChunkBytes, count - at);
    block.bytes = at == 0 ? frame(Frame::kUpload, prefix, block.outside_bytes)
                          : frame(Frame::kData, "", block.outside_bytes);
    block.keep = keep;
    last = push(std::move(block));
  }
  urgent_ = true;
  if (!wait) {
    end_append(std::move(lock), 0);
    return;
  }
  Patience patience;
  try {
    while (sent_place_ < last && is_open()) {
      if (can_send() && !sending_) {
        send_until(lock, last);
      } else {
        check_start(lock);
        wait_changed(lock, 0.05);
      }
      patience.pause(lock);
    }
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    forget_outside(lock, first, last);
    throw;
  }
  if (sent_place_ >= last) return;
  forget_outside(lock, first, last);
  raise_ended(lock);
}

// The owner of the data leaves: the worker gets zeros for what is not sent.
void Connection::forget_outside(Lock& lock, uint64_t first, uint64_t last) {
  for (auto& block : queue_) {
    if (block.place >= first && block.place <= last) block.outside = g_zeros;
  }
  auto step = steps_;
  while (stepping_ && steps_ == step) wait_changed(lock, 0.05);
}

// In parts, as room becomes free. Other appends wait until all parts are
// queued, since nothing may come between them.
void Connection::upload_copied(Lock lock, const std::string& prefix,
                               const char* data, size_t count) {
  uploading_ = slow_ = true;
  std::exception_ptr interrupted;
  Patience patience;
  for (size_t at = 0; at < count && is_open(); at += kChunkBytes) {
    Block block;
    size_t size = std::min(kChunkBytes, count - at);
    block.bytes = at == 0 ? frame(Frame::kUpload, prefix, size)
                          : frame(Frame::kData, "", size);
    try {
      while (!interrupted && is_full() && is_open()) {
        check_start(lock);
        urge();
        wait_changed(lock, 0.1);
        patience.pause(lock);
      }
    } catch (...) {
      interrupted = std::current_exception();
      if (!lock.owns_lock()) lock.lock();
    }
    if (interrupted) {
      block.outside = g_zeros;
      block.outside_bytes = size;
    } else {
      lock.unlock();
      put_bytes(block.bytes, data + at, size);
      lock.lock();
    }
    if (is_open()) push(std::move(block));
  }
  uploading_ = false;
  update_slow();
  changed_.notify_all();
  if (!is_open()) raise_ended(lock);
  if (interrupted) std::rethrow_exception(interrupted);
  urge();
}

}  // namespace mycelya
