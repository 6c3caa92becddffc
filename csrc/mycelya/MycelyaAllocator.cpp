// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
#include "MycelyaAllocator.h"

#include <sys/mman.h>

#include <array>
#include <bit>
#include <deque>
#include <mutex>

#include "MycelyaConnection.h"

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

namespace mycelya {
namespace {

constexpr int kClasses = 32;
constexpr int kSmallestBits = 9;  // 512 bytes

thread_local int t_device = 0;

// One size class: `records[i]` belongs to the i-th address of its region.
struct SizeClass {
  std::mutex mutex;
  std::deque<StorageRecord> records;  // never moves what it holds
  StorageRecord* unused = nullptr;
};

// Regions are equally large, so the largest classes hold few addresses: 2^44
// bytes in 32 regions are 512 GiB each, which is one storage of
// kMaxStorageBytes.
class AddressSpace {
 public:
  AddressSpace() {
    for (int bits = 44; bits >= 40; --bits) {
      void* at = ::mmap(nullptr, size_t{1} << bits, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (at == MAP_FAILED) continue;
      base_ = static_cast<char*>(at);
      region_bits_ = bits - 5;
      return;
    }
  }

  StorageRecord* take(size_t nbytes) {
    int index = class_of(nbytes);
    size_t each = size_t{1} << (index + kSmallestBits);
    if (base_ != nullptr && index < kClasses) {
      auto& size_class = classes_[index];
      std::lock_guard<std::mutex> lock(size_class.mutex);
      if (size_class.unused != nullptr) {
        return std::exchange(size_class.unused, size_class.unused->next);
      }
      size_t used = size_class.records.size();
      if (used < (size_t{1} << region_bits_) / each) {
        auto& record = size_class.records.emplace_back();
        record.address = region(index) + used * each;
        record.size_class = static_cast<uint8_t>(index);
        return &record;
      }
    }
    TORCH_CHECK_WITH(OutOfMemoryError, false,
                     "mycelya: no address range is left for a storage of ",
                     nbytes, " bytes");
  }

  void give_back(StorageRecord* record) {
    auto& size_class = classes_[record->size_class];
    std::lock_guard<std::mutex> lock(size_class.mutex);
    record->id = 0;
    record->next = size_class.unused;
    size_class.unused = record;
  }

  bool contains(const void* address) const {
    auto offset =
        static_cast<size_t>(static_cast<const char*>(address) - base_);
    return base_ != nullptr && offset < (size_t{kClasses} << region_bits_);
  }

  StorageRecord* find(const void* address) {
    if (!contains(address)) return nullptr;
    auto offset =
        static_cast<size_t>(static_cast<const char*>(address) - base_);
    auto index = offset >> region_bits_;
    auto within = offset & ((size_t{1} << region_bits_) - 1);
    auto& size_class = classes_[index];
    std::lock_guard<std::mutex> lock(size_class.mutex);
    auto position = within >> (index + kSmallestBits);
    if (position >= size_class.records.size()) return nullptr;
    auto& record = size_class.records[position];
    return record.id == 0 ? nullptr : &record;
  }

 private:
  static int class_of(size_t nbytes) {
    int bits = nbytes <= 1 ? 0 : std::bit_width(nbytes - 1);
    return std::max(bits, kSmallestBits) - kSmallestBits;
  }
  char* region(int index) const {
    return base_ + (static_cast<size_t>(index) << region_bits_);
  }

  char* base_ = nullptr;
  int region_bits_ = 0;
  std::array<SizeClass, kClasses> classes_;
};

AddressSpace& addresses() {
  static auto* space = new AddressSpace();  // outlives every tensor
  return *space;
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    auto pointer = new_data_ptr(t_device, nbytes);
    send_alloc(*static_cast<StorageRecord*>(pointer.get_context()));
    return pointer;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, size_t) const override {
    TORCH_CHECK(false, "mycelya: device memory cannot be read on the client");
  }
};

Allocator g_allocator;

}  // namespace

REGISTER_ALLOCATOR(kDeviceType, &g_allocator);

StorageRecord* reserve_address(size_t nbytes) {
  return addresses().take(nbytes);
}
StorageRecord* record_at(const void* address) {
  return addresses().find(address);
}
c10::Allocator* allocator() { return &g_allocator; }

void recycle(StorageRecord* list) {
  while (list != nullptr) {
    auto* next = list->next;
    addresses().give_back(list);
    list = next;
  }
}

int current_device() { return t_device; }

int set_current_device(int index) {
  TORCH_CHECK(index >= 0 && index < kMaxMachines, "mycelya: device index ",
              index, " is not in 0..", kMaxMachines - 1);
  return std::exchange(t_device, index);
}

}  // namespace mycelya
