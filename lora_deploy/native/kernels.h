/* Products with quantized weights. The values are dequantized as bitsandbytes does it, bit for bit; products and sums
 * are float32. Only the order of summation is our own. */
#ifndef LORA_DEPLOY_KERNELS_H
#define LORA_DEPLOY_KERNELS_H

#include <stdint.h>
#include <string.h>

#include "ort_abi.h"

enum { DEPTH = 128 };  /* columns of W in a panel, which has to fit the fastest cache */
enum { AHEAD = 4096 }; /* bytes of weights to prefetch: enough for the memory's latency (measured: 1024 is not) */

static const float FP4[16] = {0.0f,         0.0625f / 12,  8.0f / 12,  1.0f,  4.0f / 12,  0.5f,  2.0f / 12,  0.25f,
                              -0.0f,        -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -0.5f, -2.0f / 12, -0.25f};
static const float NF4[16] = {-1.0f,
                              -0.6961928009986877f,
                              -0.5250730514526367f,
                              -0.39491748809814453f,
                              -0.28444138169288635f,
                              -0.18477343022823334f,
                              -0.09105003625154495f,
                              0.0f,
                              0.07958029955625534f,
                              0.16093020141124725f,
                              0.24611230194568634f,
                              0.33791524171829224f,
                              0.44070982933044434f,
                              0.5626170039176941f,
                              0.7229568362236023f,
                              1.0f};

struct Path;

typedef struct {
  const OrtApi *api;
  const char *operator; /* the operator's name */
  const struct Path *path;
  int bits;                    /* of a weight: 4 or 8 */
  const float *code;           /* the 16 values of a nibble */
  size_t rows, columns, block; /* N, K, block_size */
  int shift;                   /* log2 of the block size; -1 if it is no power of two */
  size_t unit; /* columns that surely share a scale, in every row; 0 where 32 columns may not: the slow path */
} Weight;

/* One call of an operator. `codes` and `scales` may be mapped from a file; `x` is A or a copy. */
typedef struct {
  const Weight *weight;
  const float *x;
  const uint8_t *codes, *scales; /* scales: floats at any address; absmax of a block, or one a row */
  float *y;
  size_t m, task_rows;
} Problem;

typedef struct Path {
  void (*dot_rows)(const Problem *, size_t begin, size_t end);
  void (*panel)(const Problem *, size_t begin);
  size_t width; /* columns of the output in a panel */
  size_t few;   /* rows of A up to which dot_rows is faster */
} Path;

static inline float scale_of(const Problem *p, size_t row, size_t column) {
  const Weight *w = p->weight;
  const size_t flat = row * w->columns + column;
  const size_t index = w->bits == 8 ? row : w->shift >= 0 ? flat >> w->shift : flat / w->block;
  float value;
  memcpy(&value, p->scales + index * sizeof value, sizeof value);
  return value;
}

/* Dequantize `depth` columns of `width` rows of W into a panel, whatever the shape. */
static void pack_any(const Problem *p, float *panel, size_t width, size_t n, size_t k, size_t depth) {
  const Weight *w = p->weight;
  for (size_t r = 0; r < width; r++)
    for (size_t j = 0; j < depth; j++) {
      float value = 0.0f;
      if (n + r < w->rows) {
        const size_t flat = (n + r) * w->columns + k + j;
        const uint8_t byte = p->codes[w->bits == 4 ? flat / 2 : flat];
        value = w->bits == 4 ? w->code[flat % 2 ? byte & 15 : byte >> 4] : (float)(int8_t)byte;
        value *= scale_of(p, n + r, k + j);
      }
      panel[j * width + r] = value;
    }
}

typedef struct {
  float v[16];
} Values;

typedef float Float4 __attribute__((vector_size(16)));

static inline Float4 load4(const float *from) {
  Float4 v;
  memcpy(&v, from, sizeof v);
  return v;
}

#define TARGET
#define NAME(x) x##_generic
#define LANES 4
#define VEC Float4
#define LOAD(p) load4(p)
#define STORE(p, v) memcpy(p, &(v), sizeof(Float4))
#define SET1(a) ((Float4){a, a, a, a})
#define FMA(a, b, c) ((a) * (b) + (c))
#define MUL(a, b) ((a) * (b))
#define SUM(v) ((v)[0] + (v)[2] + ((v)[1] + (v)[3]))
#define TABLE Values
#define SCALED(t, code, s) \
  for (int q_ = 0; q_ < 16; q_++) (t).v[q_] = (code)[q_] * (s)
#define DECODE(t, b, e, o)          \
  for (int q_ = 0; q_ < 4; q_++) {  \
    (e)[q_] = (t).v[(b)[q_] >> 4];  \
    (o)[q_] = (t).v[(b)[q_] & 15];  \
  }
#define WIDEN(b, v) \
  for (int q_ = 0; q_ < 4; q_++) (v)[q_] = (float)(int8_t)(b)[q_]
#define TILE 4
#define DOT_ROWS(m) 1
#define FAST_PACK 0
#include "kernel_template.h"

#if defined(__x86_64__) || defined(_M_X64)
#include "kernels_x86.h"
#endif

static const Path GENERIC = {dot_rows_generic, panel_generic, 8, 8};
#ifdef KERNELS_X86
static const Path AVX2 = {dot_rows_avx2, panel_avx2, 16, 6};
static const Path AVX512 = {dot_rows_avx512, panel_avx512, 32, 24};
#endif

/* The path that the node asks for, for tests: 1 generic, 2 AVX2, 3 AVX512; 0 the best. NULL if it cannot run here. */
static const Path *find_path(int64_t wanted) {
#ifdef KERNELS_X86
  const int sets = instruction_sets();
  if ((wanted == 0 || wanted == 3) && sets & HAS_AVX512) return &AVX512;
  if ((wanted == 0 || wanted == 2) && sets & HAS_AVX2) return &AVX2;
#endif
  return wanted == 0 || wanted == 1 ? &GENERIC : NULL;
}

#endif
