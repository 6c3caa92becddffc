// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// The client's end of one machine: a bounded queue of records, a writer thread,
// a reader thread, and the threads that wait for answers.
//
// NEW -> STARTING -> RUNNING <-> RESUMING, and from each of them STOPPED or
// DEAD. In STARTING and RESUMING the queue takes records, and waits only when
// it is full. No lock is held across I/O or the destruction of tensors. All
// calls but `free` may wait and must be made without the GIL.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "MycelyaStorageImpl.h"
#include "MycelyaWire.h"

namespace mycelya {

class Socket;

struct Settings {
  std::string name;     // "local-1a2b", stands in every error
  double timeout = 30;  // seconds of silence after which a worker is dead
  double connect_timeout =
      60;  // seconds that the first answer may wait for a worker
  size_t max_inflight = size_t{64} << 20;
  bool batching = true;
  bool resumable = false;  // keeps what is not acknowledged, to send it again
};

// Counters of one machine; all monotonic but the last three.
struct Counters {
  std::atomic<int64_t> ops{0}, cache_hits{0}, cache_misses{0}, probes{0},
      dynamic_ops{0}, relayouts{0}, frames_sent{0}, round_trips{0},
      bytes_sent{0}, bytes_received{0}, storages_live{0}, bytes_live{0},
      queue_bytes{0};
};

// Whether this process was forked from one that had opened a machine.
bool in_bad_fork();

class Connection {
 public:
  enum class State { kNew, kStarting, kRunning, kResuming, kStopped, kDead };

  // The machine at a device index; never null for 0 <= index < kMaxMachines.
  // They are made at load and never destroyed: threads outlive static
  // destructors.
  static Connection& at(int index);

  // ---- life cycle, called by Python ----
  void open(Settings settings);  // NEW, STOPPED or DEAD -> STARTING
  // STARTING or RESUMING -> RUNNING. Owns `fd`. `peer_received`: how many of
  // our reliable frames the worker has; the others are sent again.
  void connect(int fd, bool has_cuda, uint64_t peer_received);
  // Waits until a resumable connection is lost ("lost") or the machine has
  // ended
  // ("stopped", "dead"). Returns "" after `seconds` without news.
  std::string wait_lost(double seconds);
  // Reliable frames received so far.
  uint64_t received() const;
  void fail(const std::string& reason);  // -> DEAD; wakes every waiter
  // Sends what is queued and BYE, waits at most `grace` seconds for the worker
  // to end the connection, then -> STOPPED. Returns the text of a failure that
  // nobody has seen, or "".
  std::string stop(double grace);
  State state() const { return state_.load(); }
  const std::string& name() const { return settings_.name; }
  bool has_cuda();  // waits for RUNNING

  // ---- queueing ----
  // Appends records: `write(std::string& out, uint64_t& newest)` is called
  // once, under the lock, and must not throw, wait or destroy tensors. Raises
  // first if the machine ended or an earlier operation failed. `ops`:
  // operations in it.
  template <class Write>
  void append(Write&& write, int ops = 0) {
    Lock lock = begin_append();
    try {
      write(block_, newest_);
    } catch (...) {  // should memory run out: half a record must not be sent
      undo_append();
      throw;
    }
    end_append(std::move(lock), ops);
  }
  // Appends a record before the next one, if the machine runs. From a
  // destructor: neither raises nor waits.
  void append_later(const std::string& record) noexcept;
  // Sends `count` bytes from `data` as UPLOAD to a storage. Small ones are
  // copied; larger ones are sent from `data`. With `keep` the call returns at
  // once, and `keep` owns `data` until it is sent.
  void upload(uint64_t id, const View& view, const void* data, size_t count,
              std::shared_ptr<void> keep);
  // Queues an id to be freed. From any thread, also with the GIL held; takes no
  // lock, never throws.
  void free(StorageRecord* record) noexcept;

  // ---- questions ----
  // Asks and waits. `body` follows the question's number. `reason` is what the
  // sync-point report shows. A failure on the worker is raised.
  std::string ask(Question question, const std::string& body,
                  const std::string& reason);
  std::string control(const std::string& payload, const std::string& reason);
  // Reads exactly `count` bytes of a view into `to`.
  void read(uint64_t id, const View& view, void* to, size_t count,
            const std::string& reason);
  // The same in two steps; `to` must stay alive until `finish_read` returned or
  // threw.
  uint64_t begin_read(uint64_t id, const View& view, void* to, size_t count);
  void finish_read(uint64_t correlation, const std::string& reason);
  void synchronize(const std::string& reason);

  Counters counters;

 private:
  using Lock = std::unique_lock<std::mutex>;
  using Clock = std::chrono::steady_clock;

  class Sending;    // the scope in which a thread has the sender's role
  class Receiving;  // the same for the receiver's
  class Waiting;    // the scope in which a thread waits for an answer

  // One frame on its way out. All of them are reliable; the others are made
  // when they are sent.
  struct Block {
    std::string bytes;  // the header, then the payload or its beginning
    const char* outside = nullptr;  // the rest of the payload
    size_t outside_bytes = 0;
    std::shared_ptr<void> keep;  // owns `outside`; null: its user waits
    uint64_t place = 0;          // in the queue's history, from 1

    size_t size() const { return bytes.size() + outside_bytes; }
    size_t cost() const {  // of the memory that the queue holds
      return bytes.size() + (keep ? outside_bytes : 0);
    }
  };

  // A question without an answer yet.
  struct Waiter {
    uint64_t correlation = 0;
    std::condition_variable ready;
    char* to = nullptr;   // where the answer goes; null: into `text`
    size_t expected = 0;  // its exact size, if there is a `to`
    std::string text;
    std::unique_ptr<RemoteFailure> failure;
    uint64_t total = 0;  // bytes of the answer, and those in complete frames
    uint64_t got = 0;
    bool begun = false;
    bool failed = false;
    bool done = false;
    bool abandoned = false;  // nobody waits any more; `to` is gone
    bool waiting = false;    // a thread waits now
    bool ended = false;      // no answer will come
    bool makes = false;      // its answer raises no failure but its own
  };
  using WaiterPtr = std::shared_ptr<Waiter>;

  // What the receiver works on; belongs to who has the role.
  struct Incoming {
    static constexpr size_t kBytes = size_t{64} << 10;
    std::unique_ptr<char[]> buffer;
    size_t begin = 0;
    size_t end = 0;
    bool in_frame = false;
    FrameHeader header;
    size_t prefix = 0;  // bytes of the payload that are collected in `small`
    std::string small;
    size_t left = 0;  // bytes after the prefix still to come, and those here
    size_t done = 0;
    WaiterPtr waiter;
  };

  // ---- MycelyaConnection.cpp ----
  // Waits for room, frees what is queued to be freed, and makes `block_` the
  // open OPS block. `raises`: a failure that nobody has seen, first. A question
  // leaves that to its answer, so that all that failed before it is told once.
  Lock begin_append(bool raises = true);
  void end_append(Lock lock, int ops);
  void undo_append();
  void settle(Lock& lock, bool raises);
  void wait_for_room(bool raises);
  bool is_open() const;
  bool is_full() const;
  void update_slow();
  void reset(Settings settings);
  // -> DEAD or STOPPED, unless it has ended already.
  void end(Lock& lock, State state, ErrorKind kind, const std::string& reason);
  // The connection is gone: -> RESUMING, or the end.
  void lose(Lock& lock, const std::string& reason);
  void push_bye();
  void wake_all();
  void wait_changed(Lock& lock, double seconds);
  void join();
  void recycle_freed();
  void write_freed();
  [[noreturn]] void raise_ended(Lock& lock);
  void raise_pending(Lock& lock);
  void check_start(Lock& lock);
  static void check_fork();

  // ---- MycelyaSend.cpp ----
  void fresh_block();
  void seal();
  void split_block(Lock& lock);
  uint64_t push(Block block);
  bool can_send() const { return socket_ != nullptr && !broken_; }
  bool has_output() const;
  bool is_due() const;
  void urge();
  void add_control();
  void finish_front(std::vector<Block>& sent);
  void advance(size_t count, std::vector<Block>& sent);
  bool send_once(Lock& lock);
  void send_until(Lock& lock, uint64_t place);
  void write_loop();
  void upload_outside(Lock lock, const std::string& prefix, const char* data,
                      size_t count, std::shared_ptr<void> keep);
  void upload_copied(Lock lock, const std::string& prefix, const char* data,
                     size_t count);
  void forget_outside(Lock& lock, uint64_t first, uint64_t last);
  void resend(uint64_t peer_received);
  void acknowledge(uint64_t count);
  void drop_acknowledged();

  // ---- MycelyaAsk.cpp ----
  WaiterPtr queue_question(Frame type, const std::string& payload, void* to,
                           size_t count);
  std::string ask_and_wait(Frame type, const std::string& payload, void* to,
                           size_t count, const std::string& reason);
  std::string finish(Lock lock, Waiter& waiter, const std::string& reason,
                     Clock::time_point start);

  // ---- MycelyaReceive.cpp ----
  void await(Lock& lock, Waiter& waiter);
  void abandon(Lock& lock, Waiter& waiter);
  enum class Got { kBytes, kNothing, kSignal };
  Got receive_once(Lock& lock, bool block);
  void take_received(Lock& lock, size_t count, size_t asked);
  void consume();
  void start_frame();
  void finish_prefix();
  void start_reply();
  void take_data(const char* from, size_t count);
  void finish_frame();
  void finish_answer();
  void take_event(RemoteFailure failure);
  void break_off(Lock& lock, const ProtocolViolation& violation);
  void read_loop();
  void read_quietly(Lock& lock);
  std::chrono::milliseconds keep_alive(Lock& lock);

  // All below is guarded by `mutex_`, if it does not say otherwise.
  std::mutex mutex_;
  std::mutex life_;  // one `open` or `stop` at a time; taken before `mutex_`
  int index_ = 0;
  std::atomic<State> state_{State::kNew};
  Settings settings_;
  std::atomic<int> descriptor_{-1};  // for a forked child to close
  std::shared_ptr<Socket> socket_;   // null: no connection now
  bool broken_ = false;              // it takes no more bytes
  bool has_cuda_ = false;
  bool draining_ = false;  // `stop` is at work
  ErrorKind end_kind_ = ErrorKind::kMachineDied;
  std::string end_reason_;
  Clock::time_point opened_, lost_;
  std::thread writer_, reader_;  // guarded by `life_`, once they run
  // Room in the queue, the end of a step or of a role; `watchers_` wait for it.
  std::condition_variable changed_;
  int watchers_ = 0;
  std::condition_variable moved_;               // to another state
  std::atomic<StorageRecord*> freed_{nullptr};  // a stack; no lock

  // The queue: `queue_`, then `block_`.
  bool slow_ = true;  // `append` must look closer
  std::string
      block_;  // the open OPS block; its first 16 bytes are the header's
  uint64_t newest_ = 0;
  std::string later_;  // records that go before the next append's
  size_t before_ = 0;  // size of `block_` and `newest_` before this append
  uint64_t newest_before_ = 0;
  std::deque<Block> queue_;
  size_t queued_ = 0;   // cost of `queue_`
  size_t wake_at_ = 0;  // the writer wants to be woken over so many bytes
  bool urgent_ = false;
  bool uploading_ = false;  // an upload is being queued in parts
  uint64_t placed_ = 0, sent_place_ = 0;
  std::vector<std::string> spare_;
  std::condition_variable work_;  // the writer's

  // Sending. Who has the role may refer to the first blocks without the lock.
  bool sending_ = false;
  bool stepping_ = false;  // a sendmsg is running
  uint64_t steps_ = 0;
  bool writer_parked_ = false;  // it wants to hear of the role's end
  size_t front_sent_ = 0;       // bytes of the first block that are sent
  std::string control_;         // PING and ACK; go before the first block
  bool ping_due_ = false, ack_due_ = false;
  uint64_t sent_bytes_ = 0;
  uint64_t numbered_ = 0;       // frames that were sent to their end
  std::deque<Block> retained_;  // the last of those, to be sent again
  size_t retained_bytes_ = 0;
  uint64_t acknowledged_ = 0;

  // Receiving.
  bool receiving_ = false;
  uint64_t receives_ = 0;           // how often the role was given back
  const Waiter* busy_ = nullptr;    // a recvmsg into its memory is running
  std::condition_variable parked_;  // the reader's
  Incoming incoming_;
  std::unordered_map<uint64_t, WaiterPtr> waiters_;
  int waiting_ = 0;
  uint64_t correlation_ = 0;
  Clock::time_point asked_;                 // when the last question was queued
  std::unique_ptr<RemoteFailure> pending_;  // nobody has seen it yet
  uint64_t raised_serial_ = 0;
  uint64_t heard_ = 0;     // bytes
  uint64_t received_ = 0;  // reliable frames
  uint64_t unacknowledged_ = 0, unacknowledged_bytes_ = 0;
  uint64_t relayouts_ = 0;  // as the worker counts
  uint64_t last_heard_bytes_ = 0, last_sent_bytes_ = 0;
  Clock::time_point last_heard_, last_sent_, last_look_;
};

}  // namespace mycelya
