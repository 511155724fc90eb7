/* Times the reader in C: prints the process seconds of opening a file and decoding all of it to float32, a line a round.
 * Run by coder.py (make bench-coder): bench_reader FILE ROUNDS. A first round warms up and is not printed. */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "muws.h"

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int main(int n, char **words) {
  MuwsError error;
  MuwsTensor tensor;
  uint64_t most = 1;
  float *values = NULL;
  for (int round = -1; n > 2 && round < atoi(words[2]); round++) {
    const double start = seconds();
    MuwsFile *file = muws_open(words[1], (uint64_t)1 << 32, &error);
    for (uint64_t i = 0; file && i < muws_n_tensors(file); i++) {
      muws_tensor(file, i, &tensor, NULL);
      if (tensor.numel > most || !values) {
        most = tensor.numel > most ? tensor.numel : most;
        free(values);
        values = malloc(most * sizeof *values);
      }
      if (!values || muws_decode(file, i, MUWS_FLOAT32, values, tensor.numel * sizeof *values, &error)) return puts(error.message), 1;
    }
    muws_close(file);
    if (!file) return puts(error.message), 1;
    if (round >= 0) printf("%.9f\n", seconds() - start);
  }
  free(values);
  return 0;
}
