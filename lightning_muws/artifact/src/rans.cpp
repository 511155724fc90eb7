// rANS with static tables: all lanes take a step together. rans.py is the reference, docs/format.md the specification.
#include <string.h>

#include "coder.h"
#include "varint.h"
#if defined(__x86_64__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,bmi,bmi2,popcnt")))
#endif

namespace {

constexpr uint32_t BITS = 12, TOTAL = 1 << BITS, LOW = 1 << 16, SHIFT = 44;
constexpr int64_t MAX_TABLES = 1024;
uint32_t load16(const uint8_t *from) {
  uint16_t value;
  memcpy(&value, from, 2);
  return value;
}

int are_frequencies(const int64_t f[256]) {
  int64_t sum = 0;
  for (int s = 0; s < 256; s++) {
    if (f[s] < 0 || f[s] > TOTAL) return 0;
    sum += f[s];
  }
  return sum == TOTAL;
}

// ---- decoding

// A table: `n` symbols from `first` on, and the sum of the frequencies below each.
struct Table {
  uint32_t first, n, starts[257];

  uint32_t f(uint32_t i) const { return starts[i + 1] - starts[i]; }
};

// For each slot, from the lowest bit: 8 bits of its symbol, 12 of the frequency less one, 12 of the place in its range.
void fill_slots(const Table &table, uint32_t slots[TOTAL]) {
  for (uint32_t s = 0, at = 0; s < table.n; s++)
    for (uint32_t i = 0, f = table.f(s); i < f; i++) slots[at++] = (table.first + s) | (f - 1) << 8 | i << 20;
}

uint32_t advanced(uint32_t x, uint32_t slot) { return ((slot >> 8 & (TOTAL - 1)) + 1) * (x >> BITS) + (slot >> 20); }

// One step of the lanes from `first` on; returns the words read in all, or MUWS_SHORT.
int64_t decode_step(const uint32_t *slots, int64_t first, int64_t lanes, uint32_t *states, const uint8_t *words,
                           int64_t read, int64_t n_words, uint8_t *symbols) {
  const int is_plenty = n_words - read > lanes - first;  // then a word may be read before it is known to be needed
  for (int64_t i = first; i < lanes; i++) {
    const uint32_t slot = slots[states[i] & (TOTAL - 1)], x = advanced(states[i], slot), is_low = x < LOW;
    symbols[i] = (uint8_t)slot;
    if (is_plenty) {  // without a branch: no CPU can guess it
      const uint32_t word = load16(words + 2 * read);
      states[i] = x << 16 * is_low | (word & (0 - is_low));
      read += is_low;
    } else if (!is_low) {
      states[i] = x;
    } else if (read < n_words) {
      states[i] = x << 16 | load16(words + 2 * read++);
    } else {
      return MUWS_SHORT;
    }
  }
  return read;
}

#if defined(__x86_64__)
// 16 lanes at a time, those that are left as above.
AVX512 int64_t decode_step_avx512(const uint32_t *slots, int64_t lanes, uint32_t *states, const uint8_t *words,
                                         int64_t read, int64_t n_words, uint8_t *symbols) {
  const __m512i low_bits = _mm512_set1_epi32(TOTAL - 1), one = _mm512_set1_epi32(1), low = _mm512_set1_epi32(LOW);
  int64_t i = 0;
  for (; i + 16 <= lanes; i += 16) {
    __m512i x = _mm512_loadu_si512(states + i);
    const __m512i slot = _mm512_i32gather_epi32(_mm512_and_si512(x, low_bits), slots, 4);
    const __m512i f = _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(slot, 8), low_bits), one);
    x = _mm512_add_epi32(_mm512_mullo_epi32(f, _mm512_srli_epi32(x, BITS)), _mm512_srli_epi32(slot, 20));
    const __mmask16 is_low = _mm512_cmplt_epu32_mask(x, low);
    const int64_t n = _mm_popcnt_u32(is_low);
    if (n > n_words - read) return MUWS_SHORT;
    // only the words that are needed: what lies after them may be outside
    const __m256i fresh = _mm256_maskz_loadu_epi16((__mmask16)_bzhi_u32(0xffff, (uint32_t)n), words + 2 * read);
    const __m512i spread = _mm512_maskz_expand_epi32(is_low, _mm512_cvtepu16_epi32(fresh));
    x = _mm512_mask_or_epi32(x, is_low, _mm512_slli_epi32(x, 16), spread);
    read += n;
    _mm512_storeu_si512(states + i, x);
    _mm_storeu_si128((__m128i *)(symbols + i), _mm512_cvtepi32_epi8(slot));
  }
  return decode_step(slots, i, lanes, states, words, read, n_words, symbols);
}
#endif

}  // namespace

int64_t muws_coder_version() { return MUWS_CODER_VERSION; }

int64_t muws_coder_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
#else
  return 0;
#endif
}

namespace {

// Few symbols, for which all slots would take longer to fill than to search; a file may have a table for each step.
int64_t decode_few(const Table &table, int64_t n, int64_t lanes, uint32_t *states, const uint8_t *words, int64_t n_words,
                   uint8_t *symbols) {
  int64_t read = 0;
  for (int64_t k = 0; k < n; k++) {
    uint32_t &x = states[k % lanes], slot = x & (TOTAL - 1), i = 0;
    while (slot >= table.starts[i + 1]) i++;
    symbols[k] = (uint8_t)(table.first + i);
    x = table.f(i) * (x >> BITS) + slot - table.starts[i];
    if (x >= LOW) continue;
    if (read == n_words) return MUWS_SHORT;
    x = x << 16 | load16(words + 2 * read++);
  }
  return read;
}

// Decodes steps with one table; returns the words read, or MUWS_SHORT.
int64_t decode_stretch(int64_t level, const Table &table, int64_t steps, int64_t lanes, uint32_t *states, const uint8_t *words,
                       int64_t n_words, uint8_t *symbols) {
  if (steps * lanes * table.n < TOTAL / 4) return decode_few(table, steps * lanes, lanes, states, words, n_words, symbols);
  uint32_t slots[TOTAL];
  fill_slots(table, slots);
  int64_t read = 0;
  for (int64_t t = 0; t < steps && read >= 0; t++, symbols += lanes) {
#if defined(__x86_64__)
    if (level) {
      read = decode_step_avx512(slots, lanes, states, words, read, n_words, symbols);
      continue;
    }
#endif
    read = decode_step(slots, 0, lanes, states, words, read, n_words, symbols);
  }
  (void)level;
  return read;
}

// Reads what stands before the states; `is_short` once more is needed than there is.
struct Head {
  const uint8_t *at, *end;
  bool is_short = false;

  uint32_t byte() {
    if (at < end) return *at++;
    is_short = true;
    return 0;
  }

  uint32_t number() { return read_varint(*this); }

  // Returns whether the frequencies sum to 4096.
  bool read(Table *table) {
    const uint32_t last = (table->first = byte(), byte());
    table->n = last < table->first ? 0 : last - table->first + 1;
    table->starts[0] = 0;
    for (uint32_t i = 0; i < table->n; i++) {
      const uint32_t f = number();
      if (f > TOTAL - table->starts[i]) return false;
      table->starts[i + 1] = table->starts[i] + f;
    }
    return !is_short && table->starts[table->n] == TOTAL;
  }
};

}  // namespace

int64_t muws_rans_decode(int64_t level, const uint8_t *coded, int64_t n, int64_t steps, int64_t lanes, uint32_t *states,
                         uint8_t *symbols) {
  Head head{coded, coded + n};
  const int64_t n_tables = head.number();
  if (lanes < 1 || n_tables < 1 || n_tables > (steps < MAX_TABLES ? steps : MAX_TABLES)) return MUWS_WRONG;
  Head lengths = head;
  int64_t left = steps;
  for (int64_t i = 1; i < n_tables; i++) {
    const int64_t some = head.number();
    if (some < 1 || some >= left) return MUWS_WRONG;
    left -= some;
  }
  Head tables = head;
  Table table;
  for (int64_t i = 0; i < n_tables; i++)
    if (!head.read(&table)) return MUWS_WRONG;
  const int64_t n_rest = head.end - head.at;
  if (n_rest / 4 < lanes || n_rest % 2) return MUWS_WRONG;
  memcpy(states, head.at, 4 * (size_t)lanes);
  const uint8_t *words = head.at + 4 * lanes;
  left = steps;
  for (int64_t i = 1; i <= n_tables; i++) {
    const int64_t some = i < n_tables ? lengths.number() : left;
    tables.read(&table);
    const int64_t read = decode_stretch(level, table, some, lanes, states, words, (head.end - words) / 2, symbols);
    if (read < 0) return read;
    words += 2 * read;
    symbols += some * lanes;
    left -= some;
  }
  for (int64_t i = 0; i < lanes; i++)
    if (states[i] != LOW) return MUWS_LEFT;
  return words < head.end ? MUWS_LEFT : 0;
}

// ---- encoding

namespace {

struct Coded {
  uint64_t inverse[256];  // ceil(2**44 / f)
  uint32_t ranges[256];   // the frequency in the lower half, the sum of those below in the upper one
};

void fill_coded(const int64_t f[256], Coded *coded) {
  for (uint32_t s = 0, start = 0; s < 256; start += (uint32_t)f[s++]) {
    const uint64_t divisor = f[s] ? (uint64_t)f[s] : 1;
    coded->inverse[s] = (((uint64_t)1 << SHIFT) + divisor - 1) / divisor;
    coded->ranges[s] = (uint32_t)f[s] | start << 16;
  }
}

// One step of the lanes from `lanes` down to `first`; returns the place of the first word.
// x * inverse >> 44 is x / f: x is below f * 2**20 then, and inverse less than 1 above 2**44 / f, so that the error
// stays below 2**20 * f / 2**44 < 1 / f, and the product below 2**64.
uint16_t *encode_step(const Coded *coded, int64_t first, int64_t lanes, const uint8_t *symbols, uint32_t *states,
                             uint16_t *words) {
  for (int64_t i = lanes - 1; i >= first; i--) {
    const uint32_t range = coded->ranges[symbols[i]], f = range & 0xffff;
    uint32_t x = states[i];
    const uint32_t is_full = x >> 20 >= f;
    words[-1] = (uint16_t)x;
    words -= is_full;
    x >>= 16 * is_full;
    states[i] = x + (uint32_t)(x * coded->inverse[symbols[i]] >> SHIFT) * (TOTAL - f) + (range >> 16);
  }
  return words;
}

#if defined(__x86_64__)
// x / f of eight states.
AVX512 __m256i quotients(__m256i x, __m256i symbols, const Coded *coded) {
  const __m512i inverse = _mm512_i32gather_epi64(symbols, coded->inverse, 8);
  return _mm512_cvtepi64_epi32(_mm512_srli_epi64(_mm512_mullo_epi64(_mm512_cvtepu32_epi64(x), inverse), SHIFT));
}

AVX512 uint16_t *encode_step_avx512(const Coded *coded, int64_t lanes, const uint8_t *symbols, uint32_t *states,
                                           uint16_t *words) {
  const __m512i total = _mm512_set1_epi32(TOTAL), half = _mm512_set1_epi32(0xffff);
  words = encode_step(coded, lanes & ~(int64_t)15, lanes, symbols, states, words);
  for (int64_t i = (lanes & ~(int64_t)15) - 16; i >= 0; i -= 16) {
    const __m512i symbol = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(symbols + i)));
    const __m512i range = _mm512_i32gather_epi32(symbol, coded->ranges, 4), f = _mm512_and_si512(range, half);
    __m512i x = _mm512_loadu_si512(states + i);
    const __mmask16 is_full = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(x, 20), f);
    const uint32_t n = (uint32_t)_mm_popcnt_u32(is_full);
    words -= n;
    _mm256_mask_storeu_epi16(words, (__mmask16)_bzhi_u32(0xffff, n),
                             _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(is_full, x)));
    x = _mm512_mask_srli_epi32(x, is_full, x, 16);
    const __m256i low = quotients(_mm512_castsi512_si256(x), _mm512_castsi512_si256(symbol), coded);
    const __m256i high = quotients(_mm512_extracti64x4_epi64(x, 1), _mm512_extracti64x4_epi64(symbol, 1), coded);
    const __m512i q = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    x = _mm512_add_epi32(x, _mm512_mullo_epi32(q, _mm512_sub_epi32(total, f)));
    _mm512_storeu_si512(states + i, _mm512_add_epi32(x, _mm512_srli_epi32(range, 16)));
  }
  return words;
}
#endif

}  // namespace

int64_t muws_rans_encode(int64_t level, const int64_t frequencies[256], const uint8_t *symbols, int64_t steps,
                         int64_t lanes, uint32_t *states, uint16_t *words, int64_t n_words) {
  if (!are_frequencies(frequencies) || n_words < steps * lanes + 1) return MUWS_WRONG;
  Coded coded;
  fill_coded(frequencies, &coded);
  uint16_t *end = words + n_words, *at = end;
  for (int64_t t = steps - 1; t >= 0; t--) {
#if defined(__x86_64__)
    if (level) {
      at = encode_step_avx512(&coded, lanes, symbols + t * lanes, states, at);
      continue;
    }
#endif
    at = encode_step(&coded, 0, lanes, symbols + t * lanes, states, at);
  }
  (void)level;
  return end - at;
}
