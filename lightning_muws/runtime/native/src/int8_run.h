// Runs a layer of 8 bits: items of output rows (or samples), each rounded and packed, then computed tile by tile.
#pragma once
#include "int8_tile.h"

namespace {

constexpr int64_t INT8_BYTES = 768 << 10;  // of an item's planes, which every block row reads from the second-level cache
constexpr int64_t INT8_SAMPLES = 3;        // up to so many samples, a Linear runs one by one

struct Int8Run {
  Int8Plan plan;
  Input8 x;
  Output8 to;
  int64_t units, item_units, row_splits;  // units: samples of a Linear, else output rows of all images
};

// Fill the tile with positions at .. at + vectors * V of an item whose first output row is `row`.
static void fill8(const MuwsInt8& l, int64_t row, int64_t positions, int64_t at, int64_t vectors, Tile8& tile) {
  tile.at = at, tile.vectors = vectors, tile.lanes = least(vectors * V, positions - at);
  tile.whole = tile.lanes == vectors * V;
  if (l.linear) return;
  const int64_t plane = l.oh * l.ow;
  int n = 0;
  for (int64_t t = 0; t < vectors; t++) {
    tile.start[t] = n;
    const int64_t last = least(at + (t + 1) * V, positions) + row * l.ow;
    for (int64_t position = at + t * V + row * l.ow, lane = 0; position < last; n++) {
      const int64_t image = position / plane, count = least(last, (image + 1) * plane) - position;
      tile.runs[n] = Run8{image * l.o * plane + position % plane, (int32_t)lane, (int32_t)count};
      tile.whole = tile.whole && count == V;
      position += count, lane += count;
    }
  }
  tile.start[vectors] = n;
}

// One sample or a few of a Linear, block rows first .. last.
static void run_samples8(const Int8Run& run, int64_t first, int64_t last) {
  const MuwsInt8& l = *run.plan.layer;
  const int64_t width = 4 * run.plan.quads + INT8_SLACK;
  uint8_t* bytes = (uint8_t*)muws_scratch(0, (size_t)(l.n * width / 4));
  float scale[INT8_SAMPLES];
  int32_t zero[INT8_SAMPLES];
  for (int64_t n = 0; n < l.n; n++) round_sample(run.plan, run.x, n, bytes + n * width, scale[n], zero[n]);
  const Dot8Fn dot = choose_dot8(l);
  const int64_t together = GROUP8 / l.rows;  // block rows that are scaled and stored together
  vi sizes = vi{};
  for (int64_t b = first; b < last; b += together) {
    const int64_t stop = least(last, b + together), row = b * l.rows, count = least(l.o, stop * l.rows) - row;
    int32_t sums[INT8_SAMPLES][GROUP8 + 4] = {};  // a block row writes four
    for (int64_t i = b; i < stop; i++)
      for (int64_t n = 0; n < l.n; n++) dot(l, bytes + n * width, i, (int32_t (&)[4])sums[n][(i - b) * l.rows]);
    for (int64_t n = 0; n < l.n; n++) {
      float values[GROUP8];
      for (int64_t r = 0; r < count; r++) {  // the compiler makes vectors of it
        const float shifted = (float)(sums[n][r] - zero[n] * l.sums[row + r]);
        values[r] = shifted * (scale[n] * l.scales[row + r]) + (l.bias ? l.bias[row + r] : 0.0f);
      }
      put_line(values, run.to, n * l.o + row, count, l.relu != 0, sizes);
    }
  }
  watch(run.to, sizes);
}

static void run_item8(void* context, int64_t item) {
  const Int8Run& run = *(const Int8Run*)context;
  const Int8Plan& p = run.plan;
  const MuwsInt8& l = *p.layer;
  const int64_t split = item % run.row_splits, first = item / run.row_splits * run.item_units;
  const int64_t first_row = split * l.row_blocks / run.row_splits, last_row = (split + 1) * l.row_blocks / run.row_splits;
  if (first_row == last_row) return;
  if (l.linear && l.n <= INT8_SAMPLES) return run_samples8(run, first_row, last_row);
  const int64_t last = least(run.units, first + run.item_units), positions = (last - first) * (l.linear ? 1 : l.ow);
  const int64_t words = p.planes * p.pitch / 4 + INT8_SLACK;
  float* scratch = muws_scratch(0, (size_t)(words + 2 * (p.positions + V)));
  Packed8 packed{(uint8_t*)scratch, scratch + words, (int32_t*)(scratch + words + p.positions + V)};
  for (int64_t i = positions; i < ceil_div(positions, V) * V; i++)  // lanes that are no positions: nothing may overflow
    packed.scales[i] = 0.0f, packed.zeros[i] = 0;
  const int64_t n_bytes = l.linear ? V * (4 * p.quads + INT8_SLACK)
                                   : (l.c * p.rows_in + 1) * l.sw * p.row_bytes + 2 * INT8_SLACK;
  uint8_t* bytes = (uint8_t*)muws_scratch(1, (size_t)ceil_div(n_bytes, 4));
  if (l.linear)
    pack_samples(p, run.x, first, last, packed, bytes);
  else
    pack_convolution(p, run.x, first, last, packed, bytes);
  const Work8 work{&p, &packed, l.linear ? run.to.from(first * l.o) : run.to, first_row, last_row};
  Tile8 tile;
  const int64_t vectors = ceil_div(positions, V), tiles = ceil_div(vectors, most_vectors8(l.rows));
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t start = i * vectors / tiles, stop = (i + 1) * vectors / tiles;
    fill8(l, first, positions, start * V, stop - start, tile);
    choose_tile8(l.rows, stop - start, l.loose != 0)(tile, work);
  }
}

static Rounding rounding_of(const float* activation) {
  return Rounding{activation[0] > 0.0f ? 1.0f / activation[0] : 0.0f, (int32_t)activation[1]};
}

// Run a layer into float32 y, bytes q, or both; return 1 if bytes were made of NaN or infinity.
static int run_layer8(const MuwsInt8* layer, const void* x, const float* onto, float* y, uint8_t* q, int64_t threads) {
  const MuwsInt8& l = *layer;
  int broken = 0;
  Int8Run run{{}, {x}, {onto, y, q, {}, &broken}, 0, 0, 1};
  if (q) run.to.next = rounding_of(l.next);
  Int8Plan& p = run.plan;
  p.layer = layer;
  p.scale = l.activation[0], p.rounding = rounding_of(l.activation);
  p.columns = l.c / l.groups * l.kh * l.kw;
  p.quads = ceil_div(p.columns, 4);
  p.planes = l.groups * p.quads * (l.loose ? 4 : 1);
  const int64_t width = l.linear ? 1 : l.ow, unit_bytes = 4 * l.groups * p.quads * width;
  run.units = l.linear ? l.n : l.n * l.oh;
  if (!run.units || !l.o) return 0;
  int64_t items = ceil_div(run.units, most<int64_t>(l.linear ? V : 1, INT8_BYTES / unit_bytes));
  // one item per thread, if each still fills its tiles
  if (items < threads && run.units * width >= threads * V * most_vectors8(l.rows)) items = threads;
  if (l.linear && l.n <= INT8_SAMPLES) items = 1;
  run.item_units = ceil_div(run.units, items);
  items = ceil_div(run.units, run.item_units);
  p.positions = run.item_units * width;
  const int64_t lines = ceil_div(ceil_div(p.positions, V) * V * (l.loose ? 1 : 4), 64);
  p.pitch = 64 * (lines < 16 ? lines : lines | 1);  // an odd number of cache lines, as in plan.h
  p.rows_in = (least(run.item_units, l.oh) - 1) * l.sh + l.kh;
  p.row_bytes = ceil_div(l.w + 2 * l.pw, l.sw);
  if (items < threads) run.row_splits = least(l.row_blocks, ceil_div(threads, items));
  muws_parallel(threads, items * run.row_splits, run_item8, &run);
  return broken;
}

static void run_int8(const MuwsInt8* layer, const float* x, const float* onto, float* y, int64_t threads) {
  run_layer8(layer, x, onto, y, nullptr, threads);
}

}  // namespace
