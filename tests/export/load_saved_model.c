/* Loads a SavedModel as TensorFlow Serving does, through TensorFlow's C API, and runs it once.
 *
 *   load_saved_model DIRECTORY [--library FILE] INPUT... -- OUTPUT...
 *
 * INPUT and OUTPUT are tensors of the graph, such as serving_default_text:0. A library holds further operations, such as
 * those of tensorflow-text. Values of the inputs are read from standard input, one tensor after the other, and those of
 * the outputs are printed alike: a line with type, rank and sizes ("string 1 3"), then each value on a line, a string
 * as its number of bytes on a line, the bytes, and a newline. Exit status 1 and a line on standard error if anything
 * goes wrong.
 */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

#define MAX_NAME 256
#define MAX_RANK 8
#define MAX_TENSORS 32

static const struct {
  const char* name;
  TF_DataType type;
  size_t size;
} types[] = {{"string", TF_STRING, sizeof(TF_TString)},
             {"float32", TF_FLOAT, sizeof(float)},
             {"int32", TF_INT32, sizeof(int32_t)},
             {"int64", TF_INT64, sizeof(int64_t)},
             {"bool", TF_BOOL, sizeof(unsigned char)}};
static const size_t num_types = sizeof types / sizeof types[0];

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

static void read_string(TF_TString* string) {
  size_t size;
  if (scanf("%zu", &size) != 1 || getchar() != '\n') fail("input", "no size of a string");
  char* bytes = malloc(size + 1);
  if (bytes == NULL || fread(bytes, 1, size, stdin) != size) fail("input", "a string that is too short");
  TF_TString_Init(string);
  TF_TString_Copy(string, bytes, size);
  free(bytes);
}

static void read_value(TF_DataType type, void* values, int64_t place) {
  int64_t number;
  if (type == TF_STRING) {
    read_string((TF_TString*)values + place);
  } else if (type == TF_FLOAT) {
    if (scanf("%f", (float*)values + place) != 1) fail("input", "no number");
  } else {
    if (scanf("%" SCNd64, &number) != 1) fail("input", "no integer");
    if (type == TF_INT32) ((int32_t*)values)[place] = (int32_t)number;
    if (type == TF_INT64) ((int64_t*)values)[place] = number;
    if (type == TF_BOOL) ((unsigned char*)values)[place] = number != 0;
  }
}

static TF_Tensor* read_tensor(void) {
  char name[16];
  int rank;
  int64_t sizes[MAX_RANK], count = 1;
  if (scanf("%15s %d", name, &rank) != 2 || rank < 0 || rank > MAX_RANK) fail("input", "no type and rank");
  for (int axis = 0; axis < rank; ++axis) {
    if (scanf("%" SCNd64, &sizes[axis]) != 1) fail("input", "no size of an axis");
    count *= sizes[axis];
  }
  for (size_t i = 0; i < num_types; ++i) {
    if (strcmp(name, types[i].name) != 0) continue;
    TF_Tensor* tensor = TF_AllocateTensor(types[i].type, sizes, rank, (size_t)count * types[i].size);
    for (int64_t place = 0; place < count; ++place) read_value(types[i].type, TF_TensorData(tensor), place);
    return tensor;
  }
  fail(name, "no type that this program knows");
  return NULL;
}

static void print_value(TF_DataType type, const void* values, int64_t place) {
  if (type == TF_STRING) {
    const TF_TString* string = (const TF_TString*)values + place;
    printf("%zu\n", TF_TString_GetSize(string));
    fwrite(TF_TString_GetDataPointer(string), 1, TF_TString_GetSize(string), stdout);
    putchar('\n');
  } else if (type == TF_FLOAT) {
    printf("%.9g\n", ((const float*)values)[place]);
  } else {
    const int64_t number = type == TF_INT32   ? ((const int32_t*)values)[place]
                           : type == TF_INT64 ? ((const int64_t*)values)[place]
                                              : ((const unsigned char*)values)[place];
    printf("%" PRId64 "\n", number);
  }
}

static void print_tensor(const TF_Tensor* tensor) {
  int64_t count = 1;
  for (size_t i = 0; i < num_types; ++i) {
    if (types[i].type != TF_TensorType(tensor)) continue;
    printf("%s %d", types[i].name, TF_NumDims(tensor));
    for (int axis = 0; axis < TF_NumDims(tensor); ++axis) {
      printf(" %" PRId64, TF_Dim(tensor, axis));
      count *= TF_Dim(tensor, axis);
    }
    putchar('\n');
    for (int64_t place = 0; place < count; ++place) print_value(types[i].type, TF_TensorData(tensor), place);
    return;
  }
  fail("output", "of a type that this program does not know");
}

int main(int argc, char** argv) {
  if (argc < 4) fail("usage", "DIRECTORY [--library FILE] INPUT... -- OUTPUT...");
  TF_Status* status = TF_NewStatus();
  int next = 2;
  if (strcmp(argv[next], "--library") == 0 && next + 1 < argc) {
    TF_LoadLibrary(argv[next + 1], status);
    check(status, argv[next + 1]);
    next += 2;
  }

  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  const char* tags[] = {"serve"};
  TF_Session* session = TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, NULL, status);
  check(status, argv[1]);

  TF_Output inputs[MAX_TENSORS], outputs[MAX_TENSORS];
  TF_Tensor *values[MAX_TENSORS], *results[MAX_TENSORS] = {NULL};
  int num_inputs = 0, num_outputs = 0;
  for (; next < argc && strcmp(argv[next], "--") != 0 && num_inputs < MAX_TENSORS; ++next, ++num_inputs) {
    inputs[num_inputs] = find(graph, argv[next]);
    values[num_inputs] = read_tensor();
  }
  for (++next; next < argc && num_outputs < MAX_TENSORS; ++next) outputs[num_outputs++] = find(graph, argv[next]);
  TF_SessionRun(session, NULL, inputs, values, num_inputs, outputs, results, num_outputs, NULL, 0, NULL, status);
  check(status, "run");

  for (int i = 0; i < num_outputs; ++i) {
    print_tensor(results[i]);
    TF_DeleteTensor(results[i]);
  }
  for (int i = 0; i < num_inputs; ++i) TF_DeleteTensor(values[i]);
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  check(status, "close");
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
  return 0;
}
