// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// The worker's control functions, as operators: no Python.h, no pybind (D5).
// torch releases the GIL around them.
#include <torch/library.h>

#include <map>
#include <mutex>

#include "MycelyaLimit.h"
#include "MycelyaWorker.h"

namespace mycelya::worker {
namespace {

using at::Tensor;

std::mutex g_mutex;
std::map<int64_t, std::shared_ptr<Session>>& sessions() {
  static auto* all = new std::map<int64_t, std::shared_ptr<Session>>();
  return *all;
}

// Held while it is used, so that `worker_close` may come from another thread.
std::shared_ptr<Session> session(int64_t handle) {
  std::lock_guard<std::mutex> lock(g_mutex);
  auto found = sessions().find(handle);
  TORCH_CHECK(found != sessions().end(), "mycelya: no worker session ", handle);
  return found->second;
}

Tensor tensor_of(const std::string& text) {
  auto bytes = at::empty({static_cast<int64_t>(text.size())},
                         at::TensorOptions().dtype(at::kByte));
  if (!text.empty()) {
    std::memcpy(bytes.mutable_data_ptr(), text.data(), text.size());
  }
  return bytes;
}

std::string text_of(const Tensor& bytes) {
  TORCH_CHECK(bytes.is_cpu() && bytes.scalar_type() == at::kByte &&
                  bytes.is_contiguous(),
              "a payload is a contiguous uint8 tensor on the CPU");
  if (bytes.numel() == 0) return {};
  return {static_cast<const char*>(bytes.const_data_ptr()), bytes.nbytes()};
}

int64_t open_session(int64_t fd, const std::string& device, bool own_generator,
                     bool resumable, int64_t max_bytes, double beat) {
  Options options;
  options.device = c10::Device(device);
  TORCH_CHECK(options.device.is_cpu() || options.device.is_cuda(),
              "mycelya: a worker runs on cpu or cuda, not on ", device);
  TORCH_CHECK(options.device.is_cpu() || options.device.has_index(),
              "mycelya: a worker on cuda needs an index, as cuda:0");
  TORCH_CHECK(max_bytes >= 0, "mycelya: max_bytes is ", max_bytes);
  if (options.device.is_cpu()) options.device = c10::Device(c10::kCPU);
  options.own_generator = own_generator;
  options.resumable = resumable;
  // On CUDA, Python limits the caching allocator.
  if (options.device.is_cpu()) {
    options.max_bytes = static_cast<uint64_t>(max_bytes);
  }
  if (options.max_bytes > 0 && !own_generator) {
    limit_cpu_memory(options.max_bytes);
  }
  options.beat = beat;
  auto session = std::make_shared<Session>(static_cast<int>(fd), options);
  std::lock_guard<std::mutex> lock(g_mutex);
  static int64_t last = 0;
  sessions()[++last] = std::move(session);
  return last;
}

std::tuple<int64_t, int64_t, Tensor> serve(int64_t handle) {
  auto served = session(handle)->serve();
  return {served.event, static_cast<int64_t>(served.correlation),
          tensor_of(served.payload)};
}

void resume(int64_t handle, int64_t fd, int64_t peer_received) {
  try {
    session(handle)->link().resume(static_cast<int>(fd),
                                   static_cast<uint64_t>(peer_received));
  } catch (const ProtocolViolation& broken) {
    TORCH_CHECK(false, "mycelya: ", broken.what());
  }
}

void close_session(int64_t handle) {
  std::shared_ptr<Session> last;
  {
    std::lock_guard<std::mutex> lock(g_mutex);
    auto found = sessions().find(handle);
    if (found == sessions().end()) return;
    last = std::move(found->second);
    sessions().erase(found);
  }
  last->link().shut_down();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mycelya, m) {
  m.def(
      "worker_new(int fd, str device, bool own_generator, bool resumable, int "
      "max_bytes, float beat) -> int",
      open_session);
  m.def("worker_serve(int handle) -> (int, int, Tensor)", serve);
  m.def(
      "worker_reply(int handle, int correlation, int status, Tensor payload) "
      "-> ()",
      [](int64_t handle, int64_t correlation, int64_t status,
         const Tensor& payload) {
        TORCH_CHECK(status >= 0 &&
                        status <= 1 + static_cast<int>(ErrorKind::kRemoteLast),
                    "mycelya: status is ", status);
        session(handle)->reply(static_cast<uint64_t>(correlation),
                               static_cast<uint8_t>(status), text_of(payload));
      });
  m.def("worker_received(int handle) -> int", [](int64_t handle) {
    return static_cast<int64_t>(session(handle)->link().received());
  });
  m.def("worker_resume(int handle, int fd, int peer_received) -> ()", resume);
  m.def("worker_adopt(int handle, int id, Tensor tensor) -> ()",
        [](int64_t handle, int64_t id, const Tensor& tensor) {
          session(handle)->adopt(static_cast<uint64_t>(id), tensor);
        });
  m.def("worker_memory(int handle) -> int[]", [](int64_t handle) {
    auto held = session(handle);
    return std::vector<int64_t>{static_cast<int64_t>(held->storages()),
                                static_cast<int64_t>(held->bytes()),
                                static_cast<int64_t>(held->peak_bytes())};
  });
  m.def("worker_reset_peak(int handle) -> ()",
        [](int64_t handle) { session(handle)->reset_peak(); });
  m.def("worker_close(int handle) -> ()", close_session);
}

}  // namespace mycelya::worker
