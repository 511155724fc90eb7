// Runs an ONNX file with our operators in a program without Python: `onnx_host model library n_in n_out x y`, where x and y are
// files of float32. It is linked with ONNX Runtime's own library, whose functions stand at these places of its table.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

struct OrtApiBase {
  void* const* (*table)(uint32_t version);
  const char* (*version)();
};
extern "C" const OrtApiBase* OrtGetApiBase();

enum { ERROR_MESSAGE = 2, CREATE_ENV = 3, CREATE_SESSION = 7, RUN = 9, CREATE_OPTIONS = 10, SET_THREADS = 24, REGISTER = 29,
       INPUT_NAME = 36, OUTPUT_NAME = 37, CREATE_TENSOR = 49, TENSOR_DATA = 51, CPU_MEMORY = 69, DEFAULT_ALLOCATOR = 78 };

static void* const* table;

// Call a function of the table, and end the program if it returns an error.
template <class... Arguments> static void call(int place, Arguments... arguments) {
  void* status = ((void* (*)(Arguments...))table[place])(arguments...);
  if (!status) return;
  fprintf(stderr, "%s\n", ((const char* (*)(void*))table[ERROR_MESSAGE])(status));
  exit(1);
}

int main(int, char** argv) {
  table = OrtGetApiBase()->table(17);
  const size_t n_in = (size_t)atoll(argv[3]), n_out = (size_t)atoll(argv[4]);
  std::vector<float> x(n_in);
  FILE* file = fopen(argv[5], "rb");
  if (!file || fread(x.data(), 4, n_in, file) != n_in) return 2;
  fclose(file);
  void *env, *options, *library, *session, *memory, *input, *output = nullptr, *allocator;
  call(CREATE_ENV, 3, "test", &env);
  call(CREATE_OPTIONS, &options);
  call(SET_THREADS, options, 1);
  call(REGISTER, options, (const char*)argv[2], &library);
  call(CREATE_SESSION, env, (const char*)argv[1], options, &session);
  call(CPU_MEMORY, 0, 0, &memory);
  const int64_t shape[] = {1, (int64_t)n_in};
  call(CREATE_TENSOR, memory, (void*)x.data(), 4 * n_in, (const int64_t*)shape, (size_t)2, 1, &input);
  char *in_name, *out_name;
  call(DEFAULT_ALLOCATOR, &allocator);
  call(INPUT_NAME, session, (size_t)0, allocator, &in_name);
  call(OUTPUT_NAME, session, (size_t)0, allocator, &out_name);
  call(RUN, session, (void*)nullptr, &in_name, (void**)&input, (size_t)1, &out_name, (size_t)1, &output);
  float* y;
  call(TENSOR_DATA, output, &y);
  file = fopen(argv[6], "wb");
  if (!file || fwrite(y, 4, n_out, file) != n_out) return 2;
  fclose(file);
}
