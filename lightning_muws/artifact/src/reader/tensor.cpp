// Tensors from a decoded chunk: blocks, edges, flat values and bytes of other dtypes.
#include <algorithm>

#include "file.h"
#include "streams.h"
#include "values.h"

namespace muws {

namespace {

constexpr uint64_t SLAB = 1 << 15;  // values that are decoded together: they stay in a core's cache
using Big = unsigned long long;

// Takes the values of one list of a chunk, such as the free ones of float32.
struct Values {
  const Plane *planes;
  uint32_t width;
  uint64_t at;
  const uint8_t *zeros;

  // Writes the next n patterns.
  void take(uint64_t n, uint8_t *out) {
    const bool is_zero = std::none_of(planes, planes + width, [](const Plane &plane) { return plane.data != nullptr; });
    if (is_zero) {
      memset(out, 0, n * width);
      at += n;
      return;
    }
    for (uint64_t some; n; n -= some, out += some * width, at += some) {
      some = std::min(n, SLAB);
      const uint8_t *from[8];
      for (uint32_t i = 0; i < width; i++) from[i] = planes[i].data ? planes[i].data + at : zeros;
      muws_join_planes(width, from, int64_t(some), out);
    }
  }
};

// Writes values of a piece to their place in a tensor, or passes them on; with neither place nor sink it only checks them.
class Target {
 public:
  Target(Budget &budget, const Manifest &all, const Entry &one, const uint64_t *sizes, bool to_float, uint8_t *to, Sink *sink_,
         uint64_t most)
      : manifest(all), entry(one), as_float32(to_float && one.dtype != FLOAT32), out(to), sink(sink_), width(width_of(one.dtype)),
        size(to_float ? 4 : width), values(budget, as_float32 ? most * width : 0), last(budget, !to || one.is_turned ? most * size : 0) {
    if (!one.is_turned) return;
    for (uint64_t axis = 2; axis < one.n_axes; axis++) inner *= sizes[axis];
    n_out = sizes[1], n_in = sizes[0] / one.groups;
  }

  // Whether patterns are what is written, in rows that follow each other.
  bool is_direct() const { return out && is_plain(entry) && !as_float32 && !entry.is_turned; }
  uint8_t *place(uint64_t row, uint64_t col) const { return out + (row * entry.cols + col) * size; }

  // Converts n patterns, which is at most what was declared, and writes them from a row and a column on.
  void write(uint64_t row, uint64_t col, const uint8_t *patterns, uint64_t n) {
    uint8_t *to = out && !entry.is_turned ? place(row, col) : last.data();
    uint8_t *middle = as_float32 ? values.data() : to;
    if (entry.has_form) to_values(manifest, entry, patterns, n, middle);
    else memcpy(middle, patterns, n * width);
    if (as_float32) to_float32(entry.dtype, middle, n, to);
    if (sink) sink->put(row, col, reinterpret_cast<const float *>(to), n);
    else if (out && entry.is_turned) scatter(row, col, to, n);
  }

 private:
  // The matrix of a transposed convolution has its axes swapped in each group.
  void scatter(uint64_t row, uint64_t col, const uint8_t *from, uint64_t n) const {
    const uint64_t group = row / n_out, o = row % n_out;
    for (uint64_t some; n; n -= some, col += some, from += some * size) {
      const uint64_t i = col / inner, k = col % inner;
      some = std::min(n, inner - k);
      memcpy(out + (((group * n_in + i) * n_out + o) * inner + k) * size, from, some * size);
    }
  }

  const Manifest &manifest;
  const Entry &entry;
  bool as_float32;
  uint8_t *out;
  Sink *sink;
  uint64_t width, size, inner = 1, n_out = 1, n_in = 1;
  Bytes values, last;
};

// Blocks of a slab from the lists of a chunk.
class Blocks {
 public:
  Blocks(Budget &budget, const Entry &one, Values all_magnitudes, Values all_free, const Plane &packed, uint64_t at, uint64_t most)
      : entry(one), magnitudes(all_magnitudes), free(all_free), signs(packed.data), n_signs(at), width(all_free.width),
        own_magnitudes(budget, most / one.block_numel() * width), own_free(budget, most * width), own_signs(budget, most) {}

  // Writes `down` times `across` blocks of these kinds, in rows of `stride` patterns.
  void join(uint8_t *kinds, uint64_t down, uint64_t across, uint8_t *out, uint64_t stride) {
    const uint64_t numel = entry.block_numel();
    uint64_t found[5] = {};
    for (uint64_t i = 0; i < down * across; i++) found[kinds[i]]++;
    const uint64_t n_magnitudes = found[1] + found[3] + found[4], n_free = found[0] * numel, n_mixed = found[1] * numel;
    magnitudes.take(n_magnitudes, own_magnitudes.data());
    free.take(n_free, own_free.data());
    for (uint64_t i = 0; i < n_mixed; i++, n_signs++) own_signs.data()[i] = signs ? signs[n_signs >> 3] >> (n_signs & 7) & 1 : 0;
    const MuwsBlocks blocks = {int64_t(width), int64_t(down), int64_t(across), int64_t(entry.block[0]), int64_t(entry.block[1]),
                               int64_t(stride), out};
    const MuwsParts parts = {kinds, own_signs.data(), own_magnitudes.data(), own_free.data(), int64_t(n_mixed), int64_t(n_magnitudes),
                             int64_t(n_free)};
    if (muws_join_blocks(&parts, &blocks)) REFUSE("its blocks do not fit its kinds");
  }

  Values &rest() { return free; }

 private:
  const Entry &entry;
  Values magnitudes, free;
  const uint8_t *signs;
  uint64_t n_signs, width;
  Bytes own_magnitudes, own_free, own_signs;
};

// Writes n values from a row and a column on, one row or the rows of a flat tensor.
void write_run(Target &target, Values &values, uint64_t row, uint64_t col, uint64_t n, bool is_flat, Bytes &patterns) {
  if (target.is_direct()) {
    values.take(n, target.place(row, col));
    return;
  }
  for (uint64_t done = 0, some; done < n; done += some) {
    some = std::min(n - done, patterns.size() / values.width);
    values.take(some, patterns.data());
    if (is_flat) target.write(row + done, col, patterns.data(), some);
    else target.write(row, col + done, patterns.data(), some);
  }
}

}  // namespace

void File::decode(uint64_t index, bool as_float32, uint8_t *out, Sink *sink) {
  const Entry &given = manifest.entries[index];
  Entry &entry = given.same_as < 0 ? manifest.entries[index] : manifest.entries[size_t(given.same_as)];
  if (entry.first_chunk == UINT64_MAX) return;  // it is empty
  if (entry.has_blocks() && !entry.is_checked) {
    if (entry.first_chunk == entry.last_chunk) load(entry.first_chunk);
    else loaded = Loaded(budget);  // so that what is refused does not depend on what was read before
    check_kinds(entry.first_chunk, entry.last_chunk);
    entry.is_checked = true;
  }
  for (uint64_t i = entry.first_chunk; i <= entry.last_chunk; i++) {
    load(i);
    const Chunk &chunk = manifest.chunks[i];
    for (uint64_t k = chunk.pieces; k < chunk.pieces + chunk.n_pieces; k++)
      if (manifest.pieces[k].tensor == uint64_t(&entry - manifest.entries.data())) decode_piece(i, k, as_float32, out, sink);
  }
}

void File::verify() {
  loaded = Loaded(budget);
  if (!manifest.chunks.empty()) check_kinds(0, manifest.chunks.size() - 1);
  for (uint64_t i = 0; i < manifest.chunks.size(); i++) {
    load(i);
    const Chunk &chunk = manifest.chunks[i];
    for (uint64_t k = chunk.pieces; k < chunk.pieces + chunk.n_pieces; k++) {
      const Entry &entry = manifest.entries[manifest.pieces[k].tensor];
      if (entry.dtype != BOOL && entry.stored != PALETTE) continue;  // they cannot be wrong
      try {
        decode_piece(i, k, false, nullptr, nullptr);
      } catch (Refusal &refusal) {
        Refusal named{refusal.code, ""};
        snprintf(named.text, sizeof named.text, "tensor '%s': %.380s", manifest.shown(entry).text, refusal.text);
        throw named;
      }
    }
  }
}

void File::decode_piece(uint64_t chunk, uint64_t index, bool as_float32, uint8_t *out, Sink *sink) {
  const Piece &piece = manifest.pieces[index];
  const Entry &entry = manifest.entries[piece.tensor];
  const Counts &before = loaded.before[index - manifest.chunks[chunk].pieces];
  const uint64_t rows = piece.stop - piece.start, cols = entry.cols, numel = rows * cols, some = std::min(numel, SLAB);
  if (!numel) return;
  const uint32_t width = width_of(entry.has_form ? entry.stored : entry.dtype);
  Target target(budget, manifest, entry, manifest.sizes.data() + entry.axes, as_float32, out, sink, some);
  Bytes patterns(budget, some * width), zeros(budget, some);
  memset(zeros.data(), 0, some);

  if (!entry.has_form) {
    for (uint64_t done = 0, n; done < numel; done += n) {
      n = std::min(numel - done, some);
      for (uint32_t i = 0; i < width; i++) {
        const uint8_t *from = loaded.other.data ? loaded.other.data + before.other + i * numel + done : zeros.data();
        for (uint64_t k = 0; k < n; k++) patterns.data()[k * width + i] = from[k];
      }
      if (entry.dtype == BOOL)
        for (uint64_t k = 0; k < n; k++)
          if (patterns.data()[k] > 1) REFUSE("it has a bool of %d, only 0 and 1 are allowed", patterns.data()[k]);
      target.write(piece.start + done, 0, patterns.data(), n);
    }
    return;
  }

  Values magnitudes{loaded.magnitudes[entry.stored], width, before.magnitudes, zeros.data()};
  Values free{loaded.free[entry.stored], width, before.free, zeros.data()};
  if (!entry.has_blocks()) return write_run(target, free, piece.start, 0, numel, true, patterns);

  const uint64_t r = entry.block[0], c = entry.block[1], down = rows / r, across = entry.across;
  if (down && across) {
    // whole block rows where a slab has room for them, else blocks of one block row
    const uint64_t wide = std::min(across, std::max<uint64_t>(1, SLAB / (r * c)));
    const uint64_t tall = wide < across ? 1 : std::min(down, std::max<uint64_t>(1, SLAB / (r * c * across)));
    const uint64_t most = tall * wide * r * c;
    Blocks blocks(budget, entry, magnitudes, free, loaded.signs, before.signs, most);
    Bytes slab(budget, target.is_direct() ? 0 : most * width);
    for (uint64_t i = 0; i < down; i += tall) {
      for (uint64_t j = 0; j < across; j += wide) {
        const uint64_t n_down = std::min(tall, down - i), n_across = std::min(wide, across - j), row = piece.start + i * r;
        uint8_t *kinds = loaded.kinds.data() + before.kinds + i * across + j;
        if (target.is_direct()) {
          blocks.join(kinds, n_down, n_across, target.place(row, j * c), cols);
          continue;
        }
        blocks.join(kinds, n_down, n_across, slab.data(), n_across * c);
        for (uint64_t y = 0; y < n_down * r; y++)
          for (uint64_t x = 0, n; x < n_across * c; x += n) {
            n = std::min(n_across * c - x, some);
            target.write(row + y, j * c + x, slab.data() + (y * n_across * c + x) * width, n);
          }
      }
    }
    free = blocks.rest();
  }
  const uint64_t edge = cols - across * c;
  for (uint64_t row = down * r; row < rows; row++) write_run(target, free, piece.start + row, 0, cols, false, patterns);
  for (uint64_t row = 0; row < down * r && edge; row++) write_run(target, free, piece.start + row, across * c, edge, false, patterns);
}

}  // namespace muws
