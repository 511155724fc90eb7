// An open file: its frame, one decoded chunk at a time, and tensors from it.
#pragma once
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

class File {
 public:
  template <typename From>
  File(From from, uint64_t max_bytes) : budget(max_bytes), source(from), manifest(budget), loaded(budget) {
    budget.take(sizeof *this);
    open();
  }
  File(const File &) = delete;
  File &operator=(const File &) = delete;

  // Decodes a tensor into memory of its size; without memory it checks that all of it can be decoded.
  void decode(uint64_t index, bool as_float32, uint8_t *out);
  void verify();

  Budget budget;
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
  void decode_piece(uint64_t chunk, uint64_t piece, bool as_float32, uint8_t *out);

  Loaded loaded;
};

}  // namespace muws
