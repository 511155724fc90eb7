// Packs a weight: first the places of its blocks, from their kinds alone, then the values, as they are decoded.
#include <algorithm>

#include "packed.h"
#include "values.h"

namespace muws {

namespace {

using Big = unsigned long long;
enum BlockKind : uint8_t { DENSE, MIXED, PRUNED };

// The time of a packed column by its rows, relative to four rows; packing.py has the same numbers.
struct RowCost {
  uint64_t rows;
  double cost;
};
constexpr RowCost ROW_COSTS[] = {{8, 2.0}, {4, 1.0}, {2, 0.6}, {1, 0.4}};

// A bit for each block of a tensor.
class Bits {
 public:
  Bits(Budget &budget, uint64_t down, uint64_t across) : words((across + 63) / 64), memory(budget, down * words * 8) {
    memset(memory.data(), 0, memory.size());
  }
  uint64_t *row(uint64_t i) const { return reinterpret_cast<uint64_t *>(memory.data()) + i * words; }
  void set(uint64_t i, uint64_t j) { row(i)[j / 64] |= uint64_t(1) << j % 64; }
  bool has(uint64_t i, uint64_t j) const { return row(i)[j / 64] >> j % 64 & 1; }
  const uint64_t words;

 private:
  Bytes memory;
};

class Packer : public Sink {
 public:
  Packer(const Entry &one, Packed &to, bool signs)
      : entry(one), out(to), is_cut(one.has_blocks() && one.down && one.across), with_signs(signs && is_cut), budget(*to.budget),
        r(is_cut ? one.block[0] : 1), c(is_cut ? one.block[1] : 1), down(is_cut ? one.down : 0), across(is_cut ? one.across : 0),
        kept(budget, down, across), unified(budget, with_signs ? down : 0, across), some(budget, 1, across) {}

  void mark(uint64_t block, uint8_t kind) {
    const uint64_t i = block / across, j = block % across;
    if (kind == PRUNED) return;
    if (with_signs && kind != DENSE) unified.set(i, j);
    else kept.set(i, j);
  }

  void lay_out() {
    BlockList &list = out.values;
    list.cols = out.inputs % 4 == 0 && (!is_cut || c % 4 == 0) ? 4 : 1;
    double least = 0;
    for (const RowCost &way : ROW_COSTS) {
      if (way.rows > uint64_t(out.kernels.most_rows)) continue;
      uint64_t n = is_cut ? 0 : (out.outputs + way.rows - 1) / way.rows * out.inputs;
      for (uint64_t group = 0; is_cut && group * way.rows < out.outputs; group++) n += columns(group, way.rows);
      if (!list.rows || way.cost * double(n) < least) list.rows = int64_t(way.rows), least = way.cost * double(n);
    }
    const uint64_t rows = uint64_t(list.rows), groups = (out.outputs + rows - 1) / rows;
    begin(list, groups, [&](uint64_t group) { return columns(group, rows) / uint64_t(list.cols); });
    fill(list, [&](uint64_t group, uint16_t *to) { write_columns(group, rows, to); });
    out.weights = zeros(uint64_t(list.n) * uint64_t(list.cols) * rows, 4);
    if (!with_signs) return;
    BlockList &signs = out.signs;
    signs.rows = int64_t(r), signs.cols = int64_t(c);
    begin(signs, down, [&](uint64_t i) { return count(unified.row(i)); });
    fill(signs, [&](uint64_t i, uint16_t *to) { to_columns(unified.row(i), c, to); });
    out.magnitudes = zeros(uint64_t(signs.n), 4);
    out.minus = zeros(uint64_t(signs.n), r * c / 8);
  }

  void put(uint64_t row, uint64_t col, const float *from, uint64_t n) override {
    if (entry.has_blocks()) return put_row(row, col, from, n);
    for (uint64_t at = row * entry.cols + col, now; n; n -= now, at += now, from += now) {  // elements of a flat tensor
      now = std::min(n, out.inputs - at % out.inputs);
      put_row(at / out.inputs, at % out.inputs, from, now);
    }
  }

 private:
  Bytes zeros(uint64_t n, uint64_t width) {
    Bytes found(budget, n * width);
    memset(found.data(), 0, found.size());
    return found;
  }

  uint64_t count(const uint64_t *bits) const {
    uint64_t n = 0;
    for (uint64_t i = 0; i < kept.words; i++) n += uint64_t(__builtin_popcountll(bits[i]));
    return n;
  }

  // Finds the blocks that rows of a group have, and counts the columns. Edges have all weights.
  uint64_t columns(uint64_t group, uint64_t rows) {
    const uint64_t first = group * rows, last = std::min(first + rows, out.outputs);
    is_all = last > down * r;
    if (is_all) return out.inputs;
    memcpy(some.row(0), kept.row(first / r), kept.words * 8);
    for (uint64_t i = first / r + 1; i * r < last; i++)
      for (uint64_t k = 0; k < kept.words; k++) some.row(0)[k] |= kept.row(i)[k];
    return count(some.row(0)) * c + out.inputs - across * c;
  }

  void write_columns(uint64_t group, uint64_t rows, uint16_t *to) {
    const uint64_t step = uint64_t(out.values.cols);
    columns(group, rows);
    if (!is_all) to = to_columns(some.row(0), step, to);
    for (uint64_t k = is_all ? 0 : across * c; k < out.inputs; k += step) *to++ = uint16_t(k);
  }

  // Writes every `step`-th column of these blocks.
  uint16_t *to_columns(const uint64_t *bits, uint64_t step, uint16_t *to) const {
    for (uint64_t word = 0; word < kept.words; word++)
      for (uint64_t left = bits[word]; left; left &= left - 1) {
        const uint64_t start = (word * 64 + uint64_t(__builtin_ctzll(left))) * c;
        for (uint64_t k = 0; k < c; k += step) *to++ = uint16_t(start + k);
      }
    return to;
  }

  template <typename Count>
  void begin(BlockList &list, uint64_t groups, Count blocks_of) {
    list.row_blocks = int64_t(groups);
    list.starts = Bytes(budget, (groups + 1) * 4);
    int32_t *starts = reinterpret_cast<int32_t *>(list.starts.data());
    uint64_t n = starts[0] = 0;
    for (uint64_t group = 0; group < groups; group++) {
      n += blocks_of(group);
      if (n > INT32_MAX) refuse_as(MUWS_TOO_LARGE, "it has more than 2147483647 packed blocks");
      starts[group + 1] = int32_t(n);
    }
    list.n = int64_t(n);
    list.columns = Bytes(budget, n * 2);
  }

  template <typename Write>
  void fill(BlockList &list, Write write) {
    uint16_t *columns = reinterpret_cast<uint16_t *>(list.columns.data());
    for (int64_t group = 0; group < list.row_blocks; group++) write(uint64_t(group), columns + list.first()[group]);
  }

  // Calls what it is given with each block of a row that has columns from `col` to `col + n`.
  template <typename Do>
  static void each(const BlockList &list, uint64_t group, uint64_t col, uint64_t n, Do what) {
    const uint16_t *end = list.column() + list.first()[group + 1], *start = list.column() + list.first()[group];
    const uint64_t cols = uint64_t(list.cols);
    start = std::upper_bound(start, end, col, [&](uint64_t from, uint16_t column) { return from < column + cols; });
    for (; start < end && *start < col + n; start++) what(uint64_t(start - list.column()), uint64_t(*start));
  }

  void put_row(uint64_t row, uint64_t col, const float *from, uint64_t n) {
    const uint64_t rows = uint64_t(out.values.rows), cols = uint64_t(out.values.cols), i = row / r;
    float *weights = reinterpret_cast<float *>(out.weights.data());
    const bool is_whole = with_signs && i < down;
    each(out.values, row / rows, col, n, [&](uint64_t block, uint64_t start) {
      const uint64_t first = std::max(start, col), last = std::min(start + cols, col + n);
      if (is_whole && start / c < across && unified.has(i, start / c)) return;  // another row of the group has this column
      for (uint64_t k = first; k < last; k++) weights[(block * cols + k - start) * rows + row % rows] = from[k - col];
    });
    if (is_whole) put_signs(row, col, from, n);
  }

  void put_signs(uint64_t row, uint64_t col, const float *from, uint64_t n) {
    float *magnitudes = reinterpret_cast<float *>(out.magnitudes.data());
    const uint64_t y = row % r, wide = std::min<uint64_t>(c, 8);
    each(out.signs, row / r, col, n, [&](uint64_t block, uint64_t start) {
      for (uint64_t k = std::max(start, col); k < std::min(start + c, col + n); k++) {
        const float value = from[k - col];
        const uint64_t x = k - start, bit = (x / wide * r + y) * wide + x % wide;
        if (!x && !y) magnitudes[block] = __builtin_fabsf(value);
        if (__builtin_signbit(value)) out.minus.data()[block * (r * c / 8) + bit / 8] |= uint8_t(1 << bit % 8);
      }
    });
  }

  const Entry &entry;
  Packed &out;
  const bool is_cut, with_signs;
  Budget &budget;
  const uint64_t r, c, down, across;
  Bits kept, unified, some;
  bool is_all = false;
};

bool has_sign_kernel(const Entry &entry) {
  const uint64_t r = entry.block[0], c = entry.block[1];
  return (r == 4 && c == 4) || ((r == 4 || r == 8 || r == 16) && c % 8 == 0);
}

}  // namespace

void File::pack(uint64_t index, bool with_signs, Packed &out) {
  const Entry &given = manifest.entries[index];
  const uint64_t at = given.same_as < 0 ? index : uint64_t(given.same_as);
  const Entry &entry = manifest.entries[at];
  const uint64_t *sizes = manifest.sizes.data() + entry.axes;
  if (!is_floating(entry.dtype)) refuse_as(MUWS_ARGUMENT, "it is %s, only floating tensors of 16 bits and more can be packed", name_of(entry.dtype));
  if (entry.n_axes < 2) refuse_as(MUWS_ARGUMENT, "it has %llu axes, a weight has two or more", (Big)entry.n_axes);
  out.outputs = entry.is_turned ? entry.rows : sizes[0];
  out.inputs = entry.is_turned ? sizes[0] / entry.groups : sizes[1];
  for (uint64_t axis = 2; axis < entry.n_axes; axis++) out.inputs *= sizes[axis];
  if (out.inputs > MOST_COLUMNS) refuse_as(MUWS_ARGUMENT, "it has %llu inputs, at most 65536 can be packed: decode it", (Big)out.inputs);
  if (with_signs && !has_sign_kernel(entry))
    refuse_as(MUWS_ARGUMENT, "it has blocks of %llux%llu, signs are for 4x4, and for 4, 8 or 16 rows by a multiple of 8 columns: give MUWS_VALUES",
              (Big)entry.block[0], (Big)entry.block[1]);
  if (!entry.numel) return;
  Packer packer(entry, out, with_signs);
  for (uint64_t i = entry.first_chunk, block = 0; i <= entry.last_chunk && entry.down && entry.across; i++) {
    const Chunk &chunk = manifest.chunks[i];
    Bytes owned;
    if (loaded.chunk != i) owned = kinds_of(i);
    const uint8_t *kinds = loaded.chunk == i ? loaded.kinds.data() : owned.data();
    for (uint64_t k = chunk.pieces; k < chunk.pieces + chunk.n_pieces; k++) {
      const uint64_t n = manifest.blocks(manifest.pieces[k]);
      if (manifest.pieces[k].tensor == at)
        for (uint64_t b = 0; b < n; b++) packer.mark(block++, kinds[b]);
      kinds += n;
    }
  }
  packer.lay_out();
  decode(index, true, nullptr, &packer);
  if (!out.values.n && !out.signs.n) return;
  // what the kernels pack of the input, the outputs before they are turned, the bias, and a plan
  const uint64_t columns = out.inputs, padded = out.outputs + 16;
  out.work_bytes = 4 * (std::min(BATCH * columns, std::max<uint64_t>(16 * columns, 1 << 18)) + columns + 16 + (BATCH + 1) * padded) + 4096;
  out.reserve(out.work_bytes);
}

}  // namespace muws
