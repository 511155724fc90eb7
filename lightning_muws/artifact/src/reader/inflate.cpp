// zlib streams (RFC 1950 and 1951), with the refusals of zlib.
#include <algorithm>

#include "streams.h"

namespace muws {

namespace {

constexpr int MAX_BITS = 15, FAST_BITS = 10;
constexpr uint16_t LENGTHS[] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
constexpr uint8_t LENGTH_BITS[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
constexpr uint16_t DISTANCES[] = {1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
                                  193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
constexpr uint8_t ORDER[] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};

[[noreturn]] void broken() { REFUSE("a zlib stream is broken"); }

// A canonical code: short ones by a table, long ones bit by bit, so that a code costs no more to build than to read.
struct Code {
  uint16_t counts[MAX_BITS + 1] = {}, symbols[288] = {};
  uint16_t fast[1 << FAST_BITS] = {};  // 16 * symbol + length, 0 for none

  void build(const uint8_t *lengths, int n, bool may_be_one) {
    memset(counts, 0, sizeof counts);
    memset(fast, 0, sizeof fast);
    for (int s = 0; s < n; s++) counts[lengths[s]]++;
    counts[0] = 0;
    int left = 1, longest = 0;
    uint16_t places[MAX_BITS + 2] = {}, next[MAX_BITS + 2] = {};
    for (int k = 1; k <= MAX_BITS; k++) {
      left = 2 * left - counts[k];
      if (left < 0) broken();
      if (counts[k]) longest = k;
      places[k + 1] = uint16_t(places[k] + counts[k]);
      next[k + 1] = uint16_t((next[k] + counts[k]) << 1);
    }
    if (left > 0 && longest > 0 && !(may_be_one && longest == 1)) broken();
    for (int s = 0; s < n; s++) {
      const int k = lengths[s];
      if (!k) continue;
      symbols[places[k]++] = uint16_t(s);
      uint32_t code = next[k]++, turned = 0;
      if (k > FAST_BITS) continue;
      for (int i = 0; i < k; i++, code >>= 1) turned = turned << 1 | (code & 1);
      for (; turned < 1 << FAST_BITS; turned += 1u << k) fast[turned] = uint16_t(s << 4 | k);
    }
  }
};

class Inflate {
 public:
  Inflate(Span from, uint8_t *to, uint64_t room) : coded(from), out(to), most(room) {
    const unsigned head = coded.n < 6 ? 1 : unsigned(coded.data[0] << 8 | coded.data[1]);
    if (head % 31 || (coded.data[0] & 15) != 8 || coded.data[0] >> 4 > 7 || coded.data[1] & 32) broken();
  }

  // Returns how many bytes were written; refuses more than there is room for.
  uint64_t run() {
    for (bool is_last = false; !is_last;) {
      is_last = bits(1);
      switch (bits(2)) {
        case 0: stored(); break;
        case 1: fixed(); break;
        case 2: dynamic(); break;
        default: broken();
      }
    }
    at -= n_held >> 3;  // whole bytes that were read too early
    if (coded.n - at < 4) broken();
    if (coded.n - at > 4) REFUSE("a zlib stream is followed by other bytes");
    uint32_t a = 1, b = 0, declared = 0;
    for (uint64_t i = 0; i < size;) {
      for (const uint64_t stop = std::min(size, i + 3800); i < stop; i++) b += a += out[i];
      a %= 65521, b %= 65521;
    }
    for (int i = 0; i < 4; i++) declared = declared << 8 | coded.data[at + uint64_t(i)];
    if (declared != (b << 16 | a)) broken();
    return size;
  }

 private:
  void refill() {
    while (n_held <= 56 && at < coded.n) {
      held |= uint64_t(coded.data[at++]) << n_held;
      n_held += 8;
    }
  }

  uint32_t bits(int n) {
    if (n_held < n) refill();
    if (n_held < n) broken();
    const uint32_t found = uint32_t(held & ((1u << n) - 1));
    held >>= n;
    n_held -= n;
    return found;
  }

  int symbol(const Code &code) {
    if (n_held < MAX_BITS) refill();
    const uint16_t entry = code.fast[held & ((1 << FAST_BITS) - 1)];
    int n = entry & 15, found = entry >> 4;
    if (!n) found = slow_symbol(code, n);
    if (n > n_held) broken();
    held >>= n;
    n_held -= n;
    return found;
  }

  int slow_symbol(const Code &code, int &n) const {
    int value = 0, first = 0, index = 0;
    for (n = 1; n <= MAX_BITS; n++) {
      value |= int(held >> (n - 1) & 1);
      const int count = code.counts[n];
      if (value - count < first) return code.symbols[index + value - first];
      index += count;
      first = (first + count) << 1;
      value <<= 1;
    }
    broken();
  }

  void room(uint64_t n) {
    if (n > most - size) REFUSE("a zlib stream does not hold the %llu bytes that are needed, but more", (unsigned long long)most);
  }

  void stored() {
    at -= n_held >> 3;
    held = 0, n_held = 0;
    if (coded.n - at < 4) broken();
    const uint64_t n = coded.data[at] | coded.data[at + 1] << 8, complement = coded.data[at + 2] | coded.data[at + 3] << 8;
    at += 4;
    if (n != (complement ^ 0xffff) || n > coded.n - at) broken();
    room(n);
    if (n) memcpy(out + size, coded.data + at, n);
    at += n, size += n;
  }

  void fixed() {
    uint8_t lengths[288];
    for (int s = 0; s < 288; s++) lengths[s] = s < 144 ? 8 : s < 256 ? 9 : s < 280 ? 7 : 8;
    literals.build(lengths, 288, true);
    memset(lengths, 5, 32);
    distances.build(lengths, 32, true);
    block();
  }

  void dynamic() {
    const int n_lengths = int(bits(5)) + 257, n_distances = int(bits(5)) + 1, n_codes = int(bits(4)) + 4;
    if (n_lengths > 286 || n_distances > 30) broken();
    uint8_t lengths[320] = {};
    for (int i = 0; i < n_codes; i++) lengths[ORDER[i]] = uint8_t(bits(3));
    literals.build(lengths, 19, false);
    memset(lengths, 0, sizeof lengths);
    for (int i = 0; i < n_lengths + n_distances;) {
      const int found = symbol(literals);
      if (found < 16) {
        lengths[i++] = uint8_t(found);
        continue;
      }
      if (found == 16 && !i) broken();
      const uint8_t value = found == 16 ? lengths[i - 1] : 0;
      int times = found == 16 ? 3 + int(bits(2)) : found == 17 ? 3 + int(bits(3)) : 11 + int(bits(7));
      if (i + times > n_lengths + n_distances) broken();
      while (times--) lengths[i++] = value;
    }
    if (!lengths[256]) broken();
    literals.build(lengths, n_lengths, true);
    distances.build(lengths + n_lengths, n_distances, true);
    block();
  }

  void block() {
    for (;;) {
      const int found = symbol(literals);
      if (found == 256) return;
      if (found < 256) {
        if (size >= most) room(1);
        out[size++] = uint8_t(found);
        continue;
      }
      if (found > 285) broken();
      const uint64_t n = LENGTHS[found - 257] + bits(LENGTH_BITS[found - 257]);
      const int far = symbol(distances);
      if (far > 29) broken();
      const uint64_t distance = DISTANCES[far] + bits(std::max(0, (far >> 1) - 1));
      if (distance > size) broken();
      room(n);
      uint8_t *to = out + size;
      if (distance >= n) memcpy(to, to - distance, n);
      else if (distance == 1) memset(to, to[-1], n);
      else for (uint64_t i = 0; i < n; i++) to[i] = to[i - distance];
      size += n;
    }
  }

  Span coded;
  uint8_t *out;
  uint64_t most, size = 0, at = 2, held = 0;
  int n_held = 0;
  Code literals, distances;
};

}  // namespace

void inflate(Span coded, uint8_t *out, uint64_t n) {
  // before memory is touched: no two bits stand for more than 258 bytes
  if (n / 1032 > coded.n) REFUSE("a zlib stream of %llu bytes does not hold the %llu bytes that are needed", (unsigned long long)coded.n, (unsigned long long)n);
  const uint64_t found = Inflate(coded, out, n).run();
  if (found != n)
    REFUSE("a zlib stream does not hold the %llu bytes that are needed, but %llu", (unsigned long long)n, (unsigned long long)found);
}

uint64_t inflate_at_most(Span coded, uint8_t *out, uint64_t most) { return Inflate(coded, out, most).run(); }

}  // namespace muws
