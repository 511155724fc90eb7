// The C interface: every refusal becomes a code and a message here, and nothing is thrown.
#include <algorithm>
#include <exception>
#include <new>

#include "packed.h"
#include "values.h"

struct MuwsPacked {
  muws::Packed packed;
  explicit MuwsPacked(const std::shared_ptr<muws::Budget> &budget) : packed(budget) {}
};

struct MuwsFile {
  muws::File file;
  template <typename From>
  MuwsFile(From from, uint64_t max_bytes) : file(from, max_bytes) {}
};

namespace {

using Big = unsigned long long;
constexpr uint64_t MOST_SIZE = 1 << 20;  // pixels of a row or a column, and images

int32_t say(MuwsError *error, int32_t code, const char *before, const char *message) {
  if (error) {
    error->code = code;
    snprintf(error->message, sizeof error->message, "%.120s%.380s", before, message);
  }
  return code;
}

// Runs what it is given; `before` is called for what comes before a message.
template <typename Do, typename Before>
int32_t guarded(MuwsError *error, Do what, Before before) {
  try {
    what();
    return say(error, MUWS_OK, "", "");
  } catch (const muws::Refusal &refusal) {
    return say(error, refusal.code, before(), refusal.text);
  } catch (const std::bad_alloc &) {
    return say(error, MUWS_NO_MEMORY, before(), "this machine has no more memory");
  } catch (const std::exception &unexpected) {  // such as a list that is too long
    return say(error, MUWS_REFUSED, before(), unexpected.what());
  }
}

void check_index(const muws::Manifest &manifest, uint64_t index) {
  if (index >= manifest.entries.size())
    muws::refuse_as(MUWS_ARGUMENT, "there is no tensor %llu, the file has %zu", (Big)index, manifest.entries.size());
}

template <typename From>
MuwsFile *opened(From from, uint64_t max_bytes, MuwsError *error) {
  MuwsFile *found = nullptr;
  guarded(error, [&] { found = new MuwsFile(from, max_bytes); }, [] { return ""; });
  return found;
}

}  // namespace

int32_t muws_abi(void) { return MUWS_ABI; }

MuwsFile *muws_open(const char *path, uint64_t max_bytes, MuwsError *error) {
  if (!path) return say(error, MUWS_ARGUMENT, "", "a path is needed, not NULL"), nullptr;
  return opened(path, max_bytes, error);
}

MuwsFile *muws_open_memory(const void *bytes, uint64_t n_bytes, uint64_t max_bytes, MuwsError *error) {
  if (!bytes && n_bytes) return say(error, MUWS_ARGUMENT, "", "the bytes of a file are needed, not NULL"), nullptr;
  return opened(muws::Span{static_cast<const uint8_t *>(bytes), n_bytes}, max_bytes, error);
}

void muws_close(MuwsFile *file) { delete file; }

const char *muws_format_version(const MuwsFile *file) { return file->file.version; }

const char *muws_extra(const MuwsFile *file, uint64_t *n_bytes) {
  if (n_bytes) *n_bytes = file->file.manifest.extra.size();
  return file->file.manifest.extra.c_str();
}

uint64_t muws_n_tensors(const MuwsFile *file) { return file->file.manifest.entries.size(); }

int32_t muws_tensor(const MuwsFile *file, uint64_t index, MuwsTensor *tensor, MuwsError *error) {
  const muws::Manifest &manifest = file->file.manifest;
  return guarded(error, [&] {
    check_index(manifest, index);
    const muws::Entry &given = manifest.entries[index];
    const muws::Entry &entry = given.same_as < 0 ? given : manifest.entries[size_t(given.same_as)];
    *tensor = {manifest.name(given), given.name_bytes, name_of(entry.dtype), name_of(entry.stored), manifest.sizes.data() + given.axes,
               given.n_axes, given.numel, given.n_bytes, {entry.block[0], entry.block[1]},
               {entry.kinds[0], entry.kinds[1], entry.kinds[2]}, entry.error, given.same_as, given.is_copy};
  }, [] { return ""; });
}

int64_t muws_find(const MuwsFile *file, const char *name) {
  const muws::Manifest &manifest = file->file.manifest;
  const size_t n = name ? strlen(name) : 0;
  const auto is_before = [&](uint32_t at, const char *other) { return manifest.compare(manifest.entries[at], other, n) < 0; };
  const auto found = std::lower_bound(manifest.by_name.begin(), manifest.by_name.end(), name ? name : "", is_before);
  return name && found != manifest.by_name.end() && !manifest.compare(manifest.entries[*found], name, n) ? int64_t(*found) : -1;
}

int32_t muws_decode(MuwsFile *file, uint64_t index, int32_t as, void *out, uint64_t out_bytes, MuwsError *error) {
  const muws::Manifest &manifest = file->file.manifest;
  char before[124] = "";
  return guarded(error, [&] {
    check_index(manifest, index);
    const muws::Entry &entry = manifest.entries[index];
    snprintf(before, sizeof before, "tensor '%s': ", manifest.shown(entry).text);
    if (as != MUWS_OWN && as != MUWS_FLOAT32) muws::refuse_as(MUWS_ARGUMENT, "%d is no way to decode: give MUWS_OWN or MUWS_FLOAT32", as);
    const bool is_float32 = as == MUWS_FLOAT32;
    if (is_float32 && !muws::has_float32(entry.dtype))
      muws::refuse_as(MUWS_ARGUMENT, "it is %s, which cannot become float32: give MUWS_OWN", name_of(entry.dtype));
    const uint64_t size = is_float32 ? 4 : width_of(entry.dtype), needed = entry.numel * size;
    if (out_bytes != needed)
      muws::refuse_as(MUWS_ARGUMENT, "it takes %llu bytes, %llu were given", (Big)needed, (Big)out_bytes);
    if (!needed) return;
    if (!out || uintptr_t(out) % std::min<uint64_t>(size, 8))
      muws::refuse_as(MUWS_ARGUMENT, "memory is needed that lies at a multiple of its element, as that of malloc does");
    file->file.decode(index, is_float32, static_cast<uint8_t *>(out));
  }, [&] { return before; });
}

int32_t muws_verify(MuwsFile *file, MuwsError *error) {
  return guarded(error, [&] { file->file.verify(); }, [] { return ""; });
}

uint64_t muws_peak_bytes(const MuwsFile *file) { return file->file.budget.peak; }

int32_t muws_stored_bytes(MuwsFile *file, double *n_bytes, uint64_t n, MuwsError *error) {
  return guarded(error, [&] {
    const uint64_t needed = file->file.manifest.entries.size();
    if (n != needed || !n_bytes) muws::refuse_as(MUWS_ARGUMENT, "memory for %llu numbers is needed, not %llu", (Big)needed, (Big)n);
    file->file.stored_bytes(n_bytes);
  }, [] { return ""; });
}

MuwsPacked *muws_pack(MuwsFile *file, uint64_t index, int32_t form, MuwsError *error) {
  const muws::Manifest &manifest = file->file.manifest;
  char before[124] = "";
  std::unique_ptr<MuwsPacked> found;
  const int32_t code = guarded(error, [&] {
    check_index(manifest, index);
    snprintf(before, sizeof before, "tensor '%s': ", manifest.shown(manifest.entries[index]).text);
    if (form != MUWS_VALUES && form != MUWS_SIGNS)
      muws::refuse_as(MUWS_ARGUMENT, "%d is no form of packed weights: give MUWS_VALUES or MUWS_SIGNS", form);
    found.reset(new MuwsPacked(file->file.shared));
    file->file.pack(index, form == MUWS_SIGNS, found->packed);
  }, [&] { return before; });
  return code ? nullptr : found.release();
}

void muws_free_packed(MuwsPacked *packed) {
  if (!packed) return;
  const std::shared_ptr<muws::Budget> budget = packed->packed.budget;
  delete packed;
  budget->drop();
}

void muws_packed(const MuwsPacked *packed, MuwsBlocksInfo *info) {
  const muws::Packed &one = packed->packed;
  const auto list = [](const muws::BlockList &blocks) {
    return MuwsBlockList{uint64_t(blocks.rows), uint64_t(blocks.cols), uint64_t(blocks.row_blocks), uint64_t(blocks.n), blocks.first(), blocks.column()};
  };
  *info = {one.outputs, one.inputs, one.n_bytes(), list(one.values), one.weight(), list(one.signs), one.magnitude(), one.minus.data()};
}

int32_t muws_linear(const MuwsPacked *packed, const float *x, uint64_t inputs, float *y, uint64_t outputs, uint64_t n,
                    const float *bias, int32_t relu, MuwsError *error) {
  return guarded(error, [&] {
    const muws::Packed &one = packed->packed;
    if (inputs != one.inputs || outputs != one.outputs)
      muws::refuse_as(MUWS_ARGUMENT, "the layer has %llu inputs and %llu outputs, not %llu and %llu", (Big)one.inputs, (Big)one.outputs,
                      (Big)inputs, (Big)outputs);
    const bool is_needed[] = {n && inputs, n && outputs};
    if ((is_needed[0] && !x) || (is_needed[1] && !y)) muws::refuse_as(MUWS_ARGUMENT, "an input and an output are needed, not NULL");
    one.linear(x, y, n, bias, relu != 0);
  }, [] { return ""; });
}

int32_t muws_conv2d(const MuwsPacked *packed, const MuwsConv2d *shape, const float *x, float *y, uint64_t y_numel, const float *bias,
                    int32_t relu, MuwsError *error) {
  return guarded(error, [&] {
    const muws::Packed &one = packed->packed;
    const uint64_t sizes[] = {shape->height, shape->width};
    uint64_t out[2], plane = 1;
    for (int axis = 0; axis < 2; axis++) {
      const uint64_t size = sizes[axis], kernel = shape->kernel[axis], stride = shape->stride[axis], padding = shape->padding[axis];
      if (size > MOST_SIZE || padding > MOST_SIZE || stride > MOST_SIZE || !stride || !kernel || kernel > size + 2 * padding)
        muws::refuse_as(MUWS_ARGUMENT, "a kernel of %llu with stride %llu and padding %llu does not fit %llu pixels", (Big)kernel, (Big)stride,
                        (Big)padding, (Big)size);
      out[axis] = (size + 2 * padding - kernel) / stride + 1;
      plane *= out[axis];
    }
    const uint64_t columns = shape->channels > muws::MOST_COLUMNS ? 0 : shape->channels * shape->kernel[0] * shape->kernel[1];
    if (shape->kernel[0] > muws::MOST_COLUMNS || shape->kernel[1] > muws::MOST_COLUMNS || columns != one.inputs)
      muws::refuse_as(MUWS_ARGUMENT, "the weight has %llu columns, not %llu channels of %llux%llu", (Big)one.inputs, (Big)shape->channels,
                      (Big)shape->kernel[0], (Big)shape->kernel[1]);
    if (one.signs.n) muws::refuse_as(MUWS_ARGUMENT, "a convolution needs a weight that was packed with MUWS_VALUES");
    const bool is_small = shape->n <= MOST_SIZE && one.outputs <= MOST_SIZE;
    const uint64_t planes = is_small ? shape->n * one.outputs : 0;
    if (!is_small || (planes ? y_numel % planes || y_numel / planes != plane : y_numel))
      muws::refuse_as(MUWS_ARGUMENT, "the output has %llu images of %llux%llux%llu, not %llu numbers", (Big)shape->n, (Big)one.outputs, (Big)out[0],
                      (Big)out[1], (Big)y_numel);
    if (!y_numel) return;
    if (!x || !y) muws::refuse_as(MUWS_ARGUMENT, "an input and an output are needed, not NULL");
    one.conv2d(*shape, out, x, y, bias, relu != 0);
  }, [] { return ""; });
}
