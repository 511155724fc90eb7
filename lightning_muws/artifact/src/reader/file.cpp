// Opens a file and decodes its chunks. container.py and chunk.py are the reference.
#include "file.h"

#include <errno.h>

#include <algorithm>

#include "streams.h"

namespace muws {

namespace {

constexpr uint64_t MOST = 16 << 20, HALF_MIB = 1 << 19, N_KINDS = 5, TRIPLES = 125;
using Big = unsigned long long;

enum BlockKind : uint8_t { DENSE, MIXED, PRUNED };

uint64_t load64(const uint8_t *from) {
  uint64_t found;
  memcpy(&found, from, sizeof found);
  return found;
}

const char *looks_like(const uint8_t *data, uint64_t n) {
  if (n >= 2 && data[0] == 'P' && data[1] == 'K') return ": it begins like a zip archive, such as torch.save writes";
  if (n >= 1 && data[0] == 0x80) return ": it begins like a pickle";
  return n >= 2 && data[0] == 0x1f && data[1] == 0x8b ? ": it begins like a gzip file" : "";
}

bool are_digits(const char *text, size_t n) {
  return n > 0 && std::all_of(text, text + n, [](char c) { return c >= '0' && c <= '9'; });
}

// Checks what the header has about the format, and copies the version.
void check_metadata(const Json &header, uint32_t about, char *version, size_t room) {
  const uint32_t format = about && header.is(about, Kind::OBJECT) ? header.get(about, "format") : 0;
  if (!format || !header.equals(format, "muws")) REFUSE("this is no .muws file: its header does not name the format");
  const uint32_t given = header.get(about, "version");
  const Text text = given && header.is(given, Kind::STRING) ? header.text(given) : header.text(format);
  const size_t point = text.find('.');
  if (point == Text::npos || !are_digits(text.data(), point) || !are_digits(text.data() + point + 1, text.size() - point - 1))
    REFUSE("version '%s' is no version such as 1.0", Shown(text).text);
  if (text.compare(0, point, "1") || text.size() >= room) REFUSE("the file has version %s, this reader knows 1.1", Shown(text).text);
  memcpy(version, text.c_str(), text.size() + 1);
  const bool is_known = !strcmp(version, "1.0") || !strcmp(version, "1.1");
  if (is_known && !(header.size(about) == 4 && header.get(about, "manifest_bytes") && header.get(about, "manifest_sha256")))
    REFUSE("the header has other keys about the format than version %s allows", version);
}

uint64_t unpacked(uint64_t packed) { return packed * 3; }

}  // namespace

// ---- bytes

Source::Source(const char *path) {
  file = fopen(path, "rb");
  if (!file) refuse_as(MUWS_NO_FILE, "it cannot be opened: %s", strerror(errno));
  setvbuf(file, nullptr, _IONBF, 0);
  const off_t end = fseeko(file, 0, SEEK_END) ? -1 : ftello(file);
  uint8_t byte;
  const bool is_readable = end >= 0 && !fseeko(file, 0, SEEK_SET) && (fread(&byte, 1, 1, file) == 1 || !ferror(file));
  if (!is_readable) {
    fclose(file);
    refuse_as(MUWS_NO_FILE, "it cannot be read in any order: give a file");
  }
  n_bytes = uint64_t(end);
}

Span Source::read(Budget &budget, uint64_t start, uint64_t stop, Bytes &owned) {
  if (!file) return {memory + start, stop - start};
  owned = Bytes(budget, stop - start);
  if (fseeko(file, off_t(start), SEEK_SET)) refuse_as(MUWS_NO_FILE, "it cannot be read: %s", strerror(errno));
  if (fread(owned.data(), 1, owned.size(), file) != owned.size()) {
    if (ferror(file)) refuse_as(MUWS_NO_FILE, "it cannot be read: %s", strerror(errno));
    REFUSE("the file became shorter while it was read");
  }
  return {owned.data(), owned.size()};
}

// ---- the frame

void File::open() {
  const uint64_t n = source.size();
  Bytes owned;
  const Span prefix = source.read(budget, 0, std::min<uint64_t>(n, 8), owned);
  const uint64_t length = n < 8 ? 0 : load64(prefix.data);
  if (length < 2 || length > n - 8)
    REFUSE("this is no .muws file, or one cut short, of %llu bytes%s", (Big)n, looks_like(prefix.data, prefix.n));
  const uint64_t largest = std::min(MOST, HALF_MIB + n / 8);
  if (length > largest) REFUSE("the header has %llu bytes, at most %llu are allowed", (Big)length, (Big)largest);
  char declared[16] = "", digest[80] = "";
  {
    const Json header(budget, source.read(budget, 8, 8 + length, owned), "header", true);
    const uint32_t about = header.get(0, "__metadata__");
    check_metadata(header, about, version, sizeof version);
    manifest.add_spans(header, 8 + length, n);
    const auto copy = [&](const char *key, char *to, size_t room) {
      const uint32_t node = header.get(about, key);
      if (!node || !header.is(node, Kind::STRING) || header.raw(node).n >= room) return;
      memcpy(to, header.raw(node).data, header.raw(node).n);
    };
    copy("manifest_bytes", declared, sizeof declared);
    copy("manifest_sha256", digest, sizeof digest);
  }
  owned = Bytes();
  const size_t n_digits = strlen(declared);
  if (manifest.manifest_start == UINT64_MAX || n_digits > 10 || !are_digits(declared, n_digits)) REFUSE("the file has no manifest");
  const uint64_t n_json = strtoull(declared, nullptr, 10), packed = manifest.manifest_stop - manifest.manifest_start;
  const uint64_t most = std::min(MOST, HALF_MIB + n / 8 + 128 * packed);
  if (std::max(n_json, packed) > most)
    REFUSE("the manifest has %llu bytes, at most %llu are allowed", (Big)std::max(n_json, packed), (Big)most);
  Span raw = source.read(budget, manifest.manifest_start, manifest.manifest_stop, owned);
  if (packed != n_json) {
    Bytes json(budget, n_json);
    inflate(raw, json.data(), n_json);
    owned = std::move(json);
    raw = {owned.data(), n_json};
  }
  if (strcmp(sha256(raw).text, digest)) REFUSE("the manifest has another SHA-256 than the header declares: the file is damaged");
  const Json json(budget, raw, "manifest", false);
  const uint32_t same = json.get(0, "version");
  if (!same || !json.equals(same, version))
    REFUSE("the header has version %s, the manifest '%s'", version, same ? json.shown(same).text : "none");
  manifest.read(json);
}

// ---- streams

Plane File::stream(uint64_t chunk, const Stream &stream, uint64_t n) {
  const char *coder = manifest.text(stream.coder);
  const bool is_raw = !strcmp(coder, "raw");
  Plane found;
  try {
    if (is_raw && stream.stop - stream.start != n)
      REFUSE("a raw stream holds %llu bytes, %llu are needed", (Big)(stream.stop - stream.start), (Big)n);
    Bytes owned;
    const Span coded = source.read(budget, stream.start, stream.stop, owned);
    const uint32_t checksum = muws_crc32(coded.data, int64_t(coded.n));
    if (int64_t(checksum) != stream.checksum)
      REFUSE("checksum %u, expected %lld: the file is damaged", checksum, (long long)stream.checksum);
    if (is_raw) {
      found.owned = std::move(owned);
      found.data = coded.data;
    } else {
      found.owned = Bytes(budget, n + slack(n));
      decode_stream(budget, coder, coded, found.owned.data(), n);
      found.data = found.owned.data();
    }
  } catch (Refusal &refusal) {
    name_stream(refusal, chunk, Shown(manifest.text(stream.name), stream.name_bytes).text);
    throw;
  }
  return found;
}

// Puts the stream, and the tensors that it belongs to, before a message.
void File::name_stream(Refusal &refusal, uint64_t chunk, const char *stream) const {
  const Chunk &one = manifest.chunks[chunk];
  const Shown tensor = one.n_pieces ? manifest.shown(manifest.entries[manifest.pieces[one.pieces].tensor]) : Shown("", 0);
  Refusal named{refusal.code, ""};
  snprintf(named.text, sizeof named.text, "stream 'c%llu.%s' of '%s'%s: %.280s", (Big)chunk, stream, tensor.text,
           one.n_pieces > 1 ? " and others" : "", refusal.text);
  refusal = named;
}

const Stream *File::find(uint64_t chunk, const char *name) const {
  const Chunk &one = manifest.chunks[chunk];
  const size_t n = strlen(name);
  for (uint64_t i = one.streams; i < one.streams + one.n_streams; i++) {
    const Stream &stream = manifest.streams[i];
    if (stream.name_bytes == n && !memcmp(manifest.text(stream.name), name, n)) return &stream;
  }
  return nullptr;
}

// The kinds of the blocks of a chunk, one a byte; whole bytes of the stream.
Bytes File::kinds_of(uint64_t chunk) {
  const Chunk &one = manifest.chunks[chunk];
  uint64_t n = 0;
  for (uint64_t i = one.pieces; i < one.pieces + one.n_pieces; i++) n += manifest.blocks(manifest.pieces[i]);
  const uint64_t n_packed = (n + 2) / 3;
  Bytes kinds(budget, unpacked(n_packed));
  const Stream *found = n ? find(chunk, "kinds") : nullptr;
  if (!found) {
    if (n) memset(kinds.data(), DENSE, kinds.size());
    return kinds;
  }
  const Plane packed = stream(chunk, *found, n_packed);
  for (uint64_t i = 0; i < n_packed; i++) {
    const unsigned three = packed.data[i];
    if (three >= TRIPLES) REFUSE("stream 'c%llu.kinds': %u stands for no kinds of blocks, only numbers below 125 do", (Big)chunk, three);
    uint8_t *out = kinds.data() + 3 * i;
    out[0] = uint8_t(three % N_KINDS), out[1] = uint8_t(three / N_KINDS % N_KINDS), out[2] = uint8_t(three / (N_KINDS * N_KINDS));
  }
  if (std::any_of(kinds.data() + n, kinds.data() + kinds.size(), [](uint8_t kind) { return kind != 0; }))
    REFUSE("stream 'c%llu.kinds': the last kinds of blocks are followed by others than zeros", (Big)chunk);
  return kinds;
}

// Compares the blocks of each tensor in some chunks with the manifest, before memory is taken for any values.
void File::check_kinds(uint64_t first, uint64_t last) {
  uint64_t counts[3] = {}, tensor = UINT64_MAX;
  for (uint64_t i = first; i <= last && i < manifest.chunks.size(); i++) {
    const Chunk &chunk = manifest.chunks[i];
    Bytes owned;
    const uint8_t *kinds = nullptr;
    if (loaded.chunk == i) kinds = loaded.kinds.data();
    else kinds = (owned = kinds_of(i)).data();
    for (uint64_t k = chunk.pieces; k < chunk.pieces + chunk.n_pieces; k++) {
      const Piece &piece = manifest.pieces[k];
      if (piece.tensor != tensor) memset(counts, 0, sizeof counts);
      tensor = piece.tensor;
      const Entry &entry = manifest.entries[tensor];
      for (const uint8_t *stop = kinds + manifest.blocks(piece); kinds < stop; kinds++) counts[*kinds == DENSE ? 0 : *kinds == PRUNED ? 2 : 1]++;
      for (int kind = 0; kind < 3; kind++)
        if (counts[kind] > entry.kinds[kind])
          REFUSE("'%s' has blocks (%llu, %llu, %llu), the manifest declares (%llu, %llu, %llu)", manifest.shown(entry).text, (Big)counts[0],
                 (Big)counts[1], (Big)counts[2], (Big)entry.kinds[0], (Big)entry.kinds[1], (Big)entry.kinds[2]);
    }
  }
}

void File::count(const Chunk &chunk, Counts &all, uint64_t *magnitudes, uint64_t *free) {
  loaded.before.reserve(chunk.n_pieces);
  for (uint64_t i = chunk.pieces; i < chunk.pieces + chunk.n_pieces; i++) {
    const Piece &piece = manifest.pieces[i];
    const Entry &entry = manifest.entries[piece.tensor];
    const Form stored = entry.stored;
    if (!entry.has_form) {
      loaded.before.push_back({all.kinds, all.signs, 0, 0, all.other});
      all.other += manifest.n_bytes(piece);
      continue;
    }
    loaded.before.push_back({all.kinds, all.signs, magnitudes[stored], free[stored], all.other});
    const uint64_t n = manifest.blocks(piece), numel = entry.block_numel();
    uint64_t found[N_KINDS] = {};
    for (uint64_t k = all.kinds; k < all.kinds + n; k++) found[loaded.kinds.data()[k]]++;
    all.kinds += n;
    all.signs += found[MIXED] * numel;
    magnitudes[stored] += n - found[DENSE] - found[PRUNED];
    free[stored] += found[DENSE] * numel + manifest.edge(piece);
  }
}

void File::load(uint64_t chunk) {
  if (loaded.chunk == chunk) return;
  loaded = Loaded(budget);
  const Chunk &one = manifest.chunks[chunk];
  uint64_t n_used = 0;
  const auto read = [&](const char *name, uint64_t n) {
    const Stream *found = n ? find(chunk, name) : nullptr;
    n_used += found != nullptr;
    return found ? stream(chunk, *found, n) : Plane();
  };
  loaded.kinds = kinds_of(chunk);
  n_used += loaded.kinds.size() && find(chunk, "kinds");
  Counts all;
  uint64_t magnitudes[N_STORED] = {}, free[N_STORED] = {};
  count(one, all, magnitudes, free);
  const uint64_t n_signs = (all.signs + 7) / 8;
  loaded.signs = read("signs", n_signs);
  if (all.signs % 8 && loaded.signs.data && loaded.signs.data[n_signs - 1] >> all.signs % 8)
    REFUSE("stream 'c%llu.signs': the last signs are followed by others than zeros", (Big)chunk);
  for (int role = 0; role < 2; role++) {
    for (int stored = 0; stored < N_STORED; stored++) {
      for (uint32_t i = 0; i < width_of(Form(stored)); i++) {
        char name[48];
        snprintf(name, sizeof name, "%s.%s.%u", role ? "free" : "magnitudes", name_of(Form(stored)), i);
        (role ? loaded.free : loaded.magnitudes)[stored][i] = read(name, (role ? free : magnitudes)[stored]);
      }
    }
  }
  loaded.other = read("other", all.other);
  if (n_used < one.n_streams) REFUSE("chunk %llu has streams that belong to none of its tensors", (Big)chunk);
  loaded.chunk = chunk;
}

}  // namespace muws
