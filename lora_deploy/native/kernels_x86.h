/* The instruction sets of x86-64 that there are paths for, chosen when a kernel is made. */
#define KERNELS_X86
#include <cpuid.h>
#include <immintrin.h>

#undef TARGET
#undef NAME
#undef LANES
#undef VEC
#undef LOAD
#undef STORE
#undef SET1
#undef FMA
#undef MUL
#undef SUM
#undef TABLE
#undef SCALED
#undef DECODE
#undef WIDEN
#undef TILE
#undef DOT_ROWS
#undef FAST_PACK

enum { HAS_AVX2 = 1, HAS_AVX512 = 2 };

/* What the processor has and the system saves at a switch of threads. __builtin_cpu_supports would do, but for zig's
 * runtime, which answers no. */
static int instruction_sets(void) {
  unsigned a, b, c, d, saved;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_FMA) || !(c & bit_OSXSAVE)) return 0;
  __asm__("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
  if ((saved & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return 0;
  return HAS_AVX2 | ((saved & 0xe6) == 0xe6 && (b & bit_AVX512F) ? HAS_AVX512 : 0);
}

/* out[16 * j + r] = from[r][offset + j]. */
static inline void transpose16(const uint8_t *const *from, size_t offset, uint8_t *out) {
  __m128i a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++) a[r] = _mm_loadu_si128((const __m128i *)(from[r] + offset));
  /* Each round interleaves row i with row i + 8, so four of them rotate the index (row, byte) by half. */
#define ROUND(from, to)                                        \
  _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) {        \
    to[2 * i] = _mm_unpacklo_epi8(from[i], from[i + 8]);       \
    to[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[i + 8]);   \
  }
  ROUND(a, b) ROUND(b, a) ROUND(a, b) ROUND(b, a)
#undef ROUND
#pragma GCC unroll 16
  for (int j = 0; j < 16; j++) _mm_storeu_si128((__m128i *)(out + 16 * j), a[j]);
}

typedef struct {
  __m256 low, high;
} Table8;

/* AVX2 looks up eight values at a time: both halves are looked up, and bit 3, moved to the sign, chooses. */
static inline __attribute__((always_inline, target("avx2,fma"))) __m256 lookup8(const Table8 *t, __m256i index,
                                                                               __m256i sign) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t->low, index), _mm256_permutevar8x32_ps(t->high, index),
                          _mm256_castsi256_ps(sign));
}

static inline __attribute__((always_inline, target("avx2,fma"))) float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define VEC __m256
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define SET1(a) _mm256_set1_ps(a)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define SUM(v) sum8(v)
#define TABLE Table8
#define SCALED(t, code, s)                              \
  do {                                                  \
    const __m256 s_ = _mm256_set1_ps(s);                \
    (t).low = _mm256_mul_ps(_mm256_loadu_ps(code), s_); \
    (t).high = _mm256_mul_ps(_mm256_loadu_ps((code) + 8), s_); \
  } while (0)
#define DECODE(t, b, e, o)                                                             \
  do {                                                                                 \
    const __m256i i_ = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(b)));    \
    (e) = lookup8(&(t), _mm256_srli_epi32(i_, 4), _mm256_slli_epi32(i_, 24));          \
    (o) = lookup8(&(t), i_, _mm256_slli_epi32(i_, 28));                                \
  } while (0)
#define WIDEN(b, v) (v) = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(b))))
#define TILE 6
#define DOT_ROWS(m) ((m) == 1 ? 4 : 2)
#define FAST_PACK 1
#include "kernel_template.h"

#undef TARGET
#undef NAME
#undef LANES
#undef VEC
#undef LOAD
#undef STORE
#undef SET1
#undef FMA
#undef MUL
#undef SUM
#undef TABLE
#undef SCALED
#undef DECODE
#undef WIDEN
#undef TILE
#undef DOT_ROWS

/* A table of sixteen values is one register; the lookup ignores all but the lowest four bits of an index. */
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx2,fma")))
#define LANES 16
#define VEC __m512
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define SET1(a) _mm512_set1_ps(a)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define SUM(v) _mm512_reduce_add_ps(v)
#define TABLE __m512
#define SCALED(t, code, s) (t) = _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(s))
#define DECODE(t, b, e, o)                                                              \
  do {                                                                                  \
    const __m512i i_ = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(b)));     \
    (e) = _mm512_permutexvar_ps(_mm512_srli_epi32(i_, 4), t);                           \
    (o) = _mm512_permutexvar_ps(i_, t);                                                 \
  } while (0)
#define WIDEN(b, v) (v) = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(b))))
#define TILE 12
#define DOT_ROWS(m) 4
#include "kernel_template.h"
