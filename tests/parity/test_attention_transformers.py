"""The attention that pipelines tell, against that of transformers on the same checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_encoders
import tiny_pipeline
import tiny_text_to_text

from lmzoo.pipelines import MaskFiller, TextClassifier, TextGenerator, TextToText

pytestmark = pytest.mark.parity
TEXTS = ["the cat sat on the mat", "naïve 漢字 and 😀", "a b"]


@pytest.fixture(scope="module", autouse=True)
def _installed():
    pytest.importorskip("torch")
    logging = pytest.importorskip("transformers").utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # It warns of heads that the bare model does not have.


def their_attention(directory, ids):
    """[L, N, T, T] of the only stack of a model, or of its encoder."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    stack = model.get_encoder() if model.config.is_encoder_decoder else model
    with torch.no_grad():
        layers = stack(torch.tensor([ids]), output_attentions=True).attentions
    return np.stack([layer.numpy()[0] for layer in layers])


def framed(tokenizer, text):
    return tokenizer.encode_pairs([text]).token_ids[0]


@pytest.mark.parametrize("name", ["gpt2", "bert", "classifier", "t5"])
def test_attention(name, tmp_path):
    encoder_tokenizer = tiny_encoders.tiny_tokenizer()
    pipeline, encode = {
        "gpt2": lambda: (TextGenerator(tiny_pipeline.shared_model(), tiny_pipeline.tiny_tokenizer(), 6), None),
        "bert": lambda: (MaskFiller(tiny_encoders.tiny_encoder(), encoder_tokenizer), framed),
        "classifier": lambda: (TextClassifier(tiny_encoders.task_model("single_label"), encoder_tokenizer), framed),
        "t5": lambda: (TextToText(tiny_text_to_text.tiny_t5(), tiny_text_to_text.tiny_tokenizer(), 6, "the "), None),
    }[name]()
    pipeline.model.save_pretrained(tmp_path)
    for text in TEXTS:
        if name == "t5":
            ids = [*pipeline.tokenizer.encode(f"the {text}")[: pipeline.max_length - 1], 1]
        else:
            ids = encode(pipeline.tokenizer, text) if encode else pipeline.tokenizer.encode(text)
        tokens, attention = pipeline.attention(text)
        assert len(tokens) == len(ids)
        np.testing.assert_allclose(attention, their_attention(tmp_path, ids), atol=2e-5)
        assert attention.std() > 0.01, "weights must differ, or anything would be equal"
