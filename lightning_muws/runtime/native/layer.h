// Knows how a whole layer runs: items of a few units and rows, each packed, computed tile by tile and written out.
#pragma once
#include "pack.h"

namespace {

struct Run {
  const Plan* plan;
  const float* x;
  float* y;
  int64_t row_splits;
};

// The part of a tile that is output: lanes from .. from + count go to y + to.
struct Piece {
  int64_t from, to, count;
};

static Blocks blocks_of(const Plan& p, int64_t row_block) {
  const MuwsLayer& l = p.layer;
  return Blocks{l.columns, l.weights, p.offsets, l.bias ? l.bias + row_block * l.rows : nullptr, l.cols, l.relu != 0};
}

// Run one tile for row blocks first .. last; output row r of block b goes to y + (b * rows + r) * pitch.
template <class After>
static void run_tile(const Plan& p, const float* x, const Tile& tile, int64_t first, int64_t last, float* y,
                     int64_t block_pitch, int64_t pitch, After after) {
  const MuwsLayer& l = p.layer;
  const TileFn fn = choose_tile(l.rows, tile.count, l.bfloat16 != 0);
  const int64_t per_group = l.o / l.groups, group_stride = l.c / l.groups * p.channel_stride;
  for (int64_t b = first; b < last; b++) {
    const int rows = (int)least(l.rows, l.o - b * l.rows);
    const float* from = x + b * l.rows / per_group * group_stride;
    fn(from, tile, blocks_of(p, b), l.starts[b], l.starts[b + 1], y + (b - first) * block_pitch, pitch, rows);
    after(b, rows);
  }
}

// Where input is read in place, the last vector moves back over the one before it rather than past the end.
static void run_direct(const Plan& p, const float* x, float* y, int64_t first, int64_t last) {
  const MuwsLayer& l = p.layer;
  const int64_t plane = l.h * l.w, vectors = ceil_div(plane, V), most = most_vectors(l.rows);
  const int64_t tiles = ceil_div(vectors, most);
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t start = i * vectors / tiles, stop = (i + 1) * vectors / tiles;
    Tile tile;
    tile.count = (int)(stop - start);
    for (int t = 0; t < tile.count; t++) {
      const int64_t at = least((start + t) * V, plane - V);
      tile.from[t] = (int32_t)at;
      tile.to[t] = at;
    }
    run_tile(p, x, tile, first, last, y + first * l.rows * plane, l.rows * plane, plane, [](int64_t, int) {});
  }
}

static void run_positions(const Plan& p, const float* x, float* y, Span s, int64_t first, int64_t last) {
  const MuwsLayer& l = p.layer;
  const int64_t positions = (s.n_units - 1) * p.unit_stride + (s.n_rows - 1) * p.pitch + l.ow;
  const int64_t vectors = ceil_div(positions, V), tiles = ceil_div(vectors, most_vectors(l.rows));
  const int64_t plane = l.oh * l.ow;
  alignas(64) float done[8 * 8 * V];
  Piece pieces[8 * V];
  int64_t unit = 0, row = 0, column = 0;  // of the next piece
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t start = i * vectors / tiles, stop = (i + 1) * vectors / tiles;
    Tile tile;
    tile.count = (int)(stop - start);
    for (int t = 0; t < tile.count; t++) {
      tile.from[t] = (int32_t)((start + t) * V);
      tile.to[t] = t * V;
    }
    int n_pieces = 0;
    while (unit < s.n_units) {
      const int64_t at = unit * p.unit_stride + row * p.pitch + column - start * V, room = tile.count * V - at;
      if (room <= 0) break;
      const int64_t count = least(l.ow - column, room);
      pieces[n_pieces++] = Piece{at, unit * l.o * plane + row * l.ow + column, count};
      if ((column += count) < l.ow) break;
      column = 0;
      if (++row == s.n_rows) row = 0, unit++;
    }
    if (!n_pieces) continue;
    run_tile(p, x, tile, first, last, done, 0, tile.count * V, [&](int64_t b, int rows) {
      for (int r = 0; r < rows; r++) {
        float* to = y + (s.unit * l.o + b * l.rows + r) * plane + s.row * l.ow;
        for (int i = 0; i < n_pieces; i++) copy(to + pieces[i].to, done + r * tile.count * V + pieces[i].from, pieces[i].count);
      }
    });
  }
}

static void run_images(const Plan& p, const float* x, float* y, Span s, int64_t first, int64_t last) {
  const MuwsLayer& l = p.layer;
  const int64_t count = s.n_rows * l.ow, positions = s.n_units * count, plane = l.oh * l.ow;
  const int64_t tiles = ceil_div(positions, most_vectors(l.rows));
  const bool in_place = l.batch_last_out && (s.unit + s.n_units) * V <= l.n;
  const int64_t outputs = least(l.o, last * l.rows) - first * l.rows;
  float* done = in_place ? nullptr : muws_scratch(1, (size_t)(outputs * positions * V));
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t start = i * positions / tiles, stop = (i + 1) * positions / tiles;
    Tile tile;
    tile.count = (int)(stop - start);
    for (int t = 0; t < tile.count; t++) {
      const int64_t at = start + t, unit = at / count, row = at % count / l.ow, column = at % l.ow;
      tile.from[t] = (int32_t)((unit * p.unit_stride + row * p.pitch + column) * V);
      tile.to[t] = in_place ? ((s.row + row) * l.ow + column) * l.n + (s.unit + unit) * V : at * V;
    }
    const int64_t pitch = in_place ? plane * l.n : positions * V;
    float* to = in_place ? y + first * l.rows * pitch : done;
    run_tile(p, x, tile, first, last, to, l.rows * pitch, pitch, [](int64_t, int) {});
  }
  if (!in_place) unpack_images(p, done, y, s, first * l.rows, first * l.rows + outputs);
}

static void run_item(void* context, int64_t item) {
  const Run& run = *(const Run*)context;
  const Plan& p = *run.plan;
  const MuwsLayer& l = p.layer;
  const int64_t split = item % run.row_splits, band = item / run.row_splits % p.bands;
  const int64_t group = item / run.row_splits / p.bands;
  const int64_t first = split * l.row_blocks / run.row_splits, last = (split + 1) * l.row_blocks / run.row_splits;
  Span s;
  s.unit = group * p.item_units;
  s.n_units = least(p.item_units, p.units - s.unit);
  s.row = band * p.band;
  s.n_rows = least(p.band, l.oh - s.row);
  if (first == last) return;
  if (p.direct) {
    run_direct(p, run.x + s.unit * l.c * l.h * l.w, run.y + s.unit * l.o * l.oh * l.ow, first, last);
    return;
  }
  float* scratch = muws_scratch(0, (size_t)p.scratch_size);
  if (p.lanes == 1) {
    (l.bfloat16 ? pack_rows<true> : pack_rows<false>)(p, run.x, scratch, s);
    run_positions(p, scratch, run.y, s, first, last);
  } else {
    (l.bfloat16 ? pack_images<true> : pack_images<false>)(p, run.x, scratch, s);
    run_images(p, scratch, run.y, s, first, last);
  }
}

static int run_plan(void* plan, const float* x, float* y, int64_t threads) {
  const Plan& p = *(const Plan*)plan;
  const int64_t items = ceil_div(p.units, p.item_units) * p.bands;
  Run run{&p, x, y, 1};
  if (items < threads) run.row_splits = least(p.layer.row_blocks, ceil_div(threads, items));
  muws_parallel(threads, items * run.row_splits, run_item, &run);
  return 0;
}

static void free_plan(void* plan) {
  if (!plan) return;
  free(((Plan*)plan)->offsets);
  free(((Plan*)plan)->places);
  free(plan);
}

}  // namespace
