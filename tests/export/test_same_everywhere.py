"""Any strings give the same in a process with TensorFlow alone as in the pipeline, scores included."""

import numpy as np
import pytest
import tensorflow as tf
from bundle import run_elsewhere
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import task_model, tiny_encoder
from tiny_encoders import tiny_tokenizer as encoder_tokenizer
from tiny_pipeline import shared_model, tiny_tokenizer
from tiny_text_to_text import tiny_t5
from tiny_text_to_text import tiny_tokenizer as t5_tokenizer

from lmzoo.pipelines import MaskFiller, TextClassifier, TextGenerator, TextToText

pytestmark = pytest.mark.slow

NUM_STRINGS = 200
STRINGS = st.one_of(st.text(max_size=40), st.text("the cat \n漢😀é", max_size=60), st.text("x", max_size=300))
PIPELINES = {
    "generator": lambda: TextGenerator(shared_model(), tiny_tokenizer(), 8, temperature=0),
    "classifier": lambda: TextClassifier(task_model("single_label"), encoder_tokenizer()),
    "filler": lambda: MaskFiller(tiny_encoder(), encoder_tokenizer(), 3),
    "t5": lambda: TextToText(tiny_t5(), t5_tokenizer(), 8, num_beams=2),
}


@pytest.fixture(scope="module")
def strings():
    """As many different strings as there are to be, the same in each run."""
    found = {}

    @settings(max_examples=2 * NUM_STRINGS, database=None)
    @given(STRINGS)
    def collect(text):
        found[text] = None

    collect()
    return list(found)[:NUM_STRINGS]


@pytest.mark.parametrize("name", PIPELINES)
def test_any_strings_give_the_same_in_a_process_of_its_own(name, strings, tmp_path):
    pipeline = PIPELINES[name]()
    texts = [f"{text} [MASK]" for text in strings] if name == "filler" else strings
    assert len(set(texts)) == NUM_STRINGS
    expected = pipeline._signatures()["serving_default"](tf.constant(texts))
    (served,) = run_elsewhere([(pipeline.export(tmp_path), "serving_default", {"text": texts})])
    assert set(served) == set(expected)
    for output, value in expected.items():
        values = value.numpy()
        if value.dtype == tf.string:
            assert np.array(served[output]).tolist() == np.char.decode(values.astype(bytes), "utf-8").tolist()
        else:
            np.testing.assert_allclose(served[output], values, atol=1e-5)
