/* Times layers of the C library: bench_layers FILE TENSOR DENSE_FILE BATCH ROUNDS prints a line for each way and round: the process
 * seconds of muws_linear with the weight as values and as signs, with a dense weight of the same size, and of a plain loop in C
 * over the decoded weight; and the bytes of each way. The ways take turns. Run by layers.py (make bench-coder). */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "muws.h"

enum { WAYS = 4, LEAST_MS = 20 };
static const char *const NAMES[WAYS] = {"values", "signs", "dense", "loop"};

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Eight sums at once, which a compiler makes vectors of. */
static void loop(const float *w, const float *x, float *y, uint64_t n, uint64_t inputs, uint64_t outputs) {
  for (uint64_t i = 0; i < n; i++)
    for (uint64_t o = 0; o < outputs; o++) {
      const float *row = w + o * inputs, *in = x + i * inputs;
      float sums[8] = {0}, sum = 0;
      uint64_t k = 0;
      for (; k + 8 <= inputs; k += 8)
        for (int lane = 0; lane < 8; lane++) sums[lane] += row[k + lane] * in[k + lane];
      for (; k < inputs; k++) sum += row[k] * in[k];
      for (int lane = 0; lane < 8; lane++) sum += sums[lane];
      y[i * outputs + o] = sum;
    }
}

static MuwsPacked *packed(const char *path, const char *name, int32_t form) {
  MuwsError error;
  MuwsFile *file = muws_open(path, (uint64_t)1 << 32, &error);
  MuwsPacked *found = file ? muws_pack(file, (uint64_t)muws_find(file, name), form, &error) : NULL;
  if (!found) fprintf(stderr, "%s\n", error.message);
  muws_close(file);
  return found;
}

int main(int argc, char **words) {
  if (argc < 6) return 2;
  const uint64_t n = (uint64_t)atoll(words[4]);
  MuwsPacked *ways[3] = {packed(words[1], words[2], MUWS_VALUES), packed(words[1], words[2], MUWS_SIGNS), packed(words[3], words[2], MUWS_VALUES)};
  if (!ways[0] || !ways[2]) return 1;
  MuwsBlocksInfo info;
  muws_packed(ways[0], &info);
  const uint64_t inputs = info.inputs, outputs = info.outputs;
  float *w = malloc(4 * inputs * outputs), *x = malloc(4 * n * inputs), *y = malloc(4 * n * outputs);
  MuwsError error;
  MuwsFile *file = muws_open(words[1], (uint64_t)1 << 32, &error);
  if (!w || !x || !y || !file || muws_decode(file, (uint64_t)muws_find(file, words[2]), MUWS_FLOAT32, w, 4 * inputs * outputs, &error)) return 1;
  for (uint64_t i = 0; i < n * inputs; i++) x[i] = (float)(i % 13) - 6;
  int calls[WAYS] = {1, 1, 1, 1};
  for (int way = 0; way < WAYS; way++)
    if (way == 3 || ways[way]) printf("%s_bytes %llu\n", NAMES[way], way == 3 ? (unsigned long long)(4 * inputs * outputs) : (muws_packed(ways[way], &info), (unsigned long long)info.n_bytes));
  for (int round = -1; round < atoi(words[5]); round++) {
    for (int way = 0; way < WAYS; way++) {
      if (way < 3 && !ways[way]) continue;
      const double start = seconds();
      for (int i = 0; i < calls[way]; i++) {
        if (way == 3) loop(w, x, y, n, inputs, outputs);
        else if (muws_linear(ways[way], x, inputs, y, outputs, n, NULL, 0, &error)) return 1;
      }
      const double took = seconds() - start;
      if (round >= 0) printf("%s %.9f\n", NAMES[way], took / calls[way]);
      else if (took < 1e-3 * LEAST_MS) calls[way] = (int)(1e-3 * LEAST_MS / (took + 1e-7)) + 1;
    }
  }
  return 0;
}
