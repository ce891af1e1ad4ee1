/* The part of onnxruntime's C interface that a custom operator needs.
 *
 * The wheel brings no header. OrtApi is a table of function pointers that only ever grows at its end, and GetApi(n)
 * refuses a version that the runtime does not have: so an index that was right in version n stays right. */
#ifndef LORA_DEPLOY_ORT_ABI_H
#define LORA_DEPLOY_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define ORT_CALL __stdcall
#define EXPORT __declspec(dllexport)
#else
#define ORT_CALL
#define EXPORT __attribute__((visibility("default")))
#endif

/* Interface 17 (onnxruntime 1.17) is the first with KernelContext_ParallelFor. */
enum { ORT_VERSION = 17 };
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ELEMENT_FLOAT = 1, ELEMENT_UINT8 = 2, ELEMENT_INT8 = 3 };

typedef struct OrtCustomOp OrtCustomOp;
typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtTensorTypeAndShapeInfo OrtShapeInfo;

typedef struct OrtApi {
  void(ORT_CALL *entry[275])(void);
} OrtApi;

typedef struct OrtApiBase {
  const OrtApi *(ORT_CALL *GetApi)(uint32_t version);
  const char *(ORT_CALL *GetVersionString)(void);
} OrtApiBase;

/* ort_X(api, ...) calls entry X of the table. */
#define ORT_ENTRY(name, index, result, parameters)                      \
  typedef result(ORT_CALL *name##_t) parameters;                        \
  static inline name##_t name(const OrtApi *api) { return (name##_t)api->entry[index]; }

ORT_ENTRY(ort_CreateStatus, 0, OrtStatus *, (int code, const char *message))
ORT_ENTRY(ort_CreateCustomOpDomain, 26, OrtStatus *, (const char *name, OrtCustomOpDomain **out))
ORT_ENTRY(ort_CustomOpDomain_Add, 27, OrtStatus *, (OrtCustomOpDomain *, const OrtCustomOp *))
ORT_ENTRY(ort_AddCustomOpDomain, 28, OrtStatus *, (OrtSessionOptions *, OrtCustomOpDomain *))
ORT_ENTRY(ort_GetTensorMutableData, 51, OrtStatus *, (OrtValue *, void **out))
ORT_ENTRY(ort_GetDimensionsCount, 61, OrtStatus *, (const OrtShapeInfo *, size_t *out))
ORT_ENTRY(ort_GetDimensions, 62, OrtStatus *, (const OrtShapeInfo *, int64_t *dims, size_t count))
ORT_ENTRY(ort_GetTensorShapeElementCount, 64, OrtStatus *, (const OrtShapeInfo *, size_t *out))
ORT_ENTRY(ort_GetTensorTypeAndShape, 65, OrtStatus *, (const OrtValue *, OrtShapeInfo **out))
ORT_ENTRY(ort_KernelInfoGetAttribute_int64, 86, OrtStatus *, (const OrtKernelInfo *, const char *name, int64_t *out))
ORT_ENTRY(ort_KernelContext_GetInput, 90, OrtStatus *, (const OrtKernelContext *, size_t index, const OrtValue **out))
ORT_ENTRY(ort_KernelContext_GetOutput, 91, OrtStatus *,
          (OrtKernelContext *, size_t index, const int64_t *dims, size_t count, OrtValue **out))
ORT_ENTRY(ort_ReleaseStatus, 93, void, (OrtStatus *))
ORT_ENTRY(ort_ReleaseTensorTypeAndShapeInfo, 99, void, (OrtShapeInfo *))
ORT_ENTRY(ort_ReleaseCustomOpDomain, 101, void, (OrtCustomOpDomain *))
ORT_ENTRY(ort_KernelContext_ParallelFor, 274, OrtStatus *,
          (const OrtKernelContext *, void (*task)(void *, size_t), size_t total, size_t batches, void *data))

/* onnxruntime reads no field that is newer than `version`, so this ends where version 17 does. */
struct OrtCustomOp {
  uint32_t version;
  void *(ORT_CALL *CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
  const char *(ORT_CALL *GetName)(const OrtCustomOp *);
  const char *(ORT_CALL *GetExecutionProviderType)(const OrtCustomOp *);
  int(ORT_CALL *GetInputType)(const OrtCustomOp *, size_t);
  size_t(ORT_CALL *GetInputTypeCount)(const OrtCustomOp *);
  int(ORT_CALL *GetOutputType)(const OrtCustomOp *, size_t);
  size_t(ORT_CALL *GetOutputTypeCount)(const OrtCustomOp *);
  void(ORT_CALL *KernelCompute)(void *, OrtKernelContext *);
  void(ORT_CALL *KernelDestroy)(void *);
  int(ORT_CALL *GetInputCharacteristic)(const OrtCustomOp *, size_t);
  int(ORT_CALL *GetOutputCharacteristic)(const OrtCustomOp *, size_t);
  int(ORT_CALL *GetInputMemoryType)(const OrtCustomOp *, size_t);
  int(ORT_CALL *GetVariadicInputMinArity)(const OrtCustomOp *);
  int(ORT_CALL *GetVariadicInputHomogeneity)(const OrtCustomOp *);
  int(ORT_CALL *GetVariadicOutputMinArity)(const OrtCustomOp *);
  int(ORT_CALL *GetVariadicOutputHomogeneity)(const OrtCustomOp *);
  OrtStatus *(ORT_CALL *CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
  OrtStatus *(ORT_CALL *KernelComputeV2)(void *, OrtKernelContext *);
  OrtStatus *(ORT_CALL *InferOutputShapeFn)(const OrtCustomOp *, void *);
  int(ORT_CALL *GetStartVersion)(const OrtCustomOp *);
  int(ORT_CALL *GetEndVersion)(const OrtCustomOp *);
};

#endif
