// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// The worker's end of a connection: frames in, frames out, and what a lost
// connection needs to be taken up again. One thread receives; it, and the
// heartbeat thread, send.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "MycelyaWire.h"

namespace mycelya::worker {

// The connection ended while something was expected from it.
struct ConnectionLost {};

class Link {
 public:
  // Owns `fd`. A PONG goes out when nothing else did for `beat` seconds.
  // `process_ends`: this process is nothing but the session, and ends when a
  // call runs on long after the client has gone.
  Link(int fd, bool resumable, double beat, bool process_ends);
  ~Link();
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  // ---- receiving: `next`, then what belongs to the frame, then `finish` ----
  FrameHeader next();
  // Bytes of the frame's payload that were not taken yet.
  size_t left() const { return left_; }
  // The next `count` bytes of the payload, valid until the next call.
  const char* peek(size_t count);
  void skip(size_t count);
  // Takes `count` bytes of the payload straight into memory.
  void take_into(char* to, size_t count);
  // The frame was acted upon: it is never to be sent again.
  void finish(const FrameHeader& header);
  uint64_t received() const { return received_.load(); }

  // ---- sending; a lost connection is noticed by the receiving end only ----
  using Pieces = std::array<std::string_view, 2>;
  void send(Frame type, uint64_t correlation, const Pieces& pieces);
  // A whole REPLY with its DATA frames.
  void reply(uint64_t correlation, uint8_t status, std::string_view data);
  // The same in steps: the first chunk comes with the size of all. Chunks are
  // at most kMaxChunk bytes.
  void begin_reply(uint64_t correlation, uint8_t status, uint64_t total,
                   std::string_view chunk);
  static constexpr size_t kMaxChunk = kMaxPayload - 9;
  // Much is sent that the client has not acknowledged.
  bool is_full() const { return retained_bytes_ > kMaxRetained; }

  // ---- life cycle ----
  // Nothing more goes in or out; wakes whoever waits for the peer.
  void shut_down();
  void acknowledged(uint64_t count);
  // Takes over a new connection and sends what the peer has not received.
  void resume(int fd, uint64_t peer_received);

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr size_t kMaxRetained = size_t{64} << 20;

  bool fill(size_t count);
  size_t receive(char* to, size_t room);
  void make_room(size_t count);
  void acknowledge();
  void wait_for_acks();
  void write(std::string_view header, const Pieces& pieces);
  void beat();

  const bool resumable_;
  const std::chrono::duration<double> beat_;
  const bool process_ends_;

  // Of the receiving thread alone.
  std::vector<char> buffer_;
  size_t begin_ = 0, end_ = 0;
  size_t left_ = 0;
  uint64_t unacked_frames_ = 0, unacked_bytes_ = 0;
  std::atomic<uint64_t> received_{0};

  std::atomic<int> fd_;
  std::mutex mutex_;  // of everything below
  bool down_ = false, closed_ = false;
  std::deque<std::string> retained_;  // reliable frames not acknowledged
  std::atomic<size_t> retained_bytes_{0};
  uint64_t sent_ = 0;  // reliable frames
  Clock::time_point last_sent_ = Clock::now();
  std::condition_variable closing_;
  std::thread heart_;
};

}  // namespace mycelya::worker
