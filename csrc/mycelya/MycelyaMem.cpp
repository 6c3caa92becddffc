// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// What crosses between this process and a machine: exactly numel * itemsize
// bytes of a view, never its whole storage (D12).
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include "MycelyaConnection.h"
#include "MycelyaDispatch.h"
#include "MycelyaStorageImpl.h"

namespace mycelya {
namespace {

uint64_t id_of(const at::Tensor& tensor) {
  check_inside_storage(tensor);
  return record_of(*tensor.storage().unsafeGetStorageImpl()).id;
}

// The elements come in the order of their indices.
at::Tensor empty_like_on_cpu(const at::Tensor& tensor) {
  auto options = tensor.options().device(at::kCPU).pinned_memory(false);
  return at::empty(tensor.sizes(), options);
}

void read_into(const at::Tensor& from, const at::Tensor& local,
               const std::string& reason) {
  if (local.numel() == 0) return;
  Connection::at(machine_of(from))
      .read(id_of(from), view_of(from), local.mutable_data_ptr(),
            local.nbytes(), reason);
}

// Whether what is read may go to `to` itself.
bool takes_as_read(const at::Tensor& to, const at::Tensor& from) {
  return to.is_cpu() && to.layout() == at::kStrided && to.is_contiguous() &&
         to.scalar_type() == from.scalar_type() && to.sizes() == from.sizes() &&
         !to.is_conj() && !to.is_neg() && !to._is_zerotensor();
}

at::Tensor copy_between(const at::Tensor& from, const at::Tensor& to) {
  upload(download(from, "copy between machines"), to, false);
  return to;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to,
                     bool non_blocking) {
  bool ours = from.device().type() == kDeviceType;
  if (!ours) {
    upload(from.is_cpu() ? from : from.cpu(), to, non_blocking);
    return to;
  }
  if (to.device().type() != kDeviceType) {
    auto reason = "copy to " + to.device().str();
    if (takes_as_read(to, from)) {
      read_into(from, to, reason);
    } else {
      const_cast<at::Tensor&>(to).copy_(download(from, reason));
    }
    return to;
  }
  if (machine_of(from) != machine_of(to)) return copy_between(from, to);
  static auto& copy = traits_of("aten::copy_", "");
  send(copy, to, from, non_blocking);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const at::Tensor& tensor) {
  return download(tensor, "read value").item();
}

// torch.equal needs only the answer.
bool equal(const at::Tensor& self, const at::Tensor& other) {
  static auto& traits = traits_of("aten::equal", "");
  return send(traits, self, other)[0].toBool();
}

}  // namespace

void check_inside_storage(const at::Tensor& tensor) {
  auto needed = at::detail::computeStorageNbytes(
      tensor.sizes(), tensor.strides(), tensor.itemsize(),
      static_cast<size_t>(tensor.storage_offset()));
  auto has = tensor.storage().nbytes();
  TORCH_CHECK(tensor.numel() == 0 || needed <= has, "a tensor of shape ",
              tensor.sizes(), " needs a storage of ", needed,
              " bytes, but its storage was resized to ", has);
}

void resize_storage(const c10::Storage& storage, size_t nbytes) {
  auto& record = record_of(*storage.unsafeGetStorageImpl());
  TORCH_CHECK_WITH(OutOfMemoryError, nbytes <= kMaxStorageBytes,
                   "mycelya: a storage of ", nbytes, " bytes is too large");
  Connection::at(record.machine)
      .append([&](std::string& out, uint64_t& newest) {
        put(out, Rec::kResize);
        put_id(out, record.id, newest);
        put_var(out, nbytes);
      });
  storage.unsafeGetStorageImpl()->set_nbytes(nbytes);
}

at::Tensor download(const at::Tensor& tensor, const std::string& reason) {
  auto local = empty_like_on_cpu(tensor);
  read_into(tensor, local, reason);
  return local;
}

void upload(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  auto source = from.to(to.scalar_type()).expand(to.sizes());
  source = source.contiguous().resolve_conj().resolve_neg();
  if (source.numel() == 0) return;
  bool own_copy = !source.is_alias_of(from);
  std::shared_ptr<void> keep;
  if (non_blocking || own_copy) keep = std::make_shared<at::Tensor>(source);
  auto view = view_of(to);
  Connection::at(machine_of(to))
      .upload(id_of(to), view, source.const_data_ptr(), source.nbytes(), keep);
}

void register_memory(torch::Library& library) {
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar_dense);
  library.impl("equal", equal);
}

// Without these two, x.conj().cpu() recurses until the stack ends.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

}  // namespace mycelya
