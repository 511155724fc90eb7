// The part of ONNX Runtime's C interface that onnx.cpp uses, declared here because its wheel carries no header. The table
// of functions is append-only: a function keeps its place in every later version. test_onnx.py calls each of them.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {

constexpr uint32_t ORT_VERSION = 17;  // of the table, ONNX Runtime 1.17 (January 2024) or newer

struct OrtStatus;  // null: no error
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtValue;
struct OrtTensorInfo;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtCustomOp;

enum OrtError { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum OrtElement { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_INT16 = 5, ORT_INT32 = 6 };

struct OrtApi {
  OrtStatus* (*create_status)(int code, const char* message);
  void* from_1[25];
  OrtStatus* (*create_domain)(const char* name, OrtCustomOpDomain** out);
  OrtStatus* (*add_to_domain)(OrtCustomOpDomain*, const OrtCustomOp*);
  OrtStatus* (*add_domain)(OrtSessionOptions*, OrtCustomOpDomain*);
  void* from_29[22];
  OrtStatus* (*tensor_data)(OrtValue*, void** out);
  void* from_52[8];
  OrtStatus* (*element_type)(const OrtTensorInfo*, int* out);
  OrtStatus* (*count_dimensions)(const OrtTensorInfo*, size_t* out);
  OrtStatus* (*dimensions)(const OrtTensorInfo*, int64_t* out, size_t n);
  void* from_63[2];
  OrtStatus* (*tensor_info)(const OrtValue*, OrtTensorInfo** out);
  void* from_66[24];
  OrtStatus* (*input)(const OrtKernelContext*, size_t i, const OrtValue** out);
  OrtStatus* (*output)(OrtKernelContext*, size_t i, const int64_t* shape, size_t n, OrtValue** out);
  void* from_92[7];
  void (*release_tensor_info)(OrtTensorInfo*);
  void* from_100[63];
  OrtStatus* (*int_attributes)(const OrtKernelInfo*, const char* name, int64_t* out, size_t* n);
  void* from_164[73];
  OrtStatus* (*has_setting)(const OrtSessionOptions*, const char* key, int* out);
  OrtStatus* (*setting)(const OrtSessionOptions*, const char* key, char* out, size_t* n);
  void* from_239[10];
  OrtStatus* (*constant_input)(const OrtKernelInfo*, size_t i, int* is_constant, const OrtValue** out);
  void* from_250[24];
  OrtStatus* (*parallel_for)(const OrtKernelContext*, void (*task)(void*, size_t), size_t items, size_t batches, void* context);
};
#define MUWS_PLACE(name, place) static_assert(offsetof(OrtApi, name) == place * sizeof(void*), "the place in the table")
MUWS_PLACE(create_domain, 26);
MUWS_PLACE(tensor_data, 51);
MUWS_PLACE(element_type, 60);
MUWS_PLACE(tensor_info, 65);
MUWS_PLACE(input, 90);
MUWS_PLACE(release_tensor_info, 99);
MUWS_PLACE(int_attributes, 163);
MUWS_PLACE(has_setting, 237);
MUWS_PLACE(constant_input, 249);
MUWS_PLACE(parallel_for, 274);
#undef MUWS_PLACE

struct OrtApiBase {
  const OrtApi* (*table)(uint32_t version);  // null if the version is newer than the library
  const char* (*version)();
};

// One operator. `version` says which members ONNX Runtime may read; null members have a default.
struct OrtCustomOp {
  uint32_t version;
  void* (*old_create)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*name)(const OrtCustomOp*);
  const char* (*provider)(const OrtCustomOp*);
  int (*input_type)(const OrtCustomOp*, size_t i);
  size_t (*count_inputs)(const OrtCustomOp*);
  int (*output_type)(const OrtCustomOp*, size_t i);
  size_t (*count_outputs)(const OrtCustomOp*);
  void (*old_compute)(void* kernel, OrtKernelContext*);
  void (*destroy)(void* kernel);
  int (*input_kind)(const OrtCustomOp*, size_t i);  // 0: required, 1: optional
  int (*output_kind)(const OrtCustomOp*, size_t i);
  int (*input_memory)(const OrtCustomOp*, size_t i);  // 0: that of the provider
  int (*fewest_variadic_inputs)(const OrtCustomOp*);
  int (*variadic_inputs_alike)(const OrtCustomOp*);
  int (*fewest_variadic_outputs)(const OrtCustomOp*);
  int (*variadic_outputs_alike)(const OrtCustomOp*);
  OrtStatus* (*create)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*compute)(void* kernel, OrtKernelContext*);
  OrtStatus* (*infer_shape)(const OrtCustomOp*, void* context);
  int (*first_opset)(const OrtCustomOp*);
  int (*last_opset)(const OrtCustomOp*);
  size_t (*may_work_in_place)(int** inputs, int** outputs);
  void (*release_in_place)(int* inputs, int* outputs);
  size_t (*aliases)(int** inputs, int** outputs);
  void (*release_aliases)(int* inputs, int* outputs);
};
}
