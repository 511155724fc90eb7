// Where a stream gets a new table, in whole numbers; stretches.py is the reference.
#include <string.h>

#include "coder.h"

namespace {

constexpr int POINT = 24, FINE = 28, COARSE = 12, REST = FINE - COARSE;

// n from 1 to below 2**34.
int64_t log_of(int64_t n, const int64_t *logs) {
  const int exponent = 63 - __builtin_clzll((unsigned long long)n);
  const int64_t mantissa = int64_t(uint64_t(n) << FINE >> exponent) - (1 << FINE);
  const int64_t at = mantissa >> REST, rest = mantissa & ((1 << REST) - 1);
  return (int64_t(exponent) << POINT) + logs[at] + ((logs[at + 1] - logs[at]) * rest >> REST);
}

int64_t cost_of(const int64_t *counts, const MuwsCosts *costs) {
  int64_t n = 0, known = 0, first = 256, last = -1;
  for (int s = 0; s < 256; s++) {
    if (counts[s] <= 0) continue;
    n += counts[s];
    known += counts[s] * log_of(counts[s], costs->logs);
    if (first > s) first = s;
    last = s;
  }
  return (n ? n * log_of(n, costs->logs) : 0) - known + costs->symbol * (last - first + 1) + costs->table;
}

}  // namespace

int64_t muws_merge(int64_t *counts, int64_t n, const MuwsCosts *costs, int64_t *firsts, int64_t *total) {
  int64_t n_tables = 0, last = 0;
  *total = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t *row = counts + 256 * i, apart = cost_of(row, costs);
    int64_t both[256], *table = counts + 256 * (n_tables - 1);
    if (n_tables) {
      for (int s = 0; s < 256; s++) both[s] = table[s] + row[s];
      const int64_t together = cost_of(both, costs);
      if (together <= last + apart) {
        memcpy(table, both, sizeof both);
        last = together;
        continue;
      }
    }
    memmove(counts + 256 * n_tables, row, sizeof both);
    firsts[n_tables++] = i;
    *total += last;
    last = apart;
  }
  *total += last;
  return n_tables;
}
