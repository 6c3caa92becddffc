// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
#include "MycelyaStorageImpl.h"

#include <atomic>

#include "MycelyaAllocator.h"
#include "MycelyaConnection.h"

namespace mycelya {
namespace {

std::atomic<uint64_t> g_next_id{1};

void count(Connection& connection, int64_t storages, uint64_t nbytes) {
  connection.counters.storages_live.fetch_add(storages,
                                              std::memory_order_relaxed);
  connection.counters.bytes_live.fetch_add(
      storages * static_cast<int64_t>(nbytes), std::memory_order_relaxed);
}

void release(void* context) {
  auto* record = static_cast<StorageRecord*>(context);
  auto& connection = Connection::at(record->machine);
  if (record->announced) {
    connection.free(record);
    return;
  }
  count(connection, -1, record->nbytes);
  record->next = nullptr;
  recycle(record);
}

c10::Storage wrap(c10::DataPtr pointer, size_t nbytes) {
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), nbytes, std::move(pointer),
      allocator(), /*resizable=*/true));
}

}  // namespace

uint64_t reserve_ids(uint64_t count) { return g_next_id.fetch_add(count); }

c10::DataPtr data_ptr_with_id(int machine, uint64_t id, size_t nbytes) {
  auto* record = reserve_address(nbytes);
  record->id = id;
  record->nbytes = nbytes;
  record->machine = static_cast<uint8_t>(machine);
  record->announced = false;
  record->next = nullptr;
  count(Connection::at(machine), 1, nbytes);
  return {record->address, record, &release,
          c10::Device(kDeviceType, static_cast<c10::DeviceIndex>(machine))};
}

c10::DataPtr new_data_ptr(int machine, size_t nbytes) {
  return data_ptr_with_id(machine, reserve_ids(1), nbytes);
}

StorageRecord& record_of(const c10::StorageImpl& storage) {
  const auto& pointer = storage.data_ptr();
  if (pointer.get_deleter() == &release) {
    return *static_cast<StorageRecord*>(pointer.get_context());
  }
  // at::from_blob and legacy pickling wrap our address with a context of their
  // own.
  auto* record = record_at(pointer.get());
  TORCH_CHECK(record != nullptr, "mycelya: a storage on ",
              pointer.device().str(),
              " that this device has not made; it cannot be used here");
  return *record;
}

void send_alloc(StorageRecord& record) {
  auto write = [&record](std::string& out, uint64_t& newest) {
    put(out, Rec::kAlloc);
    put_id(out, record.id, newest);
    put_var(out, record.nbytes);
    record.announced = true;
  };
  Connection::at(record.machine).append(write);
}

c10::Storage new_storage(int machine, size_t nbytes, bool announce) {
  auto pointer = new_data_ptr(machine, nbytes);
  if (announce) send_alloc(*static_cast<StorageRecord*>(pointer.get_context()));
  return wrap(std::move(pointer), nbytes);
}

c10::Storage storage_with_id(int machine, uint64_t id, size_t nbytes) {
  return wrap(data_ptr_with_id(machine, id, nbytes), nbytes);
}

uint64_t metadata_hash(const at::Tensor& tensor) {
  uint64_t hash = 14695981039346656037ULL;
  auto mix = [&hash](int64_t word) {
    for (int i = 0; i < 8; ++i) {
      hash ^= static_cast<uint8_t>(static_cast<uint64_t>(word) >> (8 * i));
      hash *= 1099511628211ULL;
    }
  };
  const auto& storage = *tensor.storage().unsafeGetStorageImpl();
  mix(static_cast<int64_t>(record_of(storage).id));
  mix(static_cast<int64_t>(tensor.scalar_type()));
  mix(tensor.storage_offset());
  mix(tensor.dim());
  for (auto size : tensor.sizes()) mix(size);
  for (auto stride : tensor.strides()) mix(stride);
  mix(tensor.is_conj() | tensor.is_neg() << 1);
  return hash;
}

}  // namespace mycelya
