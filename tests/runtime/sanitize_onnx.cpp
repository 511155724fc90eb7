// Runs the operators for ONNX Runtime under the sanitizers, in a host of its own: layers at random, most of them damaged, over
// memory of exactly the size asked for. See tests/runtime/sanitize.sh.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../lightning_muws/runtime/native/src/onnx_abi.h"

static std::mt19937_64 generator(0);
static int64_t any(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

struct OrtStatus {
  std::string message;
};
struct OrtValue {
  int element;
  std::vector<int64_t> shape;
  char* data = nullptr;

  OrtValue(int element, std::vector<int64_t> shape) : element(element), shape(std::move(shape)) {
    data = (char*)malloc((size_t)(count() * size()));
    for (int64_t i = 0; i < count() * size(); i++) data[i] = 0;
  }
  OrtValue(const OrtValue&) = delete;
  ~OrtValue() { free(data); }
  int64_t count() const {
    int64_t n = 1;
    for (int64_t side : shape) n *= side;
    return n;
  }
  int64_t size() const { return element == ORT_FLOAT || element == ORT_INT32 ? 4 : element == ORT_INT16 ? 2 : 1; }
  template <class T> T& at(int64_t i) { return ((T*)data)[i]; }
};
struct OrtTensorInfo {
  const OrtValue* value;
};
typedef std::vector<OrtValue*> Values;
struct OrtKernelInfo {
  std::vector<int64_t> geometry;
  Values inputs;
};
struct OrtKernelContext {
  Values inputs;
  OrtValue* output = nullptr;
};
struct OrtCustomOpDomain {
  std::vector<const OrtCustomOp*> operators;
};
struct OrtSessionOptions {
  std::string threads;  // empty: not set
  OrtCustomOpDomain* domain = nullptr;
};

static OrtStatus* fail(const char* message) { return new OrtStatus{message}; }

static OrtApi api_of_here() {
  OrtApi api{};
  api.create_status = [](int, const char* message) { return fail(message); };
  api.create_domain = [](const char*, OrtCustomOpDomain** out) -> OrtStatus* {
    *out = new OrtCustomOpDomain;
    return nullptr;
  };
  api.add_to_domain = [](OrtCustomOpDomain* domain, const OrtCustomOp* op) -> OrtStatus* {
    domain->operators.push_back(op);
    return nullptr;
  };
  api.add_domain = [](OrtSessionOptions* options, OrtCustomOpDomain* domain) -> OrtStatus* {
    options->domain = domain;
    return nullptr;
  };
  api.tensor_data = [](OrtValue* value, void** out) -> OrtStatus* {
    *out = value->data;
    return nullptr;
  };
  api.tensor_info = [](const OrtValue* value, OrtTensorInfo** out) -> OrtStatus* {
    *out = new OrtTensorInfo{value};
    return nullptr;
  };
  api.release_tensor_info = [](OrtTensorInfo* info) { delete info; };
  api.element_type = [](const OrtTensorInfo* info, int* out) -> OrtStatus* {
    *out = info->value->element;
    return nullptr;
  };
  api.count_dimensions = [](const OrtTensorInfo* info, size_t* out) -> OrtStatus* {
    *out = info->value->shape.size();
    return nullptr;
  };
  api.dimensions = [](const OrtTensorInfo* info, int64_t* out, size_t n) -> OrtStatus* {
    for (size_t i = 0; i < n; i++) out[i] = info->value->shape[i];
    return nullptr;
  };
  api.input = [](const OrtKernelContext* context, size_t i, const OrtValue** out) -> OrtStatus* {
    *out = i < context->inputs.size() ? context->inputs[i] : nullptr;
    return nullptr;
  };
  api.output = [](OrtKernelContext* context, size_t, const int64_t* shape, size_t n, OrtValue** out) -> OrtStatus* {
    double count = 1;
    for (size_t i = 0; i < n; i++) count *= (double)shape[i];
    if (count > 1 << 22) return fail("too large for this test");
    *out = context->output = new OrtValue(ORT_FLOAT, std::vector<int64_t>(shape, shape + n));
    return nullptr;
  };
  api.int_attributes = [](const OrtKernelInfo* info, const char*, int64_t* out, size_t* n) -> OrtStatus* {
    const size_t room = *n;
    *n = info->geometry.size();
    if (out && room < *n) return fail("no room");
    for (size_t i = 0; out && i < *n; i++) out[i] = info->geometry[i];
    return nullptr;
  };
  api.has_setting = [](const OrtSessionOptions* options, const char*, int* out) -> OrtStatus* {
    *out = !options->threads.empty();
    return nullptr;
  };
  api.setting = [](const OrtSessionOptions* options, const char*, char* out, size_t* n) -> OrtStatus* {
    *n = options->threads.size() + 1;
    if (out) memcpy(out, options->threads.c_str(), *n);
    return nullptr;
  };
  api.parallel_for = [](const OrtKernelContext*, void (*task)(void*, size_t), size_t items, size_t, void* context) -> OrtStatus* {
    for (size_t i = items; i-- > 0;) task(context, i);
    return nullptr;
  };
  api.constant_input = [](const OrtKernelInfo* info, size_t i, int* is_constant, const OrtValue** out) -> OrtStatus* {
    *out = i > 0 && i < info->inputs.size() ? info->inputs[i] : nullptr;
    *is_constant = *out != nullptr;
    return nullptr;
  };
  return api;
}

struct Case {
  int kind;  // 0: BlockSparse, 1: SignedLinear, 2: Int8Sparse
  std::vector<int64_t> geometry, x;
  Values inputs;
  ~Case() {
    for (OrtValue* value : inputs) delete value;
  }
};

static int64_t pick(std::initializer_list<int64_t> numbers) { return numbers.begin()[any(0, (int64_t)numbers.size() - 1)]; }

// Blocks at random: where those of each block row start, and the columns of each, `width` below `limit`.
static int64_t add_blocks(Case& c, int64_t row_blocks, int64_t limit, int64_t per_block) {
  auto* starts = new OrtValue(ORT_INT32, {row_blocks + 1});
  for (int64_t i = 0; i < row_blocks; i++) starts->at<int32_t>(i + 1) = starts->at<int32_t>(i) + (int32_t)any(0, 3);
  const int64_t blocks = starts->at<int32_t>(row_blocks);
  auto* columns = new OrtValue(ORT_INT16, {blocks * per_block});
  for (int64_t i = 0; i < blocks * per_block; i++) columns->at<uint16_t>(i) = (uint16_t)any(0, limit - 1);
  c.inputs.push_back(starts);
  c.inputs.push_back(columns);
  return blocks;
}

static OrtValue* floats(std::vector<int64_t> shape) {
  auto* value = new OrtValue(ORT_FLOAT, std::move(shape));
  for (int64_t i = 0; i < value->count(); i++) value->at<float>(i) = (float)any(-9, 9);
  return value;
}

static void random_case(Case& c) {
  c.kind = (int)any(0, 2);
  if (c.kind == 1) {
    const int64_t rows = pick({4, 8, 16}), cols = rows == 4 && any(0, 1) ? 4 : 8 * any(1, 2), in = cols + any(0, 20);
    const int64_t out = any(1, 40), row_blocks = (out + rows - 1) / rows;
    c.geometry = {out, rows, cols, any(0, 1), in};
    c.x = {any(0, 3), in};
    const int64_t blocks = add_blocks(c, row_blocks, in - cols + 1, 1);
    auto* minus = new OrtValue(ORT_UINT8, {blocks * rows * cols / 8});
    for (int64_t i = 0; i < minus->count(); i++) minus->at<uint8_t>(i) = (uint8_t)any(0, 255);
    c.inputs.insert(c.inputs.begin(), {nullptr, floats({blocks}), minus});
    c.inputs.push_back(any(0, 1) ? floats({c.x[0], out}) : nullptr);
    return;
  }
  const int64_t dims = c.kind == 2 ? pick({1, 3}) : any(1, 3), n = any(0, 1) ? any(0, 4) : any(5, 20);
  const int64_t kh = dims == 3 ? any(1, 3) : 1, kw = dims > 1 ? any(1, 3) : 1, groups = dims > 1 ? any(1, 2) : 1;
  const int64_t sh = dims == 3 ? any(1, 3) : 1, sw = dims > 1 ? any(1, 3) : 1, ph = dims == 3 ? any(0, 3) : 0;
  const int64_t pw = dims > 1 ? any(0, 3) : 0, h = dims == 3 ? any(kh, 9) : 1, w = dims > 1 ? any(kw, 21) : 1;
  const int64_t rows = c.kind == 2 ? pick({1, 2, 4}) : pick({1, 2, 4, 8}), in = groups * any(1, 9);
  const int64_t out = groups > 1 ? groups * rows * any(1, 3) : any(1, 21), row_blocks = (out + rows - 1) / rows;
  const int64_t width = in / groups * kh * kw, relu = any(0, 1);
  c.x = dims == 1 ? std::vector<int64_t>{n, in} : dims == 2 ? std::vector<int64_t>{n, in, w} : std::vector<int64_t>{n, in, h, w};
  c.geometry = {out, kh, kw, sh, sw, ph, pw, groups, rows};
  if (c.kind == 0) {
    const int64_t cols = width >= 4 ? pick({1, 4}) : 1;
    c.geometry.insert(c.geometry.end(), {cols, relu, any(0, 2), in, dims});
    const int64_t blocks = add_blocks(c, row_blocks, width - cols + 1, 1);
    c.inputs.insert(c.inputs.begin(), {nullptr, floats({blocks, cols, rows})});
    c.inputs.push_back(any(0, 1) ? floats({row_blocks * rows}) : nullptr);
  } else {
    const int64_t loose = any(0, 1), linear = dims == 1;
    c.geometry.insert(c.geometry.end(), {loose, linear, linear ? any(0, 1) : 0, relu, in, dims});
    const int64_t blocks = add_blocks(c, row_blocks, loose ? width : (width + 3) / 4, loose ? 4 : 1);
    auto *weights = new OrtValue(ORT_INT8, {blocks, rows, 4}), *sums = new OrtValue(ORT_INT32, {row_blocks * rows});
    for (int64_t i = 0; i < weights->count(); i++) weights->at<int8_t>(i) = (int8_t)any(-127, 127);
    OrtValue* activation = floats({2});
    activation->at<float>(0) = (float)any(0, 3), activation->at<float>(1) = (float)any(0, 255);
    c.inputs.insert(c.inputs.begin(), {nullptr, weights});
    c.inputs.insert(c.inputs.end(), {sums, floats({row_blocks * rows}), any(0, 1) ? floats({row_blocks * rows}) : nullptr});
    c.inputs.push_back(activation);
  }
}

static void damage(Case& c) {
  const int64_t numbers[] = {-1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 63, 255, 65535, 65536, 1 << 20, (int64_t)1 << 31, INT64_MAX, INT64_MIN};
  const int64_t number = numbers[any(0, 17)];
  OrtValue* value = c.inputs[(size_t)any(1, (int64_t)c.inputs.size() - 1)];
  if (!value || any(0, 2) == 0) {
    if (any(0, 9) == 0)
      c.geometry.resize((size_t)any(0, 16));
    else
      c.geometry[(size_t)any(0, (int64_t)c.geometry.size() - 1)] = number;
  } else if (any(0, 2) == 0) {
    for (OrtValue*& one : c.inputs)
      if (one == value) one = new OrtValue(value->element, {any(0, value->count() + 1)});
    delete value;
  } else if (value->count()) {
    memcpy(value->data + any(0, value->count() - 1) * value->size(), &number, (size_t)value->size());
  }
  if (any(0, 5) == 0) c.x[(size_t)any(0, (int64_t)c.x.size() - 1)] = any(0, 12);
  if (any(0, 9) == 0) c.x.push_back(any(0, 3));
}

int main(int argc, char** argv) {  // the library, and how many layers
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
  const auto enter = (OrtStatus * (*)(OrtSessionOptions*, const OrtApiBase*)) dlsym(library, "RegisterCustomOps");
  static const OrtApi api = api_of_here();
  const OrtApiBase base{[](uint32_t) -> const OrtApi* { return &api; }, nullptr};
  OrtSessionOptions sessions[2] = {{"", nullptr}, {"3", nullptr}};
  for (OrtSessionOptions& options : sessions)
    if (enter(&options, &base) || options.domain->operators.size() != 3) return fprintf(stderr, "not registered\n"), 1;
  int64_t refused[2] = {0, 0}, ran[2] = {0, 0};
  const int64_t count = argc > 2 ? atoll(argv[2]) : 2000;
  for (int64_t i = 0; i < count; i++) {
    Case c;
    random_case(c);
    const bool bad = any(0, 3) != 0;
    if (bad) damage(c);
    const OrtCustomOp* op = sessions[any(0, 1)].domain->operators[(size_t)c.kind];
    OrtKernelInfo info{c.geometry, c.inputs};
    void* kernel = nullptr;
    OrtStatus* status = op->create(op, &api, &info, &kernel);
    for (int call = 0; !status && call < 2; call++) {
      OrtValue* x = floats(c.x);
      OrtKernelContext context{c.inputs};
      context.inputs[0] = x;
      status = op->compute(kernel, &context);
      delete context.output;
      delete x;
    }
    if (kernel) op->destroy(kernel);
    if (status && !bad) return fprintf(stderr, "a good layer is refused: %s\n", status->message.c_str()), 1;
    (status ? refused : ran)[bad]++;
    delete status;
  }
  printf("ONNX operators: %lld good layers ran; %lld of the damaged ran, %lld were refused\n", (long long)ran[0],
         (long long)ran[1], (long long)refused[1]);
  return ran[0] && ran[1] && refused[1] ? 0 : 1;
}
