// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// The client's control functions, as operators: no Python.h, no pybind (D5).
// torch releases the GIL around them.
#include <torch/headeronly/version.h>
#include <torch/library.h>

#include "MycelyaAllocator.h"
#include "MycelyaConnection.h"
#include "MycelyaDispatch.h"
#include "MycelyaGenerator.h"
#include "MycelyaPython.h"
#include "MycelyaStorageImpl.h"

namespace mycelya {
namespace {

using at::Tensor;

Connection& machine(int64_t index) {
  TORCH_CHECK(index >= 0 && index < kMaxMachines, "mycelya: device index ",
              index, " is not in 0..", kMaxMachines - 1);
  return Connection::at(static_cast<int>(index));
}

void check_ours(const Tensor& tensor, const char* what) {
  TORCH_CHECK(tensor.defined() && tensor.device().type() == kDeviceType, what,
              " takes a mycelya tensor, got one on ", tensor.device().str());
}

std::string text_of(const Tensor& bytes) {
  TORCH_CHECK(bytes.is_cpu() && bytes.scalar_type() == at::kByte &&
                  bytes.is_contiguous(),
              "a payload is a contiguous uint8 tensor on the CPU");
  if (bytes.numel() == 0) return {};
  return {static_cast<const char*>(bytes.const_data_ptr()), bytes.nbytes()};
}

Tensor bytes_of(const std::string& text) {
  auto bytes = at::empty({static_cast<int64_t>(text.size())},
                         at::TensorOptions().dtype(at::kByte));
  if (!text.empty()) {
    std::memcpy(bytes.mutable_data_ptr(), text.data(), text.size());
  }
  return bytes;
}

std::string built_for() {
  return std::to_string(TORCH_VERSION_MAJOR) + "." +
         std::to_string(TORCH_VERSION_MINOR);
}

void open_machine(int64_t index, std::string name, double timeout,
                  double connect_timeout, int64_t max_inflight, bool batching,
                  bool resumable) {
  Settings settings;
  settings.name = std::move(name);
  settings.timeout = timeout;
  settings.connect_timeout = connect_timeout;
  settings.max_inflight = static_cast<size_t>(max_inflight);
  settings.batching = batching;
  settings.resumable = resumable;
  auto& connection = machine(index);
  SignatureCache::at(static_cast<int>(index)).clear();
  connection.open(std::move(settings));
}

std::string state_of(int64_t index) {
  static const char* names[] = {"new",      "starting", "running",
                                "resuming", "stopped",  "dead"};
  return names[static_cast<size_t>(machine(index).state())];
}

std::vector<int64_t> stats(int64_t index) {
  auto& c = machine(index).counters;
  return {c.ops,         c.cache_hits,     c.cache_misses,  c.probes,
          c.dynamic_ops, c.relayouts,      c.frames_sent,   c.round_trips,
          c.bytes_sent,  c.bytes_received, c.storages_live, c.bytes_live,
          c.queue_bytes};
}

void reset_stats(int64_t index) {
  auto& c = machine(index).counters;
  for (auto* counter : {&c.ops, &c.cache_hits, &c.cache_misses, &c.probes,
                        &c.dynamic_ops, &c.relayouts, &c.frames_sent,
                        &c.round_trips, &c.bytes_sent, &c.bytes_received}) {
    counter->store(0);
  }
}

int64_t storage_id(const Tensor& tensor) {
  check_ours(tensor, "get_storage_id");
  return static_cast<int64_t>(
      record_of(*tensor.storage().unsafeGetStorageImpl()).id);
}

int64_t hash_of(const Tensor& tensor) {
  check_ours(tensor, "get_metadata_hash");
  return static_cast<int64_t>(metadata_hash(tensor));
}

Tensor unannounced(int64_t index, int64_t nbytes) {
  machine(index);
  TORCH_CHECK(nbytes >= 0, "nbytes is ", nbytes);
  View view;
  view.dtype = at::kByte;
  view.nbytes = static_cast<uint64_t>(nbytes);
  view.sizes = {nbytes};
  view.strides = {1};
  return make_tensor(new_storage(static_cast<int>(index), view.nbytes, false),
                     kKeys, view);
}

// The worker has the storage now, so it must be freed there, too.
void announced(const Tensor& tensor) {
  check_ours(tensor, "announced");
  record_of(*tensor.storage().unsafeGetStorageImpl()).announced = true;
}

std::tuple<Tensor, int64_t> begin_read(const Tensor& tensor) {
  check_ours(tensor, "to_cpu_async");
  auto local = at::empty(tensor.sizes(), tensor.options().device(at::kCPU));
  if (local.numel() == 0) return {local, 0};
  auto& record = record_of(*tensor.storage().unsafeGetStorageImpl());
  auto ticket = Connection::at(record.machine)
                    .begin_read(record.id, view_of(tensor),
                                local.mutable_data_ptr(), local.nbytes());
  return {local, static_cast<int64_t>(ticket)};
}

void finish_read(int64_t index, int64_t ticket, std::string reason) {
  if (ticket != 0) {
    machine(index).finish_read(static_cast<uint64_t>(ticket), reason);
  }
}

Tensor control(int64_t index, const Tensor& payload, std::string reason) {
  return bytes_of(machine(index).control(text_of(payload), reason));
}

const at::Generator& generator_at(int64_t index) {
  machine(index);
  return default_generator(static_cast<int>(index));
}

Tensor default_state(int64_t index) {
  auto generator = generator_at(index);
  std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

void set_default_state(int64_t index, const Tensor& state) {
  auto generator = generator_at(index);
  std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

void seed_default(int64_t index, int64_t seed) {
  auto generator = generator_at(index);
  std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_current_seed(static_cast<uint64_t>(seed));
}

// A static object, as the order in which a library's registrations run is the
// linker's: hooks must stand before the first use, not before the kernels.
const bool g_registered = [] {
  register_hooks();
  return true;
}();

}  // namespace

TORCH_LIBRARY(mycelya, m) {
  m.def("built_for() -> str", built_for);
  m.def("set_hooks(int[] addresses) -> ()", set_hooks);
  m.def("set_error_types(int[] addresses) -> ()", set_error_types);
  m.def(
      "open(int index, str name, float timeout, float connect_timeout, int "
      "max_inflight, bool batching, bool resumable) -> ()",
      open_machine);
  m.def("connect(int index, int fd, bool has_cuda, int peer_received) -> ()",
        [](int64_t index, int64_t fd, bool has_cuda, int64_t received) {
          machine(index).connect(static_cast<int>(fd), has_cuda,
                                 static_cast<uint64_t>(received));
        });
  m.def("wait_lost(int index, float seconds) -> str",
        [](int64_t index, double seconds) {
          return machine(index).wait_lost(seconds);
        });
  m.def("received(int index) -> int", [](int64_t index) {
    return static_cast<int64_t>(machine(index).received());
  });
  m.def("fail(int index, str reason) -> ()",
        [](int64_t index, std::string reason) { machine(index).fail(reason); });
  m.def("stop(int index, float grace) -> str",
        [](int64_t index, double grace) { return machine(index).stop(grace); });
  m.def("state(int index) -> str", state_of);
  m.def("live_storages(int index) -> int", [](int64_t index) {
    return machine(index).counters.storages_live.load();
  });
  m.def("synchronize(int index, str reason) -> ()",
        [](int64_t index, std::string reason) {
          machine(index).synchronize(reason);
        });
  m.def("control(int index, Tensor payload, str reason) -> Tensor", control);
  m.def("stats(int index) -> int[]", stats);
  m.def("reset_stats(int index) -> ()", reset_stats);
  m.def("storage_id(Tensor tensor) -> int", storage_id);
  m.def("metadata_hash(Tensor tensor) -> int", hash_of);
  m.def("unannounced(int index, int nbytes) -> Tensor", unannounced);
  m.def("announced(Tensor tensor) -> ()", announced);
  m.def("begin_read(Tensor tensor) -> (Tensor, int)", begin_read);
  m.def("finish_read(int index, int ticket, str reason) -> ()", finish_read);
  m.def("in_bad_fork() -> bool", in_bad_fork);
  m.def("forbid_sync(bool forbid) -> bool", forbid_sync);
  m.def("current_device() -> int", [] { return int64_t{current_device()}; });
  m.def("set_device(int index) -> int", [](int64_t index) {
    return int64_t{set_current_device(static_cast<int>(index))};
  });
  m.def("default_state(int index) -> Tensor", default_state);
  m.def("set_default_state(int index, Tensor state) -> ()", set_default_state);
  m.def("seed_default(int index, int seed) -> ()", seed_default);
  m.def("default_initial_seed(int index) -> int", [](int64_t index) {
    return static_cast<int64_t>(generator_at(index).current_seed());
  });
}

}  // namespace mycelya
