// Random and mutated input for the native coder, in blocks of memory of exactly the right size, so that the sanitizers
// see any access outside. Each level must return what portable code returns, even for input that no encoder makes.
// Built and run by sanitize.sh.
#include <vector>

#include "../../lightning_muws/artifact/src/coder.h"
#include "../support/fuzz.h"

static void random_frequencies(int64_t f[256]) {
  memset(f, 0, 256 * sizeof *f);
  const int64_t n_symbols = 1 + below(below(2) ? 4 : 256);
  for (int64_t left = 4096; left > 0;) {
    const int64_t some = below(8) ? 1 + below(left < 64 ? left : 64) : left;
    f[below(n_symbols)] += some;
    left -= some;
  }
}

// Decodes at both levels, from bytes with nothing behind them, and compares; returns the result of portable code.
static int64_t decode(const std::vector<uint8_t> &coded, int64_t steps, int64_t lanes, Exactly<uint8_t> &symbols) {
  Exactly<uint8_t> stream(int64_t(coded.size()));
  if (coded.size()) memcpy(stream.get(), coded.data(), coded.size());
  Exactly<uint32_t> states(lanes);
  const int64_t found = muws_rans_decode(0, stream.get(), stream.n, steps, lanes, states.get(), symbols.get());
  CHECK(found <= 0 && found >= MUWS_LEFT);
  if (muws_coder_level()) {
    Exactly<uint32_t> other(lanes);
    Exactly<uint8_t> others(steps * lanes);
    CHECK(muws_rans_decode(1, stream.get(), stream.n, steps, lanes, other.get(), others.get()) == found);
    CHECK(found || !memcmp(others.get(), symbols.get(), size_t(steps * lanes)));
  }
  return found;
}

static void add_number(std::vector<uint8_t> &coded, uint64_t value) {
  for (; value > 127; value >>= 7) coded.push_back(uint8_t(value | 128));
  coded.push_back(uint8_t(value));
}

static void add_table(std::vector<uint8_t> &coded, const int64_t f[256]) {
  int first = 0, last = 255;
  while (!f[first]) first++;
  while (!f[last]) last--;
  coded.push_back(uint8_t(first)), coded.push_back(uint8_t(last));
  for (int s = first; s <= last; s++) add_number(coded, uint64_t(f[s]));
}

// Encodes the steps of one table at both levels, before the words that are there already.
static void encode(const int64_t f[256], const uint8_t *symbols, int64_t steps, int64_t lanes, Exactly<uint32_t> &states,
                   std::vector<uint8_t> &words) {
  const int64_t n = steps * lanes;
  Exactly<uint8_t> mine(n);
  memcpy(mine.get(), symbols, size_t(n));
  Exactly<uint32_t> others(states);
  Exactly<uint16_t> found(n + 1), other_words(n + 1);
  CHECK(muws_rans_encode(0, f, mine.get(), steps, lanes, others.get(), found.get(), n) == MUWS_WRONG);
  const int64_t n_words = muws_rans_encode(0, f, mine.get(), steps, lanes, states.get(), found.get(), n + 1);
  CHECK(n_words >= 0 && n_words <= n);
  if (muws_coder_level()) {
    CHECK(muws_rans_encode(1, f, mine.get(), steps, lanes, others.get(), other_words.get(), n + 1) == n_words);
    CHECK(!memcmp(others.get(), states.get(), size_t(lanes) * 4));
    CHECK(!memcmp(other_words.get() + n + 1 - n_words, found.get() + n + 1 - n_words, size_t(n_words) * 2));
  }
  const uint8_t *from = (const uint8_t *)(found.get() + n + 1 - n_words);
  words.insert(words.begin(), from, from + 2 * n_words);
}

static void rans() {
  const int64_t lanes = 1 + below(below(2) ? 40 : 3), n_tables = 1 + below(below(2) ? 4 : 1);
  Exactly<int64_t> f(256 * n_tables), stretches(n_tables);
  int64_t steps = 0;
  for (int64_t i = 0; i < n_tables; i++) {
    random_frequencies(f.get() + 256 * i);
    steps += stretches[i] = 1 + below(below(2) ? 24 : 2);
  }
  const int64_t n = lanes * steps;
  Exactly<uint8_t> symbols(n), decoded(n);
  Exactly<uint32_t> states(lanes);
  for (int64_t i = 0; i < lanes; i++) states[i] = 65536;
  std::vector<uint8_t> coded, words;
  add_number(coded, uint64_t(n_tables));
  for (int64_t i = 0; i + 1 < n_tables; i++) add_number(coded, uint64_t(stretches[i]));
  for (int64_t i = 0; i < n_tables; i++) add_table(coded, f.get() + 256 * i);
  for (int64_t i = n_tables - 1, stop = steps; i >= 0; stop -= stretches[i--]) {
    const int64_t *table = f.get() + 256 * i;
    std::vector<uint8_t> there;
    for (int s = 0; s < 256; s++)
      if (table[s]) there.push_back(uint8_t(s));
    uint8_t *mine = symbols.get() + (stop - stretches[i]) * lanes;
    for (int64_t k = 0; k < stretches[i] * lanes; k++) mine[k] = there[size_t(below(int64_t(there.size())))];
    encode(table, mine, stretches[i], lanes, states, words);
  }
  const uint8_t *from = (const uint8_t *)states.get();
  coded.insert(coded.end(), from, from + 4 * lanes);
  coded.insert(coded.end(), words.begin(), words.end());
  CHECK(decode(coded, steps, lanes, decoded) == 0);
  CHECK(!memcmp(decoded.get(), symbols.get(), size_t(n)));

  // lies: other bytes anywhere or in the tables, and fewer or more than are needed
  for (int64_t k = 1 + below(4); k > 0 && coded.size(); k--) {
    const int64_t size = int64_t(coded.size()), at = below(below(2) ? size : size < 20 ? size : 20);
    if (below(4)) coded[size_t(at)] = uint8_t(random_bits() >> below(64));
    else if (below(2)) coded.resize(size_t(below(size + 1)));
    else coded.insert(coded.begin() + at, uint8_t(random_bits()));
  }
  decode(coded, steps, lanes, decoded);
  const int64_t other_steps = 1 + below(2 * steps);
  Exactly<uint8_t> other(other_steps);
  decode(coded, other_steps, 1, other);
}

static uint32_t slow_crc(const uint8_t *data, int64_t n) {
  uint32_t crc = ~0u;
  for (int64_t i = 0; i < n; i++) {
    crc ^= data[i];
    for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
  }
  return ~crc;
}

static void bytes() {
  const int64_t n = below(400), stretch = 1 + below(300), n_rows = (n + stretch - 1) / stretch;
  Exactly<uint8_t> data(n);
  const uint64_t mask = below(2) ? 255 : 3;
  for (int64_t i = 0; i < n; i++) data[i] = uint8_t(random_bits() & mask);
  CHECK(muws_crc32(data.get(), n) == slow_crc(data.get(), n));
  Exactly<int64_t> counts(256 * n_rows), firsts(n_rows), logs(4097);
  muws_count(data.get(), n, stretch, counts.get());
  for (int64_t i = 0; i < n; i++) counts[i / stretch * 256 + data[i]]--;
  for (int64_t i = 0; i < counts.n; i++) CHECK(counts[i] == 0);
  muws_count(data.get(), n, stretch, counts.get());
  for (int64_t i = 0; i <= 4096; i++) logs[i] = i << 12;
  const MuwsCosts costs = {int64_t(below(1000) << 24), int64_t(below(16) << 24), logs.get()};
  int64_t total, sum = 0;
  const int64_t n_tables = muws_merge(counts.get(), n_rows, &costs, firsts.get(), &total);
  CHECK(n_tables <= n_rows && (n_tables > 0) == (n_rows > 0));
  for (int64_t i = 0; i < 256 * n_tables; i++) sum += counts[i];
  CHECK(sum == n);
}

template <typename T>
static void planes() {
  const int64_t n = below(3000), width = sizeof(T);
  Exactly<T> values(n), again(n);
  Exactly<uint8_t> split(width * n);
  for (int64_t i = 0; i < n; i++) values[i] = T(random_bits());
  CHECK(muws_split_planes(width, values.get(), n, split.get(), n) == 0);
  const uint8_t *places[8];
  for (int64_t k = 0; k < width; k++) places[k] = split.get() + k * n;
  CHECK(muws_join_planes(width, places, n, again.get()) == 0);
  CHECK(!memcmp(values.get(), again.get(), size_t(n * width)));
}

// Parts whose lists have these lengths.
template <typename T>
struct Lists {
  Exactly<uint8_t> kinds, signs;
  Exactly<T> magnitudes, free;
  MuwsParts parts;
  Lists(int64_t n, int64_t n_signs, int64_t n_magnitudes, int64_t n_free)
      : kinds(n), signs(n_signs), magnitudes(n_magnitudes), free(n_free),
        parts{kinds.get(), signs.get(), magnitudes.get(), free.get(), n_signs, n_magnitudes, n_free} {}
};

template <typename T>
static void blocks() {
  const int64_t rows = 1 + below(5), cols = 1 + below(5), down = below(5), across = below(5), n = down * across;
  const int64_t wide = across * cols, stride = wide + below(3), numel = n * rows * cols;
  const T top = T(T(1) << (8 * sizeof(T) - 1));
  Exactly<T> matrix(stride * down * rows), again(matrix.n);
  for (int64_t i = 0; i < n; i++) {  // blocks of each kind
    const T one = T(random_bits() & 3), sign = below(3) ? T(0) : top;
    const bool is_free = !below(4), is_mixed = !below(3);
    for (int64_t k = 0; k < rows * cols; k++) {
      const T value = is_free ? T(random_bits()) : T(one | (is_mixed && below(2) ? top : sign));
      matrix[(i / across * rows + k / cols) * stride + i % across * cols + k % cols] = value;
    }
  }
  const MuwsBlocks whole = {int64_t(sizeof(T)), down, across, rows, cols, stride, matrix.get()};
  const MuwsBlocks target = {int64_t(sizeof(T)), down, across, rows, cols, stride, again.get()};
  Lists<T> split(n, numel, n, numel);
  CHECK(muws_split_blocks(&whole, &split.parts) == 0);
  Exactly<uint8_t> kinds(n);
  CHECK(muws_kinds(&whole, kinds.get()) == 0 && !memcmp(kinds.get(), split.kinds.get(), size_t(n)));
  CHECK(muws_join_blocks(&split.parts, &target) == 0);
  for (int64_t i = 0; i < down * rows; i++)
    CHECK(!memcmp(matrix.get() + i * stride, again.get() + i * stride, size_t(wide) * sizeof(T)));

  // lists of other lengths, and any kinds
  Lists<T> lies(n, below(numel + 2), below(n + 2), below(numel + 2));
  for (int64_t i = 0; i < n; i++) lies.kinds[i] = uint8_t(below(below(8) ? 5 : 256));
  muws_join_blocks(&lies.parts, &target);
  Lists<T> few(n, below(numel + 1), below(n + 1), below(numel + 1));
  muws_split_blocks(&whole, &few.parts);
}

int main(int argc, char **argv) {
  const long long n = for_each_seed(argc, argv, [] {
    rans();
    bytes();
    switch (seed % 4) {
      case 0: planes<uint8_t>(), blocks<uint8_t>(); break;
      case 1: planes<uint16_t>(), blocks<uint16_t>(); break;
      case 2: planes<uint32_t>(), blocks<uint32_t>(); break;
      case 3: planes<uint64_t>(), blocks<uint64_t>(); break;
    }
  });
  printf("%lld inputs at %s: no finding\n", n, muws_coder_level() ? "both levels" : "the portable level");
}
