// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
#include "MycelyaWorkerLink.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace mycelya::worker {
namespace {

#ifdef MSG_NOSIGNAL
constexpr int kSendFlags = MSG_NOSIGNAL;
#else
constexpr int kSendFlags = 0;  // SO_NOSIGPIPE instead
#endif

constexpr size_t kReadAhead = size_t{256} << 10;
constexpr size_t kAckBytes = size_t{1} << 20;
constexpr size_t kAckFrames = 64;
// How far ahead of the current frame ACKs are looked for.
constexpr size_t kMaxLookAhead = size_t{64} << 20;

void prepare(int fd) {
  // Python leaves a socket with a timeout non-blocking.
  int flags = fcntl(fd, F_GETFL);
  if (flags >= 0) fcntl(fd, F_SETFL, flags & ~O_NONBLOCK);
  // Else the two ends take turns at 200 KiB each.
  int buffer = 1 << 20;
  setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof(buffer));
  int on = 1;  // without effect on a socket pair
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
#ifdef SO_NOSIGPIPE
  setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof(on));
#endif
}

bool send_all(int fd, iovec* parts, size_t count) {
  while (count > 0) {
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = count;
    ssize_t sent = ::sendmsg(fd, &message, kSendFlags);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) return false;
    auto done = static_cast<size_t>(sent);
    while (count > 0 && done >= parts->iov_len) {
      done -= parts->iov_len;
      ++parts;
      --count;
    }
    if (count > 0) {
      parts->iov_base = static_cast<char*>(parts->iov_base) + done;
      parts->iov_len -= done;
    }
  }
  return true;
}

using Seconds = std::chrono::duration<double>;
// As long as anybody may wait for a connection to be resumed: LONGEST_TIMEOUT
// in _handshake.py.
constexpr Seconds kPatience(600);

iovec part_of(std::string_view piece) {
  return {const_cast<char*>(piece.data()), piece.size()};
}

}  // namespace

Link::Link(int fd, bool resumable, double beat, bool process_ends)
    : resumable_(resumable), beat_(beat), process_ends_(process_ends), fd_(fd) {
  prepare(fd);
  if (beat > 0) heart_ = std::thread([this] { this->beat(); });
}

Link::~Link() {
  shut_down();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
  }
  closing_.notify_all();
  if (heart_.joinable()) heart_.join();
  ::close(fd_);
}

// ---- receiving ----
size_t Link::receive(char* to, size_t room) {
  for (;;) {
    ssize_t count = ::recv(fd_, to, room, 0);
    if (count < 0 && errno == EINTR) continue;
    return count < 0 ? 0 : static_cast<size_t>(count);
  }
}

// Moves the unread bytes to the front, or grows, so that `count` bytes from
// `begin_` on have a place.
void Link::make_room(size_t count) {
  if (begin_ == end_) begin_ = end_ = 0;
  if (begin_ > 0) {
    std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  if (count > buffer_.size()) buffer_.resize(std::max(count, kReadAhead));
}

bool Link::fill(size_t count) {
  if (end_ - begin_ >= count) return true;
  make_room(count);
  while (end_ - begin_ < count) {
    auto got = receive(buffer_.data() + end_, buffer_.size() - end_);
    if (got == 0) return false;
    end_ += got;
  }
  return true;
}

FrameHeader Link::next() {
  if (!fill(kHeaderBytes)) throw ConnectionLost();
  auto header = read_header(buffer_.data() + begin_);
  begin_ += kHeaderBytes;
  left_ = header.payload;
  return header;
}

const char* Link::peek(size_t count) {
  if (!fill(count)) throw ConnectionLost();
  return buffer_.data() + begin_;
}

void Link::skip(size_t count) {
  left_ -= count;
  while (count > 0) {
    if (begin_ == end_ && !fill(1)) throw ConnectionLost();
    auto some = std::min(count, end_ - begin_);
    begin_ += some;
    count -= some;
  }
}

void Link::take_into(char* to, size_t count) {
  left_ -= count;
  auto buffered = std::min(count, end_ - begin_);
  if (buffered > 0) std::memcpy(to, buffer_.data() + begin_, buffered);
  begin_ += buffered;
  while (buffered < count) {
    auto got = receive(to + buffered, count - buffered);
    if (got == 0) throw ConnectionLost();
    buffered += got;
  }
}

void Link::finish(const FrameHeader& header) {
  if (!is_reliable(header.type)) return;
  received_.fetch_add(1);
  if (!resumable_) return;
  unacked_frames_ += 1;
  unacked_bytes_ += header.payload;
  if (unacked_frames_ >= kAckFrames || unacked_bytes_ >= kAckBytes) {
    acknowledge();
  }
}

void Link::acknowledge() {
  unacked_frames_ = unacked_bytes_ = 0;
  auto count = received_.load();
  send(Frame::kWorkerAck, 0, {{{reinterpret_cast<const char*>(&count), 8}}});
}

// ---- sending ----
void Link::write(std::string_view header, const Pieces& pieces) {
  if (down_) return;
  std::array<iovec, 3> parts{part_of(header)};
  size_t count = 1;
  for (auto piece : pieces) {
    if (!piece.empty()) parts[count++] = part_of(piece);
  }
  if (!send_all(fd_, parts.data(), count)) {
    down_ = true;
    ::shutdown(fd_, SHUT_RDWR);  // so that the receiving end learns of it
  }
  last_sent_ = Clock::now();
}

void Link::send(Frame type, uint64_t correlation, const Pieces& pieces) {
  size_t payload = pieces[0].size() + pieces[1].size();
  char bytes[kHeaderBytes];
  put_header(bytes, {static_cast<uint32_t>(payload), type, correlation});
  std::string_view header(bytes, kHeaderBytes);
  std::lock_guard<std::mutex> lock(mutex_);
  if (is_reliable(type)) {
    ++sent_;
    if (resumable_) {
      std::string frame;
      frame.reserve(kHeaderBytes + payload);
      frame.append(header).append(pieces[0]).append(pieces[1]);
      retained_bytes_ += frame.size();
      retained_.push_back(std::move(frame));
    }
  }
  write(header, pieces);
}

void Link::begin_reply(uint64_t correlation, uint8_t status, uint64_t total,
                       std::string_view chunk) {
  wait_for_acks();
  char start[9];
  start[0] = static_cast<char>(status);
  std::memcpy(start + 1, &total, 8);
  send(Frame::kReply, correlation, {{{start, sizeof(start)}, chunk}});
}

void Link::reply(uint64_t correlation, uint8_t status, std::string_view data) {
  auto chunk = data.substr(0, kMaxChunk);
  begin_reply(correlation, status, data.size(), chunk);
  for (auto at = chunk.size(); at < data.size(); at += chunk.size()) {
    wait_for_acks();
    chunk = data.substr(at, kMaxPayload);
    send(Frame::kReplyData, correlation, {{chunk}});
  }
}

void Link::acknowledged(uint64_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  MYCELYA_PROTOCOL(count <= sent_,
                   "frames are acknowledged that were not sent");
  uint64_t first = sent_ - retained_.size();  // those before it are gone
  for (; first < count && !retained_.empty(); ++first) {
    retained_bytes_ -= retained_.front().size();
    retained_.pop_front();
  }
}

// Bounds what is kept for a client that reads slower than it asks. Called
// between frames only, as it reads ahead into the buffer.
void Link::wait_for_acks() {
  size_t at = begin_;
  while (is_full()) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (down_) return;
    }
    size_t whole = kHeaderBytes;
    if (end_ >= at + kHeaderBytes) {
      auto header = read_header(buffer_.data() + at);
      whole += header.payload;
      if (end_ >= at + whole) {
        if (header.type == Frame::kAck && header.payload == 8) {
          uint64_t count;
          std::memcpy(&count, buffer_.data() + at + kHeaderBytes, 8);
          acknowledged(count);
        }
        at += whole;
        continue;
      }
    }
    size_t wanted = at + whole - begin_;
    MYCELYA_PROTOCOL(wanted <= kMaxLookAhead, "replies are not acknowledged");
    at -= begin_;
    bool filled = fill(wanted);
    at += begin_;
    if (!filled) return;
  }
}

// ---- life cycle ----
void Link::shut_down() {
  // Before the lock: a sender holds it while the peer reads nothing.
  ::shutdown(fd_, SHUT_RDWR);
  std::lock_guard<std::mutex> lock(mutex_);
  down_ = true;
}

void Link::resume(int fd, uint64_t peer_received) {
  prepare(fd);
  acknowledged(peer_received);
  std::lock_guard<std::mutex> lock(mutex_);
  MYCELYA_PROTOCOL(peer_received >= sent_ - retained_.size(),
                   "the client wants frames that it acknowledged");
  ::close(fd_.exchange(fd));
  down_ = closed_;
  // A frame received in part comes again as a whole.
  begin_ = end_ = left_ = 0;
  unacked_frames_ = unacked_bytes_ = 0;
  for (const auto& frame : retained_) write(frame, {});
}

void Link::beat() {
  std::unique_lock<std::mutex> lock(mutex_);
  Seconds down_for(0);
  while (!closed_) {
    auto due = last_sent_ + std::chrono::duration_cast<Clock::duration>(beat_);
    if (Clock::now() < due) {
      closing_.wait_until(lock, due);
      continue;
    }
    char header[kHeaderBytes];
    put_header(header, {0, Frame::kPong, 0});
    last_sent_ = Clock::now();
    write({header, kHeaderBytes}, {});
    down_for = down_ ? down_for + beat_ : Seconds(0);
    // The thread that reads is inside a call and can't see the end.
    if (process_ends_ && down_for > (resumable_ ? kPatience : Seconds(0))) {
      ::_exit(0);
    }
  }
}

}  // namespace mycelya::worker
