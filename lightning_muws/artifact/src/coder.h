// The C interface of the native coder: the hot loops of a .muws file, on plain memory. Python checks what a file declares;
// each function here checks every length that it is given once more, and reads and writes nothing outside.
#pragma once
#include <stdint.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the native coder is for little-endian machines; elsewhere the package uses numpy"
#endif

#ifndef MUWS_PUBLIC  // empty in libmuws, which has these functions for itself
#define MUWS_PUBLIC __attribute__((visibility("default")))
#endif
#define MUWS_CODER_VERSION 2  // changes with any function below: Python ignores a library of another version

extern "C" {

// More input is needed; the arguments contradict each other; input is left over.
enum { MUWS_SHORT = -1, MUWS_WRONG = -2, MUWS_LEFT = -3 };

MUWS_PUBLIC int64_t muws_coder_version();

// What this CPU runs: 0 for portable code, 1 for AVX-512 as well.
MUWS_PUBLIC int64_t muws_coder_level();

// Decodes a stream of `n` bytes to (steps, lanes) symbols; `states` is memory for one of each lane. Returns 0, MUWS_WRONG
// where what stands before the words is not that of so many steps and lanes, MUWS_SHORT where more words are needed, or
// MUWS_LEFT where the stream does not end where it should.
MUWS_PUBLIC int64_t muws_rans_decode(int64_t level, const uint8_t *coded, int64_t n, int64_t steps, int64_t lanes,
                                     uint32_t *states, uint8_t *symbols);

// Encodes (steps, lanes) symbols, the last one first. Fills `words` from its end and returns how many there are;
// MUWS_WRONG where `words` has no room for one more than there are symbols, or the frequencies do not sum to 4096.
MUWS_PUBLIC int64_t muws_rans_encode(int64_t level, const int64_t frequencies[256], const uint8_t *symbols,
                                     int64_t steps, int64_t lanes, uint32_t *states, uint16_t *words, int64_t n_words);

// Counts each byte in every `stretch` bytes; counts is (ceil(n / stretch), 256).
MUWS_PUBLIC void muws_count(const uint8_t *data, int64_t n, int64_t stretch, int64_t *counts);

// What a table costs, see stretches.py: by itself and for each symbol, and 4097 logarithms of 1 to 2.
struct MuwsCosts {
  int64_t table, symbol;
  const int64_t *logs;
};

// Joins each of n stretches, counts (n, 256), with the one before it where that costs no more. The first rows of counts
// become those of the tables, `firsts` the first stretch of each, `total` what all cost. Returns the number of tables.
MUWS_PUBLIC int64_t muws_merge(int64_t *counts, int64_t n, const MuwsCosts *costs, int64_t *firsts, int64_t *total);

// Returns the CRC-32 of n bytes.
MUWS_PUBLIC uint32_t muws_crc32(const uint8_t *data, int64_t n);

// Turns n values of `width` bytes left by one bit and writes byte i of each to planes + i * stride; and back.
// Return 0, or MUWS_WRONG for a width that is not 1, 2, 4 or 8.
MUWS_PUBLIC int64_t muws_split_planes(int64_t width, const void *values, int64_t n, uint8_t *planes, int64_t stride);
MUWS_PUBLIC int64_t muws_join_planes(int64_t width, const uint8_t *const *planes, int64_t n, void *values);

// A matrix of whole blocks: down * rows by across * cols patterns, `stride` patterns from row to row.
struct MuwsBlocks {
  int64_t width, down, across, rows, cols, stride;
  void *patterns;
};

// What a matrix is made of, see streams.py; each list with the patterns or bytes that it has, or has room for.
struct MuwsParts {
  uint8_t *kinds;
  uint8_t *signs;
  void *magnitudes;
  void *free;
  int64_t n_signs, n_magnitudes, n_free;
};

// Writes the kind of each block.
MUWS_PUBLIC int64_t muws_kinds(const MuwsBlocks *blocks, uint8_t *kinds);

// Takes a matrix apart, and puts it together; return 0, or MUWS_WRONG where lists are too short, or a kind is unknown.
// muws_split_blocks sets the lengths of the lists to what it wrote.
MUWS_PUBLIC int64_t muws_split_blocks(const MuwsBlocks *blocks, MuwsParts *parts);
MUWS_PUBLIC int64_t muws_join_blocks(const MuwsParts *parts, const MuwsBlocks *blocks);

// Asks for large pages, which take less time to be filled for the first time. Changes nothing else.
MUWS_PUBLIC void muws_large_pages(void *memory, int64_t n);

}
