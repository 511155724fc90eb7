/* Reads `.muws` files of format 1.0 and 1.1 from C, and runs their layers: see docs/c.md, and docs/format.md for the file.
 *
 *     MuwsError error;
 *     MuwsFile *file = muws_open("model.muws", 1 << 28, &error);
 *     if (!file) return fprintf(stderr, "%s\n", error.message), 1;
 *     ...
 *     muws_close(file);
 *
 * It trusts nothing in a file, runs no code of it, throws nothing and has no global state. Threads may use different
 * files at the same time; one file is for one thread at a time. Every function takes NULL for `error`.
 */
#ifndef MUWS_H
#define MUWS_H
#include <stdint.h>

#ifndef MUWS_API
#if defined(__GNUC__)
#define MUWS_API __attribute__((visibility("default")))
#else
#define MUWS_API
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MUWS_ABI 2 /* changes with any struct or function below */

enum {
  MUWS_OK = 0,
  MUWS_REFUSED = 1,   /* no `.muws` file, or a damaged, lying or newer one */
  MUWS_TOO_LARGE = 2, /* reading it needs more memory than `max_bytes` */
  MUWS_NO_FILE = 3,   /* it cannot be opened or read */
  MUWS_NO_MEMORY = 4, /* the machine has no more memory */
  MUWS_ARGUMENT = 5   /* the caller asks for what there is not */
};

typedef struct {
  int32_t code;      /* one of the above */
  char message[508]; /* the tensor or the stream, and the reason; UTF-8 */
} MuwsError;

typedef struct MuwsFile MuwsFile;

typedef struct {
  const char *name;      /* its key in the state_dict, UTF-8, with a zero after it; valid until the file is closed */
  uint64_t name_bytes;   /* without that zero: a name may hold zeros */
  const char *dtype;     /* such as "float32" */
  const char *stored;    /* how its values are written: a dtype, "grid" or "palette" */
  const uint64_t *shape; /* n_axes sizes; valid until the file is closed */
  uint64_t n_axes;
  uint64_t numel;    /* elements */
  uint64_t n_bytes;  /* of the tensor in its own dtype */
  uint64_t block[2]; /* rows and columns of a block; 0 where it is not cut into blocks */
  uint64_t kinds[3]; /* its blocks: dense, unified, pruned */
  double error;      /* the largest difference between the original values and the decoded ones */
  int64_t same_as;   /* the tensor whose values it has, -1 for none */
  int32_t is_copy;   /* with same_as: equal values in separate memory; else one tensor under two names */
} MuwsTensor;

enum { MUWS_OWN = 0, MUWS_FLOAT32 = 1 }; /* how to decode: to its own dtype, or to float32 */

/* The MUWS_ABI that the library was built with. */
MUWS_API int32_t muws_abi(void);

/* Opens a file and checks its header and its manifest. The reader never holds more than max_bytes at once, packed weights
 * included; the memory that you give it is not counted. Returns NULL and sets the error if it refuses. */
MUWS_API MuwsFile *muws_open(const char *path, uint64_t max_bytes, MuwsError *error);

/* The same for a file of n_bytes in memory, which has to stay there, unchanged, until the file is closed. */
MUWS_API MuwsFile *muws_open_memory(const void *bytes, uint64_t n_bytes, uint64_t max_bytes, MuwsError *error);

/* Closes a file, or does nothing for NULL. */
MUWS_API void muws_close(MuwsFile *file);

/* The version of its format, such as "1.1". */
MUWS_API const char *muws_format_version(const MuwsFile *file);

/* The user's own values, a JSON object in ASCII of n_bytes, with a zero after it. */
MUWS_API const char *muws_extra(const MuwsFile *file, uint64_t *n_bytes);

/* The number of tensors, in the order of the state_dict. */
MUWS_API uint64_t muws_n_tensors(const MuwsFile *file);

/* Describes a tensor from the manifest; nothing is read. */
MUWS_API int32_t muws_tensor(const MuwsFile *file, uint64_t index, MuwsTensor *tensor, MuwsError *error);

/* The index of the tensor of a name, -1 if there is none. */
MUWS_API int64_t muws_find(const MuwsFile *file, const char *name);

/* Decodes a tensor, row-major, into exactly out_bytes: its n_bytes, or 4 * numel as float32. Only the chunks that hold it are
 * read, and the last one stays in memory for the next tensor. Complex tensors cannot become float32.
 * If it refuses, `out` holds anything. */
MUWS_API int32_t muws_decode(MuwsFile *file, uint64_t index, int32_t as, void *out, uint64_t out_bytes, MuwsError *error);

/* Decodes the whole file and checks every checksum, without memory for more than a chunk. */
MUWS_API int32_t muws_verify(MuwsFile *file, MuwsError *error);

/* The most bytes that the reader has held at once since the file was opened. */
MUWS_API uint64_t muws_peak_bytes(const MuwsFile *file);

/* Writes for each tensor the bytes that it takes in the file: its share of each stream, by the symbols that it has there. n is
 * the number of tensors. Only the kinds of blocks are read. Shared tensors and copies have 0. */
MUWS_API int32_t muws_stored_bytes(MuwsFile *file, double *n_bytes, uint64_t n, MuwsError *error);

/* ---- layers
 *
 * A packed weight holds the blocks that are not pruned, and no others. Its memory counts towards the max_bytes of its file
 * until it is freed, and so does what one call of muws_linear takes. It may be freed before or after the file is closed.
 * Packing and freeing are for the thread that uses the file; muws_linear may run in several threads with one weight.
 */
typedef struct MuwsPacked MuwsPacked;

enum {
  MUWS_VALUES = 0, /* a float for each weight */
  MUWS_SIGNS = 1   /* a bit for each weight of a unified block, and a magnitude; a float for other weights */
};

/* Blocks of one size. Block i of a row of blocks b, starts[b] <= i < starts[b + 1], has the outputs from b * rows on and the
 * inputs from columns[i] on. */
typedef struct {
  uint64_t rows, cols, row_blocks, n_blocks;
  const int32_t *starts;   /* row_blocks + 1 */
  const uint16_t *columns; /* n_blocks; they ascend in each row of blocks */
} MuwsBlockList;

/* A packed weight, for kernels of your own; valid until it is freed. The last row of blocks may go on after the outputs. */
typedef struct {
  uint64_t outputs, inputs; /* of the layer: the rows and columns of the matrix */
  uint64_t n_bytes;         /* that it takes, with those of a call of muws_linear */
  MuwsBlockList values;     /* of 1, 2, 4 or 8 rows by 1 or 4 columns, whatever the blocks of the file */
  const float *weights;     /* weight (r, c) of block i is weights[(i * cols + c) * rows + r] */
  MuwsBlockList signs;      /* the unified blocks, with MUWS_SIGNS */
  const float *magnitudes;  /* of each unified block */
  const uint8_t *minus;     /* a bit for each of its weights, 1 for negative, the first in the lowest bit: by 8 columns (by 4 in
                             * blocks of 4x4) after each other, and of them row by row */
} MuwsBlocksInfo;

/* Packs a weight of float16, bfloat16, float32 or float64: the matrix of a Linear, or that of a convolution, as docs/format.md
 * has it. The dense weight is never in memory. At most 65,536 inputs. MUWS_SIGNS takes an eighth of the
 * memory for unified blocks of 4x4, less for larger ones, and is made for one sample: batches run faster with MUWS_VALUES. It
 * needs blocks of 4x4, or of 4, 8 or 16 rows by a multiple of 8 columns. Returns NULL and sets the error if it refuses. */
MUWS_API MuwsPacked *muws_pack(MuwsFile *file, uint64_t index, int32_t form, MuwsError *error);

/* Frees a packed weight, or does nothing for NULL. */
MUWS_API void muws_free_packed(MuwsPacked *packed);

/* Describes a packed weight. */
MUWS_API void muws_packed(const MuwsPacked *packed, MuwsBlocksInfo *info);

/* Writes y = x W^T + bias for n samples: x (n, inputs) and y (n, outputs), row-major and apart; bias (outputs) or NULL. With relu,
 * negative outputs become 0. Refuses other numbers of inputs and outputs than the layer's. A weight that is in no packed
 * block is not multiplied, also if its input is infinite or no number. */
MUWS_API int32_t muws_linear(const MuwsPacked *packed, const float *x, uint64_t inputs, float *y, uint64_t outputs, uint64_t n,
                             const float *bias, int32_t relu, MuwsError *error);

typedef struct {
  uint64_t n, channels, height, width;       /* of the input */
  uint64_t kernel[2], stride[2], padding[2]; /* down and across; padding with zeros at both sides */
} MuwsConv2d;

/* Writes the convolution of x (n, channels, height, width) with a weight (outputs, channels, kernel[0], kernel[1]) that was packed with
 * MUWS_VALUES: y (n, outputs, height', width') of y_numel numbers, height' = (height + 2 padding[0] - kernel[0]) / stride[0] + 1. One
 * group, no dilation. Else as muws_linear; the memory that it works in is not counted. */
MUWS_API int32_t muws_conv2d(const MuwsPacked *packed, const MuwsConv2d *shape, const float *x, float *y, uint64_t y_numel,
                             const float *bias, int32_t relu, MuwsError *error);

#ifdef __cplusplus
}
#endif
#endif
