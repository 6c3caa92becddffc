// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// The way of answers and events from the socket to those who wait for them.
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "MycelyaConnection.h"
#include "MycelyaPython.h"
#include "MycelyaSocket.h"

namespace mycelya {
namespace {

constexpr size_t kReplyPrefix = 9;                    // status, bytes
constexpr uint64_t kMaxAnswer = uint64_t{256} << 20;  // of ask and control
constexpr size_t kMaxFailure = size_t{128} << 10;     // of an error record
constexpr uint64_t kAckFrames = 64;
constexpr uint64_t kAckBytes = uint64_t{1} << 20;
constexpr auto kSlice = std::chrono::milliseconds(50);
constexpr auto kQuiet = std::chrono::milliseconds(10);

using Seconds = std::chrono::duration<double>;

}  // namespace

// The scope in which a thread has the receiver's role.
class Connection::Receiving {
 public:
  Receiving(Connection& connection, Lock& lock, const Waiter* owner)
      : connection_(connection), lock_(lock), owner_(owner) {
    connection_.receiving_ = true;
  }
  ~Receiving() {
    if (!lock_.owns_lock()) lock_.lock();
    auto& self = connection_;
    self.receiving_ = false;
    ++self.receives_;
    if (self.watchers_ > 0) self.changed_.notify_all();
    if (self.waiting_ <= (owner_ != nullptr ? 1 : 0)) return;
    for (auto& [correlation, waiter] : self.waiters_) {
      if (!waiter->waiting || waiter->done || waiter.get() == owner_) continue;
      waiter->ready.notify_one();
      return;
    }
  }
  Receiving(const Receiving&) = delete;
  Receiving& operator=(const Receiving&) = delete;

 private:
  Connection& connection_;
  Lock& lock_;
  const Waiter* owner_;
};

// The scope in which a thread waits for an answer.
class Connection::Waiting {
 public:
  Waiting(Connection& connection, Lock& lock, Waiter& waiter)
      : connection_(connection), lock_(lock), waiter_(waiter) {
    waiter_.waiting = true;
    ++connection_.waiting_;
  }
  ~Waiting() {
    if (!lock_.owns_lock()) lock_.lock();
    waiter_.waiting = false;
    --connection_.waiting_;
  }
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;

 private:
  Connection& connection_;
  Lock& lock_;
  Waiter& waiter_;
};

// Waits for the answer: receives it, unless somebody else does.
void Connection::await(Lock& lock, Waiter& waiter) {
  Patience patience;
  Waiting scope(*this, lock, waiter);
  while (!waiter.done && !waiter.ended) {
    if (socket_ == nullptr || receiving_) {
      check_start(lock);
      waiter.ready.wait_until(lock, Clock::now() + kSlice);
      patience.pause(lock);
      continue;
    }
    {
      Receiving role(*this, lock, &waiter);
      while (!waiter.done && socket_ != nullptr && !patience.is_over()) {
        if (receive_once(lock, true) == Got::kSignal) patience.interrupt();
      }
    }
    if (!waiter.done) patience.pause(lock);
  }
}

// Gives an unanswered question up: its answer will be dropped, and its memory
// is not touched after this.
void Connection::abandon(Lock& lock, Waiter& waiter) {
  if (!lock.owns_lock()) lock.lock();
  waiter.abandoned = true;
  while (busy_ == &waiter) wait_changed(lock, 0.05);
  if (waiter.done) waiters_.erase(waiter.correlation);
}

// ---- the receiver's role ----
Connection::Got Connection::receive_once(Lock& lock, bool block) {
  auto& in = incoming_;
  std::memmove(in.buffer.get(), in.buffer.get() + in.begin, in.end - in.begin);
  in.end -= in.begin;
  in.begin = 0;
  iovec parts[2];
  int used = 0;
  size_t direct = 0;
  auto* waiter = in.waiter.get();
  if (in.left > 0 && waiter->to != nullptr && !waiter->failed &&
      !waiter->abandoned) {
    direct = in.left;
    parts[used++] = {waiter->to + waiter->got + in.done, direct};
    busy_ = waiter;
  }
  parts[used++] = {in.buffer.get() + in.end, Incoming::kBytes - in.end};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = static_cast<decltype(message.msg_iovlen)>(used);
  auto socket = socket_;
  lock.unlock();
  ssize_t count =
      ::recvmsg(socket->descriptor(), &message, block ? 0 : MSG_DONTWAIT);
  int error = errno;
  lock.lock();
  if (busy_ != nullptr) {
    busy_ = nullptr;
    if (watchers_ > 0) changed_.notify_all();
  }
  if (socket_ != socket) return Got::kNothing;
  if (count > 0) {
    take_received(lock, static_cast<size_t>(count), direct);
    return Got::kBytes;
  }
  if (count < 0 && error == EINTR) return Got::kSignal;
  if (count < 0 && (error == EAGAIN || error == EWOULDBLOCK)) {
    return Got::kNothing;
  }
  lose(lock,
       count == 0 || error == ECONNRESET
           ? "the worker closed the connection"
           : "the connection broke: " + std::generic_category().message(error));
  return Got::kNothing;
}

void Connection::take_received(Lock& lock, size_t count, size_t direct) {
  heard_ += count;
  counters.bytes_received.fetch_add(static_cast<int64_t>(count),
                                    std::memory_order_relaxed);
  auto& in = incoming_;
  direct = std::min(direct, count);
  in.end += count - direct;
  in.left -= direct;
  in.done += direct;
  try {
    consume();
  } catch (const ProtocolViolation& violation) {
    break_off(lock, violation);
  }
}

void Connection::break_off(Lock& lock, const ProtocolViolation& violation) {
  end(lock, State::kDead, ErrorKind::kProtocol,
      std::string("protocol violation: ") + violation.what());
}

void Connection::consume() {
  auto& in = incoming_;
  for (;;) {
    if (!in.in_frame) {
      if (in.end - in.begin < kHeaderBytes) return;
      start_frame();
    }
    if (in.small.size() < in.prefix) {
      size_t count = std::min(in.prefix - in.small.size(), in.end - in.begin);
      in.small.append(in.buffer.get() + in.begin, count);
      in.begin += count;
      if (in.small.size() < in.prefix) return;
      finish_prefix();
    }
    size_t count = std::min(in.left, in.end - in.begin);
    if (count > 0) take_data(in.buffer.get() + in.begin, count);
    in.begin += count;
    if (in.left > 0) return;
    finish_frame();
  }
}

void Connection::start_frame() {
  auto& in = incoming_;
  in.header = read_header(in.buffer.get() + in.begin);
  in.begin += kHeaderBytes;
  in.in_frame = true;
  in.small.clear();
  in.prefix = in.left = in.done = 0;
  in.waiter.reset();
  size_t payload = in.header.payload;
  switch (in.header.type) {
    case Frame::kReply:
      MYCELYA_PROTOCOL(payload >= kReplyPrefix, "a reply of ", payload,
                       " bytes");
      in.prefix = kReplyPrefix;
      break;
    case Frame::kReplyData: {
      auto found = waiters_.find(in.header.correlation);
      MYCELYA_PROTOCOL(found != waiters_.end() && found->second->begun,
                       "data for an unknown question");
      in.waiter = found->second;
      MYCELYA_PROTOCOL(
          payload > 0 && payload <= in.waiter->total - in.waiter->got,
          "a reply is longer than it says");
      in.left = payload;
      break;
    }
    case Frame::kEvent:
      MYCELYA_PROTOCOL(payload <= kMaxFailure, "an error of ", payload,
                       " bytes");
      in.prefix = payload;
      break;
    case Frame::kWorkerAck:
    case Frame::kPong:
      MYCELYA_PROTOCOL(
          payload == (in.header.type == Frame::kPong ? 0 : sizeof(uint64_t)),
          "an acknowledgement of ", payload, " bytes");
      in.prefix = payload;
      break;
    default:
      MYCELYA_PROTOCOL(false, "unknown frame type ",
                       static_cast<int>(in.header.type));
  }
}

void Connection::finish_prefix() {
  auto& in = incoming_;
  Reader reader(in.small);
  if (in.header.type == Frame::kReply) {
    start_reply();
  } else if (in.header.type == Frame::kEvent) {
    auto failure = reader.failure();
    reader.expect_end();
    take_event(std::move(failure));
  } else {
    acknowledge(reader.get<uint64_t>());
  }
}

void Connection::start_reply() {
  auto& in = incoming_;
  auto found = waiters_.find(in.header.correlation);
  MYCELYA_PROTOCOL(found != waiters_.end() && !found->second->begun,
                   "a reply to an unknown question");
  in.waiter = found->second;
  auto& waiter = *in.waiter;
  Reader reader(in.small);
  auto status = reader.get<uint8_t>();
  auto total = reader.get<uint64_t>();
  MYCELYA_PROTOCOL(status <= 1, "unknown status of a reply: ", int{status});
  waiter.failed = status == 1;
  if (waiter.failed) {
    MYCELYA_PROTOCOL(total <= kMaxFailure, "an error of ", total, " bytes");
  } else if (waiter.to != nullptr) {
    MYCELYA_PROTOCOL(total == waiter.expected, "a reply of ", total, " bytes, ",
                     waiter.expected, " were asked for");
  } else {
    MYCELYA_PROTOCOL(total <= kMaxAnswer, "a reply of ", total, " bytes");
  }
  in.left = in.header.payload - kReplyPrefix;
  MYCELYA_PROTOCOL(in.left <= total, "a reply is longer than it says");
  waiter.total = total;
}

void Connection::take_data(const char* from, size_t count) {
  auto& in = incoming_;
  auto& waiter = *in.waiter;
  if (!waiter.abandoned) {
    size_t at = waiter.got + in.done;
    if (waiter.to != nullptr && !waiter.failed) {
      std::memcpy(waiter.to + at, from, count);
    } else {
      waiter.text.resize(at);  // a frame that came twice
      waiter.text.append(from, count);
    }
  }
  in.left -= count;
  in.done += count;
}

void Connection::finish_frame() {
  auto& in = incoming_;
  in.in_frame = false;
  if (is_reliable(in.header.type)) {
    ++received_;
    unacknowledged_bytes_ += in.header.payload;
    if (++unacknowledged_ >= kAckFrames || unacknowledged_bytes_ >= kAckBytes) {
      unacknowledged_ = unacknowledged_bytes_ = 0;
      if (settings_.resumable) {
        ack_due_ = true;
        urge();
      }
    }
  }
  if (in.waiter == nullptr) return;
  in.waiter->begun = true;
  in.waiter->got += in.done;
  if (in.waiter->got == in.waiter->total) finish_answer();
  in.waiter.reset();
}

void Connection::finish_answer() {
  auto& waiter = *incoming_.waiter;
  if (waiter.failed && !waiter.abandoned) {
    Reader reader(waiter.text);
    waiter.failure = std::make_unique<RemoteFailure>(reader.failure());
    reader.expect_end();
  }
  waiter.done = true;
  if (waiter.waiting) waiter.ready.notify_one();
  if (waiter.abandoned) waiters_.erase(waiter.correlation);
}

void Connection::take_event(RemoteFailure failure) {
  if (pending_ != nullptr || failure.serial <= raised_serial_) return;
  pending_ = std::make_unique<RemoteFailure>(std::move(failure));
  slow_ = true;
}

// ---- the reader: receives while nobody waits, and watches over silence ----
void Connection::read_loop() {
  begin_thread("mycelya-r");
  Lock lock(mutex_);
  uint64_t seen = receives_;
  while (is_open()) {
    auto nap = keep_alive(lock);
    if (!is_open()) return;
    if (socket_ == nullptr || receiving_ || waiting_ > 0 || receives_ != seen) {
      // Those who wait receive their answers without a change of threads.
      seen = receives_;
      parked_.wait_until(lock, Clock::now() + kQuiet);
      continue;
    }
    auto socket = socket_;
    pollfd watched{socket->descriptor(), POLLIN, 0};
    lock.unlock();
    int ready = ::poll(&watched, 1, static_cast<int>(nap.count()));
    lock.lock();
    if (ready <= 0 || socket_ != socket || receiving_ || waiting_ > 0 ||
        receives_ != seen) {
      continue;
    }
    read_quietly(lock);
    seen = receives_;
  }
}

void Connection::read_quietly(Lock& lock) {
  Receiving role(*this, lock, nullptr);
  while (socket_ != nullptr && waiting_ == 0) {
    if (receive_once(lock, false) != Got::kBytes) return;
  }
}

// Returns how long the reader may sleep.
std::chrono::milliseconds Connection::keep_alive(Lock& lock) {
  auto now = Clock::now();
  double between = std::min(5.0, settings_.timeout / 3);
  auto nap = std::chrono::milliseconds(
      std::max<int64_t>(1, static_cast<int64_t>(between * 250)));
  auto late = now - last_look_ - 2 * nap;
  last_look_ = now;
  if (state_ == State::kResuming) {
    // Python gives up after `timeout`; this is for the case that it cannot.
    if (Seconds(now - lost_).count() > 2 * settings_.timeout + 5) {
      end(lock, State::kDead, ErrorKind::kMachineDied,
          end_reason_ + ", and no connection could be made again");
    }
    return nap;
  }
  if (state_ != State::kRunning) return nap;
  // If this process was stopped, the worker's silence is not its fault.
  if (Seconds(late).count() > 1) last_heard_ += late;
  if (heard_ != last_heard_bytes_) last_heard_ = now;
  if (sent_bytes_ != last_sent_bytes_) last_sent_ = now;
  last_heard_bytes_ = heard_;
  last_sent_bytes_ = sent_bytes_;
  if (Seconds(now - last_sent_).count() >= between) {
    last_sent_ = now;
    ping_due_ = true;
    urge();
  }
  if (Seconds(now - last_heard_).count() >= settings_.timeout) {
    lose(lock, c10::str("no answer for ", settings_.timeout, " s"));
  }
  return nap;
}

}  // namespace mycelya
