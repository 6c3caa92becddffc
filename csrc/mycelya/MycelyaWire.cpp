// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
#include "MycelyaWire.h"

namespace mycelya {

bool is_known_dtype_number(int64_t number) {
  return number >= 0 && number < static_cast<int>(at::ScalarType::NumOptions) &&
         is_known_dtype(static_cast<at::ScalarType>(number));
}

bool is_known_dtype(at::ScalarType dtype) {
  return dtype != at::ScalarType::Undefined && !c10::isQIntType(dtype);
}

void put_header(char* to, const FrameHeader& header) {
  std::memset(to, 0, kHeaderBytes);
  std::memcpy(to, &header.payload, 4);
  to[4] = static_cast<char>(header.type);
  std::memcpy(to + 8, &header.correlation, 8);
}

FrameHeader read_header(const char* from) {
  FrameHeader header;
  std::memcpy(&header.payload, from, 4);
  header.type = static_cast<Frame>(from[4]);
  MYCELYA_PROTOCOL(from[5] == 0 && from[6] == 0 && from[7] == 0,
                   "a frame has reserved bits set");
  MYCELYA_PROTOCOL(header.payload <= kMaxPayload, "a frame of ", header.payload,
                   " bytes, the limit is ", kMaxPayload);
  std::memcpy(&header.correlation, from + 8, 8);
  return header;
}

void put_view(std::string& out, const View& view) {
  put<int8_t>(out, static_cast<int8_t>(view.dtype));
  put<uint8_t>(out, view.bits);
  put<uint16_t>(out, view.storage);
  put<uint64_t>(out, view.nbytes);
  put<int64_t>(out, view.offset);
  put<uint8_t>(out, static_cast<uint8_t>(view.sizes.size()));
  put_ints(out, view.sizes);
  put_ints(out, view.strides);
}

void put_view(std::string& out, const at::Tensor& tensor, uint16_t storage) {
  const auto* impl = tensor.unsafeGetTensorImpl();
  auto dims = static_cast<size_t>(impl->dim());
  TORCH_CHECK(dims <= kMaxDims, "mycelya: tensors have at most ", kMaxDims,
              " dimensions, this one has ", dims);
  char fixed[21];
  auto nbytes = static_cast<uint64_t>(
      impl->unsafe_storage().unsafeGetStorageImpl()->nbytes());
  int64_t offset = impl->storage_offset();
  fixed[0] = static_cast<char>(tensor.scalar_type());
  fixed[1] = static_cast<char>(tensor.is_conj() | tensor.is_neg() << 1);
  std::memcpy(fixed + 2, &storage, 2);
  std::memcpy(fixed + 4, &nbytes, 8);
  std::memcpy(fixed + 12, &offset, 8);
  fixed[20] = static_cast<char>(dims);
  out.append(fixed, sizeof(fixed));
  put_ints(out, impl->sizes());
  put_ints(out, impl->strides());
}

bool is_utf8(const std::string& text) {
  size_t follow = 0;
  uint32_t code = 0, least = 0;
  for (unsigned char byte : text) {
    if (follow > 0) {
      if ((byte & 0xc0) != 0x80) return false;
      code = code << 6 | (byte & 0x3f);
      if (--follow > 0) continue;
      bool surrogate = code >= 0xd800 && code < 0xe000;
      if (code < least || code > 0x10ffff || surrogate) return false;
    } else if (byte >= 0x80) {
      follow = byte >= 0xf0 ? 3 : byte >= 0xe0 ? 2 : 1;
      if (byte < 0xc2 || byte > 0xf4) return false;
      code = byte & (0x3f >> follow);
      least = follow == 3 ? 0x10000 : follow == 2 ? 0x800 : 0x80;
    }
  }
  return follow == 0;
}

namespace {
// Cut to a size, and without bytes that are no text.
std::string plain_text(const std::string& text, size_t most) {
  auto cut = text.substr(0, most);
  if (is_utf8(cut)) return cut;
  for (auto& c : cut) {
    if (static_cast<unsigned char>(c) >= 0x80) c = '?';
  }
  return cut;
}
}  // namespace

void put_failure(std::string& out, const RemoteFailure& failure) {
  put<uint64_t>(out, failure.serial);
  put<uint64_t>(out, failure.op_number);
  put<uint8_t>(out, static_cast<uint8_t>(failure.kind));
  put_str16(out, plain_text(failure.op, kMaxName));
  put_str16(out, plain_text(failure.arguments, 4096));
  put_str32(out, plain_text(failure.text, 65536));
}

uint64_t Reader::var() {
  uint64_t value = 0;
  for (int shift = 0; shift < 70; shift += 7) {
    auto byte = static_cast<uint8_t>(*take(1));
    MYCELYA_PROTOCOL(shift < 63 || byte <= 1, "a number over 64 bits");
    value |= static_cast<uint64_t>(byte & 0x7f) << shift;
    if ((byte & 0x80) == 0) return value;
  }
  MYCELYA_PROTOCOL(false, "a number over 64 bits");
}

size_t Reader::count32(size_t each) {
  size_t count = get<uint32_t>();
  MYCELYA_PROTOCOL(count <= kMaxListItems && count * each <= left(),
                   "a list of ", count, " items does not fit");
  return count;
}

void Reader::ints(c10::SmallVectorImpl<int64_t>& into, size_t count) {
  const char* from = take(8 * count);
  into.resize(count);
  if (count > 0) std::memcpy(into.data(), from, 8 * count);
}

View Reader::view() {
  View view;
  auto dtype = get<int8_t>();
  MYCELYA_PROTOCOL(is_known_dtype_number(dtype), "unknown dtype ", int{dtype});
  view.dtype = static_cast<at::ScalarType>(dtype);
  view.bits = get<uint8_t>();
  view.storage = get<uint16_t>();
  view.nbytes = get<uint64_t>();
  view.offset = get<int64_t>();
  size_t dims = get<uint8_t>();
  MYCELYA_PROTOCOL(dims <= kMaxDims, dims, " dimensions");
  ints(view.sizes, dims);
  ints(view.strides, dims);
  check_view(view);
  return view;
}

RemoteFailure Reader::failure() {
  RemoteFailure failure;
  failure.serial = get<uint64_t>();
  failure.op_number = get<uint64_t>();
  auto kind = get<uint8_t>();
  MYCELYA_PROTOCOL(kind <= static_cast<uint8_t>(ErrorKind::kRemoteLast),
                   "unknown kind of error: ", int{kind});
  failure.kind = static_cast<ErrorKind>(kind);
  failure.op = str16();
  failure.arguments = str16();
  failure.text = str32();
  MYCELYA_PROTOCOL(is_utf8(failure.op) && is_utf8(failure.arguments) &&
                       is_utf8(failure.text),
                   "an error whose text is no UTF-8");
  return failure;
}

void check_view(const View& view) {
  MYCELYA_PROTOCOL(view.nbytes <= kMaxStorageBytes, "a storage of ",
                   view.nbytes, " bytes");
  MYCELYA_PROTOCOL(view.bits <= 3, "unknown bits of a view");
  bool complex = c10::isComplexType(view.dtype);
  MYCELYA_PROTOCOL(complex || (view.bits & 1) == 0,
                   "only complex views are conjugated");
  MYCELYA_PROTOCOL(view.offset >= 0, "a negative offset");
  bool empty = false;
  __int128 last = view.offset;
  __int128 count = 1;
  for (size_t i = 0; i < view.sizes.size(); ++i) {
    int64_t size = view.sizes[i], stride = view.strides[i];
    MYCELYA_PROTOCOL(size >= 0 && stride >= 0, "a negative size or stride");
    if (size == 0) {
      empty = true;
      continue;
    }
    last += static_cast<__int128>(size - 1) * stride;
    count *= size;
    MYCELYA_PROTOCOL(last < (static_cast<__int128>(1) << 62) &&
                         (empty || count < (static_cast<__int128>(1) << 62)),
                     "a view too large");
  }
  if (empty) return;
  // A stride of 0 makes any number of elements out of one; computing on them
  // would never end.
  auto item = static_cast<__int128>(c10::elementSize(view.dtype));
  MYCELYA_PROTOCOL(count * item <= static_cast<__int128>(kMaxStorageBytes),
                   "a view of too many elements");
  auto bytes = (last + 1) * static_cast<__int128>(c10::elementSize(view.dtype));
  MYCELYA_PROTOCOL(bytes <= static_cast<__int128>(view.nbytes),
                   "a view reaches outside its storage");
}

View view_of(const at::Tensor& tensor) {
  View view;
  view.dtype = tensor.scalar_type();
  view.bits = static_cast<uint8_t>(tensor.is_conj() | tensor.is_neg() << 1);
  view.nbytes = tensor.storage().nbytes();
  view.offset = tensor.storage_offset();
  auto sizes = tensor.sizes(), strides = tensor.strides();
  view.sizes.assign(sizes.begin(), sizes.end());
  view.strides.assign(strides.begin(), strides.end());
  return view;
}

at::Tensor make_tensor(c10::Storage storage, c10::DispatchKeySet keys,
                       const View& view) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), keys, c10::scalarTypeToTypeMeta(view.dtype));
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(view.sizes, view.strides, view.offset);
  if (view.bits & 1) tensor._set_conj(true);
  if (view.bits & 2) tensor._set_neg(true);
  return tensor;
}

}  // namespace mycelya
