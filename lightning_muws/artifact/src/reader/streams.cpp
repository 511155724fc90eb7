#include "streams.h"

#include "../varint.h"

#include <algorithm>

namespace muws {

uint64_t inflate_at_most(Span coded, uint8_t *out, uint64_t most);  // inflate.cpp

namespace {

constexpr uint64_t MAX_LANES = 8192, SYMBOLS_A_LANE = 2048;
constexpr uint64_t MAX_PARTS = 1024, PART = 1024, QUICK = 40960, LONGEST_NAME = 255;
using Big = unsigned long long;

uint64_t lanes_of(uint64_t n) { return std::max<uint64_t>(1, std::min(MAX_LANES, n / SYMBOLS_A_LANE)); }

// Reads the numbers that a coded stream begins with.
struct Cursor {
  Span coded;
  const char *what;
  uint64_t at = 0;

  uint8_t byte() {
    if (at >= coded.n) REFUSE("a stream ends within %s", what);
    return coded.data[at++];
  }

  uint32_t number() { return read_varint(*this); }

  Span take(uint64_t n) {
    if (n > coded.n - at) REFUSE("a stream ends within %s", what);
    at += n;
    return {coded.data + at - n, n};
  }

  Span rest() const { return {coded.data + at, coded.n - at}; }
};

// Reads `count` - 1 lengths; refuses them where they and a last one of at least 1 do not make a whole.
void check_lengths(Cursor cursor, uint64_t count, uint64_t whole, const char *what, const char *unit) {
  uint64_t sum = 0;
  bool is_wrong = false;
  for (uint64_t i = 1; i < count; i++) {
    const uint64_t n = cursor.number();
    is_wrong |= n < 1;
    sum += n;
  }
  if (is_wrong || sum >= whole) REFUSE("the %s are not for its %llu %s", what, (Big)whole, unit);
}

void rans(Budget &budget, Span coded, uint8_t *out, uint64_t n) {
  const uint64_t lanes = lanes_of(n), steps = (n + lanes - 1) / lanes;
  List<uint32_t> states(lanes, budget);
  switch (muws_rans_decode(muws_coder_level(), coded.data, int64_t(coded.n), int64_t(steps), int64_t(lanes), states.data(), out)) {
    case 0: return;
    case MUWS_WRONG: REFUSE("the tables and states of a rans stream are not those of its %llu steps", (Big)steps);
    case MUWS_SHORT: REFUSE("a rans stream ends too early");
    default: REFUSE("a rans stream does not end where it should");
  }
}

void zlib_twice(Budget &budget, Span coded, uint8_t *out, uint64_t n) {
  Bytes once(budget, std::min(n + 1, 1032 * coded.n));  // one that is longer than the data would not have been written
  const uint64_t length = inflate_at_most(coded, once.data(), once.size());
  inflate({once.data(), length}, out, n);
}

void plain(Budget &budget, const char *inner, Span coded, uint8_t *out, uint64_t n) {
  if (!strcmp(inner, "raw")) {
    if (coded.n != n) REFUSE("a raw stream holds %llu bytes, %llu are needed", (Big)coded.n, (Big)n);
    if (n) memcpy(out, coded.data, n);
  } else if (!strcmp(inner, "rans")) {
    rans(budget, coded, out, n);
  } else if (!strcmp(inner, "zlib")) {
    inflate(coded, out, n);
  } else {
    zlib_twice(budget, coded, out, n);
  }
}

enum Filter { REPEAT, XOR, DELTA, BITS, N_FILTERS };
constexpr const char *FILTERS[] = {"repeat", "xor", "delta", "bits"};
constexpr const char *INNER[] = {"raw", "zlib", "rans", "zlib2"};

// Which filters a coder has, and what comes after them.
struct Coder {
  bool has[N_FILTERS] = {};
  const char *inner = nullptr;

  explicit Coder(const char *name) {
    int last = -1;
    const char *from = name;
    for (const char *hyphen; (hyphen = strchr(from, '-')); from = hyphen + 1) {
      const size_t length = size_t(hyphen - from);
      int found = -1;
      for (int i = 0; i < N_FILTERS; i++)
        if (strlen(FILTERS[i]) == length && !memcmp(FILTERS[i], from, length)) found = i;
      if (found <= last) unknown(name);
      has[last = found] = true;
    }
    for (const char *known : INNER)
      if (!strcmp(known, from) && (last >= 0 || strcmp(known, "zlib2"))) inner = known;
    if (!inner) unknown(name);
  }

  [[noreturn]] static void unknown(const char *name) {
    REFUSE("coder '%s' is not known to this reader", Shown(name, strlen(name)).text);
  }
};

// Writes each byte of a few so many times, and each row; see docs/format.md.
struct Repeat {
  uint64_t row, rows, cols;

  uint64_t length(uint64_t n) const {
    if (!row || n % row || rows < 1 || rows > n / row || cols < 1 || cols > row)
      REFUSE("%llu bytes cannot repeat %llu rows of %llu and %llu columns", (Big)n, (Big)rows, (Big)row, (Big)cols);
    return ((n / row + rows - 1) / rows) * ((row + cols - 1) / cols);
  }

  void undo(const uint8_t *few, uint8_t *out, uint64_t n) const {
    for (uint64_t i = 0; i < n / row; i++, out += row) {
      if (i % rows) {
        memcpy(out, out - row, row);
        continue;
      }
      if (cols == 1) {
        memcpy(out, few, row);
        few += row;
      } else {
        for (uint64_t j = 0; j < row; j += cols) memset(out + j, *few++, std::min(cols, row - j));
      }
    }
  }
};

void coder(Budget &budget, const char *name, Span coded, uint8_t *out, uint64_t n) {
  const Coder found(name);
  Cursor cursor{coded, "the numbers of its filters"};
  Repeat repeat{1, 1, 1};
  uint64_t distance = 0, length = n;
  if (found.has[REPEAT]) {
    repeat.row = cursor.number(), repeat.rows = cursor.number(), repeat.cols = cursor.number();
    length = repeat.length(n);
  }
  if (found.has[XOR]) {
    distance = cursor.number();
    if (distance < 1 || distance >= length)
      REFUSE("%llu bytes are XOR those %llu places before, which is no distance within them", (Big)length, (Big)distance);
  }
  Bytes few, packed;
  uint8_t *data = out;
  if (found.has[REPEAT]) data = (few = Bytes(budget, length + slack(length))).data();
  if (found.has[BITS]) {
    const uint64_t n_packed = (length + 7) / 8;
    packed = Bytes(budget, n_packed + slack(n_packed));
    plain(budget, found.inner, cursor.rest(), packed.data(), n_packed);
    unpack_bits(packed.data(), length, data, "bits of a stream");
  } else {
    plain(budget, found.inner, cursor.rest(), data, length);
  }
  if (found.has[DELTA])
    for (uint64_t i = 1; i < length; i++) data[i] = uint8_t(data[i] + data[i - 1]);
  if (found.has[XOR])
    for (uint64_t i = distance; i < length; i++) data[i] ^= data[i - distance];
  if (found.has[REPEAT]) repeat.undo(data, out, n);
}

void parts(Budget &budget, Span coded, uint8_t *out, uint64_t n) {
  Cursor cursor{coded, "the head of its parts"};
  const uint64_t n_parts = cursor.number(), most = std::min(MAX_PARTS, 1 + n / PART);
  if (n_parts < 1 || n_parts > most)
    REFUSE("a stream of %llu bytes has %llu parts, 1 to %llu are allowed", (Big)n, (Big)n_parts, (Big)most);
  Cursor lengths = cursor;
  check_lengths(cursor, n_parts, n, "parts of a stream", "bytes");
  for (uint64_t i = 1; i < n_parts; i++) cursor.number();
  Cursor bodies = cursor;
  for (uint64_t i = 0; i < n_parts; i++) {
    bodies.take(bodies.byte());
    bodies.number();
  }
  for (uint64_t i = 0, left = n; i < n_parts; i++) {
    const uint64_t length = i + 1 < n_parts ? lengths.number() : left;
    char name[LONGEST_NAME + 1];
    const Span text = cursor.take(cursor.byte());
    for (uint64_t k = 0; k < text.n; k++) name[k] = text.data[k] < 32 || text.data[k] > 126 ? '?' : char(text.data[k]);
    name[text.n] = '\0';
    if (!strcmp(name, "parts")) Coder::unknown(name);
    const Coder found(name);
    if (!strcmp(found.inner, "rans") && length < QUICK && !found.has[BITS])
      REFUSE("a part of %llu bytes is coded by %s, which only parts of %llu bytes and more may be", (Big)length, name, (Big)QUICK);
    coder(budget, name, bodies.take(cursor.number()), out, length);
    out += length;
    left -= length;
  }
  if (bodies.at != coded.n) REFUSE("a stream goes on after its last part");
}

}  // namespace

uint64_t slack(uint64_t n) { return lanes_of(n) - 1; }

void decode_stream(Budget &budget, const char *name, Span coded, uint8_t *out, uint64_t n) {
  if (!strcmp(name, "parts")) parts(budget, coded, out, n);
  else coder(budget, name, coded, out, n);
}

void unpack_bits(const uint8_t *packed, uint64_t n, uint8_t *out, const char *what) {
  if (n % 8 && packed[n / 8] >> n % 8) REFUSE("the last %s are followed by others than zeros", what);
  for (uint64_t i = 0; i < n; i++) out[i] = packed[i >> 3] >> (i & 7) & 1;
}

}  // namespace muws
