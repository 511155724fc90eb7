// What a file declares, checked before anything else is read: its streams, tensors and chunks.
#pragma once
#include "json.h"
#include "memory.h"

namespace muws {

// Dtypes, in the order of docs/format.md where they are stored as such; then two more ways to store values.
enum Form : uint8_t {
  FLOAT16, BFLOAT16, FLOAT32, FLOAT64, GRID, PALETTE, INT8, UINT8, E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, E8M0FNU,
  N_STORED,
  BOOL = N_STORED, UINT16, INT16, UINT32, INT32, COMPLEX32, UINT64, INT64, COMPLEX64, COMPLEX128,
  N_FORMS,
};
const char *name_of(Form form);
uint32_t width_of(Form form);  // the bytes of a value
inline bool is_floating(Form form) { return form <= FLOAT64; }
inline bool is_bytes(Form form) { return form >= INT8 && form <= E8M0FNU; }

struct Entry {
  uint64_t name, name_bytes;  // where its name is
  uint64_t axes, n_axes;      // where its sizes are
  uint64_t numel = 0, n_bytes = 0;
  uint64_t rows = 0, cols = 1;  // of the matrix that it is seen as: units, and the elements of a unit
  uint64_t block[2] = {0, 0}, down = 0, across = 0, kinds[3] = {0, 0, 0};
  uint64_t groups = 1;
  uint64_t palette = 0, n_palette = 0;  // where its magnitudes are; the first one is 0
  double step = 0, error = 0;
  int64_t same_as = -1;
  uint64_t first_chunk = UINT64_MAX, last_chunk = 0;  // that hold it
  Form dtype = FLOAT32, stored = FLOAT32;
  bool has_form = false, is_turned = false, is_copy = false, is_checked = false;  // its kinds are those declared

  bool has_blocks() const { return block[0] != 0; }
  uint64_t block_numel() const { return down && across ? block[0] * block[1] : 0; }
};

// Units `start` to `stop` of a tensor.
struct Piece {
  uint64_t tensor, start, stop;
};

struct Stream {
  uint64_t name, name_bytes, coder;  // where their texts are; zeros follow them
  uint64_t start, stop;              // in the file
  int64_t checksum;
};

struct Chunk {
  uint64_t tensor, unit;  // before which it ends
  uint64_t streams, n_streams, pieces, n_pieces;
};

struct Manifest {
  explicit Manifest(Budget &budget);

  List<Entry> entries;
  List<Chunk> chunks;
  List<Stream> streams;
  List<Piece> pieces;
  List<uint32_t> by_name;
  List<uint64_t> sizes, magnitudes;
  Text texts, extra;
  uint64_t manifest_start = UINT64_MAX, manifest_stop = 0;  // in the file

  const char *text(uint64_t at) const { return texts.data() + at; }
  const char *name(const Entry &entry) const { return text(entry.name); }
  Shown shown(const Entry &entry) const { return Shown(name(entry), entry.name_bytes); }
  int compare(const Entry &entry, const char *other, uint64_t n) const;

  uint64_t blocks(const Piece &piece) const;
  uint64_t edge(const Piece &piece) const;  // values of a piece in no block
  uint64_t n_bytes(const Piece &piece) const;

  // Fill it from the JSON of a manifest, and from the header, whose streams have to be the same.
  void read(const Json &json);
  void add_spans(const Json &header, uint64_t base, uint64_t n_bytes);

 private:
  struct Found {  // a stream of the header
    uint64_t name, name_bytes, start, stop;
  };
  List<Found> spans;

  uint64_t add(const Text &text);
  void add_tensor(const Json &json, uint32_t node);
  void set_form(const Json &json, uint32_t node, Entry &entry);
  void set_palette(const Json &json, uint32_t node, Entry &entry);
  void set_blocks(const Json &json, uint32_t node, Entry &entry);
  void set_shared(const Json &json, uint32_t node, Entry &entry);
  void add_chunk(const Json &json, uint32_t node);
  void check_modules(const Json &json);
  void check_names();
  void check_chunks();
  void add_pieces();
  void check_streams();
};

}  // namespace muws
