// The bytes of a file that each tensor takes. maps.py is the reference.
#include <algorithm>

#include "file.h"

namespace muws {

namespace {

enum BlockKind : uint8_t { DENSE, MIXED, PRUNED };

// How many symbols of each stream a piece has; the bytes of a value count once.
struct Symbols {
  uint64_t kinds = 0, signs = 0, magnitudes = 0, free = 0, other = 0;
  Form stored = N_FORMS;

  // Those of the stream of a name, such as free.float32.0.
  uint64_t of(const char *name) const {
    if (!strcmp(name, "kinds")) return kinds;
    if (!strcmp(name, "signs")) return signs;
    if (!strcmp(name, "other")) return other;
    const char *form = strchr(name, '.'), *byte = strrchr(name, '.');
    if (stored >= N_STORED || !form || byte == form) return 0;
    const size_t n = strlen(name_of(stored));
    if (size_t(byte - form) - 1 != n || memcmp(form + 1, name_of(stored), n)) return 0;
    return !strncmp(name, "free.", 5) ? free : !strncmp(name, "magnitudes.", 11) ? magnitudes : 0;
  }
};

}  // namespace

void File::stored_bytes(double *n_bytes) {
  std::fill(n_bytes, n_bytes + manifest.entries.size(), 0.0);
  loaded = Loaded(budget);
  if (!manifest.chunks.empty()) check_kinds(0, manifest.chunks.size() - 1);
  for (uint64_t i = 0; i < manifest.chunks.size(); i++) {
    const Chunk &chunk = manifest.chunks[i];
    const Piece *pieces = manifest.pieces.data() + chunk.pieces;
    const Bytes owned = kinds_of(i);
    const uint8_t *kinds = owned.data();
    List<Symbols> all(chunk.n_pieces, Symbols(), Counted<Symbols>(budget));
    for (uint64_t k = 0; k < chunk.n_pieces; k++) {
      const Entry &entry = manifest.entries[pieces[k].tensor];
      Symbols &symbols = all[k];
      if (!entry.has_form) {
        symbols.other = manifest.n_bytes(pieces[k]);
        continue;
      }
      symbols.stored = entry.stored;
      symbols.kinds = manifest.blocks(pieces[k]);
      symbols.free = manifest.edge(pieces[k]);
      for (const uint8_t *stop = kinds + symbols.kinds; kinds < stop; kinds++) {
        symbols.free += *kinds == DENSE ? entry.block_numel() : 0;
        symbols.signs += *kinds == MIXED ? entry.block_numel() : 0;
        symbols.magnitudes += *kinds != DENSE && *kinds != PRUNED;
      }
    }
    for (uint64_t s = chunk.streams; s < chunk.streams + chunk.n_streams; s++) {
      const Stream &stream = manifest.streams[s];
      const char *name = manifest.text(stream.name);
      double total = 0;
      for (const Symbols &symbols : all) total += double(symbols.of(name));
      for (uint64_t k = 0; k < chunk.n_pieces && total > 0; k++)
        n_bytes[pieces[k].tensor] += double(stream.stop - stream.start) * double(all[k].of(name)) / total;
    }
  }
}

}  // namespace muws
