// A weight as the kernels read it: the blocks that are not pruned, and nothing else.
#pragma once
#include <memory>

#include "../../../runtime/native/src/api.h"
#include "file.h"

namespace muws {

// The kernels in use, and how many rows of a block they compute together at most. MUWS_LEVEL selects others by name.
struct Level {
  const MuwsLevel *kernels;
  int64_t most_rows;
};
Level level();

constexpr uint64_t MOST_COLUMNS = 1 << 16;  // the number of a column takes two bytes
constexpr uint64_t BATCH = 96;              // samples that are computed together: six vectors of AVX-512

// Blocks of one size, row of blocks by row of blocks.
struct BlockList {
  int64_t rows = 0, cols = 0, row_blocks = 0, n = 0;
  Bytes starts, columns;  // int32: where the blocks of a row start; uint16: the first column of each

  const int32_t *first() const { return reinterpret_cast<const int32_t *>(starts.data()); }
  const uint16_t *column() const { return reinterpret_cast<const uint16_t *>(columns.data()); }
};

struct Packed {
  explicit Packed(std::shared_ptr<Budget> from) : budget(std::move(from)), kernels(level()) { reserve(sizeof *this); }
  Packed(const Packed &) = delete;
  Packed &operator=(const Packed &) = delete;
  ~Packed() { budget->give(reserved); }

  void reserve(uint64_t n) {
    budget->take(n);
    reserved += n;
  }

  std::shared_ptr<Budget> budget;  // which outlives the file
  Level kernels;
  uint64_t outputs = 0, inputs = 0, reserved = 0;
  uint64_t work_bytes = 0;  // that one call of linear() may take
  BlockList values;
  Bytes weights;  // float: (blocks, cols, rows)
  BlockList signs;
  Bytes magnitudes, minus;  // float: of each block; a bit for each weight, in the order of signs.h

  const float *weight() const { return reinterpret_cast<const float *>(weights.data()); }
  const float *magnitude() const { return reinterpret_cast<const float *>(magnitudes.data()); }
  uint64_t n_bytes() const {
    return reserved + values.starts.size() + values.columns.size() + weights.size() + signs.starts.size() + signs.columns.size() +
           magnitudes.size() + minus.size();
  }

  // y = x W^T + bias, for n samples.
  void linear(const float *x, float *y, uint64_t n, const float *bias, bool relu) const;

  // The convolution of x, which has the sizes that were checked.
  void conv2d(const MuwsConv2d &shape, const uint64_t out[2], const float *x, float *y, const float *bias, bool relu) const;

 private:
  MuwsLayer layer(const float *bias, bool relu) const;
  const float *padded(const float *bias) const;
};

}  // namespace muws
