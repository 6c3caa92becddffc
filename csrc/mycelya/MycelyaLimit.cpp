// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
#include "MycelyaLimit.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>

#ifdef __APPLE__
#include <malloc/malloc.h>
#else
#include <malloc.h>
#endif

namespace mycelya::worker {
namespace {

// Beyond the limit, for what a full worker needs to answer and to free.
constexpr uint64_t kReserve = uint64_t{1} << 20;

std::atomic<uint64_t> g_used{0}, g_limit{UINT64_MAX};

size_t size_of(void* memory) {
#ifdef __APPLE__
  return malloc_size(memory);
#else
  return malloc_usable_size(memory);
#endif
}

// Torch's own CPU memory, counted.
class LimitedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t count) override {
    auto used = g_used.load(), limit = g_limit.load();
    bool fits = count <= limit && used <= limit - count;
    bool small = count <= kReserve && used - std::min(used, limit) < kReserve;
    TORCH_CHECK_WITH(OutOfMemoryError, fits || small, "out of memory: ", count,
                     " bytes more than the ", used,
                     " in use are over this worker's limit of ", limit);
    void* memory = c10::alloc_cpu(count);
    if (memory != nullptr) g_used.fetch_add(size_of(memory));
    return {memory, memory, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }

 private:
  static void release(void* memory) {
    if (memory == nullptr) return;
    g_used.fetch_sub(size_of(memory));
    c10::free_cpu(memory);
  }
};

}  // namespace

void limit_cpu_memory(uint64_t bytes) {
  static auto* allocator = [] {
    auto* made = new LimitedAllocator();
    c10::SetCPUAllocator(made, /*priority=*/100);
    return made;
  }();
  static_cast<void>(allocator);
  g_limit = bytes;
}

}  // namespace mycelya::worker
