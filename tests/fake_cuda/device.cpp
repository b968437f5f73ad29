// A CUDA device in CPU memory, for tests on machines without a GPU and a build of torch without CUDA.
//
// Tensors are `cuda:0` by device, dispatch key and autograd. Their memory is the CPU's, and every operator runs the
// CPU's kernel on CPU tensors over the same bytes (`run_on_cpu`), after it has checked that no operand lies on another
// device. So it finds what a GPU refuses, tensors that were left on the CPU, and draws random numbers from a generator
// of its own.
//
// It has one device and no streams, counts no memory, knows strided tensors only, and rounds as the CPU does: it says
// nothing about kernels, speed, or numbers on a real GPU. torch looks for these parts at its import, so this library
// must be loaded before. It follows the headers of torch 2.13.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;

namespace {

const c10::Device cuda(c10::kCUDA, 0);

// Memory and the current device

struct DeviceMemory final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        c10::DataPtr data = c10::GetAllocator(c10::kCPU)->allocate(bytes);
        data.unsafe_set_device(cuda);
        return data;
    }

    void copy_data(void* target, const void* source, size_t bytes) const override {
        default_copy_data(target, source, bytes);
    }
};

DeviceMemory memory;
REGISTER_ALLOCATOR(c10::kCUDA, &memory)

struct OneDevice final : c10::impl::NoOpDeviceGuardImpl<c10::kCUDA> {
    c10::Device exchangeDevice(c10::Device) const override { return cuda; }
    c10::Device getDevice() const override { return cuda; }
    c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, cuda); }
};

C10_REGISTER_GUARD_IMPL(CUDA, OneDevice);

// Random numbers

struct DeviceGenerator final : c10::GeneratorImpl {
    at::Generator on_cpu = at::detail::createCPUGenerator();

    DeviceGenerator() : c10::GeneratorImpl(cuda, DispatchKeySet(DispatchKey::CUDA)) {}

    void set_current_seed(uint64_t seed) override { on_cpu.set_current_seed(seed); }
    uint64_t current_seed() const override { return on_cpu.current_seed(); }
    uint64_t seed() override { return on_cpu.seed(); }
    void set_offset(uint64_t offset) override { on_cpu.set_offset(offset); }
    uint64_t get_offset() const override { return on_cpu.get_offset(); }
    void set_state(const c10::TensorImpl& state) override { on_cpu.unsafeGetGeneratorImpl()->set_state(state); }
    c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
        return on_cpu.unsafeGetGeneratorImpl()->get_state();
    }

    DeviceGenerator* clone_impl() const override {
        auto* copy = new DeviceGenerator();
        copy->on_cpu = on_cpu.clone();
        return copy;
    }
};

at::Generator& default_generator() {
    static at::Generator generator = at::make_generator<DeviceGenerator>();
    return generator;
}

at::Generator on_cpu(const at::Generator& generator) {
    TORCH_CHECK(generator.device() == cuda, "Expected a 'cuda' device type for generator but found 'cpu'");
    return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->on_cpu;
}

}  // namespace

// What torch asks of CUDA

namespace at {

// torch looks for this name.
struct CUDAHooks final : CUDAHooksInterface {
    CUDAHooks(CUDAHooksArgs) {}

    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    DeviceIndex deviceCount() const override { return 1; }
    DeviceIndex getCurrentDevice() const override { return 0; }
    Allocator* getPinnedMemoryAllocator() const override { return GetAllocator(kCPU); }
    const Generator& getDefaultGenerator(DeviceIndex) const override { return default_generator(); }

    // The first that Python makes is the default one, kept as torch.cuda.default_generators.
    Generator getNewGenerator(DeviceIndex) const override {
        static bool first = true;
        return std::exchange(first, false) ? default_generator() : make_generator<DeviceGenerator>();
    }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

namespace {

// Operators

// The same bytes as storage of another device; keeps `storage` alive.
c10::Storage storage_on(c10::Device device, const c10::Storage& storage) {
    auto* kept = new c10::Storage(storage);
    auto release = [](void* context) { delete static_cast<c10::Storage*>(context); };
    c10::DataPtr data(storage.mutable_data(), kept, release, device);
    c10::Allocator* allocator = c10::GetAllocator(device.type());
    return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, true);
}

// A tensor over `storage` that is laid out as `tensor` is.
Tensor tensor_over(c10::Storage storage, const Tensor& tensor) {
    DispatchKey key = storage.device() == cuda ? DispatchKey::CUDA : DispatchKey::CPU;
    Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), tensor.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    made._set_conj(tensor.is_conj());
    made._set_neg(tensor.is_neg());
    return made;
}

Tensor on_device(c10::Device device, const Tensor& tensor) {
    return tensor.device() == device ? tensor : tensor_over(storage_on(device, tensor.storage()), tensor);
}

bool laid_out_alike(const Tensor& one, const Tensor& other) {
    return one.sizes() == other.sizes() && one.strides() == other.strides() &&
        one.storage_offset() == other.storage_offset();
}

// `value` with every tensor in it changed.
template <typename Change>
IValue with_tensors(const IValue& value, Change change) {
    if (value.isTensor()) {
        return change(value.toTensor());
    }
    if (value.isTensorList()) {
        c10::List<Tensor> changed;
        for (const Tensor& tensor : value.toTensorVector()) {
            changed.push_back(change(tensor));
        }
        return changed;
    }
    if (value.isOptionalTensorList()) {
        c10::List<std::optional<Tensor>> changed;
        for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
            changed.push_back(tensor ? std::optional<Tensor>(change(*tensor)) : std::nullopt);
        }
        return changed;
    }
    return value;
}

// One call of an operator: which CPU tensor stands for which CUDA tensor.
class Call {
public:
    IValue argument(const IValue& value, const c10::Argument& declared) {
        if (value.isDevice()) {
            return c10::Device(c10::kCPU);
        }
        if (value.isGenerator()) {
            return on_cpu(value.toGenerator());
        }
        if (value.isNone() && *declared.real_type() == *c10::OptionalType::create(c10::GeneratorType::get())) {
            return on_cpu(default_generator());
        }
        bool written = declared.alias_info() && declared.alias_info()->isWrite();
        bool indices = value.isOptionalTensorList();  // they alone may lie on the CPU
        return with_tensors(value, [&](const Tensor& tensor) {
            stranger_ |= tensor.defined() && tensor.is_cpu() && (written || (tensor.dim() > 0 && !indices));
            return tensor.defined() && tensor.is_cuda() ? stand_in(tensor) : tensor;
        });
    }

    void check_devices(const std::string& name) const {
        TORCH_CHECK(
            stand_ins_.empty() || !stranger_,
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (",
            name,
            " on the fake CUDA device)");
    }

    // Sizes and memory that the kernel gave to its arguments, as resize_ and out= do.
    void write_back() {
        for (const StandIn& each : stand_ins_) {
            bool moved = each.cpu.storage().data() != each.bytes;
            if (moved) {
                each.cuda.unsafeGetTensorImpl()->set_storage_keep_dtype(storage_on(cuda, each.cpu.storage()));
            }
            if (moved || !laid_out_alike(each.cpu, each.cuda)) {
                each.cuda.unsafeGetTensorImpl()->set_sizes_and_strides(
                    each.cpu.sizes(), each.cpu.strides(), each.cpu.storage_offset());
            }
        }
    }

    Tensor result(const Tensor& tensor) const {
        if (!tensor.defined()) {
            return tensor;
        }
        for (const StandIn& each : stand_ins_) {
            if (each.cpu.is_same(tensor)) {
                return each.cuda;
            }
            if (each.cpu.storage().is_alias_of(tensor.storage())) {
                return tensor_over(each.cuda.storage(), tensor);
            }
        }
        return on_device(cuda, tensor);
    }

private:
    struct StandIn {
        Tensor cuda, cpu;
        const void* bytes;
    };

    Tensor stand_in(const Tensor& tensor) {
        for (const StandIn& each : stand_ins_) {
            if (each.cuda.is_same(tensor)) {
                return each.cpu;
            }
        }
        Tensor cpu = on_device(c10::kCPU, tensor);
        stand_ins_.push_back({tensor, cpu, cpu.storage().data()});
        return cpu;
    }

    std::vector<StandIn> stand_ins_;
    bool stranger_ = false;
};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto& schema = op.schema();
    Call call;
    size_t first = stack->size() - schema.arguments().size();
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
        (*stack)[first + i] = call.argument((*stack)[first + i], schema.arguments()[i]);
    }
    call.check_devices(schema.name());
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
    call.write_back();
    for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
        (*stack)[i] = with_tensors((*stack)[i], [&](const Tensor& tensor) { return call.result(tensor); });
    }
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
    library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

// Those that make memory, cross between devices, take a storage, or draw without a generator among their arguments

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Device = std::optional<at::Device>;
using Pinned = std::optional<bool>;
using Format = std::optional<at::MemoryFormat>;

const DispatchKeySet keys(DispatchKey::CUDA);

Tensor empty(at::IntArrayRef size, Dtype dtype, Layout, Device, Pinned, Format format) {
    return at::detail::empty_generic(size, &memory, keys, at::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Dtype dtype, Layout, Device, Pinned) {
    return at::detail::empty_strided_generic(size, stride, &memory, keys, at::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
    at::AutoDispatchBelowADInplaceOrView below;
    on_device(c10::kCPU, self).copy_(on_device(c10::kCPU, source));
    return self;
}

Tensor& set_(Tensor& self, c10::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
    self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
    self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
    return self;
}

Tensor& set_storage_(Tensor& self, c10::Storage storage) {
    auto entries = static_cast<int64_t>(storage.nbytes() / self.element_size());
    return set_(self, std::move(storage), 0, {entries}, {1});
}

std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p, std::optional<bool>) {
    Tensor mask = at::empty_like(input, at::kBool).bernoulli_(1 - p);
    return {input * mask / (1 - p), mask};
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
    library.impl("empty.memory_format", empty);
    library.impl("empty_strided", empty_strided);
    library.impl("copy_", copy_);
    library.impl("set_.source_Storage_storage_offset", set_);
    library.impl("set_.source_Storage", set_storage_);
    library.impl("native_dropout", native_dropout);
}

}  // namespace
