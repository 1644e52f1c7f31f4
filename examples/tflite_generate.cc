// Continues a text with a .tflite file of a GPT, as a program on a phone does; the tokenizer stands outside.
//   lmzoo export runs/books gpt.tflite --weights int8
//   g++ -std=c++17 -I $TENSORFLOW tflite_generate.cc -L $TFLITE -ltensorflowlite && ./a.out gpt.tflite 464 2068 7586
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tensorflow/lite/interpreter.h"
#include "tensorflow/lite/interpreter_builder.h"
#include "tensorflow/lite/kernels/register.h"
#include "tensorflow/lite/model_builder.h"
#include "tensorflow/lite/signature_runner.h"

int main(int argc, char** argv) {
  auto file = tflite::FlatBufferModel::BuildFromFile(argv[1]);
  tflite::ops::builtin::BuiltinOpResolver operators;  // Brings XNNPACK along.
  std::unique_ptr<tflite::Interpreter> interpreter;
  tflite::InterpreterBuilder(*file, operators)(&interpreter);
  interpreter->SetNumThreads(4);
  auto* prefill = interpreter->GetSignatureRunner("prefill");
  auto* decode = interpreter->GetSignatureRunner("decode");

  // Keys and values, of rank 4, lie in memory that both signatures read and write in place.
  std::map<std::string, void*> memory;
  for (auto* runner : {prefill, decode}) {
    for (const char* name : runner->input_names()) {
      const TfLiteTensor* tensor = runner->input_tensor(name);
      if (tensor->dims->size != 4) continue;
      size_t bytes = (tensor->bytes + 63) / 64 * 64;
      if (!memory.count(name)) memory[name] = std::memset(std::aligned_alloc(64, bytes), 0, bytes);
      runner->SetCustomAllocationForInputTensor(name, {memory[name], bytes});
      runner->SetCustomAllocationForOutputTensor(name, {memory[name], bytes});
    }
    runner->AllocateTensors();
  }

  // What else is in the cache says which places are taken: it starts as zeros, and is copied from call to call.
  std::map<std::string, std::vector<char>> places;
  auto run = [&](tflite::SignatureRunner* runner, const std::vector<int>& tokens) {
    std::copy(tokens.begin(), tokens.end(), runner->input_tensor("token_ids")->data.i32);
    runner->input_tensor("lengths")->data.i32[0] = tokens.size();
    for (const char* name : {"cache_mask", "cache_next_slot"}) {
      TfLiteTensor* tensor = runner->input_tensor(name);
      places[name].resize(tensor->bytes);
      std::copy(places[name].begin(), places[name].end(), tensor->data.raw);
    }
    runner->Invoke();
    for (auto& [name, bytes] : places) {
      const char* raw = runner->output_tensor(name.c_str())->data.raw;
      std::copy(raw, raw + bytes.size(), bytes.begin());
    }
    const TfLiteTensor* logits = runner->output_tensor("logits");
    return int(std::max_element(logits->data.f, logits->data.f + logits->dims->data[1]) - logits->data.f);
  };

  std::vector<int> prompt;
  for (int i = 2; i < argc; ++i) prompt.push_back(std::atoi(argv[i]));
  const size_t piece = prefill->input_tensor("token_ids")->dims->data[1];
  int token = 0;
  for (size_t start = 0; start < prompt.size(); start += piece) {  // The cache must have room for a whole piece.
    token = run(prefill, {prompt.begin() + start, prompt.begin() + std::min(start + piece, prompt.size())});
  }
  for (int step = 0; step < 64; ++step, token = run(decode, {token})) std::printf("%d ", token);
  std::printf("\n");
}
