// The kernels as operators of ONNX Runtime, in the domain lightning_muws. What a file holds is checked when a session is
// made, and the shape of an input at every call: no file and no input reads or writes past a tensor.
//
// Every operator runs on the thread that calls it, or on so many of ONNX Runtime's as the session's setting THREADS says.
// Sessions, and calls of one session, may run at once.
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "api.h"
#include "onnx_host.h"

extern "C" const void* muws_nth_level(int64_t n);

namespace {

constexpr const char* THREADS = "lightning_muws.threads";
constexpr int64_t MOST_THREADS = 1024;
constexpr int64_t MOST = 1 << 20;             // of a number of a geometry
constexpr int64_t MOST_COLUMNS = 1 << 16;     // a column's number takes two bytes
constexpr double MOST_WORK = (double)((int64_t)1 << 40);  // numbers of an output, or of what is packed for it
constexpr size_t PLANS = 16;                  // kept by a layer: one for each shape
constexpr int64_t GEMV_SAMPLES = 3;           // up to so many samples, a Linear runs one by one
constexpr int64_t MOST_SUM = 127 * MOST_COLUMNS;  // of an output's 8-bit weights

// The instruction set to use; MUWS_LEVEL selects another by name, as in Python.
const MuwsLevel* level() {
  const char* wanted = std::getenv("MUWS_LEVEL");
  for (int64_t n = 0; const void* level = muws_nth_level(n); n++)
    if (!wanted || !*wanted || std::strcmp(((const MuwsLevel*)level)->name, wanted) == 0) return (const MuwsLevel*)level;
  refuse("MUWS_LEVEL=%.40s is not allowed here: this machine does not have it", wanted);
}

bool among(int64_t number, std::initializer_list<int64_t> allowed) {
  for (int64_t one : allowed)
    if (one == number) return true;
  return false;
}

// How a layer slides over its input; a Linear has a kernel of 1x1.
struct Sliding {
  int64_t out, kh, kw, sh, sw, ph, pw, groups, inputs, dims;

  void check() const {
    const int64_t numbers[] = {out, kh, kw, sh, sw, groups, inputs};
    for (int64_t n : numbers)
      if (n < 1 || n > MOST) refuse("geometry has %lld, where 1 to %lld are allowed", (long long)n, (long long)MOST);
    if (ph < 0 || ph > MOST || pw < 0 || pw > MOST || dims < 1 || dims > 3) refuse("geometry has a wrong padding or rank");
    if (inputs % groups || out % groups) refuse("geometry has groups that do not divide its channels");
    if (dims < 3 && (kh != 1 || sh != 1 || ph)) refuse("geometry of a Linear or a Conv1d has a kernel of several rows");
    if (dims == 1 && (kw * sw * groups != 1 || pw)) refuse("geometry of a Linear has a kernel");
    if (columns() > MOST_COLUMNS) refuse("geometry has more than %lld columns", (long long)MOST_COLUMNS);
  }
  int64_t columns() const { return inputs / groups * kh * kw; }
};

// An input as images (n, c, h, w), and the shape of the output.
struct Images {
  int64_t n, c, h, w, oh, ow, outputs;
  std::vector<int64_t> shape;

  Images(const Sliding& s, const std::vector<int64_t>& x) {
    const auto rank = (int64_t)x.size();
    if (s.dims == 1 ? rank < 1 : rank != s.dims + 1) refuse("the input has %lld dimensions", (long long)rank);
    shape = x;
    if (s.dims == 1) {
      n = 1, c = x.back(), h = w = oh = ow = 1;
      for (int64_t i = 0; i + 1 < rank; i++) n *= x[(size_t)i];
      shape.back() = s.out;
    } else {
      n = x[0], c = x[1], h = s.dims == 3 ? x[2] : 1, w = x.back();
      oh = slid(h, s.ph, s.kh, s.sh), ow = slid(w, s.pw, s.kw, s.sw);
      shape[1] = s.out, shape.back() = ow;
      if (s.dims == 3) shape[2] = oh;
    }
    if (c != s.inputs) refuse("the input has %lld channels, where the layer takes %lld", (long long)c, (long long)s.inputs);
    if (oh < 0 || ow < 0) refuse("the input is smaller than the kernel of the layer");
    if ((double)n * (double)s.out * (double)oh * (double)ow > MOST_WORK ||
        (double)c * (double)s.kh * (double)s.kw * (double)(oh + s.kh) * (double)(ow + s.kw) > MOST_WORK)
      refuse("the input is too large for this layer");
    outputs = n * s.out * oh * ow;
  }
  static int64_t slid(int64_t size, int64_t pad, int64_t kernel, int64_t stride) {
    const int64_t room = size + 2 * pad - kernel;
    return room < 0 ? -1 : room / stride + 1;
  }
};

// y = x + onto, ReLU if asked.
void add(float* y, const float* onto, int64_t n, bool relu) {
  for (int64_t i = 0; i < n; i++) {
    const float sum = y[i] + onto[i];
    y[i] = relu && sum < 0.0f ? 0.0f : sum;
  }
}

// Where the blocks of each block row start; return how many there are.
int64_t check_starts(const Tensor& starts, int64_t row_blocks) {
  const auto* s = starts.as<int32_t>();
  if (starts.count != row_blocks + 1 || s[0] != 0) refuse("starts does not fit the geometry");
  for (int64_t i = 0; i < row_blocks; i++)
    if (s[i + 1] < s[i]) refuse("starts does not grow");
  return s[row_blocks];
}

// The columns of the blocks: each names `width` neighbours among `limit`.
void check_columns(const Tensor& columns, int64_t count, int64_t width, int64_t limit) {
  if (columns.count != count) refuse("columns has %lld numbers for %lld", (long long)columns.count, (long long)count);
  for (int64_t i = 0; i < count; i++)
    if (columns.as<uint16_t>()[i] + width > limit) refuse("columns has a block outside of the matrix");
}

// What may follow a layer's sum: another value of the output's shape.
const float* onto_of(const Call& call, size_t i, const std::vector<int64_t>& shape) {
  const Tensor onto = call.input(i, "onto");
  if (onto.data && onto.shape != shape) refuse("onto has another shape than the output");
  return onto.as<float>();
}

// A Linear or a convolution by packed float32 blocks.
class BlockSparse {
 public:
  static constexpr const char* NAME = "BlockSparse";
  enum { X, WEIGHTS, STARTS, COLUMNS, BIAS, ONTO };
  static constexpr Input INPUTS[] = {{ORT_FLOAT, false}, {ORT_FLOAT, false}, {ORT_INT32, false},
                                     {ORT_INT16, false}, {ORT_FLOAT, true},  {ORT_FLOAT, true}};

  explicit BlockSparse(const Node& node) : level_(level()), threads_(node.threads) {
    int64_t g[14];
    node.geometry(g);
    s_ = Sliding{g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[12], g[13]};
    s_.check();
    const int64_t rows = g[8], cols = g[9], lanes = g[11];
    if (!among(rows, {1, 2, 4, 8}) || !among(cols, {1, 4}) || !among(lanes, {0, 1, 2}) || !among(g[10], {0, 1}))
      refuse("geometry has a block or a flag that is not allowed");
    if (s_.groups > 1 && s_.out / s_.groups % rows) refuse("geometry has blocks that cross groups");
    const int64_t row_blocks = (s_.out + rows - 1) / rows;
    const Tensor weights = node.needed(WEIGHTS, ORT_FLOAT, "weights"), starts = node.needed(STARTS, ORT_INT32, "starts");
    const Tensor columns = node.needed(COLUMNS, ORT_INT16, "columns"), bias = node.constant(BIAS, ORT_FLOAT, "bias");
    const int64_t blocks = check_starts(starts, row_blocks);
    check_columns(columns, blocks, cols, s_.columns());
    if (weights.count != blocks * rows * cols) refuse("weights does not fit the geometry");
    if (bias.data && bias.count != row_blocks * rows) refuse("bias does not fit the geometry");
    layer_ = MuwsLayer{0,    0,    0,          0, s_.out,           0,                      0, s_.kh, s_.kw, s_.sh, s_.sw, s_.ph,
                       s_.pw, s_.groups, rows,  cols, row_blocks, 0, starts.as<int32_t>(), columns.as<uint16_t>()};
    layer_.weights = weights.as<float>(), layer_.bias = bias.as<float>();
    layer_.relu = g[10], layer_.batch_lanes = lanes, layer_.threads = threads_;
  }

  void run(const Call& call) {
    call.expect(WEIGHTS, layer_.weights, "weights");
    call.expect(STARTS, layer_.starts, "starts");
    call.expect(COLUMNS, layer_.columns, "columns");
    call.expect(BIAS, layer_.bias, "bias");
    const Tensor x = call.input(X, "x");
    const Images images(s_, x.shape);
    const float* onto = onto_of(call, ONTO, images.shape);
    float* y = call.output(images.shape);
    if (!images.outputs) return;
    const auto plan = plan_of(images, onto != nullptr);
    const OnThreads on_threads(call);
    if (plan->made)
      level_->run(plan->made, x.as<float>(), plan->adds ? onto : nullptr, y, threads_);
    else
      level_->gemv(&plan->layer, x.as<float>(), y, threads_);
    if (onto && !plan->adds) add(y, onto, images.outputs, layer_.relu != 0);
  }

 private:
  struct Plan {
    const MuwsLevel* level;
    MuwsLayer layer;
    bool adds = false;     // the kernel adds `onto` as it writes
    void* made = nullptr;  // null: a Linear of few samples
    ~Plan() { level->free_plan(made); }
  };

  std::shared_ptr<Plan> plan_of(const Images& images, bool has_onto) {
    const std::array<int64_t, 4> key{images.n, images.h, images.w, has_onto};
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto known = plans_.find(key); known != plans_.end()) return known->second;
    auto plan = std::make_shared<Plan>(Plan{level_, layer_});
    MuwsLayer& l = plan->layer;
    l.n = images.n, l.c = images.c, l.h = images.h, l.w = images.w, l.oh = images.oh, l.ow = images.ow;
    const bool is_linear = l.kh * l.kw * l.h * l.w * l.groups == 1 && !l.ph && !l.pw, few = l.n <= GEMV_SAMPLES;
    plan->adds = has_onto && l.batch_lanes != 1 && !(is_linear && few);
    if (has_onto && !plan->adds) l.relu = 0;
    if (!(is_linear && few) && !(plan->made = level_->plan(&l))) refuse("the input is too large for this layer");
    if (plans_.size() >= PLANS) plans_.clear();
    plans_[key] = plan;
    return plan;
  }

  const MuwsLevel* level_;
  int64_t threads_;
  Sliding s_;
  MuwsLayer layer_;
  std::mutex mutex_;
  std::map<std::array<int64_t, 4>, std::shared_ptr<Plan>> plans_;
};

// A Linear of unified blocks, one bit a weight. Its onto is the bias, or what other blocks computed.
class SignedLinear {
 public:
  static constexpr const char* NAME = "SignedLinear";
  enum { X, MAGNITUDES, MINUS, STARTS, COLUMNS, ONTO };
  static constexpr Input INPUTS[] = {{ORT_FLOAT, false}, {ORT_FLOAT, false}, {ORT_UINT8, false},
                                     {ORT_INT32, false}, {ORT_INT16, false}, {ORT_FLOAT, true}};

  explicit SignedLinear(const Node& node) : level_(level()), threads_(node.threads) {
    int64_t g[5];
    node.geometry(g);
    const int64_t out = g[0], rows = g[1], cols = g[2];
    inputs_ = g[4];
    Sliding{out, 1, 1, 1, 1, 0, 0, 1, inputs_, 1}.check();
    if (!(rows == 4 && cols == 4) && !(among(rows, {4, 8, 16}) && cols >= 8 && cols <= MOST_COLUMNS && cols % 8 == 0))
      refuse("geometry has blocks of %lld x %lld", (long long)rows, (long long)cols);
    if (!among(g[3], {0, 1})) refuse("geometry has a flag that is not allowed");
    const Tensor magnitudes = node.needed(MAGNITUDES, ORT_FLOAT, "magnitudes");
    const Tensor minus = node.needed(MINUS, ORT_UINT8, "minus"), starts = node.needed(STARTS, ORT_INT32, "starts");
    const Tensor columns = node.needed(COLUMNS, ORT_INT16, "columns");
    const int64_t row_blocks = (out + rows - 1) / rows, blocks = check_starts(starts, row_blocks);
    check_columns(columns, blocks, cols, inputs_);
    if (magnitudes.count != blocks) refuse("magnitudes does not fit the geometry");
    if (minus.count != blocks * rows * cols / 8) refuse("minus does not fit the geometry");
    layer_ = MuwsSigns{out, rows, cols, row_blocks, starts.as<int32_t>(), columns.as<uint16_t>(), magnitudes.as<float>(),
                       minus.as<uint8_t>(), g[3]};
  }

  void run(const Call& call) {
    call.expect(MAGNITUDES, layer_.magnitudes, "magnitudes");
    call.expect(MINUS, layer_.minus, "minus");
    call.expect(STARTS, layer_.starts, "starts");
    call.expect(COLUMNS, layer_.columns, "columns");
    const Tensor x = call.input(X, "x");
    const Images images(Sliding{layer_.o, 1, 1, 1, 1, 0, 0, 1, inputs_, 1}, x.shape);
    const float* onto = onto_of(call, ONTO, images.shape);
    float* y = call.output(images.shape);
    for (int64_t i = 0; i < images.outputs; i++) y[i] = onto ? onto[i] : 0.0f;
    const OnThreads on_threads(call);
    for (int64_t n = 0; n < images.n; n++) level_->signs(&layer_, x.as<float>() + n * inputs_, y + n * layer_.o, threads_);
  }

 private:
  const MuwsLevel* level_;
  int64_t threads_;
  int64_t inputs_;
  MuwsSigns layer_;
};

// A Linear or a convolution by packed blocks of 8 bits, which rounds its input to 8 bits.
class Int8Sparse {
 public:
  static constexpr const char* NAME = "Int8Sparse";
  enum { X, WEIGHTS, STARTS, COLUMNS, SUMS, SCALES, BIAS, ACTIVATION, ONTO };
  static constexpr Input INPUTS[] = {{ORT_FLOAT, false}, {ORT_INT8, false},  {ORT_INT32, false},
                                     {ORT_INT16, false}, {ORT_INT32, false}, {ORT_FLOAT, false},
                                     {ORT_FLOAT, true},  {ORT_FLOAT, true},  {ORT_FLOAT, true}};

  explicit Int8Sparse(const Node& node) : level_(level()), threads_(node.threads) {
    int64_t g[15];
    node.geometry(g);
    s_ = Sliding{g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[13], g[14]};
    s_.check();
    const int64_t rows = g[8], loose = g[9], linear = g[10], dynamic = g[11], relu = g[12];
    if (!among(rows, {1, 2, 4}) || !among(loose, {0, 1}) || !among(dynamic, {0, linear}) || !among(relu, {0, 1}))
      refuse("geometry has a block or a flag that is not allowed");
    if (linear != (s_.dims == 1)) refuse("geometry of a Linear has a wrong rank");
    if (s_.groups > 1 && s_.out / s_.groups % rows) refuse("geometry has blocks that cross groups");
    const int64_t row_blocks = (s_.out + rows - 1) / rows;
    const Tensor weights = node.needed(WEIGHTS, ORT_INT8, "weights"), starts = node.needed(STARTS, ORT_INT32, "starts");
    const Tensor columns = node.needed(COLUMNS, ORT_INT16, "columns"), sums = node.needed(SUMS, ORT_INT32, "sums");
    const Tensor scales = node.needed(SCALES, ORT_FLOAT, "scales"), bias = node.constant(BIAS, ORT_FLOAT, "bias");
    const Tensor activation = node.needed(ACTIVATION, ORT_FLOAT, "activation");
    const int64_t blocks = check_starts(starts, row_blocks), quads = (s_.columns() + 3) / 4;
    if (weights.count != blocks * rows * 4) refuse("weights does not fit the geometry");
    check_columns(columns, loose ? 4 * blocks : blocks, 1, loose ? s_.columns() : quads);
    if (sums.count != row_blocks * rows || scales.count != sums.count || (bias.data && bias.count != sums.count))
      refuse("sums, scales or bias does not fit the geometry");
    for (int64_t i = 0; i < sums.count; i++)
      if (sums.as<int32_t>()[i] > MOST_SUM || sums.as<int32_t>()[i] < -MOST_SUM) refuse("sums has a sum that is too large");
    const auto* a = activation.as<float>();
    if (activation.count != 2 || !(a[0] >= 0.0f && a[0] <= 3e38f && a[1] >= 0.0f && a[1] <= 255.0f))
      refuse("activation has no valid scale and zero");
    layer_ = MuwsInt8{0,    0,    0,    0,    s_.out, 0,     0,    s_.kh,   s_.kw,
                      s_.sh, s_.sw, s_.ph, s_.pw, s_.groups, rows, row_blocks, loose, linear, dynamic};
    layer_.starts = starts.as<int32_t>(), layer_.columns = columns.as<uint16_t>(), layer_.weights = weights.as<int8_t>();
    layer_.sums = sums.as<int32_t>(), layer_.scales = scales.as<float>(), layer_.bias = bias.as<float>();
    layer_.activation = a, layer_.relu = relu;
  }

  void run(const Call& call) {
    call.expect(WEIGHTS, layer_.weights, "weights");
    call.expect(STARTS, layer_.starts, "starts");
    call.expect(COLUMNS, layer_.columns, "columns");
    call.expect(SUMS, layer_.sums, "sums");
    call.expect(SCALES, layer_.scales, "scales");
    call.expect(BIAS, layer_.bias, "bias");
    call.expect(ACTIVATION, layer_.activation, "activation");
    const Tensor x = call.input(X, "x");
    const Images images(s_, x.shape);
    const float* onto = onto_of(call, ONTO, images.shape);
    float* y = call.output(images.shape);
    if (!images.outputs) return;
    MuwsInt8 l = layer_;
    l.n = images.n, l.c = images.c, l.h = images.h, l.w = images.w, l.oh = images.oh, l.ow = images.ow;
    const OnThreads on_threads(call);
    level_->int8(&l, x.as<float>(), onto, y, threads_);
  }

 private:
  const MuwsLevel* level_;
  int64_t threads_;
  Sliding s_;
  MuwsInt8 layer_;
};

constexpr Input BlockSparse::INPUTS[];
constexpr Input SignedLinear::INPUTS[];
constexpr Input Int8Sparse::INPUTS[];

// The setting THREADS of a session: 1 if it is not there.
int64_t threads_of(const OrtApi* api, const OrtSessionOptions* options) {
  int given = 0;
  check(api->has_setting(options, THREADS, &given));
  if (!given) return 1;
  char text[16] = "";
  size_t n = 0;
  check(api->setting(options, THREADS, nullptr, &n));
  if (n <= sizeof text) check(api->setting(options, THREADS, text, &n));
  char* end = text;
  const long long threads = std::strtoll(text, &end, 10);
  if (end == text || *end || threads < 1 || threads > MOST_THREADS)
    refuse("%s is not allowed: give a whole number from 1 to %lld", THREADS, (long long)MOST_THREADS);
  return threads;
}

struct Operators {
  Operator<BlockSparse> block_sparse;
  Operator<SignedLinear> signed_linear;
  Operator<Int8Sparse> int8_sparse;
  OrtCustomOpDomain* domain = nullptr;

  explicit Operators(int64_t threads) : block_sparse(threads), signed_linear(threads), int8_sparse(threads) {}
};

// A domain is made once for each ONNX Runtime of the process and number of threads, and lives as long as the library.
OrtCustomOpDomain* domain_of(const OrtApi* api, int64_t threads) {
  static std::mutex mutex;
  static std::map<std::pair<const OrtApi*, int64_t>, std::unique_ptr<Operators>> all;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Operators>& found = all[{api, threads}];
  if (found) return found->domain;
  auto made = std::make_unique<Operators>(threads);
  check(api->create_domain("lightning_muws", &made->domain));
  check(api->add_to_domain(made->domain, &made->block_sparse));
  check(api->add_to_domain(made->domain, &made->signed_linear));
  check(api->add_to_domain(made->domain, &made->int8_sparse));
  found = std::move(made);
  return found->domain;
}

}  // namespace

// What ONNX Runtime calls when a program registers the library.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->table(ORT_VERSION);
  if (!api)  // the function that makes a status has always been the first
    return base->table(1)->create_status(ORT_FAIL, "lightning_muws needs ONNX Runtime 1.17 or newer");
  return guarded(api, [&] { check(api->add_domain(options, domain_of(api, threads_of(api, options)))); });
}
