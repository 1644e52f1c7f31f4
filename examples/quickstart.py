"""From text to a served GPT in a few minutes: trains a tokenizer and a model, generates, exports, and checks itself.

python examples/quickstart.py            # a model of 3 million parameters on the help of Python itself
python examples/quickstart.py --smoke    # the same path in seconds, with a model that has learnt nothing
"""

import argparse
import lzma
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

from lmzoo import TextGenerator, pretrain
from lmzoo.data.corpus import Corpus

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--directory", type=Path, default=Path("runs/quickstart"), help="where the run goes")
parser.add_argument("--export", type=Path, default=Path("saved_models/quickstart"), help="where the SavedModel goes")
parser.add_argument("--source", nargs="+", default=["pydoc"], help="text to train on")
parser.add_argument("--steps", type=int, default=800, help="optimizer steps")
parser.add_argument("--smoke", action="store_true", help="a few steps only")
arguments = parser.parse_args()
start = time.perf_counter()

# 1. Train a tokenizer and a model on text.
result = pretrain(
    directory=arguments.directory,
    source=tuple(arguments.source),
    preset="gpt2-nano",
    vocab_size=512 if arguments.smoke else 4096,
    context_length=128,
    num_layers=2 if arguments.smoke else 4,
    num_heads=4,
    model_dim=64 if arguments.smoke else 192,
    steps=20 if arguments.smoke else arguments.steps,
    batch_size=8 if arguments.smoke else 16,
    optimizer="muon",
    learning_rate=4e-3,
    warmup_steps=10 if arguments.smoke else 100,
    final_learning_rate=0.0,
    schedule="linear",
    evaluate_every=10 if arguments.smoke else 200,
    separate_documents=False,
)

# 2. What has it learnt? Code the held-out text with it, beside a compressor that everybody has.
held_out = Corpus.open(arguments.directory / "corpus" / "validation")
text = "".join(result.tokenizer.decode([held_out.document(number) for number in range(held_out.num_documents)]))
compressed = 8 * len(lzma.compress(text.encode(), preset=9)) / len(text.encode())
print(f"\nheld-out text: {result.validation.bits_per_byte:.3f} bits per byte by the model, {compressed:.3f} by xz -9")

# 3. Generate: strings in, strings out.
generator = TextGenerator(result.model, result.tokenizer, max_new_tokens=48, temperature=0.7, top_k=40)
prompts = ["The statement", "Return a list of"]
texts = generator(prompts, seed=1)
for prompt, continuation in zip(prompts, texts, strict=True):
    print(f"\n> {prompt}{continuation}")

# 4. Export the same graph for TF Serving, load it as a server would, and compare.
version = generator.export(arguments.export)
served = tf.saved_model.load(str(version))
again = served.generate(tf.constant(prompts), seed=tf.constant([1], tf.int64))["text"]
same = [item.decode() for item in again.numpy()] == texts
seconds = time.perf_counter() - start
print(f"\nthe exported model gives {'the same' if same else 'OTHER'} texts; {seconds:.0f} s since the start")
print(f"""
checkpoint  {result.checkpoint}   (transformers opens it too)
metrics     {arguments.directory}/metrics.jsonl   (or: tensorboard --logdir {arguments.directory})
SavedModel  {version}

Next: lmzoo generate {arguments.directory} "The statement"
      lmzoo pretrain --help
      python examples/pretrain_gpt.py --help""")
raise SystemExit(0 if same else 1)
