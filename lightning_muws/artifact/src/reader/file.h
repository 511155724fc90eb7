// An open file: its frame, one decoded chunk at a time, and tensors from it.
#pragma once
#include <memory>

#include "manifest.h"
#include "memory.h"

namespace muws {

// Where the bytes of a file come from: an open file, or memory.
class Source {
 public:
  explicit Source(const char *path);
  explicit Source(Span from) : memory(from.data), n_bytes(from.n) {}
  Source(const Source &) = delete;
  Source &operator=(const Source &) = delete;
  ~Source() {
    if (file) fclose(file);
  }
  uint64_t size() const { return n_bytes; }

  // The bytes from `start` to `stop`; `owned` holds them unless the file is in memory.
  Span read(Budget &budget, uint64_t start, uint64_t stop, Bytes &owned);

 private:
  FILE *file = nullptr;
  const uint8_t *memory = nullptr;
  uint64_t n_bytes = 0;
};

// The bytes of a decoded stream; without data they are zeros.
struct Plane {
  Bytes owned;
  const uint8_t *data = nullptr;
};

// How many values of each list come before a piece, and how many it has.
struct Counts {
  uint64_t kinds = 0, signs = 0, magnitudes = 0, free = 0, other = 0;
};

// A chunk, all its streams decoded.
struct Loaded {
  explicit Loaded(Budget &budget) : before(budget) {}
  uint64_t chunk = UINT64_MAX;
  Bytes kinds;
  Plane signs, other, magnitudes[N_STORED][8], free[N_STORED][8];
  List<Counts> before;  // each piece
};

// Takes the values of a tensor as they are decoded, in runs of a row of its matrix; a flat tensor is one column.
class Sink {
 public:
  virtual void put(uint64_t row, uint64_t col, const float *from, uint64_t n) = 0;

 protected:
  ~Sink() = default;
};

struct Packed;

class File {
 public:
  template <typename From>
  File(From from, uint64_t max_bytes)
      : shared(std::make_shared<Budget>(max_bytes)), budget(*shared), source(from), manifest(budget), loaded(budget) {
    budget.take(sizeof *this);
    open();
  }
  File(const File &) = delete;
  File &operator=(const File &) = delete;

  ~File() {
    loaded = Loaded(budget);
    budget.drop();
  }

  // Decodes a tensor into memory of its size, or passes it on as float32.
  void decode(uint64_t index, bool as_float32, uint8_t *out, Sink *sink = nullptr);
  void verify();

  // Packs a weight, without memory for all of it; with the signs of its unified blocks, or their values.
  void pack(uint64_t index, bool with_signs, Packed &out);

  // The share of each tensor in the streams, by the symbols that it has there; maps.py is the reference.
  void stored_bytes(double *n_bytes);

  std::shared_ptr<Budget> shared;  // with what was packed, which may live longer
  Budget &budget;
  Source source;
  Manifest manifest;
  char version[16];

 private:
  void open();
  Plane stream(uint64_t chunk, const Stream &stream, uint64_t n);
  void name_stream(Refusal &refusal, uint64_t chunk, const char *stream) const;
  const Stream *find(uint64_t chunk, const char *name) const;
  Bytes kinds_of(uint64_t chunk);
  void check_kinds(uint64_t first, uint64_t last);
  void count(const Chunk &chunk, Counts &signs, uint64_t *magnitudes, uint64_t *free);
  void load(uint64_t chunk);
  void decode_piece(uint64_t chunk, uint64_t piece, bool as_float32, uint8_t *out, Sink *sink);

  Loaded loaded;
};

}  // namespace muws
