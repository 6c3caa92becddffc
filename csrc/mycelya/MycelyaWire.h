// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// clang-format off
// The wire format, protocol version 1, on one page. All numbers little endian.
//
// A frame: u32 payload bytes (<= 16 MiB), u8 type, u8 flags (0), u16 0,
// u64 correlation (0 = none), payload. Reliable frames (all but ACK, PING, PONG)
// are counted from 1 per direction; after a lost connection both sides say how
// many they received, and the rest is sent again.
//
// client -> worker            payload
//   1 OPS      records, see below
//   2 UPLOAD   u64 storage id, view, u64 bytes, then data; if the frame ends
//              before the data does, DATA frames follow at once, with nothing
//              between but ACK and PING
//   3 DATA     more data
//   4 ASK      u8 question, see below; correlation != 0, answered by REPLY
//   5 CONTROL  msgpack map for the Python half; correlation != 0, answered by
//              REPLY
//   6 ACK      u64 reliable frames received so far
//   7 BYE      empty: the session is over
//   8 PING     empty
// worker -> client
//   16 REPLY   u8 status (0 fine, 1 error), u64 bytes, then data (status 1: an
//              error); DATA frames with the same correlation follow if it does
//              not fit
//   17 DATA    more data
//   18 EVENT   an error that no question asked for
//   19 ACK     as above
//   20 PONG    empty; also unasked, so that silence means death
//
// error: u64 serial, u64 op number, u8 kind, str16 op, str16 arguments, str32 text
// strN:  an N-bit length, then that many bytes of UTF-8
// view:  i8 dtype (c10::ScalarType), u8 conj | neg << 1, u16 storage index,
//        u64 bytes of the whole storage, i64 offset, u8 dims (<= 64),
//        i64 sizes[], i64 strides[]; offset, sizes and strides >= 0, and the
//        view lies inside the storage
// var:   LEB128, unsigned, at most 10 bytes
// id:    var of zigzag(newest - id), where newest is the largest id that records
//        of this direction carried so far (0 at first)
//
// Records in OPS, each u8 kind and fields; no length; none crosses a frame's end:
//   1 ALLOC    id, var bytes                 content is undefined
//   2 FREE     var count, ids
//   3 RESIZE   id, var bytes                 keeps the content that fits
//   4 DEFSIG   var signature, u32 bytes, call, u16 results, each: u8 0 (nothing
//              to do: undefined, or a view of an argument), or u8 1 and a view
//              whose storage index counts the fresh storages (0, 1, ... at
//              first use)
//   5 EXEC     var signature, id per storage of the call, dyn bytes, id per
//              fresh storage
//   6 SEED     var generator, u64 seed       generator 0 is the device's own
//   7 GENSTATE var generator, str32 state    empty state: forget the generator
//   8 DROPSIG  var count, var signatures
//   9 DTYPE    u8 dtype                      torch.get_default_dtype() from now
//   16, 17     reserved for sequences of EXEC
//
// call: str16 operator ("aten::add"), str16 overload, u16 arguments, str32 values.
// values, one for each argument of the operator's schema; dyn: what may differ
// from call to call, in the order of the values:
//   'N' none   'U' undefined tensor   'T' view (storage: index among the call's)
//   'W' CPU scalar tensor: i8 dtype, u8 is_wrapped_number; dyn: 16 bytes
//   'I' i64   'J' int; dyn: i64   'E' f64   'D' double; dyn: f64   'B' u8
//   'C' f64 re, f64 im   'S' str32   'V' the worker's device
//   'G' generator; dyn: u64 its number
//   'i' u32 n, i64[]   'd' u32 n, f64[]   'b' u32 n, u8[]
//   'L' u32 n, tensors ('U' 'T' 'W')   'O' the same, 'N' also allowed
//   's' u32 n, scalars ('I' 'J' 'E' 'D' 'B' 'C')
//
// Questions in ASK:
//   1 READ     u64 storage id, view; REPLY: the elements, contiguous, conj and
//              neg resolved
//   2 RUN      call, u16 n, u64 ids[n], str32 dyn, u64 first, u64 count: ids for
//              fresh storages, in order. REPLY: u16 returns, each: u8
//              0 undefined, 1 tensor: u64 id, view; 2 list: u32 n, then each 0, 1
//              or 7; 3 i64; 4 u8 bool; 5 f64; 6 f64 re, f64 im; 7 the u16-th
//              tensor of the call. Then u16 changed: u16 which tensor of the
//              call, view
//   3 SYNC     REPLY: u64 results laid out anew so far; all before it has run
//   4 GETSTATE u64 generator; REPLY: its state
// clang-format on
#pragma once

#include <cstring>

#include "Mycelya.h"

namespace mycelya {

enum class Frame : uint8_t {
  kOps = 1,
  kUpload = 2,
  kData = 3,
  kAsk = 4,
  kControl = 5,
  kAck = 6,
  kBye = 7,
  kPing = 8,
  kReply = 16,
  kReplyData = 17,
  kEvent = 18,
  kWorkerAck = 19,
  kPong = 20,
};

enum class Rec : uint8_t {
  kAlloc = 1,
  kFree = 2,
  kResize = 3,
  kDefSig = 4,
  kExec = 5,
  kSeed = 6,
  kGenState = 7,
  kDropSig = 8,
  kDefaultDtype = 9,
};

enum class Question : uint8_t { kRead = 1, kRun = 2, kSync = 3, kGetState = 4 };

enum class Result : uint8_t {
  kUndefined = 0,
  kTensor = 1,
  kList = 2,
  kInt = 3,
  kBool = 4,
  kDouble = 5,
  kComplex = 6,
  kArgument = 7,
};

constexpr size_t kHeaderBytes = 16;
constexpr size_t kScalarBytes = 16;  // of a CPU scalar tensor in dyn

struct FrameHeader {
  uint32_t payload = 0;
  Frame type = Frame::kOps;
  uint64_t correlation = 0;
};

void put_header(char* to, const FrameHeader& header);
// Refuses non-zero reserved fields and payloads over the limit; knows no types.
FrameHeader read_header(const char* from);

// Whether a frame is counted for resumption.
inline bool is_reliable(Frame type) {
  return type != Frame::kAck && type != Frame::kPing &&
         type != Frame::kWorkerAck && type != Frame::kPong;
}

// ---- writing ----
template <class T>
inline void put(std::string& out, T value) {
  static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
  out.append(reinterpret_cast<const char*>(&value), sizeof(T));
}
inline void put_bytes(std::string& out, const void* data, size_t count) {
  if (count > 0) out.append(static_cast<const char*>(data), count);
}
inline void put_var(std::string& out, uint64_t value) {
  while (value >= 0x80) {
    out.push_back(static_cast<char>(value | 0x80));
    value >>= 7;
  }
  out.push_back(static_cast<char>(value));
}
// Writes an id relative to the newest one, and moves that on.
inline void put_id(std::string& out, uint64_t id, uint64_t& newest) {
  auto delta = static_cast<int64_t>(newest - id);
  put_var(out, (static_cast<uint64_t>(delta) << 1) ^
                   static_cast<uint64_t>(delta >> 63));
  if (id > newest) newest = id;
}
inline void put_str16(std::string& out, const std::string& text) {
  TORCH_CHECK(text.size() <= UINT16_MAX, "text too long for the wire");
  put<uint16_t>(out, static_cast<uint16_t>(text.size()));
  out += text;
}
inline void put_str32(std::string& out, const std::string& text) {
  TORCH_CHECK(text.size() <= UINT32_MAX, "text too long for the wire");
  put<uint32_t>(out, static_cast<uint32_t>(text.size()));
  out += text;
}
inline void put_ints(std::string& out, c10::IntArrayRef values) {
  put_bytes(out, values.data(), 8 * values.size());
}
void put_view(std::string& out, const View& view);
// The same without a View in between; the hot path of an operation.
void put_view(std::string& out, const at::Tensor& tensor, uint16_t storage);
bool is_utf8(const std::string& text);
void put_failure(std::string& out, const RemoteFailure& failure);

// ---- reading; everything is checked against the end, and ends in
// ProtocolViolation ----
class Reader {
 public:
  Reader(const char* begin, size_t count) : at_(begin), end_(begin + count) {}
  explicit Reader(const std::string& text) : Reader(text.data(), text.size()) {}

  size_t left() const { return static_cast<size_t>(end_ - at_); }
  const char* take(size_t count) {
    MYCELYA_PROTOCOL(count <= left(), "a frame or record is too short: ", count,
                     " bytes wanted, ", left(), " left");
    const char* from = at_;
    at_ += count;
    return from;
  }
  template <class T>
  T get() {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
    T value;
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
    return value;
  }
  uint64_t var();
  uint64_t id(uint64_t& newest) {
    uint64_t coded = var();
    auto delta = (coded >> 1) ^ (~(coded & 1) + 1);
    uint64_t id = newest - delta;
    MYCELYA_PROTOCOL(id != 0 && id < (uint64_t{1} << 62), "impossible id");
    if (id > newest) newest = id;
    return id;
  }
  std::string str16() { return text(get<uint16_t>()); }
  std::string str32() { return text(get<uint32_t>()); }
  // A count of items that take at least `each` bytes; refused before
  // allocation.
  size_t count32(size_t each);
  void ints(c10::SmallVectorImpl<int64_t>& into, size_t count);
  View view();  // checked by `check_view`
  RemoteFailure failure();
  void expect_end() const {
    MYCELYA_PROTOCOL(at_ == end_, left(), " bytes too many");
  }

 private:
  std::string text(size_t count) { return {take(count), count}; }

  const char* at_;
  const char* end_;
};

// Quantized dtypes carry a scale that a view does not.
bool is_known_dtype(at::ScalarType dtype);
bool is_known_dtype_number(int64_t number);

// Refuses unknown dtypes and bits, negative numbers, and whatever reaches
// outside `nbytes`; computed in 128 bits.
void check_view(const View& view);

}  // namespace mycelya
