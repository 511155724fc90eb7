// Damaged and lying files for the reader in C, in one process: each in memory of exactly its size, so that the sanitizers
// see any access outside. Most have every checksum right. Whatever a file is, the reader stays within its limit and a
// second, a file that it verifies can be decoded, and its weights can be packed and run.
// Built and run by fuzz_reader.sh: fuzz_reader INPUTS FIRST_SEED FILE...
#include <time.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "../../lightning_muws/artifact/src/reader/json.h"
#include "../../lightning_muws/artifact/src/reader/streams.h"
#include "../support/fuzz.h"

using std::string;

static bool chance(int percent) { return int(below(100)) < percent; }
template <typename T>
static const T &choice(const std::vector<T> &from) { return from[below(from.size())]; }

struct Range {
  size_t start, stop;
};

struct Stream {
  string name, bytes;
  Range coder, checksum;  // in the manifest
};

struct Model {
  string manifest, version;
  std::vector<Stream> streams;
  std::vector<Range> values;  // of the manifest, strings with their quotes
};

static muws::Span span(const string &text) { return {(const uint8_t *)text.data(), text.size()}; }

static Range place(const muws::Json &json, uint32_t node) {
  const size_t quote = json.is(node, muws::Kind::STRING);
  return {json[node].start - quote, json[node].stop + quote};
}

static Model take_apart(const string &data) {
  Model found;
  muws::Budget budget(uint64_t(1) << 32);
  uint64_t length, start = 0, stop = 0;
  memcpy(&length, data.data(), 8);
  const string text = data.substr(8, length), body = data.substr(8 + length);
  const muws::Json header(budget, span(text), "header", true);
  const uint32_t about = header.get(0, "__metadata__");
  const muws::Text version = header.text(header.get(about, "version"));
  found.version.assign(version.data(), version.size());
  const size_t n_json = size_t(atoll(header.text(header.get(about, "manifest_bytes")).c_str()));
  for (uint32_t key = header.next(about); key < header.end(0); key = header.next(header.next(key))) {
    const uint32_t offsets = header.get(header.next(key), "data_offsets"), first = header.first(offsets);
    start = uint64_t(header.integer(first)), stop = uint64_t(header.integer(header.next(first)));
    const muws::Text name = header.text(key);
    found.streams.push_back({string(name.data(), name.size()), body.substr(start, stop - start), {}, {}});
  }
  found.manifest = found.streams.back().bytes;
  found.streams.pop_back();
  if (found.manifest.size() != n_json) {
    string raw(n_json, ' ');
    muws::inflate(span(found.manifest), (uint8_t *)&raw[0], n_json);
    found.manifest = raw;
  }
  const muws::Json json(budget, span(found.manifest), "manifest", false);
  for (uint32_t node = 1; node < json.end(0); node++) found.values.push_back(place(json, node));
  const uint32_t chunks = json.get(0, "chunks");
  size_t k = 0;
  for (uint32_t chunk = json.first(chunks); chunk < json.end(chunks); chunk = json.next(chunk)) {
    const uint32_t list = json.get(chunk, "streams");
    for (uint32_t key = json.first(list); key < json.end(list); key = json.next(json.next(key)), k++) {
      const uint32_t coder = json.first(json.next(key));
      found.streams[k].coder = place(json, coder);
      found.streams[k].checksum = place(json, json.next(coder));
    }
  }
  return found;
}

static string number(size_t value) {
  string found;
  for (; value > 127; value >>= 7) found += char(value | 128);
  return found + char(value);
}

static uint32_t adler(const string &data) {
  uint32_t a = 1, b = 0;
  for (const char c : data) a = (a + (unsigned char)c) % 65521, b = (b + a) % 65521;
  return b << 16 | a;
}

static string big_endian(uint32_t n) { return {char(n >> 24), char(n >> 16), char(n >> 8), char(n)}; }

// A zlib stream that stores its data, in blocks of any size.
static string stored(const string &data) {
  string found = "\x78\x01";
  for (size_t at = 0, some; at < data.size(); at += some) {
    some = std::min<size_t>({data.size() - at, 65535, 1 + below(65535)});
    const uint16_t n = uint16_t(some), other = uint16_t(~n);
    found += char(at + some == data.size());
    found += {char(n), char(n >> 8), char(other), char(other >> 8)};
    found += data.substr(at, some);
  }
  return found + big_endian(adler(data));
}

// A zlib stream of zeros, as small as there is: a literal, and as many matches of 258 bytes.
static string bomb(size_t matches) {
  string found = "\x78\x01";
  uint64_t held = 0;
  int n_held = 0;
  const auto put = [&](uint64_t code, int n, bool is_turned) {
    for (int i = 0; i < n; i++, n_held++) held |= (code >> (is_turned ? n - 1 - i : i) & 1) << n_held;
    for (; n_held >= 8; n_held -= 8, held >>= 8) found += char(held);
  };
  put(3, 3, false);    // the last block, of the fixed codes
  put(0x30, 8, true);  // a zero
  for (size_t i = 0; i < matches; i++) put(0xc5, 8, true), put(0, 5, true);
  put(0, 7, true);
  put(0, n_held ? 8 - n_held : 0, false);
  return found + big_endian(uint32_t((258 * matches + 1) % 65521) << 16 | 1);
}

static string bent(string data) {
  if (data.empty()) data = string(1, '\0');
  const size_t times = choice<size_t>({1, 1, 2, 5});
  for (size_t i = 0; i < times; i++) {
    const size_t at = chance(50) ? below(data.size()) : below(std::min<size_t>(12, data.size()));
    switch (below(6)) {
      case 0: case 1: data[at] = char(choice<size_t>({0, 1, 2, 127, 128, 255, below(256)})); break;
      case 2: data[at] = char(data[at] ^ 1 << below(8)); break;
      case 3: data.erase(at, choice<size_t>({1, 1, 4, data.size()})); break;
      case 4: data.insert(at, choice<string>({"\xff\xff\xff\x7f", "\x80\x80\x01", number(below(1 << 28)), string(below(9), char(below(256)))})); break;
      case 5: data.insert(at, data.substr(0, 1 + below(63))); break;
    }
    if (data.empty()) data = string(1, '\0');
  }
  return data;
}

static string coder() {
  string found;
  for (const char *filter : {"repeat-", "xor-", "delta-", "bits-"})
    if (chance(40)) found += filter;
  found += choice<string>({"raw", "zlib", "rans", "zlib2"});
  if (chance(3)) found += choice<string>({"-", "-raw", "x", "-bits-raw"});
  return chance(15) ? "parts" : found;
}

static string value() {
  static const std::vector<string> values = {
      "null", "true", "false", "-1", "0", "1", "2", "3", "4", "7", "8", "63", "64", "127", "128", "255", "1024", "8192", "1048576", "268435456",
      "2147483648", "576460752303423488", "1152921504606846975", "1180591620717411303424", "-0", "0.0", "0.5", "1e300", "1e400", "1e-400", "NaN", "\"\"",
      "\"float16\"", "\"float32\"", "\"float64\"", "\"bfloat16\"", "\"grid\"", "\"palette\"", "\"int8\"", "\"uint8\"", "\"bool\"", "\"complex128\"",
      "\"float8_e4m3fn\"", "\"0000000000000000\"", "\"\\u0000\\ud800\\ud83d\\ude00\\\"\"", "[]", "[0]", "[0,0]", "[2,2]", "[1,2,3]", "{}", "{\"a\":[]}", "[[[]]]"};
  return choice(values);
}

static string put_together(const string &manifest, const std::vector<Stream> &streams, const string &version) {
  const string packed = chance(30) ? stored(manifest) : manifest;
  std::ostringstream header;
  header << "{\"__metadata__\":{\"format\":\"muws\",\"version\":\"" << version << "\",\"manifest_bytes\":\"" << manifest.size()
         << "\",\"manifest_sha256\":\"" << muws::sha256(span(manifest)).text << "\"}";
  string body;
  const auto add = [&](const string &name, const string &bytes) {
    header << ",\"" << name << "\":{\"dtype\":\"U8\",\"shape\":[" << bytes.size() << "],\"data_offsets\":[" << body.size() << ','
           << body.size() + bytes.size() << "]}";
    body += bytes;
  };
  for (const Stream &stream : streams) add(stream.name, stream.bytes);
  add("manifest", packed);
  string text = header.str() + "}";
  if (chance(2)) text[below(text.size())] = char(32 + below(96));
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();
  return string((const char *)&length, 8) + text + body;
}

// A file whose streams, coders or manifest were changed, with every checksum right.
static string lie(const Model &good) {
  std::vector<Stream> streams = good.streams;
  string manifest = good.manifest, version = good.version;
  if (streams.empty() || chance(25)) {
    for (size_t i = choice<size_t>({1, 1, 1, 2, 4}); i; i--) {
      if (chance(15)) {
        manifest = bent(manifest);
        break;  // the places are others now
      }
      const Range at = choice(good.values);
      if (at.stop <= manifest.size()) manifest.replace(at.start, at.stop - at.start, chance(80) ? value() : manifest.substr(below(manifest.size()), 1 + below(30)));
      if (i > 1 && chance(50)) break;
    }
    if (chance(3)) version = choice<string>({"1.0", "1.1", "1.9", "2.0", "1"});
  } else {
    std::vector<string> coders(streams.size());
    for (size_t i = choice<size_t>({1, 1, 1, 2, 3}); i; i--) {
      const size_t k = below(streams.size());
      if (chance(30)) coders[k] = coder();
      if (chance(5)) streams[k].bytes = stored(chance(50) ? streams[k].bytes : string(below(5000), char(below(3))));
      else if (chance(5)) streams[k].bytes = bomb(below(chance(10) ? 100000 : 300));
      else if (chance(85)) streams[k].bytes = bent(streams[k].bytes);
    }
    for (size_t k = streams.size(); k-- > 0;) {
      const Stream &one = streams[k];
      const uint32_t checksum = muws_crc32((const uint8_t *)one.bytes.data(), int64_t(one.bytes.size()));
      manifest.replace(one.checksum.start, one.checksum.stop - one.checksum.start, std::to_string(checksum));
      if (!coders[k].empty()) manifest.replace(one.coder.start, one.coder.stop - one.coder.start, '"' + coders[k] + '"');
    }
  }
  return put_together(manifest, streams, version);
}

// A file with bits flipped, or cut, or spliced from itself or another.
static string damaged(string data, const string &other) {
  size_t a = below(data.size() + 1), b = below(data.size() + 1);
  if (a > b) std::swap(a, b);
  switch (below(8)) {
    case 0: case 1: case 2:
      for (size_t i = choice<size_t>({1, 1, 2, 8}); i; i--) {
        const size_t at = below(chance(50) ? data.size() : std::min<size_t>(600, data.size()));
        data[at] = char(data[at] ^ 1 << below(8));
      }
      return data;
    case 3: return data.substr(0, a);
    case 4: return data.erase(a, b - a);
    case 5: return data.insert(a, data.substr(b, 1 + below(63)));
    case 6: return data.replace(a, b - a, other.substr(std::min(a, other.size()), b - a));
    default: return data.replace(a, b - a, string(b - a, '\0'));
  }
}

static double seconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

static Exactly<float> ones(uint64_t n) {
  Exactly<float> found(static_cast<int64_t>(n));
  std::fill(found.get(), found.get() + n, 1.0f);
  return found;
}

// Packs a weight, and runs it for inputs of ones: all outputs together are the sum of its weights.
static void run(MuwsFile *file, uint64_t index, int32_t form, const std::vector<float> &weights, bool is_intact) {
  MuwsError error;
  MuwsPacked *packed = muws_pack(file, index, form, &error);
  CHECK((packed != nullptr) == (error.code == MUWS_OK));
  CHECK(packed || error.code == MUWS_ARGUMENT || error.code == MUWS_TOO_LARGE || (error.code == MUWS_REFUSED && !is_intact));
  if (!packed) return;
  MuwsBlocksInfo info;
  muws_packed(packed, &info);
  CHECK(info.outputs * info.inputs == weights.size());
  double sum = 0, size = 1e-30;
  for (const float weight : weights) sum += weight, size += std::fabs(weight);
  if (info.outputs + info.inputs < 100000) {
    const uint64_t n = 1 + below(chance(80) ? 6 : 100);
    const Exactly<float> x = ones(n * info.inputs), y = ones(n * info.outputs), bias = ones(info.outputs);
    const bool has_bias = chance(50), relu = chance(20);
    CHECK(muws_linear(packed, x.get(), info.inputs + 1, y.get(), info.outputs, n, nullptr, 0, &error) == MUWS_ARGUMENT);
    CHECK(muws_linear(packed, x.get(), info.inputs, y.get(), info.outputs, n, has_bias ? bias.get() : nullptr, relu, &error) == MUWS_OK);
    double found = has_bias ? -double(n * info.outputs) : 0;
    for (uint64_t i = 0; i < n * info.outputs; i++) found += y[int64_t(i)];
    if (size < 1e30 && !relu) CHECK(std::fabs(found - double(n) * sum) <= 1e-4 * double(n) * (size + double(info.outputs)));
  }
  const uint64_t n = 1 + below(3), h = 1 + below(5), w = 1 + below(20), numel = n * info.outputs * h * w;
  if (form == MUWS_VALUES && info.outputs + info.inputs < 2000) {
    const Exactly<float> x = ones(n * info.inputs * h * w), y = ones(numel);
    const MuwsConv2d shape = {n, info.inputs, h, w, {1, 1}, {1, 1}, {0, 0}};
    CHECK(muws_conv2d(packed, &shape, x.get(), y.get(), numel + 1, nullptr, 0, &error) == MUWS_ARGUMENT);
    CHECK(muws_conv2d(packed, &shape, x.get(), y.get(), numel, nullptr, 0, &error) == MUWS_OK);
    double found = 0;
    for (uint64_t i = 0; i < numel; i++) found += y[int64_t(i)];
    if (size < 1e30) CHECK(std::fabs(found - double(n * h * w) * sum) <= 1e-4 * double(n * h * w) * size);
  }
  muws_free_packed(packed);
}

// Reads all that can be read of a file; returns whether it was verified.
static bool read(const string &data, uint64_t limit) {
  const Exactly<char> exact(static_cast<int64_t>(data.size()));
  memcpy(exact.get(), data.data(), data.size());
  MuwsError error;
  const double start = seconds();
  MuwsFile *file = muws_open_memory(exact.get(), data.size(), limit, &error);
  CHECK((file != nullptr) == (error.code == MUWS_OK));
  CHECK(file || *error.message);
  if (!file) {
    CHECK(seconds() - start < 1);
    return false;
  }
  const bool is_verified = muws_verify(file, &error) == MUWS_OK;
  CHECK(is_verified || error.code == MUWS_REFUSED || error.code == MUWS_TOO_LARGE);
  CHECK(seconds() - start < 1);
  uint64_t n_extra, room = 4 << 20;
  CHECK(muws_extra(file, &n_extra)[n_extra] == '\0');
  for (uint64_t i = 0; i < muws_n_tensors(file); i++) {
    MuwsTensor tensor;
    CHECK(muws_tensor(file, i, &tensor, &error) == MUWS_OK);
    CHECK(strlen(tensor.name) != tensor.name_bytes || muws_find(file, tensor.name) == int64_t(i));
    for (const int32_t as : {MUWS_OWN, MUWS_FLOAT32}) {
      if (tensor.n_bytes > room || tensor.numel > room / 4) continue;
      const uint64_t n = as == MUWS_OWN ? tensor.n_bytes : 4 * tensor.numel;
      room -= n / 2;
      const Exactly<uint8_t> out(static_cast<int64_t>(n));
      std::vector<float> weights(as == MUWS_FLOAT32 ? tensor.numel : 0);
      const int32_t code = muws_decode(file, i, as, out.get(), n, &error);
      const bool is_complex = !strncmp(tensor.dtype, "complex", 7) && as == MUWS_FLOAT32;
      CHECK(is_complex ? code == MUWS_ARGUMENT : code == MUWS_OK || code == MUWS_TOO_LARGE || (code == MUWS_REFUSED && !is_verified));
      if (code || as == MUWS_OWN) continue;
      if (n) memcpy(weights.data(), out.get(), n);
      setenv("MUWS_LEVEL", choice<const char *>({"", "", "avx2", "portable"}), 1);
      run(file, i, MUWS_VALUES, weights, is_verified);
      run(file, i, MUWS_SIGNS, weights, is_verified);
    }
  }
  std::vector<double> sizes(muws_n_tensors(file));
  if (muws_stored_bytes(file, sizes.data(), sizes.size(), &error)) CHECK(error.code == MUWS_TOO_LARGE || (error.code == MUWS_REFUSED && !is_verified));
  CHECK(!is_verified || muws_n_tensors(file) == 0 || error.code || std::fabs(sizes[0]) < double(data.size()));
  CHECK(muws_peak_bytes(file) <= limit);
  muws_close(file);
  return is_verified;
}

int main(int argc, char **argv) {
  std::vector<string> files;
  std::vector<Model> models;
  for (int i = 3; i < argc; i++) {
    std::ifstream file(argv[i], std::ios::binary);
    files.push_back(string(std::istreambuf_iterator<char>(file), {}));
    CHECK(read(files.back(), 1 << 24));
    models.push_back(take_apart(files.back()));
  }
  CHECK(!files.empty());
  long long n_verified = 0;
  const long long n = for_each_seed(argc, argv, [&] {
    const size_t k = below(files.size());
    const string data = chance(80) ? lie(models[k]) : damaged(files[k], choice(files));
    n_verified += read(data, chance(90) ? 8 << 20 : below(1 << below(24)));
  });
  printf("%lld inputs, %lld of them intact: no finding\n", n, n_verified);
}
