// Runs a whole layer: items of a few units and rows, each packed as it is read, and computed tile by tile.
#pragma once
#include "pack.h"

namespace {

struct Run {
  const Plan* plan;
  const float* x;
  const float* onto;  // added to the output at the same place; or null
  float* y;
  int64_t row_splits;
};

// Where a tile's outputs go: output o, unit u, row r, column c at y + o * output + u * unit + r * row + c * column.
struct Target {
  float* y;
  int64_t output, unit, row, column;
  bool far;  // y is the output, not scratch
};

// A position of the scratch: its unit, its place in the unit, and the row of that place.
struct Place {
  int64_t unit, place, row;
};

// Fill the tile with vectors start .. stop of the rows of a span; return the last output row among them.
static int64_t fill(const Plan& p, Span s, const Target& to, int64_t start, int64_t stop, Tile& tile) {
  const MuwsLayer& l = p.layer;
  const int64_t per_row = p.lanes == 1 ? ceil_div(l.ow, V) : l.ow, per_unit = per_row * s.n_rows;
  int64_t last_row = 0;
  int n = 0;
  tile.count = (int)(stop - start);
  tile.whole = true;
  Place at{start * V / p.unit_stride, start * V % p.unit_stride, 0};
  at.row = at.place / p.pitch;
  for (int64_t v = start; v < stop; v++) {
    const int t = (int)(v - start);
    tile.start[t] = n;
    if (p.lanes > 1 || p.by_rows) {
      const int64_t unit = v / per_unit, row = v % per_unit / per_row;
      const int64_t column = p.lanes > 1 ? v % per_row : least(v % per_row * V, l.ow - V);
      const int64_t images = p.lanes > 1 ? least<int64_t>(V, l.n - (s.unit + unit) * V) : V;
      tile.from[t] = (int32_t)((unit * p.unit_stride + (s.row + row) * p.pitch + column) * p.lanes);
      const int64_t place = unit * to.unit + (s.row + row) * to.row + column * to.column;
      tile.pieces[n++] = Piece{place, (1u << images) - 1, (int)images};
      tile.whole = tile.whole && images == V;
      last_row = most(last_row, s.row + row);
      continue;
    }
    tile.from[t] = (int32_t)(v * V);
    for (int lane = 0, open = -1; lane < V && at.unit < s.n_units;) {
      const int64_t left = V - lane, column = at.place - at.row * p.pitch;
      int64_t step = least(left, p.unit_stride - at.place);
      if (at.row < s.n_rows) {
        step = least(step, p.pitch - column);
        const int64_t there = least(step, l.ow - column);
        if (there > 0) {
          if (open < 0) tile.pieces[open = n++] = Piece{at.unit * to.unit + at.row * to.row + column, 0, 0};
          tile.pieces[open].mask |= ((1u << there) - 1) << lane;
          tile.pieces[open].count += (int)there;
          last_row = most(last_row, at.row);
        }
        if (column + step == p.pitch) at.row++;
      }
      lane += (int)step;
      if ((at.place += step) == p.unit_stride) {
        at = Place{at.unit + 1, 0, 0};
        open = -1;
      }
    }
    tile.whole = tile.whole && n == tile.start[t] + 1 && tile.pieces[n - 1].mask == ALL_LANES;
    if (n == tile.start[t]) tile.pieces[n++] = Piece{0, 0, 0};  // between two images: nothing to store
  }
  tile.start[tile.count] = n;
  const Piece& end = tile.pieces[n - 1];
  tile.joined = p.lanes == 1 && n == tile.count;
  for (int i = 0; i + 1 < n && tile.joined; i++) {
    const Piece& piece = tile.pieces[i];
    tile.joined = tile.pieces[i + 1].to == piece.to + piece.count && piece.to + V <= end.to + end.count;
  }
  return last_row;
}

static int64_t count_vectors(const Plan& p, Span s) {
  const MuwsLayer& l = p.layer;
  if (p.lanes > 1) return s.n_units * s.n_rows * l.ow;
  if (p.by_rows) return s.n_units * s.n_rows * ceil_div(l.ow, V);
  return ceil_div((s.n_units - 1) * p.unit_stride + (s.n_rows - 1) * p.pitch + l.ow, V);
}

// Pack up to a scratch row, and some rows ahead: the zeros right of the last row are those left of the next.
static void pack_to(const Plan& p, const float* x, float* scratch, Span s, int64_t row, int64_t& packed) {
  if (row <= packed) return;
  if (p.taps) {
    pack_taps(p, x, scratch, s);
    packed = p.rows;
    return;
  }
  const Rows rows{packed, least(p.rows, most(row, packed + p.chunk))};
  if (p.lanes == 1)
    (p.layer.bfloat16 ? pack_rows<true> : pack_rows<false>)(p, x, scratch, s, rows);
  else
    (p.layer.bfloat16 ? pack_images<true> : pack_images<false>)(p, x, scratch, s, rows);
  packed = rows.last;
}

static void run_tile(const Plan& p, const float* x, const Tile& tile, const Target& to, const float* onto,
                     int64_t first, int64_t last) {
  const MuwsLayer& l = p.layer;
  const int64_t spacing = p.taps || p.direct ? p.channel_stride : 0;
  const TileFn fn = choose_tile(l.rows, l.cols, tile.count, l.bfloat16 != 0, spacing != 0);
  const int64_t per_group = ceil_div(l.row_blocks, l.groups), group_stride = l.c / l.groups * p.channel_stride;
  for (int64_t b = first; b < last;) {  // group by group
    const int64_t group = b / per_group, stop = least(last, (group + 1) * per_group);
    fn(x + group * group_stride, tile, Work{&l, p.offsets, b, stop, to.y, onto, to.output, to.far, spacing});
    b = stop;
  }
}

static void run_span(const Plan& p, const float* x, const float* onto, float* y, Span s, int64_t first, int64_t last) {
  const MuwsLayer& l = p.layer;
  const int64_t plane = l.oh * l.ow, band_row = s.row, done_outputs = least(l.o, last * l.rows) - first * l.rows;
  const bool in_place = p.lanes == 1 || l.batch_last_out;
  float* scratch = p.direct ? nullptr : muws_scratch(0, (size_t)p.scratch_size);
  const float* from = p.direct ? x + s.unit * l.c * l.h * l.w : scratch;
  float* done = nullptr;
  Tile tile;
  int64_t packed = 0;
  for (int64_t row = 0; row < s.n_rows; row += p.step) {
    Span now{s.unit, s.n_units, row, least(p.step, s.n_rows - row)};  // rows of the band
    Target to{y + s.unit * l.o * plane + band_row * l.ow, plane, l.o * plane, l.ow, 1, true};
    if (p.lanes > 1 && in_place) {
      to = Target{y + band_row * l.ow * l.n + s.unit * V, plane * l.n, V, l.ow * l.n, l.n, true};
    } else if (!in_place) {
      const int64_t count = now.n_rows * l.ow * V;
      done = muws_scratch(1, (size_t)(done_outputs * s.n_units * count));
      to = Target{done - first * l.rows * s.n_units * count - row * l.ow * V, s.n_units * count, count, l.ow * V, V, false};
    }
    const int64_t vectors = count_vectors(p, now), tiles = ceil_div(vectors, most_vectors(l.rows));
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t last_row = fill(p, now, to, i * vectors / tiles, (i + 1) * vectors / tiles, tile);
      if (!in_place) tile.whole = true;  // lanes past the batch too: they stay in the scratch
      if (!p.direct) pack_to(p, x, scratch, s, least(p.rows, last_row + (l.kh - 1) / l.sh + 2), packed);
      run_tile(p, from, tile, to, onto ? onto + (to.y - y) : nullptr, first, last);
    }
    if (in_place) continue;
    now.row += band_row;
    unpack_images(p, done, y, now, first * l.rows, first * l.rows + done_outputs);
  }
}

static void run_item(void* context, int64_t item) {
  const Run& run = *(const Run*)context;
  const Plan& p = *run.plan;
  const MuwsLayer& l = p.layer;
  const int64_t split = item % run.row_splits, band = item / run.row_splits % p.bands;
  const int64_t group = item / run.row_splits / p.bands;
  const int64_t first = split * l.row_blocks / run.row_splits, last = (split + 1) * l.row_blocks / run.row_splits;
  if (first == last) return;
  Span s;
  s.unit = group * p.item_units;
  s.n_units = least(p.item_units, p.units - s.unit);
  s.row = band * p.band;
  s.n_rows = least(p.band, l.oh - s.row);
  run_span(p, run.x, run.onto, run.y, s, first, last);
}

static int run_plan(void* plan, const float* x, const float* onto, float* y, int64_t threads) {
  const Plan& p = *(const Plan*)plan;
  const int64_t items = ceil_div(p.units, p.item_units) * p.bands;
  Run run{&p, x, onto, y, 1};
  if (items < threads) run.row_splits = least(p.layer.row_blocks, ceil_div(threads, items));
  muws_parallel(threads, items * run.row_splits, run_item, &run);
  return 0;
}

static void* make_plan(const MuwsLayer* layer) {
  Plan* p = plan_of(layer);
#if MUWS_LANES == 16
  if (p && p->taps) p->windows = make_windows(p->source);
#endif
  return p;
}

static void free_plan(void* plan) {
  if (!plan) return;
  free(((Plan*)plan)->windows);
  free(((Plan*)plan)->offsets);
  free(((Plan*)plan)->places);
  free(plan);
}

}  // namespace
