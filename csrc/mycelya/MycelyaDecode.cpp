// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
#include "MycelyaDecode.h"

#include <ATen/core/jit_type.h>
#include <ATen/ops/aminmax.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <string_view>

#include "MycelyaWorkerOps.h"

namespace mycelya::worker {
namespace {

using c10::IValue;
using c10::TypeKind;
using std::string_view;

// Operators that reach beyond tensors: files, pinned memory, streams, state of
// the process, autograd. What needs a Storage, a Stream or an object cannot be
// encoded anyway.
constexpr std::array kForbidden = {
    string_view("from_file"),
    string_view("_pin_memory"),
    string_view("pin_memory"),
    string_view("set_data"),
    string_view("record_stream"),
    string_view("resize_storage_bytes_"),
    string_view("_cudnn_init_dropout_state"),
    string_view("_assert_async"),
    string_view("_functional_assert_async"),
    string_view("_print"),
    string_view("_backward"),
    string_view("requires_grad_"),
    string_view("retain_grad"),
    string_view("_make_dual"),
    string_view("_fw_primal"),
    // They believe the sizes they are given.
    string_view("_reshape_alias"),
    string_view("_reshape_alias_copy"),
    string_view("_nested_view_from_buffer"),
    string_view("_nested_view_from_jagged"),
};

// In-place operators that read nothing of the tensor they write.
constexpr std::array kOverwriting = {
    string_view("copy_"),          string_view("fill_"),
    string_view("zero_"),          string_view("normal_"),
    string_view("uniform_"),       string_view("bernoulli_"),
    string_view("random_"),        string_view("exponential_"),
    string_view("geometric_"),     string_view("log_normal_"),
    string_view("cauchy_"),        string_view("_foreach_copy_"),
    string_view("_foreach_zero_"),
};

template <class Names>
bool is_among(const Names& names, string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

string_view short_name(const c10::OperatorHandle& op) {
  string_view name = op.operator_name().name;
  return name.substr(name.find(':') + 2);
}

}  // namespace

bool is_allowed(const c10::OperatorHandle& op) {
  string_view name = op.operator_name().name;
  auto space = name.substr(0, name.find(':'));
  if (space != "aten" && space != "prims" && space != "torchvision") {
    return false;
  }
  if (is_among(kForbidden, short_name(op)) || op.schema().is_vararg()) {
    return false;
  }
  // Names of dimensions look like strings; torch would keep each for ever.
  auto overload = op.operator_name().overload_name;
  std::transform(overload.begin(), overload.end(), overload.begin(), ::tolower);
  if (overload.find("name") != std::string::npos) return false;
  const auto& arguments = op.schema().arguments();
  return std::all_of(arguments.begin(), arguments.end(), [](const auto& a) {
    return a.name() != "filename" && a.name() != "names";
  });
}

namespace {

c10::OperatorHandle find_operator(Reader& in) {
  auto name = in.str16(), overload = in.str16();
  MYCELYA_PROTOCOL(name.size() <= kMaxName && overload.size() <= kMaxName,
                   "an operator's name is too long");
  auto op = c10::Dispatcher::singleton().findSchema({name, overload});
  MYCELYA_PROTOCOL(op.has_value(), "unknown operator ", name, ".", overload);
  MYCELYA_PROTOCOL(is_allowed(*op), "operator ", name, ".", overload,
                   " is not allowed");
  return *op;
}

// Some operators update statistics without saying so in their schema.
bool is_written(const c10::OperatorHandle& op, const c10::Argument& argument) {
  if (argument.alias_info() != nullptr && argument.alias_info()->isWrite()) {
    return true;
  }
  if (argument.name() != "running_mean" && argument.name() != "running_var") {
    return false;
  }
  auto name = short_name(op);
  return name.find("batch_norm") != name.npos &&
         name.find("backward") == name.npos &&
         name.find("no_training") == name.npos;
}

// Backwards of pooling write where their indices say, and look at none of them.
size_t find_trusted_indices(const c10::OperatorHandle& op) {
  auto name = short_name(op);
  if (name.find("max_pool") == name.npos ||
      name.find("_backward") == name.npos) {
    return 0;
  }
  return static_cast<size_t>(
      op.schema().argumentIndexWithName("indices").value_or(0));
}

// The second argument of these operators is what was pooled.
void check_indices(const c10::OperatorHandle& op, const c10::IValue& indices,
                   const c10::IValue& pooled) {
  const auto& where = indices.toTensor();
  auto sizes = pooled.toTensor().sizes();
  if (where.numel() == 0 || where.scalar_type() != at::kLong) return;
  size_t pooled_dims = short_name(op).find("3d") != std::string::npos ? 3 : 2;
  int64_t plane = 1;
  for (auto size :
       sizes.slice(sizes.size() - std::min(sizes.size(), pooled_dims))) {
    plane *= size;
  }
  auto [least, most] = at::aminmax(where);
  TORCH_CHECK_INDEX(least.item<int64_t>() >= 0 && most.item<int64_t>() < plane,
                    "indices from ", least.item<int64_t>(), " to ",
                    most.item<int64_t>(), " in a plane of ", plane);
}

bool covers_storage(const at::Tensor& tensor, const View& view) {
  return view.offset == 0 && tensor.nbytes() == view.nbytes &&
         tensor.is_non_overlapping_and_dense();
}

}  // namespace

// Reads the values of one call.
class Decoder {
 public:
  Decoder(std::string&& values, Prepared& call, const Target& target)
      : bytes_(std::move(values)), in_(bytes_), call_(call), target_(target) {}

  void arguments() {
    const auto& arguments = call_.op_->schema().arguments();
    call_.values_.reserve(arguments.size());
    for (const auto& argument : arguments) {
      argument_ = &argument;
      writes_ = is_written(*call_.op_, argument);
      overwrites_ =
          writes_ && (argument.is_out() ||
                      (call_.values_.empty() &&
                       is_among(kOverwriting, short_name(*call_.op_))));
      call_.mutates_ |= writes_;
      call_.values_.push_back(value(*argument.real_type(), false));
    }
    in_.expect_end();
  }

 private:
  [[noreturn]] void refuse(char tag) const {
    throw ProtocolViolation(
        c10::str("argument ", argument_->name(), " of ",
                 call_.op_->operator_name().name, " is of kind '", tag,
                 "', the schema says ", argument_->real_type()->str()));
  }

  IValue value(const c10::Type& type, bool optional) {
    if (type.kind() == TypeKind::OptionalType) {
      return value(*type.castRaw<c10::OptionalType>()->getElementType(), true);
    }
    auto tag = in_.get<char>();
    if (tag == 'N' && optional) {
      bool default_generator = type.kind() == TypeKind::GeneratorType &&
                               target_.own_generator.defined();
      return default_generator ? IValue(target_.own_generator) : IValue();
    }
    switch (type.kind()) {
      case TypeKind::TensorType:
        return tensor(tag);
      case TypeKind::ListType:
        return list(*type.castRaw<c10::ListType>()->getElementType(), tag);
      case TypeKind::ScalarTypeType:
      case TypeKind::LayoutType:
      case TypeKind::MemoryFormatType:
        return choice(type.kind(), tag);
      case TypeKind::StringType:
        if (tag == 'S') return in_.str32();
        break;
      case TypeKind::DeviceObjType:
        if (tag == 'V') return target_.device;
        break;
      case TypeKind::GeneratorType:
        if (tag == 'G') return slot(tag, 8);
        break;
      default:
        return scalar(type.kind(), tag, -1);
    }
    refuse(tag);
  }

  IValue scalar(TypeKind kind, char tag, int64_t item) {
    bool number = kind == TypeKind::NumberType;
    bool whole = kind == TypeKind::IntType || kind == TypeKind::SymIntType;
    bool real = kind == TypeKind::FloatType || kind == TypeKind::SymFloatType;
    bool flag = kind == TypeKind::BoolType || kind == TypeKind::SymBoolType;
    if (tag == 'I' && (number || whole)) return in_.get<int64_t>();
    if (tag == 'J' && (number || whole)) return slot(tag, 8, item);
    if (tag == 'E' && (number || real)) return in_.get<double>();
    if (tag == 'D' && (number || real)) return slot(tag, 8, item);
    if (tag == 'B' && (number || flag)) return boolean();
    if (tag == 'C' && number) {
      auto re = in_.get<double>(), im = in_.get<double>();
      return c10::complex<double>(re, im);
    }
    refuse(tag);
  }

  bool boolean() {
    auto value = in_.get<uint8_t>();
    MYCELYA_PROTOCOL(value <= 1, "a bool is ", int{value});
    return value != 0;
  }

  // A number that stands for one of a few things.
  IValue choice(TypeKind kind, char tag) {
    if (tag != 'I') refuse(tag);
    auto number = in_.get<int64_t>();
    bool fine =
        kind == TypeKind::ScalarTypeType ? is_known_dtype_number(number)
        : kind == TypeKind::LayoutType
            ? number == static_cast<int64_t>(c10::Layout::Strided)
            : number >= 0 &&
                  number < static_cast<int64_t>(c10::MemoryFormat::NumOptions);
    MYCELYA_PROTOCOL(fine, "argument ", argument_->name(), " of ",
                     call_.op_->operator_name().name, " is ", number);
    return number;
  }

  // A place for what `dyn` brings; holds a value of the right kind until then.
  IValue slot(char tag, size_t bytes, int64_t item = -1, void* data = nullptr,
              at::ScalarType dtype = at::kLong) {
    auto argument = static_cast<uint16_t>(call_.values_.size());
    call_.slots_.push_back({tag, argument, item, data, dtype});
    call_.dyn_bytes_ += bytes;
    return tag == 'J' ? IValue(int64_t{0}) : IValue(0.0);
  }

  at::Tensor tensor(char tag) {
    if (tag == 'U') return {};
    if (tag == 'W') return scalar_tensor();
    if (tag != 'T') refuse(tag);
    auto view = in_.view();
    auto& storages = call_.storages_;
    MYCELYA_PROTOCOL(view.storage <= storages.size(),
                     "storages of a call are counted from 0 at first use");
    if (view.storage == storages.size()) storages.emplace_back();
    auto tensor = make_tensor(target_.nothing, target_.keys, view);
    auto& use = storages[view.storage];
    use.nbytes = std::max(use.nbytes, view.nbytes);
    use.writes |= writes_;
    use.reads |= !(overwrites_ && covers_storage(tensor, view));
    call_.tensors_.push_back({tensor, false, writes_, std::move(view)});
    return tensor;
  }

  at::Tensor scalar_tensor() {
    auto number = in_.get<int8_t>();
    auto wrapped = in_.get<uint8_t>();
    MYCELYA_PROTOCOL(is_known_dtype_number(number) && wrapped <= 1,
                     "a bad scalar tensor");
    View view;
    view.dtype = static_cast<at::ScalarType>(number);
    view.nbytes = kScalarBytes;
    c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), kScalarBytes,
        c10::GetAllocator(c10::kCPU), false));
    auto* data = storage.mutable_data();
    std::memset(data, 0, kScalarBytes);
    auto tensor = make_tensor(std::move(storage),
                              c10::DispatchKeySet(c10::DispatchKey::CPU), view);
    tensor.unsafeGetTensorImpl()->set_wrapped_number(wrapped != 0);
    slot('W', kScalarBytes, -1, data, view.dtype);
    call_.tensors_.push_back({tensor, true, false, std::move(view)});
    return tensor;
  }

  IValue list(const c10::Type& element, char tag) {
    bool optional = element.kind() == TypeKind::OptionalType;
    auto kind =
        optional
            ? element.castRaw<c10::OptionalType>()->getElementType()->kind()
            : element.kind();
    if (kind == TypeKind::TensorType && tag == (optional ? 'O' : 'L')) {
      return optional ? IValue(optional_tensors()) : IValue(tensors());
    }
    if (optional) refuse(tag);
    bool whole = kind == TypeKind::IntType || kind == TypeKind::SymIntType;
    if (whole && tag == 'i') return numbers<int64_t>();
    if (kind == TypeKind::FloatType && tag == 'd') return numbers<double>();
    if (kind == TypeKind::BoolType && tag == 'b') return booleans();
    if (kind == TypeKind::NumberType && tag == 's') return scalars();
    refuse(tag);
  }

  // Lists of fixed length: torch takes one number for all, and none for a
  // default; only lists of bools become arrays without a check.
  size_t count(size_t each, bool exactly = false) {
    auto count = in_.count32(each);
    auto fixed = static_cast<size_t>(argument_->N().value_or(0));
    MYCELYA_PROTOCOL(fixed == 0 || count == fixed ||
                         (!exactly && (fixed == 1 || count <= 1)),
                     "argument ", argument_->name(), " of ",
                     call_.op_->operator_name().name, " has ", count,
                     " items, not ", fixed);
    return count;
  }

  template <class T>
  IValue numbers() {
    auto n = count(sizeof(T));
    c10::List<T> values;
    values.reserve(n);
    for (size_t i = 0; i < n; ++i) values.push_back(in_.get<T>());
    return values;
  }

  IValue booleans() {
    auto n = count(1, true);
    c10::List<bool> values;
    values.reserve(n);
    for (size_t i = 0; i < n; ++i) values.push_back(boolean());
    return values;
  }

  IValue scalars() {
    auto n = count(1);
    c10::List<at::Scalar> values;
    values.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      auto tag = in_.get<char>();
      auto item = static_cast<int64_t>(i);
      values.push_back(scalar(TypeKind::NumberType, tag, item).toScalar());
    }
    return values;
  }

  c10::List<at::Tensor> tensors() {
    auto n = count(1);
    c10::List<at::Tensor> values;
    values.reserve(n);
    for (size_t i = 0; i < n; ++i) values.push_back(tensor(in_.get<char>()));
    return values;
  }

  c10::List<std::optional<at::Tensor>> optional_tensors() {
    auto n = count(1);
    c10::List<std::optional<at::Tensor>> values;
    values.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      auto tag = in_.get<char>();
      if (tag == 'N' || tag == 'U') {
        values.push_back(std::nullopt);
      } else {
        values.push_back(tensor(tag));
      }
    }
    return values;
  }

  std::string bytes_;
  Reader in_;
  Prepared& call_;
  const Target& target_;
  const c10::Argument* argument_ = nullptr;
  bool writes_ = false, overwrites_ = false;
};

Prepared::Prepared(Reader& in, const Target& target) : op_(find_operator(in)) {
  auto arguments = in.get<uint16_t>();
  const auto& schema = op_->schema();
  MYCELYA_PROTOCOL(arguments == schema.arguments().size(),
                   op_->operator_name().name, " takes ",
                   schema.arguments().size(), " arguments, not ", arguments);
  Decoder(in.str32(), *this, target).arguments();
  kernel_ = own_kernel(op_->operator_name(), target.device.type());
  if (target.device.is_cpu()) trusted_indices_ = find_trusted_indices(*op_);
}

void Prepared::fill(c10::ArrayRef<const c10::Storage*> storages,
                    const char* dyn, const FindGenerator& find_generator) {
  for (auto& argument : tensors_) {
    if (argument.scalar) continue;
    argument.tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(
        *storages[argument.view.storage]);
  }
  for (const auto& slot : slots_) {
    uint64_t word;
    std::memcpy(&word, dyn, 8);
    if (slot.tag == 'W') {
      std::memcpy(slot.data, dyn, kScalarBytes);
      if (slot.dtype == at::kBool) {
        *static_cast<bool*>(slot.data) = (word & 0xff) != 0;
      }
      dyn += kScalarBytes;
      continue;
    }
    dyn += 8;
    IValue value = slot.tag == 'J'   ? IValue(static_cast<int64_t>(word))
                   : slot.tag == 'D' ? IValue(c10::bit_cast<double>(word))
                                     : IValue(find_generator(word));
    if (slot.item < 0) {
      values_[slot.argument] = std::move(value);
    } else {
      values_[slot.argument].toList().set(static_cast<size_t>(slot.item),
                                          std::move(value));
    }
  }
}

void Prepared::run(Stack& stack) {
  if (C10_UNLIKELY(trusted_indices_ != 0)) {
    check_indices(*op_, values_[trusted_indices_], values_[1]);
  }
  stack.assign(values_.begin(), values_.end());
  if (kernel_ != nullptr) {
    kernel_->callBoxed(*op_, c10::DispatchKeySet(), &stack);
  } else {
    op_->callBoxed(stack);
  }
}

void Prepared::release(const Target& target) {
  for (auto& argument : tensors_) {
    if (argument.scalar) continue;
    auto* impl = argument.tensor.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(target.nothing);
    if (!argument.writes) continue;
    const auto& view = argument.view;
    if (impl->sizes() != c10::IntArrayRef(view.sizes) ||
        impl->strides() != c10::IntArrayRef(view.strides) ||
        impl->storage_offset() != view.offset) {
      impl->set_sizes_and_strides(view.sizes, view.strides, view.offset);
    }
  }
}

std::string Prepared::describe() const {
  std::string text;
  for (const auto& argument : tensors_) {
    if (!text.empty()) text += ", ";
    text += c10::getDtypeNames(argument.view.dtype).first;
    if (argument.view.sizes.empty()) continue;
    for (size_t i = 0; i < argument.view.sizes.size(); ++i) {
      text += (i == 0 ? "[" : ",") + std::to_string(argument.view.sizes[i]);
    }
    text += "]";
  }
  return text;
}

}  // namespace mycelya::worker
