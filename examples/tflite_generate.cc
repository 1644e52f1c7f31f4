// Continues a text with a .tflite file of a GPT, as a program on a phone does; the tokenizer stands outside.
//   lmzoo export runs/books gpt.tflite --weights int8
//   g++ -std=c++17 -I $LITERT tflite_generate.cc -L $LIBRARY -lLiteRt && ./a.out gpt.tflite 464 2068 7586
// LITERT has the headers of LiteRT 2.3; LIBRARY has libLiteRt.so, as the folder of the Python package ai_edge_litert.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "litert/c/litert_common.h"
#include "litert/c/litert_compiled_model.h"
#include "litert/c/litert_environment.h"
#include "litert/c/litert_environment_options.h"
#include "litert/c/litert_model.h"
#include "litert/c/litert_opaque_options.h"
#include "litert/c/litert_options.h"
#include "litert/c/litert_tensor_buffer.h"

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::exit(1);
}

void check(LiteRtStatus status, const std::string& what) {
  if (status != kLiteRtStatusOk) fail("LiteRT cannot " + what + ": status " + std::to_string(status) + ".");
}

struct Tensor {
  LiteRtTensorBuffer buffer;
  LiteRtRankedTensorType type;
  void* memory;  // Of the buffer; the CPU reads and writes it where it lies.
  size_t bytes;

  int size(int axis) const { return type.layout.dimensions[axis]; }
};

struct Signature {
  LiteRtParamIndex index;
  std::map<std::string, Tensor> inputs, outputs;
  std::vector<LiteRtTensorBuffer> given, taken;  // Their buffers in the order in which they are passed.
};

// Inputs named cache_* are memory that all signatures share, zeros to begin with. Keys and values, of rank 4, are
// written where they lie; the others, which say what places are taken, are copied from output to input by each call.
struct Model {
  LiteRtEnvironment environment;
  LiteRtModel file;
  LiteRtCompiledModel compiled;
  std::map<std::string, Tensor> cache;
  std::vector<LiteRtTensorBuffer> buffers;
};

Model read(const std::string& path) {
  Model model;
  LiteRtOptions options;
  LiteRtOpaqueOptions threads;
  LiteRtEnvOption quiet{};
  quiet.tag = kLiteRtEnvOptionTagMinLoggerSeverity;
  quiet.value.type = kLiteRtAnyTypeInt;
  quiet.value.int_value = 3;  // Errors.
  check(LiteRtCreateEnvironment(1, &quiet, &model.environment), "start");
  check(LiteRtCreateModelFromFile(model.environment, path.c_str(), &model.file), "read " + path);
  check(LiteRtCreateOptions(&options), "make options");
  check(LiteRtSetOptionsHardwareAccelerators(options, kLiteRtHwAcceleratorCpu), "choose the CPU");
  // Text, since the functions of litert/c/options/litert_cpu_options.h that write it are not in the library.
  check(LiteRtCreateOpaqueOptions("xnnpack", strdup("num_threads = 4"), std::free, &threads), "make XNNPACK's options");
  check(LiteRtAddOpaqueOptions(options, threads), "choose the number of threads");
  check(LiteRtCreateCompiledModel(model.environment, model.file, options, &model.compiled), "compile " + path);
  LiteRtDestroyOptions(options);
  return model;
}

Tensor allocate(Model& model, LiteRtRankedTensorType type, LiteRtTensorBufferRequirements needs) {
  Tensor tensor{nullptr, type, nullptr, 0};
  check(LiteRtCreateManagedTensorBufferFromRequirements(model.environment, &type, needs, &tensor.buffer),
        "take memory for a tensor");
  check(LiteRtGetTensorBufferHostMemory(tensor.buffer, &tensor.memory), "reach the memory of a tensor");
  check(LiteRtGetTensorBufferPackedSize(tensor.buffer, &tensor.bytes), "measure a tensor");
  std::memset(tensor.memory, 0, tensor.bytes);
  model.buffers.push_back(tensor.buffer);
  return tensor;
}

Signature find(Model& model, const std::string& key) {
  Signature found{};
  LiteRtSignature signature;
  LiteRtParamIndex count;
  const char* name;
  check(LiteRtGetNumModelSignatures(model.file, &count), "count the signatures");
  for (; found.index < count; ++found.index) {
    check(LiteRtGetModelSignature(model.file, found.index, &signature), "find a signature");
    check(LiteRtGetSignatureKey(signature, &name), "name a signature");
    if (name == key) break;
  }
  if (found.index == count) fail("the file has no signature named " + key + ", but that of a GPT has.");

  auto add = [&](auto count_of, auto name_of, auto type_of, auto needs_of, unsigned rank, auto& tensors, auto& passed) {
    check(count_of(signature, &count), "count the tensors of " + key);
    for (LiteRtParamIndex place = 0; place < count; ++place) {
      LiteRtTensor described;
      LiteRtRankedTensorType type;
      LiteRtTensorBufferRequirements needs;
      check(name_of(signature, place, &name), "name a tensor of " + key);
      check(type_of(signature, place, &described), "find a tensor of " + key);
      check(LiteRtGetRankedTensorType(described, &type), "tell the shape of a tensor");
      check(needs_of(model.compiled, found.index, place, &needs), "tell what memory a tensor needs");
      const bool shared = std::string(name).rfind("cache_", 0) == 0 && type.layout.rank >= rank;
      if (shared && !model.cache.count(name)) model.cache[name] = allocate(model, type, needs);
      tensors[name] = shared ? model.cache[name] : allocate(model, type, needs);
      passed.push_back(tensors[name].buffer);
    }
  };
  add(LiteRtGetNumSignatureInputs, LiteRtGetSignatureInputName, LiteRtGetSignatureInputTensorByIndex,
      LiteRtGetCompiledModelInputBufferRequirements, 0, found.inputs, found.given);
  add(LiteRtGetNumSignatureOutputs, LiteRtGetSignatureOutputName, LiteRtGetSignatureOutputTensorByIndex,
      LiteRtGetCompiledModelOutputBufferRequirements, 4, found.outputs, found.taken);
  return found;
}

// The most likely token after some more of them; padding fills what is left of the input.
int32_t run(Model& model, Signature& signature, const std::vector<int32_t>& tokens) {
  const Tensor &token_ids = signature.inputs.at("token_ids"), &lengths = signature.inputs.at("lengths");
  std::memset(token_ids.memory, 0, token_ids.bytes);
  std::copy(tokens.begin(), tokens.end(), static_cast<int32_t*>(token_ids.memory));
  *static_cast<int32_t*>(lengths.memory) = int32_t(tokens.size());
  check(LiteRtRunCompiledModel(model.compiled, signature.index, signature.given.size(), signature.given.data(),
                               signature.taken.size(), signature.taken.data()),
        "run the model");
  for (auto& [name, input] : model.cache) {
    const Tensor& output = signature.outputs.at(name);
    if (output.memory != input.memory) std::memcpy(input.memory, output.memory, input.bytes);
  }
  const Tensor& logits = signature.outputs.at("logits");
  const auto* first = static_cast<const float*>(logits.memory);
  return int32_t(std::max_element(first, first + logits.size(1)) - first);
}

std::vector<int32_t> numbers(int count, char** words, int vocab_size) {
  std::vector<int32_t> token_ids;
  for (; count > 0; --count, ++words) {
    char* end;
    const long token = std::strtol(*words, &end, 10);
    if (*end || end == *words || token < 0 || token >= vocab_size) {
      fail(std::string(*words) + " is no token id: these are 0 to " + std::to_string(vocab_size - 1) + ".");
    }
    token_ids.push_back(int32_t(token));
  }
  return token_ids;
}

int main(int argc, char** argv) {
  if (argc < 3) fail("usage: tflite_generate FILE ID [ID ...], with at least one token id.");
  Model model = read(argv[1]);
  Signature prefill = find(model, "prefill"), decode = find(model, "decode");
  const size_t piece = prefill.inputs.at("token_ids").size(1), room = model.cache.at("cache_mask").size(1);
  const auto prompt = numbers(argc - 2, argv + 2, decode.outputs.at("logits").size(1));
  if (prompt.size() > room) {
    fail("the prompt has " + std::to_string(prompt.size()) + " tokens, but the file has room for " +
         std::to_string(room) + ".");
  }
  int32_t token = 0;
  for (size_t start = 0, stop; start < prompt.size(); start = stop) {
    const bool fits = start + piece <= room;  // With its padding; where it does not, tokens are read one by one.
    stop = fits ? std::min(start + piece, prompt.size()) : start + 1;
    token = run(model, fits ? prefill : decode, {prompt.begin() + start, prompt.begin() + stop});
  }
  std::printf("%d", token);
  for (size_t taken = prompt.size(); taken < std::min(room, prompt.size() + 63); ++taken) {
    std::printf(" %d", token = run(model, decode, {token}));
  }
  std::printf("\n");

  for (LiteRtTensorBuffer buffer : model.buffers) LiteRtDestroyTensorBuffer(buffer);
  LiteRtDestroyCompiledModel(model.compiled);
  LiteRtDestroyModel(model.file);
  LiteRtDestroyEnvironment(model.environment);
}
