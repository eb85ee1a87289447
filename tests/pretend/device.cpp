// A pretend accelerator, by torch's open registration: the host's memory under another name.
//
// Every op without a kernel of its own here runs through one boxed fallback. It refuses tensors of
// another device, as a real accelerator does, lends their memory to the CPU's kernel, and gives the
// results back as tensors of this device. Nothing is copied between devices but by copies that were
// asked for, and those are counted. Not a driver. Read next: __init__.py.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <vector>

namespace {

constexpr auto kHere = c10::DeviceType::PrivateUse1;
constexpr int64_t kMemory = int64_t{1} << 34;  // what the device says it has

std::atomic<int64_t> allocated{0}, arrived{0}, left{0};  // bytes held; copies in and out

int64_t now_ns() {
  return std::chrono::steady_clock::now().time_since_epoch().count();
}

struct Block {
  void* data;
  int64_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated -= block->bytes;
  std::free(block->data);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 64, bytes ? bytes : 64) == 0, "no memory");
    allocated += static_cast<int64_t>(bytes);
    auto* block = new Block{data, static_cast<int64_t>(bytes)};
    return {data, block, &release, c10::Device(kHere, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

Memory memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kHere; }
  c10::Device exchangeDevice(c10::Device) const override { return {kHere, 0}; }
  c10::Device getDevice() const override { return {kHere, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void record(void** event, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    if (*event == nullptr) *event = new int64_t;
    *static_cast<int64_t*>(*event) = now_ns();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<int64_t*>(event);
  }
  double elapsedTime(void* first, void* last, const c10::DeviceIndex) const override {
    return double(*static_cast<int64_t*>(last) - *static_cast<int64_t*>(first)) / 1e6;
  }

 private:
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, c10::Device(kHere, 0)); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
};

// Tensors over memory that is there.

at::Tensor over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides());
  impl->set_storage_offset(like.storage_offset());
  return made;
}

// The same memory as `own`, shaped as `like`: a view, by torch's rules for version counters.
at::Tensor view(const at::Tensor& own, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(own.storage()), own.key_set(), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_storage_offset(like.storage_offset());
  impl->set_sizes_and_strides(like.sizes(), like.strides());
  return made;
}

// The tensor's memory as the CPU's kernels see it; the tensor keeps it alive.
at::Tensor lend(const at::Tensor& tensor) {
  const auto& storage = tensor.storage();
  c10::DataPtr data(const_cast<void*>(storage.data()), c10::Device(c10::kCPU));
  c10::Storage lent(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                    c10::GetAllocator(c10::kCPU), /*resizable=*/true);
  return over(lent, c10::DispatchKey::CPU, tensor);
}

// A result of the CPU's kernel, from now on this device's.
at::Tensor take(const at::Tensor& tensor) {
  auto* kept = new at::Tensor(tensor);
  const auto& storage = tensor.storage();
  c10::DataPtr data(const_cast<void*>(storage.data()), kept,
                    [](void* context) { delete static_cast<at::Tensor*>(context); },
                    c10::Device(kHere, 0));
  c10::Storage own(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), &memory);
  return over(own, c10::DispatchKey::PrivateUse1, tensor);
}

// The boxed fallback.

struct Loan {
  at::Tensor own, cpu;
};

at::Tensor lent(const at::Tensor& tensor, std::vector<Loan>& loans, const std::string& op) {
  if (!tensor.defined()) return tensor;
  if (tensor.device().type() != kHere) {
    // A real accelerator takes numbers from the host, and nothing else.
    TORCH_CHECK(tensor.dim() == 0, op, " got a tensor on ", tensor.device(), ", others are on ",
                c10::Device(kHere, 0));
    return tensor;
  }
  for (auto& loan : loans)
    if (loan.own.is_same(tensor)) return loan.cpu;
  loans.push_back({tensor, lend(tensor)});
  return loans.back().cpu;
}

at::Tensor returned(const at::Tensor& result, const std::vector<Loan>& loans) {
  if (!result.defined()) return result;
  for (auto& loan : loans)
    if (loan.cpu.is_same(result)) {
      // The kernel may have given its result another shape, and other memory (out=, resize_).
      auto* impl = loan.own.unsafeGetTensorImpl();
      if (result.storage().data() != loan.own.storage().data())
        impl->set_storage_keep_dtype(take(result).storage());
      impl->set_sizes_and_strides(result.sizes(), result.strides());
      return loan.own;
    }
  for (auto& loan : loans)
    if (result.storage().is_alias_of(loan.cpu.storage()))
      return view(loan.own, result);
  return take(result);
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.name();
  std::vector<Loan> loans;
  const auto count = schema.arguments().size();
  auto arguments = torch::jit::last(*stack, count);
  const auto begin = stack->size() - count;
  for (size_t i = 0; i < count; ++i) {
    const auto& value = arguments[i];
    if (value.isTensor()) {
      (*stack)[begin + i] = lent(value.toTensor(), loans, name);
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> made;
      for (const auto& one : value.toTensorVector()) made.push_back(lent(one, loans, name));
      (*stack)[begin + i] = c10::IValue(c10::List<at::Tensor>(made));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> made;
      for (const auto& one : value.toOptionalTensorList()) {
        const std::optional<at::Tensor> tensor = one;
        made.push_back(tensor ? std::optional(lent(*tensor, loans, name)) : std::nullopt);
      }
      (*stack)[begin + i] = c10::IValue(made);
    } else if (value.isDevice()) {
      (*stack)[begin + i] = c10::IValue(c10::Device(c10::kCPU));
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  const auto results = schema.returns().size();
  const auto from = stack->size() - results;
  for (size_t i = 0; i < results; ++i) {
    auto& value = (*stack)[from + i];
    if (value.isTensor()) {
      value = returned(value.toTensor(), loans);
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> made;
      for (const auto& one : value.toTensorVector()) made.push_back(returned(one, loans));
      value = c10::IValue(c10::List<at::Tensor>(made));
    }
  }
}

// What the fallback cannot do: make room, and cross between devices.

at::Tensor make(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor make_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

at::Tensor either(const at::Tensor& tensor) {
  return tensor.device().type() == kHere ? lend(tensor) : tensor;
}

void count_crossing(const at::Tensor& from, const at::Tensor& to) {
  if (from.device().type() == to.device().type()) return;
  (to.device().type() == kHere ? arrived : left) += static_cast<int64_t>(from.nbytes());
}

at::Tensor& copy_into(at::Tensor& self, const at::Tensor& from, bool) {
  count_crossing(from, self);
  either(self).copy_(either(from));
  return self;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  count_crossing(from, to);
  either(to).copy_(either(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  return copy_from(from, to, false);
}

at::Scalar number_of(const at::Tensor& self) {
  return lend(self).item();
}

at::Tensor& point_at(at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size,
                 c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(size, stride);
  return self;
}

int64_t counter(int64_t which) {
  if (which == 3) return kMemory;
  return which == 0 ? allocated.load() : which == 1 ? arrived.load() : left.load();
}

}  // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

static const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  c10::SetAllocator(kHere, &memory);
  return true;
}();

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &make);
  m.impl("empty_strided", &make_strided);
  m.impl("copy_", &copy_into);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &number_of);
  m.impl("set_.source_Storage_storage_offset", &point_at);
}

TORCH_LIBRARY(pretend, m) {
  m.def("counter(int which) -> int", &counter);
}
