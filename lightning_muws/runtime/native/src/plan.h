// The memory layout while a layer runs: the padded scratch, its offsets, the bands of rows.
#pragma once
#include "tile.h"

extern "C" void* malloc(size_t);
extern "C" void free(void*);

namespace {

// The scratch holds (channel, phase, unit, row, column) times `lanes` numbers. A unit is one image, or V images side by
// side in the lanes. A stride is undone by splitting rows and columns into phases, so that outputs that are neighbours
// read neighbours. If lanes run over positions, the zeros right of a row are also those left of the next.
struct Plan {
  MuwsLayer layer;
  int64_t lanes, units, item_units, band, bands;
  int64_t phases_h, phases_w, rows, pitch, unit_stride, phase_stride, channel_stride;
  int64_t scratch_size;
  bool direct;         // 1x1, no border: the input is read in place
  bool taps;           // small images: every tap of the kernel is a channel, and the layer is 1x1
  MuwsLayer source;    // the layer as given
  bool by_rows;        // lanes over positions: no vector crosses rows, the last of a row overlaps the one before
  int64_t chunk, step;  // rows packed at a time, output rows finished at a time
  int32_t* offsets;    // of each logical column
  void* windows;       // taps: the source of each vector of a plane, or null
  int32_t* places;     // of each input position in its unit, band 0; -1 if no output reads it
};

constexpr int64_t SCRATCH_BYTES = 8 << 20;  // of a band, which is packed row by row, just before it is read
constexpr int64_t TAPS_BYTES = 768 << 10;  // of all taps, which every block row reads from the second-level cache
constexpr int64_t CACHED_BYTES = 512 << 10;  // what stays in a core's second-level cache beside the weights

static int64_t phase_rows(const MuwsLayer& l, int64_t band) { return band - 1 + (l.kh - 1) / l.sh + 1; }

static void lay_out(Plan& p, int64_t band, int64_t item_units) {
  const MuwsLayer& l = p.layer;
  const bool share = p.lanes == 1;
  p.band = band;
  p.bands = ceil_div(l.oh, band);
  p.item_units = item_units;
  p.rows = phase_rows(l, band);
  const int64_t shared_w = share && l.sw == 1 ? least(l.pw, l.kw - 1) : 0;
  const int64_t shared_h = share && l.sh == 1 && band == l.oh && item_units > 1 ? least(l.ph, l.kh - 1) : 0;
  p.pitch = l.ow - 1 + (l.kw - 1) / l.sw + 1 - shared_w;
  p.unit_stride = (p.rows - shared_h) * p.pitch;
  p.phase_stride = item_units * p.unit_stride + shared_h * p.pitch + shared_w;
  const int64_t lines = ceil_div(p.phases_h * p.phases_w * p.phase_stride * p.lanes, 16);
  // an odd number of cache lines, so that large channels do not compete for one set of a cache
  p.channel_stride = 16 * (lines < 16 ? lines : lines | 1);
  p.scratch_size = l.c * p.channel_stride + V;
}

// Returns false if there is no memory.
static bool place(Plan& p) {
  const MuwsLayer& l = p.layer;
  const int64_t columns = l.c / l.groups * l.kh * l.kw;
  p.offsets = (int32_t*)malloc(sizeof(int32_t) * (size_t)columns);
  if (!p.offsets) return false;
  int64_t k = 0;
  for (int64_t c = 0; c < l.c / l.groups; c++)
    for (int64_t a = 0; a < l.kh; a++)
      for (int64_t b = 0; b < l.kw; b++, k++) {
        const int64_t phase = (a % l.sh) * p.phases_w + b % l.sw;
        const int64_t position = phase * p.phase_stride + (a / l.sh) * p.pitch + b / l.sw;
        p.offsets[k] = (int32_t)(c * p.channel_stride + position * p.lanes);
      }
  if (l.logical) {
    int32_t* all = p.offsets;
    p.offsets = (int32_t*)malloc(sizeof(int32_t) * (size_t)most<int64_t>(1, l.n_logical));
    for (int64_t i = 0; p.offsets && i < l.n_logical; i++) p.offsets[i] = all[l.logical[i]];
    free(all);
  }
  p.places = (int32_t*)malloc(sizeof(int32_t) * (size_t)(l.h * l.w));
  if (!p.offsets || !p.places) return false;
  for (int64_t h = 0; h < l.h; h++)
    for (int64_t w = 0; w < l.w; w++) {
      const int64_t a = (h + l.ph) % l.sh, b = (w + l.pw) % l.sw, j = (w + l.pw) / l.sw;
      const bool read = a < p.phases_h && b < p.phases_w && j < p.pitch;
      const int64_t position = (a * p.phases_w + b) * p.phase_stride + (h + l.ph) / l.sh * p.pitch + j;
      p.places[h * l.w + w] = read ? (int32_t)(position * p.lanes) : -1;
    }
  return true;
}

static Plan* plan_of(const MuwsLayer* layer) {
#if !defined(__AVX512BF16__)
  if (layer->bfloat16) return nullptr;
#endif
  Plan* p = (Plan*)malloc(sizeof(Plan));
  if (!p) return nullptr;
  p->layer = *layer;
  const MuwsLayer& l = p->layer;
  p->source = *layer;
  p->windows = nullptr;
  p->offsets = p->places = nullptr;
  p->lanes = l.batch_lanes == 1 ? V : 1;
  p->units = ceil_div(l.n, p->lanes);
  p->phases_h = least(l.sh, l.kh);
  p->phases_w = least(l.sw, l.kw);
  const bool pointwise = l.kh == 1 && l.kw == 1 && l.sh == 1 && l.sw == 1 && l.ph == 0 && l.pw == 0;
  p->direct = p->lanes == 1 && pointwise && l.h * l.w >= V && !l.bfloat16;
  p->taps = l.batch_lanes == 2 && !pointwise && !l.bfloat16 &&
            4 * l.c * l.kh * l.kw * (l.oh * l.ow + V) <= TAPS_BYTES;
  if (p->taps) {
    MuwsLayer& flat = p->layer;
    flat.c *= flat.kh * flat.kw;
    flat.w = flat.ow = flat.oh * flat.ow;
    flat.h = flat.oh = flat.kh = flat.kw = flat.sh = flat.sw = 1;
    flat.ph = flat.pw = 0;
    p->phases_h = p->phases_w = 1;
    lay_out(*p, 1, 1);
  } else if (p->direct) {
    p->layer.w = p->layer.ow = l.h * l.w;  // a plane is one long row
    p->layer.h = p->layer.oh = 1;
    lay_out(*p, 1, 1);
    p->channel_stride = l.h * l.w;
  } else {
    int64_t band = l.oh, units = 1;
    lay_out(*p, band, 1);
    const int64_t limit = p->lanes == 1 ? CACHED_BYTES : SCRATCH_BYTES;
    while (band > 1 && 4 * p->scratch_size > limit) lay_out(*p, band = ceil_div(band, 2), 1);
    // one band per thread: else every thread would pack the whole image
    const int64_t shared = ceil_div(l.oh, most<int64_t>(1, l.threads));
    if (p->units * p->bands < l.threads && shared * p->pitch * p->lanes >= V * most_vectors(l.rows))
      lay_out(*p, band = shared, 1);
    if (band == l.oh) {
      // small images: several per item, so that tiles are full
      const int64_t full = 2 * most_vectors(l.rows);
      const int64_t vectors = p->lanes == 1 ? ceil_div(p->unit_stride, V) : l.oh * l.ow;
      units = least(p->units, most<int64_t>(1, full / vectors));
      while (units > 1 && 4 * l.c * units * p->unit_stride * p->lanes > CACHED_BYTES) units--;
    }
    lay_out(*p, band, units);
  }
  // computing a few outputs twice is cheaper than storing in pieces
  const int64_t row_vectors = ceil_div(l.ow, V);
  p->by_rows = p->lanes == 1 && (p->direct || (l.ow >= V && 16 * row_vectors * V <= 17 * l.ow));
  const int64_t row_bytes = most<int64_t>(1, 4 * p->scratch_size / p->rows);
  p->chunk = p->item_units > 1 ? p->rows : most<int64_t>(ceil_div(V, most<int64_t>(1, l.w)), CACHED_BYTES / 4 / row_bytes);
  const int64_t done_bytes = 4 * V * l.o * l.ow * p->item_units;
  p->step = p->lanes == 1 ? p->band : most<int64_t>(ceil_div(V, l.ow), CACHED_BYTES / done_bytes);
  if (p->scratch_size <= INT32_MAX && place(*p)) return p;
  free(p->offsets);
  free(p->places);
  free(p);
  return nullptr;
}

}  // namespace
