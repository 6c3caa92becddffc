// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
#pragma once

#include <cstdint>

namespace mycelya::worker {

// From now on, all tensors of this process on the CPU, temporary ones too, take
// at most so many bytes together; what would be more is an OutOfMemoryError.
// Only for a process that is a worker and nothing else.
void limit_cpu_memory(uint64_t bytes);

}  // namespace mycelya::worker
