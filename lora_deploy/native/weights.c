/* Rounding weights to codes and reading codes back, bit for bit as torch does it: compile with -ffp-contract=off.
 *
 * Every function works on the rows (or flat blocks) from `begin` to `end`, so that threads can share a weight. Matrices
 * are row-major. The last block of a row may be partly empty: it counts as filled up with zeros. */
#include <stdint.h>
#include <string.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT /* visible as it is: clang takes no attribute of visibility beside target_clones */
#endif

/* The loader chooses the instruction set, where it can: glibc's does. IEEE arithmetic is the same in all of them. */
#ifndef CLONES
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#endif
#ifndef CLONES
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

enum { LARGEST_BLOCK = 256, LARGEST_BNB = 4096 }; /* weights.py says the same */
enum { FLOAT32, FLOAT16, BFLOAT16 };

/* Factors on the scale at which the largest weight of a block is just representable: those of the torch path. */
static const float SHRINK4[] = {1.06f, 1.0f, 0.94f, 0.88f, 0.82f, 0.76f, 0.7f};
static const float SHRINK8[] = {1.0f, 0.95f};
enum { LARGEST_SHRINK = sizeof SHRINK4 / sizeof *SHRINK4 };

INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* To the nearest value of the type, ties to even; overflow gives infinity. */
INLINE float round_to(float value, int type) {
  const uint32_t bits = bits_of(value), size = bits & 0x7fffffff, sign = bits & 0x80000000;
  if (type == FLOAT32 || size >= 0x7f800000) return value;
  if (type == BFLOAT16) return float_of((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
  if (size >= 0x477ff000) return float_of(sign | 0x7f800000);                  /* from 65520 on */
  if (size < 0x38800000) return float_of(sign | bits_of((float_of(size) + 0.5f) - 0.5f)); /* steps of 2**-24 */
  return float_of((bits + 0xfff + (bits >> 13 & 1)) & 0xffffe000);
}

/* value / scale, in whole steps from `low` to `high`. NaN stays NaN. */
INLINE float step(float value, float scale, float low, float high) {
  const float magic = 12582912.0f; /* 1.5 * 2**23: floats of its size are whole numbers, rounded to even */
  float found = value / scale;
  found = low > found ? low : found;
  found = high < found ? high : found;
  return (found + magic) - magic;
}

/* Add the second half of `count` values to the first; how many there are then. A sum by halves is that of torch's path, in
 * any vector width. */
INLINE int add_halves(float *values, int count) {
  const int kept = (count + 1) / 2;
  for (int i = 0; i < count - kept; i++) values[i] += values[kept + i];
  return kept;
}

INLINE int add_halves_of_all(float (*values)[LARGEST_BLOCK], int count, int last) {
  for (int i = 0; i < last; i++) add_halves(values[i], count);
  return add_halves(values[last], count);
}

/* The weighted square errors of a block, summed up to at most 8; how many there are. */
INLINE int block_errors(const float *values, const float *importance, float scale, float half, int block, float *error) {
  for (int i = 0; i < block; i++) {
    const float lost = step(values[i], scale, -half, half - 1) * scale - values[i];
    error[i] = lost * lost * importance[i];
  }
  int count = block;
  if (count > 128) count = add_halves(error, count); /* no loop: written out, the compiler knows every count */
  if (count > 64) count = add_halves(error, count);
  if (count > 32) count = add_halves(error, count);
  if (count > 16) count = add_halves(error, count);
  if (count > 8) count = add_halves(error, count);
  return count;
}

/* The first of the largest values. */
INLINE float largest_of(const float *values, int block) {
  uint32_t size = 0;
  int first = block;
  for (int i = 0; i < block; i++) {
    const uint32_t own = bits_of(values[i]) & 0x7fffffff;
    size = own > size ? own : size;
  }
  for (int i = 0; i < block; i++) {
    const int found = (bits_of(values[i]) & 0x7fffffff) == size ? i : block;
    first = found < first ? found : first;
  }
  return values[first];
}

/* Find the best scale of a block; whether its error is finite. The sums of all scales end together, for the last steps of
 * each wait for one another. */
INLINE int fit_block(const float *values, const float *importance, float *best, int block, int bits, int type) {
  const float half = (float)(1 << (bits - 1)), largest = largest_of(values, block), whole = -largest / half;
  const float *shrink = bits == 4 ? SHRINK4 : SHRINK8, infinity = float_of(0x7f800000);
  const int last = bits == 4 ? sizeof SHRINK4 / sizeof *SHRINK4 : sizeof SHRINK8 / sizeof *SHRINK8;
  float scale[LARGEST_SHRINK + 1], error[LARGEST_SHRINK + 1][LARGEST_BLOCK], least = infinity;
  int count = block;
  for (int i = 0; i <= last; i++) {
    scale[i] = i < last ? whole * shrink[i] : float_of(bits_of(largest) & 0x7fffffff) / (half - 1);
    scale[i] = round_to(scale[i] == 0.0f ? 1.0f : scale[i], type);
    count = block_errors(values, importance, scale[i], half, block, error[i]);
  }
  if (count > 4) count = add_halves_of_all(error, count, last);
  if (count > 2) count = add_halves_of_all(error, count, last);
  if (count > 1) count = add_halves_of_all(error, count, last);
  *best = 0.0f;
  for (int i = 0; i <= last; i++)
    if (error[i][0] < least) *best = scale[i], least = error[i][0];
  return least < infinity;
}

/* A block of a row: in place, or a copy of the last one, filled up. */
INLINE const float *block_at(const float *row, int64_t column, int64_t columns, int block, float *copy) {
  if (columns - column >= block) return row + column;
  const size_t rest = (size_t)(columns - column);
  memcpy(copy, row + column, rest * sizeof *copy);
  memset(copy + rest, 0, ((size_t)block - rest) * sizeof *copy);
  return copy;
}

INLINE int64_t fit_rows(const float *values, const float *importance, float *scales, int64_t begin, int64_t end,
                        int64_t columns, int block, int bits, int type) {
  float padded[LARGEST_BLOCK], weights[LARGEST_BLOCK];
  int64_t failed = 0;
  scales += begin * ((columns + block - 1) / block);
  for (int64_t row = begin; row < end; row++)
    for (int64_t column = 0; column < columns; column += block) {
      const float *from = block_at(values + row * columns, column, columns, block, padded);
      const float *weight = block_at(importance, column, columns, block, weights);
      failed += !fit_block(from, weight, scales++, block, bits, type);
    }
  return failed;
}

/* The usual sizes, known to the compiler. */
#define FIT(block) fit_rows(values, importance, scales, begin, end, columns, block, bits, type)

/* The scale of each block with the smallest weighted square error, of a few that clip more or less.
 * values: (rows, columns); importance: (columns,); scales: (rows, blocks). bits: 4 or 8.
 * Returns how many blocks there are that no scale suits. */
EXPORT CLONES int64_t lora_deploy_fit(const float *values, const float *importance, float *scales, int64_t begin,
                                      int64_t end, int64_t columns, int block, int bits, int type) {
  switch (block) {
    case 16: return FIT(16);
    case 32: return FIT(32);
    case 64: return FIT(64);
    case 128: return FIT(128);
    default: return FIT(block);
  }
}

INLINE void pack_pairs(const uint8_t *codes, uint8_t *out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
}

/* Codes of values on the grid of their scales, the code of zero in the middle. codes: (rows, blocks * block), or, packed,
 * two to a byte, the low nibble first. No value may be NaN on that grid. */
EXPORT CLONES void lora_deploy_quantize(const float *values, const float *scales, uint8_t *codes, int64_t begin,
                                        int64_t end, int64_t columns, int block, int bits, int packed) {
  const float half = (float)(1 << (bits - 1));
  const int64_t blocks = (columns + block - 1) / block, bytes = packed ? block / 2 : block;
  float padded[LARGEST_BLOCK];
  uint8_t whole[LARGEST_BLOCK];
  scales += begin * blocks, codes += begin * blocks * bytes;
  for (int64_t row = begin; row < end; row++)
    for (int64_t column = 0; column < columns; column += block, scales++, codes += bytes) {
      const float *from = block_at(values + row * columns, column, columns, block, padded);
      uint8_t *to = packed ? whole : codes;
      for (int i = 0; i < block; i++) to[i] = (uint8_t)(int32_t)(step(from[i], *scales, -half, half - 1) + half);
      if (packed) pack_pairs(whole, codes, block / 2);
    }
}

/* Codes of 4 bits, one a byte, become two a byte, the low nibble first. `begin` and `end` count pairs. */
EXPORT CLONES void lora_deploy_pack(const uint8_t *codes, uint8_t *out, int64_t begin, int64_t end) {
  pack_pairs(codes + 2 * begin, out + begin, end - begin);
}

/* out = (codes - 2**(bits - 1)) * scale of the block, for codes of (rows, blocks * block), one a byte. */
EXPORT CLONES void lora_deploy_dequantize(const uint8_t *codes, const float *scales, float *out, int64_t begin,
                                          int64_t end, int64_t columns, int block, int bits) {
  const int64_t blocks = (columns + block - 1) / block;
  const float half = (float)(1 << (bits - 1));
  for (int64_t row = begin; row < end; row++)
    for (int64_t b = 0; b < blocks; b++) {
      const uint8_t *from = codes + (row * blocks + b) * block;
      const int count = (int)(columns - b * block < block ? columns - b * block : block);
      float *to = out + row * columns + b * block;
      const float scale = scales[row * blocks + b];
      for (int i = 0; i < count; i++) to[i] = ((float)from[i] - half) * scale;
    }
}

/* out = codes * scale of the row: LLM.int8. */
EXPORT CLONES void lora_deploy_dequantize_rows(const int8_t *codes, const float *scales, float *out, int64_t begin,
                                               int64_t end, int64_t columns) {
  for (int64_t row = begin; row < end; row++)
    for (int64_t i = row * columns; i < (row + 1) * columns; i++) out[i] = (float)codes[i] * scales[row];
}

/* out = value of the nibble * absmax of the block, for `count` weights in flat blocks, the high nibble first. `begin` and
 * `end` count blocks. pairs: the two values of each byte. */
EXPORT void lora_deploy_dequantize_4bit(const uint8_t *codes, const float *absmax, const float *pairs, float *out,
                                        int64_t begin, int64_t end, int64_t count, int64_t block) {
  for (int64_t b = begin; b < end; b++) {
    const float scale = absmax[b];
    const int64_t last = (b + 1) * block < count ? (b + 1) * block : count;
    int64_t i = b * block;
    if (i % 2) out[i] = pairs[2 * codes[i / 2] + 1] * scale, i++;
    for (; i + 1 < last; i += 2) {
      const float *pair = pairs + 2 * codes[i / 2];
      out[i] = pair[0] * scale;
      out[i + 1] = pair[1] * scale;
    }
    if (i < last) out[i] = pairs[2 * codes[i / 2]] * scale;
  }
}

/* bfloat16 or float32 as float32. */
INLINE void read_values(const void *values, int type, int64_t from, int count, float *to) {
  if (type == BFLOAT16) {
    const uint16_t *source = (const uint16_t *)values + from;
    for (int i = 0; i < count; i++) to[i] = float_of((uint32_t)source[i] << 16);
  } else {
    memcpy(to, (const float *)values + from, (size_t)count * sizeof *to);
  }
}

/* How many of the 15 bounds a value is beyond. Written out, so that it stays in registers. */
INLINE int32_t level_of(float value, const float *bound) {
  return (value > bound[0]) + (value > bound[1]) + (value > bound[2]) + (value > bound[3]) + (value > bound[4]) +
         (value > bound[5]) + (value > bound[6]) + (value > bound[7]) + (value > bound[8]) + (value > bound[9]) +
         (value > bound[10]) + (value > bound[11]) + (value > bound[12]) + (value > bound[13]) + (value > bound[14]);
}

/* Codes of 4 bits as bitsandbytes' kernel for CPUs gives them, for blocks of `block` (even, at most LARGEST_BNB) of a
 * flat weight of `count` values, the high nibble first. `begin` and `end` count blocks. type: of the values, FLOAT32 or
 * BFLOAT16. bounds: the 15 midpoints between the sorted values of the code; order: the nibble of each of these. */
EXPORT CLONES void lora_deploy_quantize_4bit(const void *values, const float *bounds, const uint8_t *order,
                                             uint8_t *codes, float *absmax, int64_t begin, int64_t end, int64_t count,
                                             int block, int type) {
  const float smallest = 1e-38f; /* what bitsandbytes divides a block of zeros by */
  float own[LARGEST_BNB];
  int32_t level[LARGEST_BNB];
  for (int64_t b = begin; b < end; b++) {
    const int64_t start = b * block;
    const int size = (int)(count - start < block ? count - start : block);
    uint32_t largest = 0;
    read_values(values, type, start, size, own);
    for (int i = 0; i < size; i++) {
      const uint32_t bits = bits_of(own[i]) & 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    const float found = float_of(largest), divisor = found < smallest ? smallest : found;
    if (size == block) {
      const float factor = 1.0f / divisor;
      for (int i = 0; i < size; i++) own[i] *= factor;
    } else {
      for (int i = 0; i < size; i++) own[i] /= divisor;
    }
    absmax[b] = size == block ? found : divisor;
    if (size % 2) own[size] = 0.0f;
    const int even = size + size % 2;
    for (int i = 0; i < even; i++) level[i] = level_of(own[i], bounds);
    uint8_t *out = codes + start / 2;
    for (int i = 0; i < even / 2; i++) out[i] = (uint8_t)(order[level[2 * i]] << 4 | order[level[2 * i + 1]]);
  }
}
