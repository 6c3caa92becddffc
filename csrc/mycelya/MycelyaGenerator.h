// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Generators whose state lives on the worker; the client knows a number and the
// seed.
#pragma once

#include <ATen/core/Generator.h>

#include "Mycelya.h"

namespace mycelya {

// The number by which the worker knows a generator; 0 is the device's default.
uint64_t generator_number(const at::Generator& generator);

// The default generator of a device index; also before a machine runs there.
const at::Generator& default_generator(int index);

// Makes a further one.
at::Generator new_generator(int index);

}  // namespace mycelya
