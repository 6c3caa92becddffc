// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
#include "MycelyaWorker.h"

#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <new>

namespace mycelya::worker {
namespace {

// UPLOAD's fields before the data, at most.
constexpr size_t kUploadStart = 8 + 21 + 16 * kMaxDims + 8;

Target target_of(const Options& options) {
  Target target;
  target.device = options.device;
  bool cpu = options.device.is_cpu();
  target.keys =
      c10::DispatchKeySet(cpu ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA);
  at::globalContext().lazyInitDevice(options.device.type());
  if (options.own_generator) {
    target.own_generator = new_generator(options.device);
  }
  target.nothing = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), 0,
      c10::DataPtr(nullptr, options.device),
      c10::GetAllocator(options.device.type()), false);
  return target;
}

struct Told {
  ErrorKind kind = ErrorKind::kRuntime;
  std::string text;
};

// Names the exception that is being handled.
Told told() {
  try {
    throw;
  } catch (const c10::OutOfMemoryError& error) {
    return {ErrorKind::kOutOfMemory, error.what_without_backtrace()};
  } catch (const c10::IndexError& error) {
    return {ErrorKind::kIndex, error.what_without_backtrace()};
  } catch (const c10::ValueError& error) {
    return {ErrorKind::kValue, error.what_without_backtrace()};
  } catch (const c10::TypeError& error) {
    return {ErrorKind::kType, error.what_without_backtrace()};
  } catch (const c10::NotImplementedError& error) {
    return {ErrorKind::kNotImplemented, error.what_without_backtrace()};
  } catch (const c10::LinAlgError& error) {
    return {ErrorKind::kLinAlg, error.what_without_backtrace()};
  } catch (const c10::Error& error) {
    std::string text = error.what_without_backtrace();
    // The CPU's allocator has no exception of its own.
    auto memory = text.find("DefaultCPUAllocator: ");
    if (memory == std::string::npos) return {ErrorKind::kRuntime, text};
    return {ErrorKind::kOutOfMemory, "out of memory: " + text.substr(memory)};
  } catch (const std::bad_alloc&) {
    return {ErrorKind::kOutOfMemory, "out of memory"};
  } catch (const std::exception& error) {
    return {ErrorKind::kRuntime, error.what()};
  } catch (...) {
    return {ErrorKind::kRuntime, "an unknown exception"};
  }
}

// What the client sent may be quoted in a text, and texts are UTF-8.
std::string printable(std::string text) {
  for (auto& c : text) {
    if (c < ' ' || c > '~') c = '?';
  }
  return text;
}

}  // namespace

Session::Session(int fd, const Options& options)
    : options_(options),
      target_(target_of(options)),
      link_(fd, options.resumable, options.beat, !options.own_generator),
      staging_(options.device),
      find_generator_([this](uint64_t number) { return generator(number); }) {}

// ---- the loop ----
Served Session::serve() {
  c10::InferenceMode no_autograd(true);
  c10::OptionalDeviceGuard guard;
  if (!options_.device.is_cpu()) guard.reset_device(options_.device);
  Served served;
  try {
    for (;;) {
      auto header = link_.next();
      if (frame(header, served)) return served;
    }
  } catch (const ConnectionLost&) {
    served.event = Served::kLost;
    return served;
  } catch (const ProtocolViolation& broken) {
    return violation(broken.what());
  } catch (const std::exception&) {
    // Nothing that a client may do gets here; memory for a buffer may lack.
    return violation(told().text);
  }
}

Served Session::violation(const std::string& text) {
  RemoteFailure last;
  last.serial = ++serial_;
  last.op_number = op_number_;
  last.text = "protocol violation: " + printable(text);
  std::string body;
  put_failure(body, last);
  link_.send(Frame::kEvent, 0, {{body}});
  link_.shut_down();
  Served served;
  served.event = Served::kViolation;
  served.payload = last.text;
  return served;
}

// Acts on one frame. True: `serve` returns.
bool Session::frame(const FrameHeader& header, Served& served) {
  auto type = header.type;
  bool asks = type == Frame::kAsk || type == Frame::kControl;
  MYCELYA_PROTOCOL(asks == (header.correlation != 0),
                   "a wrong correlation number");
  MYCELYA_PROTOCOL(!upload_.active || type == Frame::kData ||
                       type == Frame::kAck || type == Frame::kPing,
                   "the rest of an upload is missing");
  if (type == Frame::kUpload || type == Frame::kData) {
    MYCELYA_PROTOCOL(upload_.active || type == Frame::kUpload,
                     "data without an upload");
    if (type == Frame::kUpload) begin_upload();
    more_upload();
    link_.finish(header);
    return false;
  }
  Reader in(link_.peek(header.payload), header.payload);
  std::string body;
  switch (type) {
    case Frame::kOps:
      while (in.left() > 0) record(in);
      break;
    case Frame::kAck:
      link_.acknowledged(in.get<uint64_t>());
      in.expect_end();
      break;
    case Frame::kPing:
    case Frame::kBye:
      in.expect_end();
      break;
    case Frame::kAsk:
    case Frame::kControl:
      body.assign(in.take(header.payload), header.payload);
      break;
    default:
      MYCELYA_PROTOCOL(false, "unknown frame ", static_cast<int>(type));
  }
  link_.skip(header.payload);
  if (type == Frame::kAsk) ask(header.correlation, body);
  if (type == Frame::kPing) link_.send(Frame::kPong, 0, {});
  link_.finish(header);
  if (type != Frame::kControl && type != Frame::kBye) return false;
  served.event = type == Frame::kBye ? Served::kBye : Served::kControl;
  served.correlation = header.correlation;
  served.payload = std::move(body);
  return true;
}

// ---- uploads ----
uint64_t bytes_in(const View& view) {
  // In range, as `check_view` bounded the product.
  auto count = static_cast<unsigned __int128>(c10::elementSize(view.dtype));
  for (auto size : view.sizes) count *= static_cast<uint64_t>(size);
  return count > UINT64_MAX ? UINT64_MAX : static_cast<uint64_t>(count);
}

// A frame that was received in part comes again as a whole after a lost
// connection, so `done` moves at a frame's end only; writing the same bytes
// twice does no harm, as nothing else happens between the frames of an upload.
void Session::begin_upload() {
  auto size = std::min(link_.left(), kUploadStart);
  Reader in(link_.peek(size), size);
  Upload upload;
  upload.id = in.get<uint64_t>();
  upload.view = in.view();
  upload.total = in.get<uint64_t>();
  link_.skip(size - in.left());
  MYCELYA_PROTOCOL(upload.total == bytes_in(upload.view), "an upload of ",
                   upload.total, " bytes into ", bytes_in(upload.view));
  auto& entry = stored(upload.id);
  bool sound = entry.poison == nullptr;
  MYCELYA_PROTOCOL(!sound || entry.storage.nbytes() >= upload.view.nbytes,
                   "storage ", upload.id, " has ", entry.storage.nbytes(),
                   " bytes, not ", upload.view.nbytes);
  try {
    if (upload.total == upload.view.nbytes) {
      revive(entry, upload.view.nbytes);
    }
    if (entry.storage.nbytes() >= upload.view.nbytes) {
      auto there = on(entry.storage, upload.view);
      upload.through = !there.is_contiguous() || upload.view.bits != 0;
      if (upload.through) check_temporary(upload.view);
      upload.target =
          !upload.through
              ? there
              : at::empty(there.sizes(), there.options().device(at::kCPU));
    }
  } catch (const Poison&) {
    upload.target.reset();  // still no memory: the data are dropped
  } catch (const std::exception&) {
    entry.poison = report(nullptr);
  }
  upload_ = std::move(upload);
}

void Session::more_upload() {
  auto count = link_.left();
  MYCELYA_PROTOCOL(count <= upload_.total - upload_.done,
                   "an upload has more data than it said");
  MYCELYA_PROTOCOL(
      count > 0 || upload_.done == upload_.total || upload_.done == 0,
      "empty data");
  const auto& target = upload_.target;
  if (!target.defined()) {
    link_.skip(count);
  } else if (target.is_cpu()) {
    if (count > 0) {
      link_.take_into(
          static_cast<char*>(target.mutable_data_ptr()) + upload_.done, count);
    }
  } else {
    auto first = upload_.done +
                 static_cast<uint64_t>(upload_.view.offset) * target.itemsize();
    staging_.upload(bytes_of(target.storage(), target_.keys, first, count),
                    [this](char* to, size_t n) { link_.take_into(to, n); });
  }
  upload_.active = true;
  upload_.done += count;
  if (upload_.done == upload_.total) end_upload();
}

void Session::end_upload() {
  auto upload = std::exchange(upload_, {});
  if (!upload.target.defined()) return;
  auto& entry = stored(upload.id);
  try {
    if (upload.through) on(entry.storage, upload.view).copy_(upload.target);
    if (upload.total == upload.view.nbytes) entry.poison = nullptr;
  } catch (const std::exception&) {
    entry.poison = report(nullptr);
  }
}

// ---- for the Python half ----
void Session::reply(uint64_t correlation, uint8_t status,
                    const std::string& payload) {
  if (status == 0) return link_.reply(correlation, 0, payload);
  MYCELYA_PROTOCOL(status <= 1 + static_cast<int>(ErrorKind::kRemoteLast),
                   "status ", int{status});
  RemoteFailure failure;
  failure.serial = ++serial_;
  failure.op_number = op_number_;
  failure.kind = static_cast<ErrorKind>(status - 1);
  failure.text = payload;
  reply_failure(correlation, failure);
}

void Session::adopt(uint64_t id, const at::Tensor& tensor) {
  TORCH_CHECK(id != 0 && storages_.find(id) == nullptr, "mycelya: storage ", id,
              " exists already");
  TORCH_CHECK(tensor.defined() && tensor.device() == target_.device &&
                  tensor.has_storage(),
              "mycelya: only tensors on ", target_.device.str(),
              " can be adopted");
  insert(id, {tensor.storage(), nullptr});
}

// ---- failures ----
RemoteFailure Session::failure(const Prepared* call) {
  auto what = told();
  RemoteFailure failure;
  failure.serial = ++serial_;
  failure.op_number = op_number_;
  failure.kind = what.kind;
  failure.text = std::move(what.text);
  if (call != nullptr) {
    failure.op = call->op().operator_name().name;
    failure.arguments = call->describe();
  }
  return failure;
}

Poison Session::report(const Prepared* call) {
  auto poison = std::make_shared<const RemoteFailure>(failure(call));
  // A client that lets so many failures wait learns of the others by reading.
  if (link_.is_full()) return poison;
  std::string body;
  put_failure(body, *poison);
  link_.send(Frame::kEvent, 0, {{body}});
  return poison;
}

}  // namespace mycelya::worker
