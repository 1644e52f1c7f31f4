/* Loads a SavedModel as TensorFlow Serving does, through TensorFlow's C API, and runs one signature of it.
 *
 *   load_saved_model DIRECTORY strings INPUT OUTPUT [--seed INPUT NUMBER] TEXT...
 *       prints each string that comes back: its number of bytes on a line, then the bytes and a newline.
 *   load_saved_model DIRECTORY ids INPUT OUTPUT ID...
 *       feeds one row of token ids and prints the float32 tensor that comes back: its shape on a line, then one number
 *       a line.
 *
 * INPUT and OUTPUT are tensors of the graph, such as serving_default_text:0. Exit status 1 and a line on standard error
 * if anything goes wrong.
 */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

#define MAX_NAME 256

static void fail(const char* what, const char* why) {
  fprintf(stderr, "load_saved_model: %s: %s\n", what, why);
  exit(1);
}

static void check(const TF_Status* status, const char* what) {
  if (TF_GetCode(status) != TF_OK) fail(what, TF_Message(status));
}

/* The tensor named "operation:index" of a graph. */
static TF_Output find(TF_Graph* graph, const char* tensor) {
  char name[MAX_NAME];
  const char* colon = strrchr(tensor, ':');
  if (colon == NULL || (size_t)(colon - tensor) >= sizeof name) fail(tensor, "not the name of a tensor");
  memcpy(name, tensor, (size_t)(colon - tensor));
  name[colon - tensor] = '\0';
  TF_Output output = {TF_GraphOperationByName(graph, name), atoi(colon + 1)};
  if (output.oper == NULL) fail(tensor, "the graph has no such operation");
  return output;
}

static TF_Tensor* strings_tensor(char** texts, int64_t count) {
  TF_Tensor* tensor = TF_AllocateTensor(TF_STRING, &count, 1, (size_t)count * sizeof(TF_TString));
  TF_TString* strings = TF_TensorData(tensor);
  for (int64_t i = 0; i < count; ++i) {
    TF_TString_Init(&strings[i]);
    TF_TString_Copy(&strings[i], texts[i], strlen(texts[i]));
  }
  return tensor;
}

static TF_Tensor* ids_tensor(char** numbers, int64_t count) {
  const int64_t shape[2] = {1, count};
  TF_Tensor* tensor = TF_AllocateTensor(TF_INT32, shape, 2, (size_t)count * sizeof(int32_t));
  int32_t* ids = TF_TensorData(tensor);
  for (int64_t i = 0; i < count; ++i) ids[i] = (int32_t)strtol(numbers[i], NULL, 10);
  return tensor;
}

static TF_Tensor* seed_tensor(const char* number) {
  const int64_t shape[1] = {1};
  TF_Tensor* tensor = TF_AllocateTensor(TF_INT64, shape, 1, sizeof(int64_t));
  *(int64_t*)TF_TensorData(tensor) = strtoll(number, NULL, 10);
  return tensor;
}

static void print_strings(const TF_Tensor* tensor) {
  if (TF_TensorType(tensor) != TF_STRING || TF_NumDims(tensor) != 1) fail("output", "not a vector of strings");
  const TF_TString* strings = TF_TensorData(tensor);
  for (int64_t i = 0; i < TF_Dim(tensor, 0); ++i) {
    const size_t size = TF_TString_GetSize(&strings[i]);
    printf("%zu\n", size);
    fwrite(TF_TString_GetDataPointer(&strings[i]), 1, size, stdout);
    putchar('\n');
  }
}

static void print_floats(const TF_Tensor* tensor) {
  if (TF_TensorType(tensor) != TF_FLOAT) fail("output", "not float32");
  int64_t size = 1;
  for (int axis = 0; axis < TF_NumDims(tensor); ++axis) {
    size *= TF_Dim(tensor, axis);
    printf("%" PRId64 " ", TF_Dim(tensor, axis));
  }
  putchar('\n');
  const float* values = TF_TensorData(tensor);
  for (int64_t i = 0; i < size; ++i) printf("%.9g\n", values[i]);
}

int main(int argc, char** argv) {
  if (argc < 5) fail("usage", "DIRECTORY strings|ids INPUT OUTPUT [--seed INPUT NUMBER] VALUE...");
  const int is_text = strcmp(argv[2], "strings") == 0;
  int first = 5;

  TF_Status* status = TF_NewStatus();
  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  const char* tags[] = {"serve"};
  TF_Session* session = TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, NULL, status);
  check(status, argv[1]);

  TF_Output inputs[2] = {find(graph, argv[3])};
  TF_Tensor* values[2];
  int num_inputs = 1;
  if (first + 2 < argc && strcmp(argv[first], "--seed") == 0) {
    inputs[1] = find(graph, argv[first + 1]);
    values[1] = seed_tensor(argv[first + 2]);
    num_inputs = 2;
    first += 3;
  }
  values[0] = is_text ? strings_tensor(argv + first, argc - first) : ids_tensor(argv + first, argc - first);

  const TF_Output output = find(graph, argv[4]);
  TF_Tensor* result = NULL;
  TF_SessionRun(session, NULL, inputs, values, num_inputs, &output, &result, 1, NULL, 0, NULL, status);
  check(status, "run");
  is_text ? print_strings(result) : print_floats(result);

  TF_DeleteTensor(result);
  for (int i = 0; i < num_inputs; ++i) TF_DeleteTensor(values[i]);
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  check(status, "close");
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
  return 0;
}
