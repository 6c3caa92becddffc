// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// What torch asks of a device: hooks, the device guard, generators.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/GeneratorImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <mutex>

#include "MycelyaAllocator.h"
#include "MycelyaConnection.h"
#include "MycelyaDispatch.h"
#include "MycelyaGenerator.h"

namespace mycelya {
namespace {

c10::Device device_at(int index) {
  return {kDeviceType, static_cast<c10::DeviceIndex>(index)};
}

int index_or_current(c10::DeviceIndex index) {
  int chosen = index < 0 ? current_device() : index;
  TORCH_CHECK(chosen < kMaxMachines, "mycelya: device index ", chosen,
              " is not in 0..", kMaxMachines - 1);
  return chosen;
}

// ---- generators ----
// Callers of a generator hold its mutex, torch's own with the GIL. Whoever
// waits for the machine lets others have the GIL, and they may want the mutex.
class Unlocked {
 public:
  explicit Unlocked(std::mutex& mutex) : mutex_(mutex) { mutex_.unlock(); }
  ~Unlocked() { mutex_.lock(); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  std::mutex& mutex_;
};

class RemoteGenerator final : public c10::GeneratorImpl {
 public:
  RemoteGenerator(int machine, uint64_t number)
      : GeneratorImpl(device_at(machine),
                      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        machine_(machine),
        number_(number) {}

  ~RemoteGenerator() override {
    if (number_ == 0) return;
    std::string record;
    put_state(record, "");
    Connection::at(machine_).append_later(record);
  }

  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    if (!is_open()) return;
    Unlocked unlocked(mutex_);
    Connection::at(machine_).append([&](std::string& out, uint64_t&) {
      put(out, Rec::kSeed);
      put_var(out, number_);
      put<uint64_t>(out, seed);
    });
  }
  void set_offset(uint64_t) override {
    TORCH_CHECK(false, "mycelya generators have no offset");
  }
  uint64_t get_offset() const override {
    TORCH_CHECK(false, "mycelya generators have no offset");
  }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    auto seed = c10::detail::getNonDeterministicRandom();
    set_current_seed(seed);
    return seed;
  }
  void set_state(const c10::TensorImpl& state) override {
    at::detail::check_rng_state(state);
    auto count = static_cast<size_t>(state.numel());
    TORCH_CHECK(count >= sizeof(seed_), "RNG state is wrong size");
    const auto* bytes = static_cast<const char*>(state.data());
    send_state(std::string(bytes, count));
    // The states of the CPU's and of CUDA's generators begin with the seed.
    std::memcpy(&seed_, bytes, sizeof(seed_));
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    std::string body;
    put<uint64_t>(body, number_);
    auto state = ask_state(body);
    auto tensor = at::empty({static_cast<int64_t>(state.size())},
                            at::TensorOptions().dtype(at::kByte));
    if (!state.empty()) {
      std::memcpy(tensor.mutable_data_ptr(), state.data(), state.size());
    }
    return tensor.getIntrusivePtr();
  }
  uint64_t number() const { return number_; }

 private:
  bool is_open() const {
    auto state = Connection::at(machine_).state();
    return state == Connection::State::kStarting ||
           state == Connection::State::kRunning ||
           state == Connection::State::kResuming;
  }
  void put_state(std::string& out, const std::string& state) const {
    put(out, Rec::kGenState);
    put_var(out, number_);
    put<uint32_t>(out, static_cast<uint32_t>(state.size()));
    out += state;
  }
  void send_state(const std::string& state) {
    Unlocked unlocked(mutex_);
    Connection::at(machine_).append(
        [&](std::string& out, uint64_t&) { put_state(out, state); });
  }
  std::string ask_state(const std::string& body) const {
    Unlocked unlocked(const_cast<RemoteGenerator*>(this)->mutex_);
    return Connection::at(machine_).ask(Question::kGetState, body,
                                        "generator state");
  }
  RemoteGenerator* clone_impl() const override {
    auto copy = new_generator(machine_);
    auto* impl =
        static_cast<RemoteGenerator*>(copy.unsafeReleaseGeneratorImpl());
    impl->set_state(*get_state());
    return impl;
  }

  int machine_;
  uint64_t number_;
  uint64_t seed_ = c10::default_rng_seed_val;
};

// ---- hooks ----
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex index) const override {
    return Connection::at(index).state() != Connection::State::kNew;
  }
  const at::Generator& getDefaultGenerator(
      c10::DeviceIndex index) const override {
    return default_generator(index_or_current(index));
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return new_generator(index_or_current(index));
  }
  at::Device getDeviceFromPtr(void* data) const override {
    auto* record = record_at(data);
    TORCH_CHECK(record != nullptr, "this address is no mycelya storage");
    return device_at(record->machine);
  }
  at::Allocator* getPinnedMemoryAllocator() const override {
    // We are the current accelerator; where the client has CUDA too, its pinned
    // memory is what callers mean.
    const auto& cuda = at::detail::getCUDAHooks();
    return cuda.hasCUDA() ? cuda.getPinnedMemoryAllocator()
                          : c10::GetCPUAllocator();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage,
                              size_t nbytes) const override {
    resize_storage(storage, nbytes);
  }
  c10::DeviceIndex deviceCount() const override { return kMaxMachines; }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    set_current_device(index);
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return static_cast<c10::DeviceIndex>(current_device());
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return static_cast<c10::DeviceIndex>(set_current_device(index));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return index < 0 ? getCurrentDevice() : exchangeDevice(index);
  }
};

// ---- guard ----
class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  static constexpr auto static_type = kDeviceType;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kDeviceType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    return device.has_index() ? device_at(set_current_device(device.index()))
                              : getDevice();
  }
  c10::Device getDevice() const override { return device_at(current_device()); }
  void setDevice(c10::Device device) const override { exchangeDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0 && device.index() < kMaxMachines) {
      set_current_device(device.index());
    }
  }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return getStream(device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return getStream(device);  // a machine runs one program, in its order
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getStream(device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return kMaxMachines;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    Connection::at(stream.device_index()).synchronize("synchronize");
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    Connection::at(index).synchronize("synchronize");
  }
};

}  // namespace

uint64_t generator_number(const at::Generator& generator) {
  auto* impl =
      dynamic_cast<RemoteGenerator*>(generator.unsafeGetGeneratorImpl());
  TORCH_CHECK(impl != nullptr, "not a generator of this device");
  return impl->number();
}

const at::Generator& default_generator(int index) {
  static auto* all = [] {
    auto* made = new std::array<at::Generator, kMaxMachines>();
    for (int i = 0; i < kMaxMachines; ++i) {
      (*made)[static_cast<size_t>(i)] =
          at::make_generator<RemoteGenerator>(i, uint64_t{0});
    }
    return made;
  }();
  return all->at(static_cast<size_t>(index));
}

at::Generator new_generator(int index) {
  static std::atomic<uint64_t> numbers{1};
  return at::make_generator<RemoteGenerator>(index, numbers.fetch_add(1));
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

void register_hooks() { at::RegisterPrivateUse1HooksInterface(new Hooks()); }

}  // namespace mycelya
