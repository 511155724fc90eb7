/* Runs a perceptron of two layers from a `.muws` file, without Python: Linear, ReLU, Linear. In a clone:
 *
 *     make lib
 *     cc examples/07_deploy/mlp.c -Ibuild -Lbuild -lmuws -Wl,-rpath,$PWD/build -o mlp
 *     ./mlp model.muws fc1 fc2 < inputs.bin > outputs.bin  # float32, a sample after the other
 */
#include <stdio.h>
#include <stdlib.h>

#include "muws.h"

enum { BATCH = 64, FLOAT_BYTES = 4 };

typedef struct {
  MuwsPacked *weight;
  float *bias;
  uint64_t inputs, outputs;
} Layer;

static int64_t find(const MuwsFile *file, const char *layer, const char *part) {
  char name[256];
  snprintf(name, sizeof name, "%s.%s", layer, part);
  return muws_find(file, name);
}

/* Loads a Linear. Returns 0, or 1 and sets the error. What it has loaded is for unload in any case. */
static int load(MuwsFile *file, const char *name, Layer *layer, MuwsError *error) {
  const int64_t bias = find(file, name, "bias");
  MuwsBlocksInfo info;
  layer->weight = muws_pack(file, (uint64_t)find(file, name, "weight"), MUWS_VALUES, error);
  if (!layer->weight) return 1;
  muws_packed(layer->weight, &info);
  layer->inputs = info.inputs, layer->outputs = info.outputs;
  if (bias < 0) return 0;
  layer->bias = malloc(info.outputs * FLOAT_BYTES + 1);
  return !layer->bias || muws_decode(file, (uint64_t)bias, MUWS_FLOAT32, layer->bias, info.outputs * FLOAT_BYTES, error);
}

static void unload(Layer *layer) {
  muws_free_packed(layer->weight);
  free(layer->bias);
}

static int run(const Layer *layer, const float *x, uint64_t inputs, float *y, uint64_t n, int relu, MuwsError *error) {
  return muws_linear(layer->weight, x, inputs, y, layer->outputs, n, layer->bias, relu, error);
}

/* Reads samples until there are no more, and writes their outputs. Returns 0, or 1 and sets the error. */
static int run_all(const Layer *first, const Layer *second, MuwsError *error) {
  float *x = malloc(BATCH * first->inputs * FLOAT_BYTES + 1), *h = malloc(BATCH * first->outputs * FLOAT_BYTES + 1);
  float *y = malloc(BATCH * second->outputs * FLOAT_BYTES + 1);
  int failed = !x || !h || !y;
  for (size_t n = BATCH; n == BATCH && !failed;) {
    n = fread(x, first->inputs * FLOAT_BYTES, BATCH, stdin);
    failed = run(first, x, first->inputs, h, n, 1, error) || run(second, h, first->outputs, y, n, 0, error);
    if (!failed) fwrite(y, second->outputs * FLOAT_BYTES, n, stdout);
  }
  free(x);
  free(h);
  free(y);
  return failed;
}

int main(int n, char **words) {
  MuwsError error = {MUWS_NO_MEMORY, "this machine has no more memory"};
  Layer first = {0}, second = {0};
  if (n < 4) return fprintf(stderr, "usage: mlp FILE LAYER LAYER < INPUTS > OUTPUTS\n"), 2;
  MuwsFile *file = muws_open(words[1], (uint64_t)1 << 30, &error); /* with the packed layers, it takes at most 1 GiB */
  int failed = !file || load(file, words[2], &first, &error) || load(file, words[3], &second, &error);
  muws_close(file); /* the layers stay */
  if (!failed) failed = run_all(&first, &second, &error);
  if (failed) fprintf(stderr, "%s\n", error.message);
  unload(&first);
  unload(&second);
  return failed;
}
