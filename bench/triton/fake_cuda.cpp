// What a build of torch without CUDA asks of a CUDA device, answered without one: device 0 is
// there, has one stream, and nothing ever runs on it. Load it before torch is.
//
// Written against the headers of torch 2.13.

#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);
const c10::Stream kStream(c10::Stream::DEFAULT, kDevice);

// Copies to and from fake tensors enter the device's guard.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kDevice.type();
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return 1;
  }
  c10::Device getDevice() const override {
    return kDevice;
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return kDevice;
  }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override {
    return kStream;
  }
  c10::Stream getDefaultStream(c10::Device) const override {
    return kStream;
  }
  c10::Stream getNewStream(c10::Device, int) const override {
    return kStream;
  }
  c10::Stream exchangeStream(c10::Stream) const override {
    return kStream;
  }
};

// Static, as the registry does not own it.
Guard guard;
const c10::impl::DeviceGuardImplRegistrar guard_registrar(c10::DeviceType::CUDA, &guard);

}  // namespace

namespace at {

// What torch asks before it looks for a device.
struct FakeCUDAHooks final : CUDAHooksInterface {
  explicit FakeCUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override {
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

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, FakeCUDAHooks);

namespace accelerator {

// Autograd gives each accelerator a thread, and asks here which one there is. The name is torch's
// own: of two libraries that define it, the one loaded first is called.
std::optional<c10::DeviceType> getAccelerator(bool) {
  return kDevice.type();
}

}  // namespace accelerator
}  // namespace at
