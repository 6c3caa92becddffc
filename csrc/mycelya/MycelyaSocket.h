// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// A socket in blocking mode whose calls end after a slice of time, so that
// every wait notices signals and the end of the machine.
#pragma once

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <unistd.h>

#include <chrono>
#include <mutex>

#include "MycelyaPython.h"

namespace mycelya {

#ifdef MSG_NOSIGNAL
constexpr int kNoSignal = MSG_NOSIGNAL;
#else
constexpr int kNoSignal = 0;  // macOS: SO_NOSIGPIPE instead
#endif

// Closes its descriptor when the last user lets go, so that no call can reach
// another file that got the same number.
class Socket {
 public:
  explicit Socket(int descriptor) : descriptor_(descriptor) {
    int flags = ::fcntl(descriptor, F_GETFL);
    ::fcntl(descriptor, F_SETFL, flags & ~O_NONBLOCK);
    ::fcntl(descriptor, F_SETFD, FD_CLOEXEC);
    timeval slice{0, 50'000};
    set(SOL_SOCKET, SO_RCVTIMEO, slice);
    set(SOL_SOCKET, SO_SNDTIMEO, slice);
    set(SOL_SOCKET, SO_SNDBUF, int{1} << 20);
    set(IPPROTO_TCP, TCP_NODELAY, 1);  // fails on a socketpair, which is fine
#ifdef SO_NOSIGPIPE
    set(SOL_SOCKET, SO_NOSIGPIPE, 1);
#endif
  }
  ~Socket() { ::close(descriptor_); }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;

  int descriptor() const { return descriptor_; }
  // Wakes everybody who waits in a call.
  void shut() { ::shutdown(descriptor_, SHUT_RDWR); }

 private:
  template <class T>
  void set(int level, int option, const T& value) {
    ::setsockopt(descriptor_, level, option, &value, sizeof(value));
  }

  int descriptor_;
};

// Runs `check_signals` every 100 ms of a wait, and after an interrupted call.
// It takes the GIL, so nobody should wait for us meanwhile: leave roles first.
// If it throws, the lock is not held.
class Patience {
 public:
  bool is_over() const { return signal_ || Clock::now() >= next_; }
  void interrupt() { signal_ = true; }
  void pause(std::unique_lock<std::mutex>& lock) {
    if (!is_over()) return;
    signal_ = false;
    next_ = Clock::now() + kBetween;
    lock.unlock();
    check_signals();
    lock.lock();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr auto kBetween = std::chrono::milliseconds(100);
  Clock::time_point next_ = Clock::now() + kBetween;
  bool signal_ = false;
};

// Signals are for Python's threads: there they interrupt the waiting call.
inline void begin_thread(const char* name) {
  sigset_t all;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
#ifdef __APPLE__
  ::pthread_setname_np(name);
#else
  ::pthread_setname_np(::pthread_self(), name);
#endif
}

}  // namespace mycelya
