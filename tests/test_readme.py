"""What the README shows must run, and what it says of sizes must be so."""

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from lmzoo import BertModel, GPTConfig, GPTModel, Tokenizer, pretrain

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_first_block_is_the_two_commands():
    block = re.search(r"```bash\n(.*?)```", README, re.DOTALL)[1]
    commands = [line.split("#")[0].strip() for line in block.splitlines()]
    assert commands == ["pip install -e . && python examples/quickstart.py", "pip install -e '.[test]' && pytest"]


def test_the_table_of_presets_is_true():
    rows = re.findall(
        r"^\| `([\w-]+)` \| ([\d,]+) \| (\d+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", README, re.M
    )
    assert [row[0] for row in rows] == list(GPTConfig.PRESETS)
    for name, *numbers in rows:
        config = GPTConfig.preset(name)
        assert [int(number.replace(",", "")) for number in numbers] == [
            config.count_params(),
            config.num_layers,
            config.num_heads,
            config.model_dim,
            config.context_length,
            config.vocab_size,
        ]


@pytest.mark.slow
def test_the_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("A sentence for a model that is made in no time. " * 200)
    Path("more.txt").write_text("Another one, so that something can be held out. " * 20)
    tiny = {"context_length": 48, "num_layers": 1, "num_heads": 2, "model_dim": 16}
    pretrain(directory=Path("runs/books"), source=("*.txt",), vocab_size=300, steps=2, batch_size=2, **tiny)
    tokenizer = Tokenizer.train(["text.txt"], kind="wordpiece", vocab_size=100)
    BertModel.from_preset("bert-tiny", vocab_size=tokenizer.vocab_size, **tiny).save_pretrained("runs/bert")
    tokenizer.save_pretrained("runs/bert")
    Path("reviews.csv").write_text("text,label\n" + "a sentence,good\nno time at all,bad\n" * 20)
    original = GPTModel.from_preset.__func__
    monkeypatch.setattr(GPTModel, "from_preset", classmethod(lambda cls, name: original(cls, name, **tiny)))

    tokens = np.random.default_rng(0).integers(0, 50257, (4, 17)).astype("int32")
    namespace = {"dataset": tf.data.Dataset.from_tensors((tokens[:, :-1], tokens[:, 1:]))}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(
            block.replace("max_new_tokens=32", "max_new_tokens=8").replace(
                "top_k=40)", "top_k=40, max_new_tokens=8)", 1
            )
            if "TextGenerator" in block
            else block.replace("max_new_tokens=32", "max_new_tokens=8"),
            namespace,
        )
    assert Path("checkpoint/model.safetensors").is_file()
    for name in ("books", "reviews"):
        assert Path(f"saved_models/{name}/1/saved_model.pb").is_file()
