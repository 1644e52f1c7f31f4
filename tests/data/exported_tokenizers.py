"""A tokenizer's twin in a SavedModel, called by a process that has TensorFlow and no other library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tensorflow as tf

from lmzoo.data.tokenizers import Tokenizer

LOAD = """
import json, sys

sys.modules.update(dict.fromkeys(("lmzoo", "keras", "tokenizers", "tensorflow_text")))  # so that they cannot be had
import tensorflow as tf

loaded = tf.saved_model.load(sys.argv[1])
texts = tf.constant(json.loads(sys.argv[2]))
ids, offsets = loaded.tokenizer.encode_with_offsets(texts)
pairs = loaded.signatures["serving_default"](texts)
print(json.dumps({
    "ids": ids.to_list(),
    "offsets": offsets.to_list(),
    "decoded": [t.decode() for t in loaded.tokenizer.decode(ids).numpy()],
    "pairs": pairs["ids"].numpy().tolist(),
}))
"""


class Reader(tf.Module):
    """A pipeline without a model: pairs of a text and itself."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer.graph

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def serve(self, texts):
        return {"ids": self.tokenizer.encode_pairs(texts, texts, max_length=9).token_ids.to_tensor(-1)}


def assert_export_runs_without_lmzoo(tokenizer: Tokenizer, texts: list[str], directory: Path) -> None:
    """The loaded twin gives the ids, offsets, pairs and texts of the library."""
    module = Reader(tokenizer)
    tf.saved_model.save(module, directory / "reader", signatures=module.serve)
    command = [sys.executable, "-c", LOAD, str(directory / "reader"), json.dumps(texts)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    expected = tokenizer._backend.encode_batch(texts, add_special_tokens=False)
    assert answer["ids"] == [encoding.ids for encoding in expected]
    assert answer["offsets"] == [list(map(list, encoding.offsets)) for encoding in expected]
    assert answer["decoded"] == tokenizer.decode(answer["ids"])
    pairs = tokenizer.encode_pairs(texts, texts, max_length=9).token_ids
    assert [[index for index in row if index >= 0] for row in answer["pairs"]] == pairs
