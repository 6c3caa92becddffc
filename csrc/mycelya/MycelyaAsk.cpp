// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Questions to a machine, and what their answers raise.
#include <algorithm>

#include "MycelyaConnection.h"
#include "MycelyaPython.h"
#include "MycelyaSocket.h"

namespace mycelya {
namespace {

using Seconds = std::chrono::duration<double>;

std::string read_payload(uint64_t id, const View& view) {
  std::string payload;
  put(payload, Question::kRead);
  put<uint64_t>(payload, id);
  put_view(payload, view);
  return payload;
}

}  // namespace

std::string Connection::ask(Question question, const std::string& body,
                            const std::string& reason) {
  std::string payload;
  put(payload, question);
  payload += body;
  return ask_and_wait(Frame::kAsk, payload, nullptr, 0, reason);
}

std::string Connection::control(const std::string& payload,
                                const std::string& reason) {
  return ask_and_wait(Frame::kControl, payload, nullptr, 0, reason);
}

void Connection::read(uint64_t id, const View& view, void* to, size_t count,
                      const std::string& reason) {
  char nothing = 0;  // an empty tensor has no address
  ask_and_wait(Frame::kAsk, read_payload(id, view), count > 0 ? to : &nothing,
               count, reason);
}

uint64_t Connection::begin_read(uint64_t id, const View& view, void* to,
                                size_t count) {
  static char nothing;
  Lock lock = begin_append();
  auto waiter = queue_question(Frame::kAsk, read_payload(id, view),
                               count > 0 ? to : &nothing, count);
  urge();
  return waiter->correlation;
}

void Connection::finish_read(uint64_t correlation, const std::string& reason) {
  check_fork();
  WithoutGil without;
  Lock lock(mutex_);
  auto found = waiters_.find(correlation);
  if (found == waiters_.end() && !is_open()) {
    // The machine ended; its last bytes may still be on their way into `to`.
    while (busy_ != nullptr && busy_->correlation == correlation) {
      wait_changed(lock, 0.05);
    }
    raise_ended(lock);
  }
  TORCH_CHECK(found != waiters_.end(), "mycelya: no read has the number ",
              correlation);
  auto waiter = found->second;
  try {
    about_to_wait(reason);
  } catch (...) {
    abandon(lock, *waiter);
    throw;
  }
  finish(std::move(lock), *waiter, reason, Clock::now());
}

void Connection::synchronize(const std::string& reason) {
  auto answer = ask(Question::kSync, "", reason);
  Lock lock(mutex_);
  try {
    Reader reader(answer);
    auto relayouts = reader.get<uint64_t>();
    reader.expect_end();
    counters.relayouts += static_cast<int64_t>(relayouts - relayouts_);
    relayouts_ = relayouts;
  } catch (const ProtocolViolation& violation) {
    break_off(lock, violation);
    raise_ended(lock);
  }
}

std::string Connection::ask_and_wait(Frame type, const std::string& payload,
                                     void* to, size_t count,
                                     const std::string& reason) {
  TORCH_CHECK(payload.size() <= kMaxPayload, "mycelya: a question of ",
              payload.size(), " bytes, the limit is ", kMaxPayload);
  about_to_wait(reason);
  WithoutGil without;
  auto start = Clock::now();
  // What a RUN makes on the worker has to be taken: there, a failure that
  // nobody has seen is raised before the question, else with its answer.
  bool makes =
      type == Frame::kAsk && payload[0] == static_cast<char>(Question::kRun);
  Lock lock = begin_append(/*raises=*/makes);
  auto waiter = queue_question(type, payload, to, count);
  waiter->makes = makes;
  try {
    // Handing the question to the writer would cost a change of threads.
    if (can_send() && !sending_) send_until(lock, placed_);
  } catch (...) {
    abandon(lock, *waiter);
    throw;
  }
  return finish(std::move(lock), *waiter, reason, start);
}

Connection::WaiterPtr Connection::queue_question(Frame type,
                                                 const std::string& payload,
                                                 void* to, size_t count) {
  auto waiter = std::make_shared<Waiter>();
  waiter->correlation = ++correlation_;
  asked_ = Clock::now();
  waiter->to = static_cast<char*>(to);
  waiter->expected = count;
  Block block;
  block.bytes.reserve(kHeaderBytes + payload.size());
  block.bytes.resize(kHeaderBytes);
  put_header(block.bytes.data(), {static_cast<uint32_t>(payload.size()), type,
                                  waiter->correlation});
  block.bytes += payload;
  seal();
  push(std::move(block));
  waiters_.emplace(waiter->correlation, waiter);
  urgent_ = true;
  counters.round_trips.fetch_add(1, std::memory_order_relaxed);
  return waiter;
}

std::string Connection::finish(Lock lock, Waiter& waiter,
                               const std::string& reason,
                               Clock::time_point start) {
  try {
    await(lock, waiter);
  } catch (...) {
    abandon(lock, waiter);
    throw;
  }
  waiters_.erase(waiter.correlation);
  if (!waiter.done) {
    abandon(lock, waiter);
    raise_ended(lock);
  }
  // An answer without an error still comes after a failure that nobody saw.
  auto failure = std::move(waiter.failure);
  if (!failure) {
    if (!waiter.makes) failure = std::move(pending_);
  } else if (pending_ && pending_->serial == failure->serial) {
    pending_.reset();
  }
  if (failure) {
    raised_serial_ = std::max(raised_serial_, failure->serial);
    update_slow();
  }
  std::string text = std::move(waiter.text);
  lock.unlock();
  // An interrupt that came last is raised here: in the report it would be lost.
  if (!failure) check_signals();
  report_wait(reason, Seconds(Clock::now() - start).count(), index_);
  if (failure) raise_error(failure->kind, failure_text(*failure, name()));
  return text;
}

}  // namespace mycelya
