// Tensors and chunks. manifest.py is the reference.
#include "manifest.h"

#include <algorithm>

namespace muws {

namespace {

constexpr uint64_t MAX_AXES = 64, MAX_NUMEL = 1ull << 60, MAX_CHUNK = 256 << 20, MAX_CHUNKS = 1024, MAX_PALETTE = 4096, MAX_DEPTH = 64;
using Big = unsigned long long;

struct Named {
  const char *name;
  uint32_t width;
};
constexpr Named FORMS[N_FORMS] = {
    {"float16", 2}, {"bfloat16", 2}, {"float32", 4}, {"float64", 8}, {"grid", 2}, {"palette", 2}, {"int8", 1}, {"uint8", 1},
    {"float8_e4m3fn", 1}, {"float8_e4m3fnuz", 1}, {"float8_e5m2", 1}, {"float8_e5m2fnuz", 1}, {"float8_e8m0fnu", 1},
    {"bool", 1}, {"uint16", 2}, {"int16", 2}, {"uint32", 4}, {"int32", 4}, {"complex32", 4}, {"uint64", 8}, {"int64", 8},
    {"complex64", 8}, {"complex128", 16}};

// The form of a string of JSON, N_FORMS if there is none.
Form form_of(const Json &json, uint32_t node) {
  int found = 0;
  while (found < N_FORMS && !json.equals(node, FORMS[found].name)) found++;
  return Form(found);
}

// A whole number from 0 to below 2**60.
uint64_t whole(const Json &json, uint32_t node, const char *what) {
  const int64_t found = json.is(node, Kind::INTEGER) ? json.integer(node) : -1;
  if (found < 0 || uint64_t(found) >= MAX_NUMEL) REFUSE("%s has '%s', whole numbers >= 0 are needed", what, json.shown(node).text);
  return uint64_t(found);
}

void wholes(const Json &json, uint32_t object, const char *key, uint64_t *out, uint32_t n) {
  const uint32_t list = json.get(object, key, Kind::LIST);
  if (json.size(list) != n) REFUSE("%s has %u numbers, %u are needed", key, json.size(list), n);
  for (uint32_t node = json.first(list); node < json.end(list); node = json.next(node)) *out++ = whole(json, node, key);
}

uint64_t sum(uint64_t a, uint64_t b) { return a > UINT64_MAX - b ? UINT64_MAX : a + b; }

}  // namespace

const char *name_of(Form form) { return FORMS[form].name; }

uint32_t width_of(Form form) { return FORMS[form].width; }

Manifest::Manifest(Budget &budget)
    : entries(budget), chunks(budget), streams(budget), pieces(budget), by_name(budget), sizes(budget), magnitudes(budget),
      texts(Counted<char>(budget)), extra(Counted<char>(budget)), spans(budget) {}

int Manifest::compare(const Entry &entry, const char *other, uint64_t n) const {
  const int found = memcmp(name(entry), other, std::min(entry.name_bytes, n));
  return found ? found : entry.name_bytes < n ? -1 : entry.name_bytes > n;
}

uint64_t Manifest::blocks(const Piece &piece) const {
  const Entry &entry = entries[piece.tensor];
  return entry.has_blocks() ? (piece.stop - piece.start) / entry.block[0] * entry.across : 0;
}

uint64_t Manifest::edge(const Piece &piece) const {
  const Entry &entry = entries[piece.tensor];
  return (piece.stop - piece.start) * entry.cols - blocks(piece) * entry.block_numel();
}

uint64_t Manifest::n_bytes(const Piece &piece) const {
  const Entry &entry = entries[piece.tensor];
  return (piece.stop - piece.start) * entry.cols * width_of(entry.dtype);
}

void Manifest::read(const Json &json) {
  const uint32_t tensors = json.get(0, "tensors", Kind::LIST);
  entries.reserve(json.size(tensors));
  for (uint32_t node = json.first(tensors); node < json.end(tensors); node = json.next(node)) add_tensor(json, node);
  check_names();
  const uint32_t parts = json.get(0, "chunks", Kind::LIST);
  chunks.reserve(json.size(parts));
  for (uint32_t node = json.first(parts); node < json.end(parts); node = json.next(node)) add_chunk(json, node);
  check_modules(json);
  const uint32_t own = json.get(0, "extra", Kind::OBJECT, true);
  if (own && json.nests_deeper(own, MAX_DEPTH)) REFUSE("extra nests more than 64 deep");
  const Span raw = own ? json.raw(own) : Span{(const uint8_t *)"{}", 2};
  extra.assign((const char *)raw.data, raw.n);
  check_chunks();
  add_pieces();
  check_streams();
}

uint64_t Manifest::add(const Text &text) {
  const uint64_t at = texts.size();
  texts.append(text);
  texts.push_back('\0');
  return at;
}

// ---- tensors

void Manifest::add_tensor(const Json &json, uint32_t node) {
  json.need(node, Kind::OBJECT, "a tensor");
  Entry entry;
  const Text name = json.text(json.get(node, "name", Kind::STRING));
  entry.name = add(name);
  entry.name_bytes = name.size();
  const Shown shown(name);
  const uint32_t dtype = json.get(node, "dtype", Kind::STRING), shape = json.get(node, "shape", Kind::LIST);
  entry.dtype = form_of(json, dtype);
  if (entry.dtype == N_FORMS || entry.dtype == GRID || entry.dtype == PALETTE)
    REFUSE("'%s' has dtype '%s', which this reader does not know", shown.text, json.shown(dtype).text);
  entry.axes = sizes.size();
  entry.n_axes = json.size(shape);
  if (entry.n_axes > MAX_AXES) REFUSE("'%s' has %llu axes, at most 64 can be stored", shown.text, (Big)entry.n_axes);
  uint64_t numel = 1;
  entry.numel = 1;
  for (uint32_t size = json.first(shape); size < json.end(shape); size = json.next(size)) {
    sizes.push_back(whole(json, size, "shape"));
    entry.numel *= sizes.back();
    const uint64_t n = std::max<uint64_t>(1, sizes.back());
    if (n >= MAX_NUMEL / numel + (MAX_NUMEL % numel != 0)) REFUSE("'%s' has more weights than any memory holds", shown.text);
    numel *= n;
  }
  entry.n_bytes = entry.numel * width_of(entry.dtype);
  entry.rows = entry.numel;
  entry.stored = entry.dtype;
  if (json.get(node, "same_as")) {
    set_shared(json, node, entry);
  } else {
    set_form(json, node, entry);
    if (json.get(node, "block")) set_blocks(json, node, entry);
    const uint32_t error = json.get(node, "error", Kind::REAL, true);
    entry.error = error ? json.real(error) : 0;
    if (!(entry.error >= 0)) REFUSE("'%s' has an error of %g, a finite number >= 0 is needed", shown.text, entry.error);
  }
  entries.push_back(entry);
}

void Manifest::set_shared(const Json &json, uint32_t node, Entry &entry) {
  const uint32_t copy = json.get(node, "copy", Kind::BOOLEAN, true);
  entry.is_copy = copy && json.boolean(copy);
  entry.same_as = json.integer(json.get(node, "same_as", Kind::INTEGER));
  const bool is_there = entry.same_as >= 0 && uint64_t(entry.same_as) < entries.size();
  const Entry *other = is_there ? &entries[size_t(entry.same_as)] : nullptr;
  if (!other || other->same_as >= 0 || other->dtype != entry.dtype || other->n_axes != entry.n_axes ||
      !std::equal(sizes.begin() + entry.axes, sizes.end(), sizes.begin() + other->axes))
    REFUSE("'%s' has same_as=%lld, but that tensor is missing, itself shared, or has another shape or dtype",
           shown(entry).text, (long long)entry.same_as);
  entry.stored = other->stored;
}

void Manifest::set_form(const Json &json, uint32_t node, Entry &entry) {
  const Shown name = shown(entry);
  const uint32_t stored = json.get(node, "stored", Kind::STRING, true), step = json.get(node, "step", Kind::REAL, true);
  entry.stored = stored ? form_of(json, stored) : entry.dtype;
  entry.step = step ? json.real(step) : 0;
  if (!is_floating(entry.dtype)) {
    if (entry.stored != entry.dtype || entry.step != 0)
      REFUSE("'%s' is of dtype %s and stored as '%s'", name.text, name_of(entry.dtype), json.shown(stored).text);
    entry.has_form = is_bytes(entry.dtype) && json.get(node, "block");
    return;
  }
  entry.has_form = true;
  if (entry.stored == PALETTE) {
    entry.step = 0;
    return set_palette(json, node, entry);
  }
  const bool is_known = is_floating(entry.stored) || entry.stored == GRID;
  const bool is_held = entry.dtype == FLOAT64 || double(float(entry.step)) == entry.step;
  if (!is_known || (entry.stored == GRID) != (entry.step != 0) || !(entry.step >= 0) || !is_held)
    REFUSE("'%s' is stored as '%s' with step %g, which this format does not allow", name.text,
           stored ? json.shown(stored).text : name_of(entry.dtype), entry.step);
}

void Manifest::set_palette(const Json &json, uint32_t node, Entry &entry) {
  const uint32_t palette = json.get(node, "palette", Kind::STRING), width = width_of(entry.dtype);
  const Text text = json.text(palette);
  const auto digit = [&](size_t i) {
    static const char digits[] = "0123456789abcdef0123456789ABCDEF";
    const char *found = i < text.size() && text[i] ? strchr(digits, text[i]) : nullptr;
    return found ? int(found - digits) & 15 : -1;
  };
  entry.palette = magnitudes.size();
  magnitudes.push_back(0);
  uint64_t value = 0, n_bytes = 0;
  bool is_wrong = false;
  for (size_t i = 0; i < text.size() && !is_wrong;) {
    if (strchr(" \t\n\r\f\v", text[i]) && text[i]) {
      i++;
      continue;
    }
    is_wrong = digit(i) < 0 || digit(i + 1) < 0 || n_bytes >= MAX_PALETTE * width;
    if (is_wrong) break;
    value |= uint64_t(16 * digit(i) + digit(i + 1)) << 8 * (n_bytes % width);
    i += 2;
    if (++n_bytes % width) continue;
    is_wrong = value >> (8 * width - 1);
    magnitudes.push_back(value);
    value = 0;
  }
  entry.n_palette = magnitudes.size() - entry.palette;
  if (is_wrong || n_bytes % width || entry.n_palette < 2)
    REFUSE("'%s' has the palette '%s', 1 to 4096 magnitudes of %u bytes in hex are needed", shown(entry).text,
           json.shown(palette).text, width);
}

void Manifest::set_blocks(const Json &json, uint32_t node, Entry &entry) {
  const Shown name = shown(entry);
  if (!entry.has_form)
    REFUSE("'%s' is of dtype %s and in blocks, which only floating tensors are, and bytes", name.text, name_of(entry.dtype));
  const uint64_t *shape = sizes.data() + entry.axes, first = entry.n_axes ? shape[0] : 1;
  const uint32_t given_groups = json.get(node, "groups", Kind::INTEGER, true), given_axis = json.get(node, "out_axis", Kind::INTEGER, true);
  const int64_t groups = given_groups ? json.integer(given_groups) : 1, axis = given_axis ? json.integer(given_axis) : 0;
  wholes(json, node, "block", entry.block, 2);
  const bool fits = entry.n_axes >= 2 && (axis == 0 || axis == 1) && groups >= 1 && uint64_t(groups) <= std::max<uint64_t>(1, first);
  if (!fits || first % uint64_t(groups) || (groups > 1 && axis == 0))
    REFUSE("'%s' cannot have out_axis=%lld, groups=%lld: its shape does not fit", name.text, (long long)axis, (long long)groups);
  if (!entry.block[0] || !entry.block[1])
    REFUSE("'%s': block_shape=(%llu, %llu) is not allowed: two whole numbers >= 1 are", name.text, (Big)entry.block[0], (Big)entry.block[1]);
  entry.groups = uint64_t(groups);
  entry.is_turned = axis == 1;
  entry.rows = entry.is_turned ? shape[1] * entry.groups : first;
  entry.cols = entry.rows ? entry.numel / entry.rows : 0;
  entry.down = entry.rows / entry.block[0];
  entry.across = entry.cols / entry.block[1];
  wholes(json, node, "kinds", entry.kinds, 3);
  const uint64_t declared = entry.kinds[0] + entry.kinds[1] + entry.kinds[2];
  if (declared != entry.down * entry.across)
    REFUSE("'%s' has %llu blocks, the file declares %llu", name.text, (Big)(entry.down * entry.across), (Big)declared);
}

void Manifest::check_names() {
  by_name.resize(entries.size());
  for (size_t i = 0; i < entries.size(); i++) by_name[i] = uint32_t(i);
  std::sort(by_name.begin(), by_name.end(), [&](uint32_t a, uint32_t b) {
    return compare(entries[a], name(entries[b]), entries[b].name_bytes) < 0;
  });
  for (size_t i = 1; i < by_name.size(); i++) {
    const Entry &one = entries[by_name[i]];
    if (!compare(entries[by_name[i - 1]], name(one), one.name_bytes)) REFUSE("two tensors of the file have one name: '%s'", shown(one).text);
  }
}

void Manifest::check_modules(const Json &json) {
  const uint32_t modules = json.get(0, "modules", Kind::OBJECT, true);
  if (!modules) return;
  for (uint32_t key = json.first(modules); key < json.end(modules); key = json.next(json.next(key))) {
    json.need(json.next(key), Kind::OBJECT, "the entry of a module");
    json.get(json.next(key), "version", Kind::INTEGER, true);
  }
}

// ---- chunks

void Manifest::add_chunk(const Json &json, uint32_t node) {
  json.need(node, Kind::OBJECT, "a chunk");
  uint64_t until[2];
  wholes(json, node, "until", until, 2);
  const uint32_t list = json.get(node, "streams", Kind::OBJECT);
  chunks.push_back({until[0], until[1], streams.size(), json.size(list), 0, 0});
  for (uint32_t key = json.first(list); key < json.end(list); key = json.next(json.next(key))) {
    const uint32_t about = json.next(key);
    const bool is_pair = json.is(about, Kind::LIST) && json.size(about) == 2;
    const uint32_t coder = json.first(about), checksum = is_pair ? json.next(coder) : 0;
    if (!is_pair || !json.is(coder, Kind::STRING) || !json.is(checksum, Kind::INTEGER))
      REFUSE("stream '%s' has neither coder nor checksum", json.shown(key).text);
    const Text name = json.text(key), coder_name = json.text(coder);
    if (memchr(coder_name.data(), '\0', coder_name.size())) REFUSE("coder '%s' is not known to this reader", json.shown(coder).text);
    const uint64_t at = add(name);
    streams.push_back({at, name.size(), add(coder_name), 0, 0, json.integer(checksum)});
  }
}

void Manifest::check_chunks() {
  uint64_t n_bytes = 0, last = 0, last_unit = 0;
  const uint64_t n = entries.size();
  for (const Entry &entry : entries)
    if (entry.same_as < 0 || entry.is_copy) n_bytes = sum(n_bytes, entry.n_bytes);
  const uint64_t most = MAX_CHUNKS + (n_bytes >> 20);
  if (chunks.size() > most) REFUSE("the file has %llu chunks, at most %llu are allowed for its tensors", (Big)chunks.size(), (Big)most);
  for (const Chunk &chunk : chunks) {
    const uint64_t at = chunk.tensor, unit = chunk.unit;
    const bool is_whole = at <= n && (!unit || (at < n && entries[at].same_as < 0));
    if (!is_whole || at < last || (at == last && unit <= last_unit))
      REFUSE("a chunk ends at tensor %llu, unit %llu, which is not after (%llu, %llu) and within %llu", (Big)at, (Big)unit, (Big)last,
             (Big)last_unit, (Big)n);
    if (unit && (unit >= entries[at].rows || (entries[at].has_blocks() && unit % entries[at].block[0])))
      REFUSE("a chunk ends within '%s', at %llu, where no block row does", shown(entries[at]).text, (Big)unit);
    last = at, last_unit = unit;
  }
  if (last != n || last_unit) REFUSE("the chunks end at tensor %llu of %llu", (Big)last, (Big)n);
}

void Manifest::add_pieces() {
  pieces.reserve(entries.size() + chunks.size());
  uint64_t at = 0, unit = 0;
  for (size_t i = 0; i < chunks.size(); i++) {
    Chunk &chunk = chunks[i];
    chunk.pieces = pieces.size();
    uint64_t size = 0;
    while (at < chunk.tensor || (at == chunk.tensor && unit < chunk.unit)) {
      Entry &entry = entries[at];
      const uint64_t end = at == chunk.tensor ? chunk.unit : entry.rows;
      if (entry.same_as < 0 && end > unit) {
        pieces.push_back({at, unit, end});
        size = sum(size, this->n_bytes(pieces.back()));
        entry.first_chunk = std::min<uint64_t>(entry.first_chunk, i);
        entry.last_chunk = i;
      }
      if (at == chunk.tensor) unit = end;
      else at++, unit = 0;
    }
    chunk.n_pieces = pieces.size() - chunk.pieces;
    if (size > MAX_CHUNK) REFUSE("chunk %llu, which ends at tensor %llu, has %llu bytes, at most 268435456 are allowed", (Big)i,
                                 (Big)chunk.tensor, (Big)size);
  }
}

// ---- streams of the header

void Manifest::add_spans(const Json &header, uint64_t base, uint64_t n_bytes) {
  uint64_t end = 0;
  spans.reserve(header.size(0));
  for (uint32_t key = header.first(0); key < header.end(0); key = header.next(header.next(key))) {
    if (header.equals(key, "__metadata__")) continue;
    const uint32_t about = header.next(key);
    const bool is_object = header.is(about, Kind::OBJECT) && header.size(about) == 3;
    const uint32_t dtype = is_object ? header.get(about, "dtype") : 0, shape = is_object ? header.get(about, "shape") : 0;
    const uint32_t offsets = is_object ? header.get(about, "data_offsets") : 0;
    const auto numbers = [&](uint32_t list, uint32_t n, int64_t *out) {
      if (!list || !header.is(list, Kind::LIST) || header.size(list) != n) return false;
      for (uint32_t node = header.first(list); node < header.end(list); node = header.next(node)) {
        if (!header.is(node, Kind::INTEGER)) return false;
        *out++ = header.integer(node);
      }
      return true;
    };
    int64_t span[2], length;
    const bool is_right = dtype && header.equals(dtype, "U8") && numbers(offsets, 2, span) && numbers(shape, 1, &length);
    if (!is_right || uint64_t(span[0]) != end || span[1] < span[0] || length != span[1] - span[0] || uint64_t(span[1]) > n_bytes - base)
      REFUSE("stream '%s' should be U8 data at offset %llu, within the file", header.shown(key).text, (Big)end);
    end = uint64_t(span[1]);
    const uint64_t start = base + uint64_t(span[0]);
    if (header.equals(key, "manifest")) {
      manifest_start = start, manifest_stop = base + end;
      continue;
    }
    const Text name = header.text(key);
    spans.push_back({add(name), name.size(), start, base + end});
  }
  if (base + end != n_bytes) REFUSE("the header declares %llu bytes, the file has %llu", (Big)(base + end), (Big)n_bytes);
}

void Manifest::check_streams() {
  size_t at = 0;
  for (size_t i = 0; i < chunks.size(); i++) {
    char start[32];
    const size_t length = size_t(snprintf(start, sizeof start, "c%zu.", i));
    for (uint64_t k = chunks[i].streams; k < chunks[i].streams + chunks[i].n_streams; k++) {
      Stream &stream = streams[k];
      const bool is_same = at < spans.size() && spans[at].name_bytes == length + stream.name_bytes &&
                           !memcmp(text(spans[at].name), start, length) &&
                           !memcmp(text(spans[at].name) + length, text(stream.name), stream.name_bytes);
      if (!is_same) REFUSE("the manifest declares other streams than the header: %s%s", start, Shown(text(stream.name), stream.name_bytes).text);
      stream.start = spans[at].start, stream.stop = spans[at].stop;
      at++;
    }
  }
  if (at < spans.size()) REFUSE("the manifest declares fewer streams than the header");
  spans = List<Found>(spans.get_allocator());
}

}  // namespace muws
