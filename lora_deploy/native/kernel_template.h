/* The arithmetic for one instruction set. kernels.h includes this once for each, with these macros defined:
 *
 *   NAME(x)              x with the instruction set's suffix
 *   TARGET               the function attribute that allows its instructions
 *   LANES, VEC           floats in a vector, and its type
 *   LOAD, STORE, SET1, FMA, MUL, SUM
 *   TABLE                type of sixteen values ready to be looked up
 *   SCALED(t, code, s)   t = code * s, each product rounded: the dequantized values of a block
 *   DECODE(t, b, e, o)   look up LANES bytes: e from the high nibbles (even elements), o from the low ones
 *   WIDEN(b, v)          v = LANES signed bytes as floats
 *   TILE, DOT_ROWS(m)    rows of A in a tile of the large product; rows of W at a time in the small one
 *   FAST_PACK            whether bytes can be transposed with SSE2 */

#define WIDTH (2 * LANES) /* columns of the output in a panel */
#define INLINE static inline __attribute__((always_inline)) TARGET

/* A few rows of A: every weight is decoded once, in registers, and multiplied with `m` rows. With 4 bits x is
 * deinterleaved: of each 32 elements first the 16 even ones, then the 16 odd ones. */
INLINE void NAME(dot)(const int bits, const int m, const int rows, const Problem *p, size_t row, size_t n) {
  const Weight *w = p->weight;
  const size_t columns = w->columns, bytes = columns * bits / 8;
  const uint8_t *first = p->codes + n * bytes;
  VEC sums[4][4]; /* of constant size, so that it lives in registers once the loops are unrolled */
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int i = 0; i < m; i++) sums[r][i] = SET1(0.0f);
  for (size_t start = 0; start < columns; start += w->unit) {
    TABLE tables[4];
    VEC scales[4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
      if (bits == 4)
        SCALED(tables[r], w->code, scale_of(p, n + r, start));
      else
        scales[r] = SET1(scale_of(p, n + r, start));
    for (size_t k = start; k < start + w->unit; k += 32) {
      const uint8_t *codes = first + k * bits / 8;
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) __builtin_prefetch((const void *)((uintptr_t)(codes + r * bytes) + AHEAD));
#pragma GCC unroll 4
      for (int part = 0; part < 16; part += LANES) {
        const float *even = p->x + row * columns + k + part, *odd = even + 16;
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
          VEC e, o;
          if (bits == 4) {
            DECODE(tables[r], codes + r * bytes + part, e, o);
          } else {
            WIDEN(codes + r * bytes + part, e);
            WIDEN(codes + r * bytes + part + 16, o);
            e = MUL(e, scales[r]);
            o = MUL(o, scales[r]);
          }
#pragma GCC unroll 4
          for (int i = 0; i < m; i++) {
            sums[r][i] = FMA(e, LOAD(even + i * columns), sums[r][i]);
            sums[r][i] = FMA(o, LOAD(odd + i * columns), sums[r][i]);
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int i = 0; i < m; i++) p->y[(row + i) * w->rows + n + r] = SUM(sums[r][i]);
}

INLINE void NAME(dot_strips)(const int bits, const int m, const Problem *p, size_t row, size_t begin, size_t end) {
  size_t n = begin;
  for (; n + DOT_ROWS(m) <= end; n += DOT_ROWS(m)) NAME(dot)(bits, m, DOT_ROWS(m), p, row, n);
  for (; n < end; n++) NAME(dot)(bits, m, 1, p, row, n);
}

INLINE void NAME(dot_bits)(const int bits, const Problem *p, size_t begin, size_t end) {
  for (size_t row = 0; row < p->m; row += 4) switch (p->m - row) {
      case 1:
        NAME(dot_strips)(bits, 1, p, row, begin, end);
        break;
      case 2:
        NAME(dot_strips)(bits, 2, p, row, begin, end);
        break;
      case 3:
        NAME(dot_strips)(bits, 3, p, row, begin, end);
        break;
      default:
        NAME(dot_strips)(bits, 4, p, row, begin, end);
    }
}

/* Rows begin to end of W, with all rows of A, four at a time: more of them no longer fit the fastest cache. */
static TARGET void NAME(dot_rows)(const Problem *p, size_t begin, size_t end) {
  if (p->weight->bits == 4)
    NAME(dot_bits)(4, p, begin, end);
  else
    NAME(dot_bits)(8, p, begin, end);
}

#if FAST_PACK
/* Dequantize `depth` columns of 16 rows of W into a panel. The bytes are transposed before they are decoded: they are
 * much less than the values. */
static TARGET void NAME(pack16)(const Problem *p, float *panel, size_t n, size_t k, size_t depth) {
  const Weight *w = p->weight;
  const uint8_t *from[16];
  size_t rows[16];
  TABLE table;
  if (w->bits == 4) SCALED(table, w->code, 1.0f);
  for (size_t r = 0; r < 16; r++) { /* a row beyond the last one repeats it; what it gives is not stored */
    rows[r] = n + r < w->rows ? n + r : w->rows - 1;
    from[r] = p->codes + (rows[r] * w->columns + k) * w->bits / 8;
  }
  for (size_t done = 0; done < depth; done += 32) {
    float scales[16];
    for (size_t r = 0; r < 16; r++) scales[r] = scale_of(p, rows[r], k + done);
    for (size_t offset = done * w->bits / 8; offset < (done + 32) * w->bits / 8; offset += 16) {
      uint8_t bytes[256];
      transpose16(from, offset, bytes);
      for (size_t j = 0; j < 16; j++)
        for (size_t part = 0; part < 16; part += LANES) {
          const VEC s = LOAD(scales + part);
          float *to = panel + (offset + j) * 8 / w->bits * WIDTH + part;
          VEC e, o;
          if (w->bits == 4) {
            DECODE(table, bytes + 16 * j + part, e, o);
            STORE(to + WIDTH, MUL(o, s));
          } else {
            WIDEN(bytes + 16 * j + part, e);
          }
          STORE(to, MUL(e, s));
        }
    }
  }
}
#endif

/* A tile of `m` rows of A times a panel: y[m, WIDTH]. */
INLINE void NAME(tile)(const int m, const Problem *p, const float *panel, size_t row, size_t n, size_t k,
                       size_t depth) {
  const size_t columns = p->weight->columns, stride = p->weight->rows, width = stride - n;
  const float *x = p->x + row * columns + k;
  VEC sums[TILE][2];
#pragma GCC unroll 16
  for (int i = 0; i < m; i++) sums[i][0] = sums[i][1] = SET1(0.0f);
  for (size_t j = 0; j < depth; j++) {
    const VEC left = LOAD(panel + j * WIDTH), right = LOAD(panel + j * WIDTH + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < m; i++) {
      const VEC a = SET1(x[i * columns + j]);
      sums[i][0] = FMA(left, a, sums[i][0]);
      sums[i][1] = FMA(right, a, sums[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < m; i++) {
    float *y = p->y + (row + i) * stride + n, values[WIDTH];
    float *to = width >= WIDTH ? y : values;
    if (k > 0) {
      if (to == values) memcpy(values, y, width * sizeof(float));
      sums[i][0] += LOAD(to);
      sums[i][1] += LOAD(to + LANES);
    }
    STORE(to, sums[i][0]);
    STORE(to + LANES, sums[i][1]);
    if (to == values) memcpy(y, values, width * sizeof(float));
  }
}

/* WIDTH columns of the output from column n on, for all rows of A. */
static TARGET void NAME(panel)(const Problem *p, size_t n) {
  const Weight *w = p->weight;
  float panel[DEPTH * WIDTH] __attribute__((aligned(64)));
  for (size_t k = 0; k < w->columns; k += DEPTH) {
    const size_t depth = w->columns - k < DEPTH ? w->columns - k : DEPTH;
    size_t row = 0;
#if FAST_PACK
    if (w->unit)
      for (size_t column = 0; column < WIDTH; column += 16) NAME(pack16)(p, panel + column, n + column, k, depth);
    else
#endif
      pack_any(p, panel, WIDTH, n, k, depth);
    for (; row + TILE <= p->m; row += TILE) NAME(tile)(TILE, p, panel, row, n, k, depth);
    for (; row + 4 <= p->m; row += 4) NAME(tile)(4, p, panel, row, n, k, depth);
    for (; row < p->m; row++) NAME(tile)(1, p, panel, row, n, k, depth);
  }
}

#undef WIDTH
#undef INLINE
