"""Heads of fine-tuning tasks against transformers itself, on configurations that nobody chose, both ways."""

from __future__ import annotations

import tempfile
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from lmzoo.models import ARCHITECTURES
from lmzoo.tasks import TASKS, EmbeddingModel, QuestionAnsweringModel, SequenceClassificationModel, load_task

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
LEAST_WIDTH = 8
KINDS = ("bert", "roberta", "distilbert", "albert", "electra", "gpt2")
# Head -> the task, the end of the class's name in transformers, and `problem_type`.
HEADS = {
    "single_label": ("sequence", "ForSequenceClassification", "single_label_classification"),
    "multi_label": ("sequence", "ForSequenceClassification", "multi_label_classification"),
    "regression": ("sequence", "ForSequenceClassification", "regression"),
    "tokens": ("tokens", "ForTokenClassification", None),
    "answers": ("answers", "ForQuestionAnswering", None),
}
SHAPE = {
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 20,
}


@pytest.fixture(scope="module", autouse=True)
def _installed():
    pytest.importorskip("torch")
    pytest.importorskip("transformers").utils.logging.disable_progress_bar()


def make_theirs(kind, head, num_labels, seed, **shape):
    """A model of transformers in evaluation mode, whose every weight, biases included, is random."""
    import transformers

    _, end, problem = HEADS[head]
    config = transformers.AutoConfig.for_model(kind, problem_type=problem, pad_token_id=1, **names_of(kind, shape))
    if head != "answers":
        config.id2label = {number: f"label {number}" for number in range(num_labels)}
        config.label2id = {label: number for number, label in config.id2label.items()}
    model = getattr(transformers, ARCHITECTURES[kind].task_heads.classes + end)(config).eval()
    return randomised(model, seed)


def randomised(model, seed):
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def names_of(kind, shape):
    """A shape in the words of a kind's config."""
    names = {}
    if kind == "distilbert":
        names = {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
        }
    if kind == "gpt2":
        names = {
            "max_position_embeddings": "n_positions",
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "hidden_act": "activation_function",
        }
    return {names.get(name, name): value for name, value in shape.items()}


def make_batch(kind, head, num_labels, seed, vocab_size, rows, length, is_padded):
    """Inputs, labels and weights; what is padded has the id of padding, which GPT-2's class in transformers reads."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, length + 1, (rows, 1)) if is_padded else np.full((rows, 1), length)
    mask = np.arange(length) < sizes
    inputs = {
        "token_ids": np.where(mask, random.integers(2, vocab_size, (rows, length)), 1).astype("int32"),
        "padding_mask": mask,
    }
    if kind in ("bert", "albert", "electra"):
        inputs["token_type_ids"] = np.sort(random.integers(0, 2, (rows, length)), axis=1).astype("int32")
    weights = np.ones(rows, "float32")
    if head == "single_label":
        labels = random.integers(0, num_labels, rows).astype("int32")
    elif head == "multi_label":
        labels = random.integers(0, 2, (rows, num_labels)).astype("float32")
    elif head == "regression":
        labels = random.normal(size=(rows, num_labels)).astype("float32")
    elif head == "tokens":
        labels = random.integers(0, num_labels, (rows, length)).astype("int32")
        weights = (mask & (random.random((rows, length)) < 0.8)).astype("float32")
        weights[:, 0] = 1
    else:
        labels = random.integers(0, sizes, (rows, 2)).astype("int32")
    return inputs, labels, weights


def reference(model, kind, head, inputs, labels, weights):
    """Logits, loss, and gradients of the table of tokens and of the output layer, as transformers has them."""
    import torch

    tensors = {name: torch.tensor(value).long() for name, value in inputs.items()}
    arguments = {"input_ids": tensors["token_ids"], "attention_mask": tensors["padding_mask"]}
    if "token_type_ids" in tensors:
        arguments["token_type_ids"] = tensors["token_type_ids"]
    model.zero_grad()
    if head == "answers":
        output = model(**arguments)
        logits = torch.stack([output.start_logits, output.end_logits], -1)
        shown = logits.masked_fill(~torch.tensor(inputs["padding_mask"]).unsqueeze(2), -1e9)
        loss = torch.nn.functional.cross_entropy(shown, torch.tensor(labels).long())
    else:
        known = np.where(weights == 0, -100, labels) if head == "tokens" else labels
        answers = torch.tensor(known)
        if head == "regression" and known.shape[1] == 1:
            answers = answers.squeeze(1)
        output = model(**arguments, labels=answers.long() if known.dtype == np.int32 else answers)
        logits, loss = output.logits, output.loss
    loss.backward()
    table = model.base_model.get_input_embeddings().weight.grad
    return {name: value.detach().numpy() for name, value in (("logits", logits), ("loss", loss), ("table", table))}


def assert_parity(ours, inputs, labels, weights, expected):
    table = ours.encoder.token_embedding.embeddings
    with tf.GradientTape() as tape:
        value, weight = ours.compute_sums(inputs, labels, weights, training=False)["loss"]
        loss = value / weight
    gradient = tf.convert_to_tensor(tape.gradient(loss, table.value)).numpy()
    gradient[1] = 0.0  # Torch leaves the row of padding out.
    expected["table"][1] = 0.0
    actual = np.asarray(ours(inputs))
    if actual.ndim == 3:
        mask = inputs["padding_mask"]
        actual, expected["logits"] = actual[mask], expected["logits"][mask]
    np.testing.assert_allclose(actual, expected["logits"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(loss, expected["loss"], rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(gradient, expected["table"], rtol=TOLERANCE, atol=TOLERANCE)


def check_from_transformers(kind, head, num_labels, seed, shape, batch):
    theirs = make_theirs(kind, head, num_labels, seed, **shape)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs.save_pretrained(directory)
        ours = load_task(directory)
    assert type(ours) is TASKS[HEADS[head][0]]
    assert ours.count_params() == theirs.num_parameters()
    if head != "answers":
        assert ours.labels == tuple(f"label {number}" for number in range(num_labels))
    if head in ("single_label", "multi_label", "regression"):
        assert ours.problem == head
    assert_parity(ours, *batch, reference(theirs, kind, head, *batch))


def make_ours(kind, head, num_labels, seed, **shape):
    import transformers

    values = transformers.AutoConfig.for_model(kind, pad_token_id=1, **names_of(kind, shape)).to_dict()
    keras.utils.set_random_seed(seed)
    model_class = ARCHITECTURES[kind]
    encoder = model_class(model_class.config_class.from_hugging_face(values), output_head=False)
    arguments = {} if head == "answers" else {"labels": [f"label {number}" for number in range(num_labels)]}
    if HEADS[head][0] == "sequence":
        arguments["problem"] = head
    with warnings.catch_warnings():  # Of a pooler that is new.
        warnings.simplefilter("ignore", UserWarning)
        model = TASKS[HEADS[head][0]](encoder, **arguments)
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign_add(random.normal(0.0, 0.2, variable.shape))
    return model


def check_to_transformers(kind, head, num_labels, seed, shape, batch):
    import transformers

    ours = make_ours(kind, head, num_labels, seed, **shape)
    auto = getattr(
        transformers,
        {
            "sequence": "AutoModelForSequenceClassification",
            "tokens": "AutoModelForTokenClassification",
            "answers": "AutoModelForQuestionAnswering",
        }[HEADS[head][0]],
    )
    with tempfile.TemporaryDirectory() as directory:
        ours.save_pretrained(directory)
        theirs, report = auto.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.num_parameters() == ours.count_params()
    if head != "answers":
        assert theirs.config.id2label == dict(enumerate(ours.labels))
        assert theirs.config.label2id == {label: number for number, label in enumerate(ours.labels)}
    assert theirs.config.problem_type == HEADS[head][2]
    assert_parity(ours, *batch, reference(theirs.eval(), kind, head, *batch))


@st.composite
def cases(draw):
    kind, head, num_heads = draw(st.sampled_from(KINDS)), draw(st.sampled_from(list(HEADS))), draw(st.integers(1, 3))
    rows, length = draw(st.integers(1, 4)), draw(st.integers(2, 10))
    num_labels = draw(st.integers(1 if head in ("multi_label", "regression") else 2, 4))
    narrowest = max(3, -(-LEAST_WIDTH // num_heads))
    shape = {
        "vocab_size": draw(st.integers(6, 60)),
        "max_position_embeddings": length + 2 + draw(st.integers(0, 9)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": num_heads,
        "hidden_size": num_heads * draw(st.integers(narrowest, 10)),
        "intermediate_size": draw(st.integers(1, 40)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu"])),
    }
    if kind in ("albert", "electra"):
        shape["embedding_size"] = draw(st.integers(LEAST_WIDTH, 20))
    seed = draw(st.integers(0, 2**31))
    batch = make_batch(kind, head, num_labels, seed, shape["vocab_size"], rows, length, draw(st.booleans()))
    return kind, head, num_labels, seed, shape, batch


DIRECTIONS = {"from": check_from_transformers, "to": check_to_transformers}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_head_of_every_architecture(kind, head, direction):
    batch = make_batch(kind, head, 3, 0, 40, 4, 9, is_padded=True)
    shape = {**SHAPE, "embedding_size": 12} if kind in ("albert", "electra") else SHAPE
    DIRECTIONS[direction](kind, head, 3, 0, shape, batch)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(max_examples=50)
@given(case=cases())
def test_random_configurations(direction, case):
    DIRECTIONS[direction](*case)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_loss_of_answers_is_transformers_own_without_padding(kind):
    import torch

    theirs = make_theirs(kind, "answers", 2, 3, **SHAPE)
    inputs, labels, weights = make_batch(kind, "answers", 2, 3, 40, 4, 9, is_padded=False)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = QuestionAnsweringModel.from_pretrained(directory)
    starts, ends = torch.tensor(labels).long().unbind(1)
    types = {"token_type_ids": torch.tensor(inputs["token_type_ids"])} if "token_type_ids" in inputs else {}
    output = theirs(torch.tensor(inputs["token_ids"]), start_positions=starts, end_positions=ends, **types)
    value, weight = ours.compute_sums(inputs, labels, weights, training=False)["loss"]
    assert float(value / weight) == pytest.approx(output.loss.item(), abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_those_of_torch(smoothing):
    """With label smoothing torch weighs the smoothed share by class, too, which is not done here."""
    import torch

    ours = make_ours("bert", "single_label", 3, 0, **SHAPE)
    inputs, labels, weights = make_batch("bert", "single_label", 3, 0, 40, 6, 9, is_padded=True)
    class_weights = None if smoothing else [1.0, 2.0, 0.5]
    ours.compile(class_weights=class_weights, label_smoothing=smoothing)
    value, weight = ours.compute_sums(inputs, labels, weights, training=False)["loss"]
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(np.asarray(ours(inputs))),
        torch.tensor(labels).long(),
        weight=None if class_weights is None else torch.tensor(class_weights),
        label_smoothing=smoothing,
    )
    assert float(value / weight) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "rates"), [("bert", {"classifier_dropout": 0.35}), ("albert", {}), ("distilbert", {})]
)
@pytest.mark.parametrize("head", ["single_label", "tokens"])
def test_dropout_of_the_head_is_theirs(kind, rates, head, tmp_path):
    import transformers

    _, end, _ = HEADS[head]
    name = ARCHITECTURES[kind].task_heads.classes + end
    config = transformers.AutoConfig.for_model(kind, **names_of(kind, {**SHAPE, **rates}))
    theirs = getattr(transformers, name)(config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_task(tmp_path / "theirs")
    assert ours.dropout.rate == theirs.dropout.p
    ours.save_pretrained(tmp_path / "ours")
    assert getattr(transformers, name).from_pretrained(tmp_path / "ours").dropout.p == theirs.dropout.p
    assert load_task(tmp_path / "ours").dropout.rate == theirs.dropout.p


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_saved_as_a_bare_encoder(kind, tmp_path):
    import torch
    import transformers

    shape = {**SHAPE, "embedding_size": 12} if kind in ("albert", "electra") else SHAPE
    ours = EmbeddingModel(make_ours(kind, "answers", 2, 0, **shape).encoder, normalize=False)
    ours.save_pretrained(tmp_path)
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    pooler = {name for name in report["missing_keys"] if "pooler" in name}
    assert not any(set(names) - pooler for names in report.values()), report
    inputs, _, _ = make_batch(kind, "answers", 2, 0, 40, 3, 9, is_padded=True)
    mask = inputs["padding_mask"]
    types = {"token_type_ids": torch.tensor(inputs["token_type_ids"])} if "token_type_ids" in inputs else {}
    arguments = {"input_ids": torch.tensor(inputs["token_ids"]), "attention_mask": torch.tensor(mask).long(), **types}
    with torch.no_grad():
        hidden = theirs.eval()(**arguments).last_hidden_state.numpy()
    expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(ours(inputs), expected, rtol=0, atol=TOLERANCE)


def test_one_output_without_a_problem_is_regression(tmp_path):
    """As transformers takes it when it computes a loss."""
    theirs = make_theirs("bert", "regression", 1, 0, **SHAPE)
    theirs.config.problem_type = None
    theirs.save_pretrained(tmp_path)
    assert SequenceClassificationModel.from_pretrained(tmp_path).problem == "regression"
