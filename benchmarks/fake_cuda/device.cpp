// A device guard and hooks for CUDA, so that autograd in a CPU build of PyTorch takes fake CUDA
// tensors. There is one device and one stream, and every event has happened.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Device only_device() {
    return Device(DeviceType::CUDA, 0);
  }
  static Stream only_stream() {
    return Stream(Stream::DEFAULT, only_device());
  }
  DeviceType type() const override {
    return DeviceType::CUDA;
  }
  DeviceIndex deviceCount() const noexcept override {
    return 1;
  }
  Device getDevice() const override {
    return only_device();
  }
  Device exchangeDevice(Device) const override {
    return only_device();
  }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override {
    return only_stream();
  }
  Stream getNewStream(Device, int) const override {
    return only_stream();
  }
  Stream exchangeStream(Stream) const override {
    return only_stream();
  }
  bool queryStream(const Stream&) const override {
    return true;
  }
  void synchronizeStream(const Stream&) const override {}
  void record(void**, const Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
};

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return false;
  }
  DeviceIndex deviceCount() const override {
    return 1;
  }
  DeviceIndex getCurrentDevice() const override {
    return 0;
  }
};

c10::impl::DeviceGuardImplRegistrar guard(DeviceType::CUDA, new Guard());

} // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}
