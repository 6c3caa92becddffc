// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Storage records: a storage on the device is an id, a machine, and an address
// that nothing can read. The record is the context of the storage's DataPtr;
// there is no StorageImpl subclass.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>

#include "Mycelya.h"

namespace mycelya {

struct StorageRecord {
  uint64_t id = 0;  // unique in this process, from 1
  void* address = nullptr;
  uint64_t nbytes = 0;  // at creation, for the live-bytes count
  uint8_t size_class = 0;
  uint8_t machine = 0;  // device index
  bool announced =
      false;  // the worker knows this id, so it must be freed there
  StorageRecord* next = nullptr;  // in the list of those to be freed
};

// Makes a record and a DataPtr that owns it; sends nothing. OutOfMemoryError
// when no address range is left.
c10::DataPtr new_data_ptr(int machine, size_t nbytes);

// Returns the addresses of a list of dead records; the deleter's last step.
void recycle(StorageRecord* list);

// The record of a storage of ours, also when another owner wraps its address
// (at::from_blob). RuntimeError for any other storage.
StorageRecord& record_of(const c10::StorageImpl& storage);

// Takes `count` ids in a row, for results that the worker counts; the first of
// them.
uint64_t reserve_ids(uint64_t count);

// A DataPtr for an id taken by `reserve_ids`.
c10::DataPtr data_ptr_with_id(int machine, uint64_t id, size_t nbytes);

// Tells the worker to make the storage.
void send_alloc(StorageRecord& record);

// Storage of `nbytes` on a machine; `announce`: tell the worker now (else an
// operation's record does).
c10::Storage new_storage(int machine, size_t nbytes, bool announce);
c10::Storage storage_with_id(int machine, uint64_t id, size_t nbytes);

// FNV-1a over a tensor's metadata; for debugging, identifies nothing (D8).
uint64_t metadata_hash(const at::Tensor& tensor);

}  // namespace mycelya
