/* onnxruntime custom operators for weights as bitsandbytes stores them, exact, at the speed of reading the codes.
 *
 *   MatMulBnb4: Y = A W^T, W[N, K] = code[nibble] * absmax[block], NF4 or FP4. Inputs and attributes are those of
 *               com.microsoft's operator, whose kernel writes the dequantized weight to memory at each call.
 *   MatMulInt8: Y = A W^T, W[N, K] = B[N, K] * scale[N], int8 times float: LLM.int8 with scale = row_absmax / 127.
 *               Attributes: K, N.
 *
 * Both take an attribute `path`, for tests: see find_path. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { MIN_BLOCK = 16, MAX_BLOCK = 4096 };
/* Weights a task of the small product: long beside the cost of handing it to a thread, short beside the whole. */
enum { TASK_WEIGHTS = 1 << 14 };

static OrtStatus *fail(const OrtApi *api, int code, const char *format, ...) {
  char message[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return ort_CreateStatus(api)(code, message); /* copies the message */
}

#define CHECK(call)                          \
  do {                                       \
    OrtStatus *status_ = (call);             \
    if (status_) return status_;             \
  } while (0)

static size_t common_divisor(size_t a, size_t b) {
  while (b) {
    const size_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

static OrtStatus *read_integer(const Weight *w, const OrtKernelInfo *info, const char *name, int64_t *out) {
  return ort_KernelInfoGetAttribute_int64(w->api)(info, name, out);
}

static OrtStatus *read_shape(const OrtKernelInfo *info, Weight *w) {
  int64_t columns, rows, path = 0;
  CHECK(read_integer(w, info, "K", &columns));
  CHECK(read_integer(w, info, "N", &rows));
  OrtStatus *absent = read_integer(w, info, "path", &path);
  if (absent) ort_ReleaseStatus(w->api)(absent);
  if (columns < 1 || rows < 1 || (uint64_t)columns > (SIZE_MAX >> 5) / (uint64_t)rows)
    return fail(w->api, ORT_INVALID_ARGUMENT, "lora_deploy.%s: K and N must be positive and K * N fit in memory",
                w->operator);
  w->columns = (size_t)columns;
  w->rows = (size_t)rows;
  w->path = find_path(path);
  if (w->path) return NULL;
  return fail(w->api, ORT_INVALID_ARGUMENT, "lora_deploy.%s: path %lld does not exist on this processor", w->operator,
              (long long)path);
}

static OrtStatus *read_4bit(const OrtKernelInfo *info, Weight *w) {
  int64_t block, type;
  CHECK(read_integer(w, info, "block_size", &block));
  CHECK(read_integer(w, info, "quant_type", &type));
  if (block < MIN_BLOCK || block > MAX_BLOCK)
    return fail(w->api, ORT_INVALID_ARGUMENT, "lora_deploy.MatMulBnb4: block_size is %lld, not 16 to 4096",
                (long long)block);
  if (type != 0 && type != 1)
    return fail(w->api, ORT_INVALID_ARGUMENT, "lora_deploy.MatMulBnb4: quant_type is %lld, not 0 (FP4) or 1 (NF4)",
                (long long)type);
  w->block = (size_t)block;
  w->code = type ? NF4 : FP4;
  w->shift = -1;
  for (int s = 4; s <= 12; s++)
    if (w->block == (size_t)1 << s) w->shift = s;
  return NULL;
}

static OrtStatus *create(const char *operator, int bits, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  Weight *w = calloc(1, sizeof *w);
  if (!w) return fail(api, ORT_FAIL, "lora_deploy: out of memory");
  w->api = api;
  w->operator = operator;
  w->bits = bits;
  OrtStatus *status = read_shape(info, w);
  if (!status && bits == 4) status = read_4bit(info, w);
  if (status) {
    free(w);
    return status;
  }
  if (bits == 8) w->block = w->columns;
  w->unit = common_divisor(w->columns, w->block);
  if (w->unit % 32) w->unit = 0;
  *out = w;
  return NULL;
}

static void ORT_CALL destroy(void *kernel) { free(kernel); }

/* An input's data, its dimensions (into a fresh array, if `dims` is given) and its number of elements. */
static OrtStatus *read_input(const OrtApi *api, const OrtKernelContext *context, size_t index, const void **data,
                             size_t *elements, int64_t **dims, size_t *rank) {
  const OrtValue *value;
  OrtShapeInfo *shape;
  CHECK(ort_KernelContext_GetInput(api)(context, index, &value));
  if (!value) return fail(api, ORT_INVALID_ARGUMENT, "lora_deploy: input %d is missing", (int)index);
  CHECK(ort_GetTensorMutableData(api)((OrtValue *)value, (void **)data));
  CHECK(ort_GetTensorTypeAndShape(api)(value, &shape));
  OrtStatus *status = ort_GetTensorShapeElementCount(api)(shape, elements);
  if (!status && dims) {
    status = ort_GetDimensionsCount(api)(shape, rank);
    if (!status && !(*dims = malloc((*rank + 1) * sizeof **dims)))
      status = fail(api, ORT_FAIL, "lora_deploy: out of memory");
    if (!status && (status = ort_GetDimensions(api)(shape, *dims, *rank))) {
      free(*dims);
      *dims = NULL;
    }
  }
  ort_ReleaseTensorTypeAndShapeInfo(api)(shape);
  return status;
}

static void dot_task(void *data, size_t index) {
  const Problem *p = data;
  const size_t begin = index * p->task_rows, rest = p->weight->rows - begin;
  p->weight->path->dot_rows(p, begin, begin + (rest < p->task_rows ? rest : p->task_rows));
}

static void panel_task(void *data, size_t index) {
  const Problem *p = data;
  p->weight->path->panel(p, index * p->task_rows);
}

static OrtStatus *run_tasks(const OrtKernelContext *context, Problem *p, size_t rows, void (*task)(void *, size_t)) {
  const size_t tasks = (p->weight->rows + rows - 1) / rows;
  p->task_rows = rows;
  if (tasks > 1) return ort_KernelContext_ParallelFor(p->weight->api)(context, task, tasks, tasks, p);
  task(p, 0);
  return NULL;
}

static OrtStatus *multiply(const OrtKernelContext *context, Problem *p) {
  const Weight *w = p->weight;
  if (p->m > w->path->few || !w->unit) return run_tasks(context, p, w->path->width, panel_task);
  const size_t count = p->m * w->columns, few = TASK_WEIGHTS / w->columns / 8 * 8, rows = few ? few : 8;
  if (w->bits == 8) return run_tasks(context, p, rows, dot_task);
  float *x = malloc(count * sizeof(float));
  if (!x) return fail(w->api, ORT_FAIL, "lora_deploy: out of memory");
  for (size_t i = 0; i < count; i += 32)
    for (size_t j = 0; j < 16; j++) {
      x[i + j] = p->x[i + 2 * j];
      x[i + 16 + j] = p->x[i + 2 * j + 1];
    }
  p->x = x;
  OrtStatus *status = run_tasks(context, p, rows, dot_task);
  free(x);
  return status;
}

static OrtStatus *check_sizes(const Weight *w, const int64_t *dims, size_t rank, size_t codes, size_t scales) {
  const size_t count = w->rows * w->columns, blocks = (count + w->block - 1) / w->block;
  const size_t bytes = w->bits == 4 ? (count + 1) / 2 : count;
  if (rank < 1 || (size_t)dims[rank - 1] != w->columns)
    return fail(w->api, ORT_INVALID_ARGUMENT, "lora_deploy.%s: the last dimension of A is %lld, not K = %zu",
                w->operator, rank ? (long long)dims[rank - 1] : 0LL, w->columns);
  if (codes != bytes)
    return fail(w->api, ORT_INVALID_ARGUMENT, "lora_deploy.%s: B has %zu bytes, not %zu", w->operator, codes, bytes);
  if (scales != blocks)
    return fail(w->api, ORT_INVALID_ARGUMENT, "lora_deploy.%s: %s has %zu values, not %zu", w->operator,
                w->bits == 4 ? "absmax" : "scale", scales, blocks);
  return NULL;
}

static OrtStatus *ORT_CALL compute(void *kernel, OrtKernelContext *context) {
  const Weight *w = kernel;
  const OrtApi *api = w->api;
  Problem p = {.weight = w};
  size_t elements, codes, blocks, rank = 0;
  int64_t *dims = NULL;
  OrtValue *output;
  CHECK(read_input(api, context, 1, (const void **)&p.codes, &codes, NULL, NULL));
  CHECK(read_input(api, context, 2, (const void **)&p.scales, &blocks, NULL, NULL));
  CHECK(read_input(api, context, 0, (const void **)&p.x, &elements, &dims, &rank));
  OrtStatus *status = check_sizes(w, dims, rank, codes, blocks);
  if (!status) {
    dims[rank - 1] = (int64_t)w->rows;
    status = ort_KernelContext_GetOutput(api)(context, 0, dims, rank, &output);
  }
  free(dims);
  if (status) return status;
  CHECK(ort_GetTensorMutableData(api)(output, (void **)&p.y));
  p.m = elements / w->columns;
  return p.m ? multiply(context, &p) : NULL;
}

static const char *ORT_CALL provider(const OrtCustomOp *op) {
  (void)op;
  return NULL; /* the CPU's */
}
static size_t ORT_CALL three(const OrtCustomOp *op) {
  (void)op;
  return 3;
}
static size_t ORT_CALL one(const OrtCustomOp *op) {
  (void)op;
  return 1;
}
static int ORT_CALL output_type(const OrtCustomOp *op, size_t index) {
  (void)op, (void)index;
  return ELEMENT_FLOAT;
}
static int ORT_CALL zero(const OrtCustomOp *op, size_t index) { /* required; in default memory */
  (void)op, (void)index;
  return 0;
}
static int ORT_CALL start_version(const OrtCustomOp *op) {
  (void)op;
  return 1;
}
static int ORT_CALL end_version(const OrtCustomOp *op) {
  (void)op;
  return INT32_MAX;
}

#define OPERATOR(table, name, bits, codes)                                                                       \
  static const char *ORT_CALL name##_name(const OrtCustomOp *op) {                                               \
    (void)op;                                                                                                    \
    return #name;                                                                                                \
  }                                                                                                              \
  static int ORT_CALL name##_input(const OrtCustomOp *op, size_t index) {                                        \
    (void)op;                                                                                                    \
    return index == 1 ? codes : ELEMENT_FLOAT;                                                                   \
  }                                                                                                              \
  static OrtStatus *ORT_CALL name##_create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info,  \
                                           void **out) {                                                         \
    (void)op;                                                                                                    \
    return create(#name, bits, api, info, out);                                                                  \
  }                                                                                                              \
  static const OrtCustomOp table = {                                                                             \
      .version = ORT_VERSION,                                                                                    \
      .GetName = name##_name,                                                                                    \
      .GetExecutionProviderType = provider,                                                                      \
      .GetInputType = name##_input,                                                                              \
      .GetInputTypeCount = three,                                                                                \
      .GetOutputType = output_type,                                                                              \
      .GetOutputTypeCount = one,                                                                                 \
      .KernelDestroy = destroy,                                                                                  \
      .GetInputCharacteristic = zero,                                                                            \
      .GetOutputCharacteristic = zero,                                                                           \
      .GetInputMemoryType = zero,                                                                                \
      .CreateKernelV2 = name##_create,                                                                           \
      .KernelComputeV2 = compute,                                                                                \
      .GetStartVersion = start_version,                                                                          \
      .GetEndVersion = end_version,                                                                              \
  };

OPERATOR(MATMUL_BNB4, MatMulBnb4, 4, ELEMENT_UINT8)
OPERATOR(MATMUL_INT8, MatMulInt8, 8, ELEMENT_INT8)

/* onnxruntime does not own a domain and cannot say when its last session is gone, so one is made and kept for good.
 * It belongs to one runtime; a second copy of onnxruntime in the process gets its own at each registration. */
typedef struct {
  const OrtApi *api;
  OrtCustomOpDomain *domain;
} Registered;

static Registered *registered;

EXPORT OrtStatus *ORT_CALL RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  const OrtApi *api = base->GetApi(ORT_VERSION);
  if (!api) { /* interface 1 has always been there; CreateStatus is its first entry */
    const OrtApi *oldest = base->GetApi(1);
    if (!oldest) return NULL; /* the session will miss the operators */
    return fail(oldest, ORT_FAIL, "lora_deploy's operators need version %d of onnxruntime's interface", ORT_VERSION);
  }
  Registered *known = __atomic_load_n(&registered, __ATOMIC_ACQUIRE);
  if (known && known->api == api) return ort_AddCustomOpDomain(api)(options, known->domain);
  Registered *mine = malloc(sizeof *mine), *nobody = NULL;
  if (!mine) return fail(api, ORT_FAIL, "lora_deploy: out of memory");
  mine->api = api;
  OrtStatus *status = ort_CreateCustomOpDomain(api)("lora_deploy", &mine->domain);
  if (status) {
    free(mine);
    return status;
  }
  status = ort_CustomOpDomain_Add(api)(mine->domain, &MATMUL_BNB4);
  if (!status) status = ort_CustomOpDomain_Add(api)(mine->domain, &MATMUL_INT8);
  if (!status) status = ort_AddCustomOpDomain(api)(options, mine->domain);
  if (status) { /* the options do not have it */
    ort_ReleaseCustomOpDomain(api)(mine->domain);
    free(mine);
    return status;
  }
  __atomic_compare_exchange_n(&registered, &nobody, mine, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
  return NULL;
}
