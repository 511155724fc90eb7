/* Lists the tensors of a `.muws` file and decodes one to float32, without Python. In a clone:
 *
 *     make lib
 *     cc examples/07_deploy/decode.c -Ibuild -Lbuild -lmuws -Wl,-rpath,$PWD/build -o decode
 *     ./decode model.muws            # lists it and checks every checksum
 *     ./decode model.muws fc.weight  # prints the first values and the sum of one tensor
 */
#include <stdio.h>
#include <stdlib.h>

#include "muws.h"

static int failed(const MuwsError *error) {
  fprintf(stderr, "%s\n", error->message);
  return 1;
}

static void list(const MuwsFile *file) {
  for (uint64_t i = 0; i < muws_n_tensors(file); i++) {
    MuwsTensor tensor;
    muws_tensor(file, i, &tensor, NULL);
    printf("%s %s [", tensor.name, tensor.dtype);
    for (uint64_t axis = 0; axis < tensor.n_axes; axis++) printf(axis ? ", %llu" : "%llu", (unsigned long long)tensor.shape[axis]);
    printf("] %llu bytes\n", (unsigned long long)tensor.n_bytes);
  }
}

static int decode(MuwsFile *file, const char *name) {
  const int64_t index = muws_find(file, name);
  MuwsTensor tensor;
  MuwsError error;
  if (muws_tensor(file, (uint64_t)index, &tensor, &error)) return failed(&error);
  float *values = malloc(tensor.numel * sizeof *values + 1);
  double sum = 0;
  const int code = values ? muws_decode(file, (uint64_t)index, MUWS_FLOAT32, values, tensor.numel * sizeof *values, &error) : 1;
  if (!code) {
    for (uint64_t i = 0; i < tensor.numel; i++) sum += values[i];
    for (uint64_t i = 0; i < tensor.numel && i < 4; i++) printf("%g\n", values[i]);
    printf("sum %.6g\n", sum);
  }
  free(values);
  return code ? failed(&error) : 0;
}

int main(int n, char **words) {
  MuwsError error;
  if (n < 2) return fprintf(stderr, "usage: decode FILE [TENSOR]\n"), 2;
  MuwsFile *file = muws_open(words[1], (uint64_t)1 << 30, &error); /* it takes at most 1 GiB */
  if (!file) return failed(&error);
  int code = 0;
  if (n > 2) code = decode(file, words[2]);
  else if (muws_verify(file, &error)) code = failed(&error);
  else list(file);
  muws_close(file);
  return code;
}
