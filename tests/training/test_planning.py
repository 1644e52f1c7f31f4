import importlib.util
import math
import shlex
from pathlib import Path

import pytest

from lmzoo.engine.optimizers import OPTIMIZERS, make_optimizer
from lmzoo.models import find_preset
from lmzoo.training.memory import count_variables, parse_bytes, step_memory
from lmzoo.training.planning import PEAK_FLOPS, PlanConfig, _most, plan

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "plan_memory.py"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_variables_are_those_that_training_makes(optimizer):
    model_class, shape = find_preset("gpt2-micro")
    shape = shape.replace(num_layers=2)
    counted = count_variables(model_class, shape, optimizer=optimizer)
    model = model_class(shape)
    made = make_optimizer(optimizer, 1e-3)
    made.build(model.trainable_variables)

    def size(variables):
        return sum(variable.numpy().nbytes for variable in variables)

    assert counted.parameters == model.count_params() == shape.count_params()
    assert counted.weights == size(model.weights)
    assert counted.optimizer_state == size(made.variables)
    assert counted.largest == model.token_embedding.embeddings.numpy().nbytes
    kernels = [variable for variable in model.trainable_variables if variable.path.endswith("kernel")]
    assert counted.kernels * 4 == size(kernels)


@pytest.mark.parametrize("preset", ["gpt2-nano", "bert-tiny", "albert-base-v1"])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("dropout_rate", [0.0, 0.1])
def test_what_a_block_keeps_is_what_its_backward_pass_reads(preset, dtype, dropout_rate):
    """Reads the graph of a step: every tensor of the forward pass that the backward pass takes, each buffer once."""
    model_class, shape = find_preset(preset)
    rows, tokens, size = 3, 40, 4 if dtype == "float32" else 2
    # Widths that are no multiple of one another, so that no tensor is taken for another.
    fields = {"num_layers": 2, "num_heads": 5, "model_dim": 35, "feedforward_dim": 111, "vocab_size": 97}
    shape = shape.replace(**fields, context_length=tokens, dropout_rate=dropout_rate)
    one, two = (_read_backward(model_class, shape.replace(num_layers=n), dtype, rows, tokens) for n in (1, 2))
    per_token = 2 * 3 * 4 * rows * tokens  # Mean, deviation and a product of each layer norm, a number a token.
    kernels = size * (35 * 3 * 35 + 35 * 35 + 2 * 35 * 111) if size == 2 else 0
    planned = shape.activation_bytes(rows, tokens, size).block
    assert two - one - per_token - kernels == pytest.approx(planned, abs=64)


def _read_backward(model_class, shape, dtype, rows, tokens):
    """Bytes of the forward pass's tensors that the backward pass reads; views of one buffer count once."""
    import tensorflow as tf

    model = model_class(shape, dtype=dtype)
    model.compile()
    boundary = []

    @tf.function(autograph=False)
    def step(ids):
        with tf.GradientTape() as tape:
            total, weight = model.compute_sums(ids, ids, tf.ones_like(ids, "float32"), True)["loss"]
            loss = total / weight
        boundary.append(len(tf.compat.v1.get_default_graph().get_operations()))
        return tape.gradient(loss, [variable.value for variable in model.trainable_variables])

    operations = step.get_concrete_function(tf.TensorSpec([rows, tokens], tf.int32)).graph.get_operations()
    forward = {operation.name for operation in operations[: boundary[0]]}
    buffers = {}
    for operation in operations[boundary[0] :]:
        for tensor in operation.inputs:
            if operation.type == "Shape":
                continue
            fused = operation.type == "BatchMatMulV2"  # It takes keys as they are: the transposition is optimized away.
            while tensor.op.type in ("Reshape", "Identity", "ExpandDims", "Unpack") or (
                fused and tensor.op.type == "Transpose" and tensor.op.inputs[0].op.type == "Unpack"
            ):
                tensor = tensor.op.inputs[0]
            if tensor.op.name in forward and tensor.op.type not in ("Const", "ReadVariableOp", "Placeholder", "Shape"):
                buffers[tensor.name] = tensor.shape.num_elements() * tensor.dtype.size
    return sum(buffers.values())


def test_memory_grows_with_rows_and_shrinks_with_remat():
    model_class, shape = find_preset("gpt2-micro")
    variables = count_variables(model_class, shape)
    one, two, remat = (
        step_memory(shape, variables, rows=rows, remat=remat) for rows, remat in ((8, 0), (16, 0), (8, 1))
    )
    assert two.total > 1.7 * one.total
    assert remat.total < 0.5 * one.total
    assert one.total == sum(
        (one.weights, one.optimizer_state, one.gradients, one.activations, one.working, one.allocator)
    )
    assert step_memory(shape, variables, rows=1, accumulates=True).total > step_memory(shape, variables, rows=1).total


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    made = plan(preset="gpt2-micro", memory="4GB", dtype="float32")
    limit = 4e9
    for remat, rows in ((False, made.rows_without_remat), (True, made.rows_with_remat)):
        options = {"remat": remat, "accumulates": made.batch.micro_batches > 1}
        sizes = [step_memory(made.shape, made.variables, rows=rows + more, **options).total for more in (0, 1)]
        assert sizes[0] <= limit < sizes[1]
    assert made.rows_with_remat > 2 * made.rows_without_remat > 0


def test_the_search_finds_every_limit():
    assert [_most(lambda rows, limit=limit: rows <= limit) for limit in range(70)] == list(range(70))


def test_the_batch_is_about_what_was_asked_for():
    made = plan(preset="gpt2-micro", strategy="mirrored", devices=8, memory="6GB", batch_tokens=2**19)
    tokens = made.batch.global_batch * made.row_tokens
    assert tokens == pytest.approx(2**19, rel=0.1)
    assert made.batch.replicas == 8
    assert made.memory.total <= 6e9
    fixed = plan(preset="gpt2-nano", memory="24GB", micro_batch=2, batch_tokens=2048)
    assert (fixed.batch.rows, fixed.batch.micro_batches) == (2, 4)


def test_time_and_tokens():
    made = plan(
        preset="gpt2-nano",
        strategy="mirrored",
        devices=4,
        accelerator="a100",
        mfu=0.5,
        remat="none",
        batch_tokens=2**13,
    )
    flops = made.shape.training_flops_per_token(256)
    assert made.tokens == 20 * made.variables.parameters
    assert made.tokens_per_second == pytest.approx(4 * 0.5 * PEAK_FLOPS["a100"] / flops)
    assert made.steps == math.ceil(made.tokens / (made.batch.global_batch * 256))
    assert made.seconds == pytest.approx(made.tokens / made.tokens_per_second, rel=0.01)
    recomputing = plan(made.config, remat="block")
    assert recomputing.tokens_per_second == pytest.approx(0.75 * made.tokens_per_second)
    assert "50% of the peak of a100" in str(made)
    assert plan(made.config, peak_flops=1e12).tokens_per_second == pytest.approx(4 * 0.5 * 1e12 / flops)


def test_the_command_is_one_that_pretraining_takes():
    tyro = pytest.importorskip("tyro")
    from lmzoo.training import PretrainConfig

    made = plan(preset="gpt2-micro", seq_length=256, num_layers=3, memory="2GB", remat="block", batch_tokens=2**16)
    program, verb, *words = shlex.split(made.command)
    assert (program, verb) == ("lmzoo", "pretrain")
    config = tyro.cli(PretrainConfig, args=words)
    assert config.batch_size == made.batch.global_batch
    assert config.micro_batches == made.batch.micro_batches > 1
    assert (config.steps, config.remat, config.context_length, config.num_layers) == (made.steps, "block", 256, 3)
    assert made.command in str(made)


def test_two_phases_are_planned_for_the_longer_rows():
    tyro = pytest.importorskip("tyro")
    from lmzoo.training import PretrainConfig
    from lmzoo.training.phases import make_phases

    fields = {"preset": "bert-mini", "memory": "4GB", "batch_tokens": 2**14}
    long, short = plan(**fields, seq_length=512), plan(**fields, seq_length=128)
    made = plan(**fields, seq_length=128, long_seq_length=512)
    assert made.memory == long.memory
    assert made.memory.total > short.memory.total
    assert made.flops_per_token == pytest.approx(0.9 * short.flops_per_token + 0.1 * long.flops_per_token)
    config = tyro.cli(PretrainConfig, args=shlex.split(made.command)[2:])
    first, second = make_phases(config, config.context_length, 1)
    assert (first.seq_length, second.seq_length) == (128, 512)
    assert first.step_tokens == second.step_tokens == pytest.approx(2**14, rel=0.1)
    assert "rows of 512 tokens in 10% of the steps, of 128 before" in str(made)


def test_a_decoder_has_rows_of_its_own():
    tyro = pytest.importorskip("tyro")
    from lmzoo.training import PretrainConfig

    made = plan(preset="t5-small", memory="24GB", batch_tokens=2**16)
    assert made.lengths == (512, 114)  # Raffel et al. 2020
    assert "rows of 512 + 114 tokens" in str(made)
    tokens = made.batch.global_batch * made.row_tokens
    assert tokens == pytest.approx(2**16, rel=0.1)
    assert made.steps == math.ceil(made.tokens / tokens)
    assert made.flops_per_token == made.shape.training_flops_per_token(512, 114)
    assert made.activations_of_a_row < plan(made.config, objective="prefix").activations_of_a_row
    fields = {"num_decoder_layers": 2, "head_dim": 32, "feedforward_dim": 512, "noise_density": 0.3}
    other = plan(made.config, objective="span", mean_span_length=8.0, **fields)
    assert other.lengths[1] > 114
    config = tyro.cli(PretrainConfig, args=shlex.split(other.command)[2:])
    assert {name: getattr(config, name) for name in fields} == fields
    assert (config.objective, config.mean_span_length, config.batch_size) == ("span", 8.0, other.batch.global_batch)
    assert plan(preset="byt5-small", memory="80GB").lengths == (512, 95)  # Of 597 bytes, 90 in 4 spans.


def test_another_vocabulary_keeps_the_ids_that_it_has():
    shape = plan(preset="roberta-base", vocab_size=1000, memory="80GB", remat="none").shape
    assert (shape.vocab_size, shape.pad_token_id, shape.eos_token_id) == (1000, 1, 2)
    assert plan(preset="gpt2", vocab_size=1000).shape.eos_token_id is None


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much():
    with pytest.raises(ValueError, match=r"gpt2-xl does not fit: with 1 row of 1,024 tokens .* more than its 24 GB"):
        plan(preset="gpt2-xl", memory="24GB")
    assert plan(preset="gpt2-micro", memory="350MB").remat
    assert not plan(preset="gpt2-micro", memory="2GB").remat
    with pytest.raises(ValueError, match="Try remat='block', a smaller micro_batch"):
        plan(preset="gpt2-micro", memory="8GB", micro_batch=64, remat="none")


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GB", 80e9), ("80GiB", 80 * 2**30), ("1.5 gb", 1.5e9), ("512MB", 512e6), ("16G", 16e9), ("1000000", 1e6)],
)
def test_sizes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["lots", "80XB", "-1GB", "0GB", "", "1.2.3GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="must be a number above 0 and a unit"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"devices": 0}, "devices is 0"),
        ({"devices": 2}, "strategy 'one' has one"),
        ({"mfu": 1.5}, r"mfu is 1.5, but must lie in \(0, 1\]"),
        ({"tokens": -1.0}, "tokens is -1.0"),
        ({"long_seq_length": 512}, "long_seq_length is 512, but seq_length is None: give a shorter one"),
        ({"long_seq_length": 128, "seq_length": 128}, "long_seq_length is 128, but seq_length is 128"),
        ({"long_share": 0.0}, r"long_share is 0.0, but must lie in"),
        ({"memory": "80 apples"}, "memory is '80 apples'"),
        ({"accelerator": "h10"}, "Did you mean 'h100'"),
    ],
)
def test_settings_that_are_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(**fields)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "gpt2-micro", "rows": 16, "remat": True},
        {"preset": "gpt2-micro", "rows": 8, "dtype": "mixed_bfloat16", "optimizer": "adafactor"},
    ],
    ids=["remat", "mixed"],
)
def test_planned_memory_is_what_a_process_takes(settings, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    spec = importlib.util.spec_from_file_location("plan_memory", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    figures = benchmark.compare({**settings, "steps": 3})
    assert figures["planned"] == pytest.approx(figures["measured"], rel=0.15)
