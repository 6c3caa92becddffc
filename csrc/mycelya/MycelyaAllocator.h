// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Addresses that stand for storages. They lie in a reservation without memory
// behind it: unique, ordered, never readable (D10). Sizes are rounded up to
// powers of two; each size class owns a region, so that an address leads to its
// record in O(1).
#pragma once

#include "MycelyaStorageImpl.h"

namespace mycelya {

// Takes an address for `nbytes`, and makes its record (id 0). OutOfMemoryError
// when the size class has none left.
StorageRecord* reserve_address(size_t nbytes);

// The record whose range holds this address, or null.
StorageRecord* record_at(const void* address);

c10::Allocator* allocator();

// The device index that `allocate` serves in this thread.
int current_device();
int set_current_device(int index);  // the former one; refuses unknown indices

}  // namespace mycelya
