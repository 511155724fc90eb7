// A matrix of blocks <-> their kinds, signs, magnitudes and free weights. streams.py is the reference.
#include "coder.h"

namespace {

enum Kind : uint8_t { DENSE, MIXED, PRUNED, POSITIVE, NEGATIVE };

// The blocks of a matrix, and how far the lists of its parts were written or read.
template <typename T>
struct Walk {
  static constexpr T sign = T(T(1) << (8 * sizeof(T) - 1));
  const MuwsBlocks &m;
  int64_t n_signs = 0, n_magnitudes = 0, n_free = 0;

  T *block(int64_t i, int64_t j) const { return (T *)m.patterns + i * m.rows * m.stride + j * m.cols; }

  // Whether the lists go on for a block of this kind.
  bool has_room(const MuwsParts &parts, Kind kind) const {
    const int64_t numel = m.rows * m.cols;
    if (kind == DENSE) return parts.n_free - n_free >= numel;
    if (kind == MIXED && parts.n_signs - n_signs < numel) return false;
    return kind == PRUNED || parts.n_magnitudes > n_magnitudes;
  }

  Kind kind(const T *block, T &magnitude) const {
    T ors = 0, ands = T(~T(0));
    for (int64_t r = 0; r < m.rows; r++)
      for (int64_t c = 0; c < m.cols; c++) {
        ors |= block[r * m.stride + c];
        ands &= block[r * m.stride + c];
      }
    magnitude = T(ands & ~sign);
    if (ors == 0) return PRUNED;
    if (T((ors ^ ands) & ~sign)) return DENSE;
    return ands & sign ? NEGATIVE : ors & sign ? MIXED : POSITIVE;
  }

  int64_t kinds(uint8_t *found) const {
    T magnitude;
    for (int64_t i = 0; i < m.down; i++)
      for (int64_t j = 0; j < m.across; j++) *found++ = kind(block(i, j), magnitude);
    return 0;
  }

  int64_t split(MuwsParts &parts) {
    for (int64_t i = 0; i < m.down; i++)
      for (int64_t j = 0; j < m.across; j++)
        if (!split_block(block(i, j), parts, parts.kinds[i * m.across + j])) return MUWS_WRONG;
    parts.n_signs = n_signs, parts.n_magnitudes = n_magnitudes, parts.n_free = n_free;
    return 0;
  }

  bool split_block(const T *block, MuwsParts &parts, uint8_t &found) {
    T magnitude;
    const Kind kind = this->kind(block, magnitude);
    found = kind;
    if (!has_room(parts, kind)) return false;
    if (kind != DENSE && kind != PRUNED) ((T *)parts.magnitudes)[n_magnitudes++] = magnitude;
    T *free = (T *)parts.free + n_free;
    uint8_t *signs = parts.signs + n_signs;
    for (int64_t r = 0; r < m.rows && (kind == DENSE || kind == MIXED); r++)
      for (int64_t c = 0; c < m.cols; c++) {
        const T value = block[r * m.stride + c];
        if (kind == DENSE) *free++ = value;
        else *signs++ = (value & sign) != 0;
      }
    n_free += kind == DENSE ? m.rows * m.cols : 0;
    n_signs += kind == MIXED ? m.rows * m.cols : 0;
    return true;
  }

  int64_t join(const MuwsParts &parts) {
    for (int64_t i = 0; i < m.down; i++)
      for (int64_t j = 0; j < m.across; j++)
        if (!join_block(block(i, j), parts, parts.kinds[i * m.across + j])) return MUWS_WRONG;
    return n_signs == parts.n_signs && n_magnitudes == parts.n_magnitudes && n_free == parts.n_free ? 0 : MUWS_WRONG;
  }

  bool join_block(T *block, const MuwsParts &parts, uint8_t number) {
    const Kind kind = Kind(number);
    if (number > NEGATIVE || !has_room(parts, kind)) return false;
    if (kind == DENSE) {
      const T *free = (const T *)parts.free + n_free;
      n_free += m.rows * m.cols;
      each_row(block, [&](int64_t r, int64_t c) { return free[r * m.cols + c]; });
      return true;
    }
    T value = kind == PRUNED ? T(0) : ((const T *)parts.magnitudes)[n_magnitudes++];
    if (kind == NEGATIVE) value |= sign;
    if (kind == MIXED) {
      const uint8_t *minus = parts.signs + n_signs;
      n_signs += m.rows * m.cols;
      each_row(block, [&](int64_t r, int64_t c) { return minus[r * m.cols + c] ? T(value | sign) : value; });
    } else {
      each_row(block, [&](int64_t, int64_t) { return value; });
    }
    return true;
  }

  // Fills a block with what a function returns for each row and column; rows of four, the usual ones, at once.
  template <typename Of>
  void each_row(T *block, Of of) const {
    for (int64_t r = 0; r < m.rows; r++, block += m.stride)
      if (m.cols == 4)
        for (int64_t c = 0; c < 4; c++) block[c] = of(r, c);
      else
        for (int64_t c = 0; c < m.cols; c++) block[c] = of(r, c);
  }
};

bool is_matrix(const MuwsBlocks &m) {
  return m.down >= 0 && m.across >= 0 && m.rows >= 1 && m.cols >= 1 && m.stride >= m.across * m.cols;
}

// Calls what it is given with the walk of the right width.
template <typename Do>
int64_t walk(const MuwsBlocks &m, Do what) {
  if (!is_matrix(m)) return MUWS_WRONG;
  switch (m.width) {
    case 1: return what(Walk<uint8_t>{m});
    case 2: return what(Walk<uint16_t>{m});
    case 4: return what(Walk<uint32_t>{m});
    case 8: return what(Walk<uint64_t>{m});
  }
  return MUWS_WRONG;
}

}  // namespace

int64_t muws_kinds(const MuwsBlocks *blocks, uint8_t *kinds) {
  return walk(*blocks, [=](auto walk) { return walk.kinds(kinds); });
}

int64_t muws_split_blocks(const MuwsBlocks *blocks, MuwsParts *parts) {
  return walk(*blocks, [=](auto walk) { return walk.split(*parts); });
}

int64_t muws_join_blocks(const MuwsParts *parts, const MuwsBlocks *blocks) {
  return walk(*blocks, [=](auto walk) { return walk.join(*parts); });
}
