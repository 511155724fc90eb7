// What an operator sees of ONNX Runtime: its constants, inputs and outputs as plain tensors. Errors are exceptions here and
// become statuses where ONNX Runtime called.
#pragma once
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "api.h"
#include "onnx_abi.h"

namespace {

// A refusal, with its reason.
struct Refusal : std::exception {
  char message[256];
  const char* what() const noexcept override { return message; }
};

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
[[noreturn]] void
refuse(const char* format, ...) {
  Refusal refusal;
  va_list values;
  va_start(values, format);
  vsnprintf(refusal.message, sizeof refusal.message, format, values);
  va_end(values);
  throw refusal;
}

struct Failure {  // ONNX Runtime's own, passed on
  OrtStatus* status;
};
inline void check(OrtStatus* status) {
  if (status) throw Failure{status};
}

// Run a function, and return its error.
template <class Function> OrtStatus* guarded(const OrtApi* api, Function function) noexcept {
  try {
    function();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return api->create_status(ORT_INVALID_ARGUMENT, error.what());
  } catch (...) {
    return api->create_status(ORT_FAIL, "lightning_muws: unknown error");
  }
}

struct Tensor {
  const void* data = nullptr;
  std::vector<int64_t> shape;
  int64_t count = 0;
  template <class T> const T* as() const { return (const T*)data; }
};

inline const void* data_of(const OrtApi* api, const OrtValue* value) {
  void* data = nullptr;
  if (value) check(api->tensor_data(const_cast<OrtValue*>(value), &data));
  return data;
}

inline Tensor tensor_of(const OrtApi* api, const OrtValue* value, int element, const char* name) {
  OrtTensorInfo* info = nullptr;
  check(api->tensor_info(value, &info));
  std::unique_ptr<OrtTensorInfo, void (*)(OrtTensorInfo*)> owner(info, api->release_tensor_info);
  int given = 0;
  size_t n = 0;
  check(api->element_type(info, &given));
  if (given != element) refuse("%s has elements of type %d, where %d is allowed", name, given, element);
  check(api->count_dimensions(info, &n));
  Tensor tensor;
  tensor.shape.resize(n);
  check(api->dimensions(info, tensor.shape.data(), n));
  tensor.count = 1;
  for (int64_t size : tensor.shape)
    if (size < 0 || __builtin_mul_overflow(tensor.count, size, &tensor.count)) refuse("%s has no valid shape", name);
  tensor.data = data_of(api, value);
  return tensor;
}

// What a node of the file gives: read once, when a session is made.
struct Node {
  const OrtApi* api;
  const OrtKernelInfo* info;
  int64_t threads;  // that a kernel may use

  // The whole numbers of the attribute `geometry`.
  template <size_t N> void geometry(int64_t (&numbers)[N]) const {
    size_t n = 0;
    check(api->int_attributes(info, "geometry", nullptr, &n));
    if (n != N) refuse("geometry has %zu numbers, where %zu are needed", n, N);
    check(api->int_attributes(info, "geometry", numbers, &n));
  }
  // An input that is an initializer; empty if it is left out or no constant.
  Tensor constant(size_t i, int element, const char* name) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(api->constant_input(info, i, &is_constant, &value));
    return is_constant && value ? tensor_of(api, value, element, name) : Tensor{};
  }
  // The same for one that must be given.
  Tensor needed(size_t i, int element, const char* name) const {
    Tensor tensor = constant(i, element, name);
    if (tensor.shape.empty()) refuse("%s is no constant of the file", name);
    return tensor;
  }
};

// One call.
struct Call {
  const OrtApi* api;
  OrtKernelContext* context;

  const OrtValue* value(size_t i) const {
    const OrtValue* found = nullptr;
    check(api->input(context, i, &found));
    return found;
  }
  // Check that a constant is where it was when the session was made: the kernels read it there.
  void expect(size_t i, const void* data, const char* name) const {
    if (data_of(api, value(i)) != data) refuse("%s is no constant of the file", name);
  }
  Tensor input(size_t i, const char* name) const {
    const OrtValue* found = value(i);
    return found ? tensor_of(api, found, ORT_FLOAT, name) : Tensor{};
  }
  float* output(const std::vector<int64_t>& shape) const {
    OrtValue* made = nullptr;
    check(api->output(context, 0, shape.data(), shape.size(), &made));
    return (float*)data_of(api, made);
  }
};

// While it lives, the kernels that this thread calls run on the threads of ONNX Runtime.
class OnThreads : MuwsHost {
 public:
  explicit OnThreads(const Call& call) : MuwsHost{&spread}, call_(call) { muws_use_host(this); }
  OnThreads(const OnThreads&) = delete;
  ~OnThreads() { muws_use_host(nullptr); }

 private:
  struct Job {
    MuwsTask task;
    void* context;
    std::atomic<bool> failed{false};
  };
  static void spread(const MuwsHost* self, int64_t threads, int64_t items, MuwsTask task, void* context) {
    const Call& call = static_cast<const OnThreads*>(self)->call_;
    Job job{task, context};
    const auto run = [](void* data, size_t item) {
      Job& job = *(Job*)data;
      try {
        job.task(job.context, (int64_t)item);
      } catch (...) {  // no memory for the scratch of this thread
        job.failed = true;
      }
    };
    check(call.api->parallel_for(call.context, run, (size_t)items, (size_t)threads, &job));
    if (job.failed) throw std::bad_alloc();
  }
  const Call& call_;
};

struct Input {
  int element;
  bool optional;
};

// An operator whose kernels are of type Kernel: `Kernel(Node)` reads and checks the node, `run(Call)` computes.
template <class Kernel> struct Operator : OrtCustomOp {
  struct Made {
    const OrtApi* api;
    Kernel kernel;
  };
  int64_t threads;
  explicit Operator(int64_t threads) : OrtCustomOp{}, threads(threads) {
    version = ORT_VERSION;
    name = [](const OrtCustomOp*) { return Kernel::NAME; };
    provider = [](const OrtCustomOp*) -> const char* { return "CPUExecutionProvider"; };
    input_type = [](const OrtCustomOp*, size_t i) { return Kernel::INPUTS[i].element; };
    input_kind = [](const OrtCustomOp*, size_t i) { return (int)Kernel::INPUTS[i].optional; };
    count_inputs = [](const OrtCustomOp*) { return sizeof Kernel::INPUTS / sizeof Kernel::INPUTS[0]; };
    output_type = [](const OrtCustomOp*, size_t) { return (int)ORT_FLOAT; };
    output_kind = [](const OrtCustomOp*, size_t) { return 0; };
    count_outputs = [](const OrtCustomOp*) { return (size_t)1; };
    input_memory = [](const OrtCustomOp*, size_t) { return 0; };
    create = [](const OrtCustomOp* self, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
      const int64_t threads = static_cast<const Operator*>(self)->threads;
      return guarded(api, [&] { *kernel = new Made{api, Kernel(Node{api, info, threads})}; });
    };
    compute = [](void* kernel, OrtKernelContext* context) {
      Made& made = *(Made*)kernel;
      return guarded(made.api, [&] { made.kernel.run(Call{made.api, context}); });
    };
    destroy = [](void* kernel) { delete (Made*)kernel; };
  }
};

}  // namespace
