// The C interface: what Python passes (plain C, raw pointers), and what the dispatcher calls in a level.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {

// A layer and the shape of its input. Python fills it in; library.py repeats the fields in this order, which a test
// checks. The plan points to the weights, which must outlive it.
struct MuwsLayer {
  int64_t n, c, h, w;        // input (n, c, h, w); a Linear has h = w = 1
  int64_t o, oh, ow;         // output (n, o, oh, ow)
  int64_t kh, kw, sh, sw, ph, pw, groups;
  int64_t rows, cols;        // of a packed block: 1, 2, 4 or 8 by 1 or 4; bfloat16: by 2
  int64_t row_blocks;        // ceil(o / rows); blocks of block row r are starts[r] .. starts[r + 1]
  int64_t n_logical;         // 2 * blocks for bfloat16, else 0
  const int32_t* starts;     // (row_blocks + 1)
  const uint16_t* columns;   // (blocks): the first column of each; unused for bfloat16
  const int32_t* logical;    // bfloat16: (2 * blocks) the two columns of each
  const float* weights;      // (blocks, cols, rows); bfloat16: (blocks, cols / 2, rows, 2) halves
  const float* bias;         // (row_blocks * rows) or null
  int64_t relu, bfloat16;
  int64_t batch_last_in, batch_last_out;  // strides (1, h*w*n, w*n, n) instead of contiguous
  int64_t batch_lanes;       // lanes run over 0: the positions of an image, 1: the images of a batch, 2: the positions
                             // of every tap of the kernel, unfolded
  int64_t threads;           // that will run it: a large image is cut into so many bands
};

// Unified blocks of a Linear, for one sample: y += sum of magnitude * sign * x.
struct MuwsSigns {
  int64_t o, rows, cols, row_blocks;
  const int32_t* starts;
  const uint16_t* columns;   // (blocks): the first column of each
  const float* magnitudes;   // (blocks)
  const uint8_t* minus;      // a bit per weight, set if it is negative; signs.h gives the order
  int64_t relu;
};

// A Linear or a convolution whose weights are whole numbers of 8 bits. Inputs are quantised as they are packed:
// x = scale * (q - zero) with q of 0 .. 255. A block is 4 columns of `rows` outputs. In a program (below) a layer may get
// the bytes q that the layer before it made, and make those of the layer after it.
struct MuwsInt8 {
  int64_t n, c, h, w;        // as in MuwsLayer
  int64_t o, oh, ow;
  int64_t kh, kw, sh, sw, ph, pw, groups;
  int64_t rows, row_blocks;  // 1, 2 or 4; ceil(o / rows)
  int64_t loose;             // 0: a block's columns are neighbours, 4 * columns[i] .. + 3; 1: columns names all four
  int64_t linear;            // output (n, o) with the outputs of a sample side by side; else (n, o, oh, ow)
  int64_t dynamic;           // scale and zero of each sample from its own range, for a Linear; else those below
  const int32_t* starts;     // (row_blocks + 1)
  const uint16_t* columns;   // (blocks), or (blocks, 4) if loose; counted from the group's first
  const int8_t* weights;     // (blocks, rows, 4)
  const int32_t* sums;       // (row_blocks * rows): the sum of an output's weights
  const float* scales;       // (row_blocks * rows): an output's weights are scale * whole number
  const float* bias;         // (row_blocks * rows) or null
  int64_t relu;
  const float* activation;   // (2): scale and zero of the input
  int64_t bytes_in;          // the input is q already, a byte each
  const float* next;         // (2): scale and zero of the bytes to make of the output, or null
};

// A step of a program. A place is an offset in the arena, or PLACE_OUTSIDE plus the number of a tensor outside, or -1. Every
// step but STEP_PLAN, STEP_GEMV, STEP_MEAN and STEP_COPY can make bytes of its output for a layer of 8 bits.
enum {
  STEP_INT8, STEP_PLAN, STEP_GEMV,  // a layer
  STEP_ADD, STEP_RELU,              // x + onto; the larger of x and 0
  STEP_MEAN,                        // of each row
  STEP_GELU, STEP_GELU_TANH,        // torch's two forms
  STEP_NORM,                        // LayerNorm of each row
  STEP_ATTENTION,                   // x: queries, onto: keys, more: values
  STEP_POOL,                        // the largest number of each window; a row is a plane
  STEP_COPY,                        // a view, in order
};
struct MuwsStep {
  int64_t kind;
  const void* layer;         // MuwsInt8; what muws_plan made; MuwsLayer; STEP_NORM: its weight (width) or null; MuwsAttention;
                             // MuwsPool; MuwsCopy
  int64_t x, onto, y, q;     // places of float32; q: of the bytes that it makes. x is of bytes if a layer of 8 bits says so
  int64_t rows, width;       // of x; of what STEP_COPY makes
  int64_t relu;              // STEP_ADD
  int64_t more;              // a place of float32
  const float* next;         // (2): scale and zero of the bytes; a layer of 8 bits has its own
  const float* bias;         // STEP_NORM: (width) or null
  double number;             // STEP_NORM: is added to the variance; STEP_ATTENTION: of each score, the factor
};

// Softmax attention of (batch, heads, queries, depth), (batch, heads, keys, depth) and (batch, heads, keys, width). Each input
// starts at its number `at` and has the distances of its dimensions; numbers of a row are neighbours.
struct MuwsAttention {
  int64_t batch, heads, queries, keys, depth, width;
  int64_t q_at, q_batch, q_head, q_row;
  int64_t k_at, k_batch, k_head, k_row;
  int64_t v_at, v_batch, v_head, v_row;
  int64_t y_batch, y_head, y_row;
};

// The largest number of each kh x kw window of planes (h, w); borders count as minus infinity.
struct MuwsPool {
  int64_t h, w, oh, ow, kh, kw, sh, sw, ph, pw;
};

struct MuwsCopy {
  int64_t dims, at;          // 1 .. 6; the first number
  int64_t sizes[6], strides[6];
};
constexpr int64_t PLACE_OUTSIDE = (int64_t)1 << 48;

typedef void (*MuwsTask)(void* context, int64_t item);
void muws_parallel(int64_t threads, int64_t items, MuwsTask task, void* context);

// Threads of the program that we are in: tasks of a thread that names them run there. See muws_use_host.
struct MuwsHost {
  void (*run)(const MuwsHost* self, int64_t threads, int64_t items, MuwsTask task, void* context);
};
void muws_use_host(const MuwsHost* host);  // for the calling thread; null: none
float* muws_scratch(int slot, size_t n_floats);  // of this thread, 64-byte aligned

struct MuwsLevel {
  const char* name;
  void* (*plan)(const MuwsLayer*);
  int (*run)(void* plan, const float* x, const float* onto, float* y, int64_t threads);  // onto: null, or with the layout of y
  void (*free_plan)(void* plan);
  void (*gemv)(const MuwsLayer*, const float* x, float* y, int64_t threads);
  void (*signs)(const MuwsSigns*, const float* x, float* y, int64_t threads);
  void (*int8)(const MuwsInt8*, const float* x, const float* onto, float* y, int64_t threads);
  // 1 if bytes were to be made of NaN or infinity: then the outputs are not those of the layers one by one
  int (*program)(const MuwsStep*, int64_t n_steps, char* arena, void* const* outside, int64_t threads);
};
}
