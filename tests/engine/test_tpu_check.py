"""A training step as a TPU would get it: what it holds, whether it compiles, what it needs."""

from __future__ import annotations

import importlib.util
import os
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import SEQ2SEQ
from tiny_models import LENGTH, VOCABULARY, TokenModel, flat_weights, token_data

from lmzoo.engine import tpu_check
from lmzoo.engine.optimizers import OPTIMIZERS, make_optimizer
from lmzoo.engine.tpu_check import check_on_tpu, host_ops, matmul_flops, replicas_of
from lmzoo.engine.tpu_report import GIB, Memory, TPUReport

# An interpreter that has jax and libtpu, where this one has not.
TPU_PYTHON = os.environ.get("LMZOO_TPU_PYTHON")
has_libtpu = TPU_PYTHON or all(importlib.util.find_spec(name) for name in ("jax", "libtpu"))
needs_libtpu = pytest.mark.skipif(not has_libtpu, reason="needs the extra tpu-check")

# Embedding 8 wide, then 8 x 16 and 16 x 11 weights: forward, and twice backward, 2 each, for each token.
FLOPS_PER_TOKEN = 6 * (8 * 16 + 16 * VOCABULARY)


class Odd(TokenModel):
    """A model with one more op, given as a function of the hidden states and of the ids, in its loss."""

    def __init__(self, extra=None):
        super().__init__()
        self.extra = extra

    def compute_sums(self, inputs, labels, weights, training):
        sums = super().compute_sums(inputs, labels, weights, training)
        value, weight = sums["loss"]
        return {**sums, "loss": (value + 0.0 * self.extra(self(inputs), inputs), weight)}


ODD = {
    "RandomUniform": (lambda hidden, ids: tf.random.uniform([]), "state of its own"),
    "RandomShuffle": (lambda hidden, ids: tf.reduce_sum(tf.random.shuffle(hidden)), "state of its own"),
    "StringLength": (
        lambda hidden, ids: tf.reduce_sum(tf.cast(tf.strings.length(tf.fill([2], "a")), "float32")),
        "strings",
    ),
    "Where": (lambda hidden, ids: tf.cast(tf.reduce_sum(tf.where(ids > 2)), "float32"), "only the data tells"),
    "GatherV2": (lambda hidden, ids: tf.reduce_sum(tf.boolean_mask(hidden, ids > 2)), "only the data tells"),
    "EagerPyFunc": (lambda hidden, ids: tf.py_function(lambda: 1.0, [], tf.float32), "Python"),
    "NumericalPython": (lambda hidden, ids: tf.numpy_function(lambda: np.float32(1.0), [], tf.float32), "Python"),
}


def compiled(model=None, optimizer="adamw", micro_batches=1, **settings):
    model = TokenModel() if model is None else model
    model.compile(make_optimizer(optimizer, 0.01, **settings), micro_batches=micro_batches)
    return model


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_holds_nothing_that_a_tpu_cannot_run(name, micro_batches):
    model = compiled(TokenModel(dropout_rate=0.1), name, micro_batches, ema_momentum=0.9)
    assert host_ops(model, token_data(8)) == []


def test_the_step_of_a_language_model_holds_nothing_that_a_tpu_cannot_run(make_model, architecture):
    both = {"generator_size": 1.0} if architecture == "electra" else {}
    model = make_model(dtype="mixed_bfloat16", dropout_rate=0.1, **both)
    model.compile(micro_batches=2)
    tokens = tf.TensorSpec([4, 12], tf.int32)
    inputs = dict.fromkeys(("token_ids", "segment_ids", "positions"), tokens)
    if architecture in SEQ2SEQ:
        inputs |= dict.fromkeys(("decoder_token_ids", "decoder_segment_ids", "decoder_positions"), tokens)
    assert host_ops(model, (inputs, tokens, tf.TensorSpec([4, 12], tf.float32))) == []


@pytest.mark.parametrize("kind", ODD)
def test_what_a_tpu_cannot_run_is_named(kind):
    extra, reason = ODD[kind]
    found = host_ops(compiled(Odd(extra)), token_data(8))
    assert any(reason in fault for fault in found), found
    if kind != "NumericalPython":
        assert any(fault.startswith(f"{kind} ") for fault in found), found


def test_what_a_tpu_cannot_run_is_found_inside_a_branch_of_a_loop():
    def extra(hidden, ids):
        draw = lambda total: total + tf.cond(total > 0.0, lambda: tf.random.normal([]), lambda: 0.0)  # noqa: E731
        return tf.while_loop(lambda total: total < 1.0, lambda total: [draw(total)], [tf.constant(0.5)])[0]

    (fault,) = host_ops(compiled(Odd(extra)), token_data(8))
    assert fault.startswith("RandomStandardNormal ")
    assert "cond_true" in fault


def test_a_step_compiles_for_the_host_and_changes_nothing():
    model = compiled()
    before = flat_weights(model)
    rows = 16
    report = check_on_tpu(model, token_data(rows), "v5e:2x2", model_flops=FLOPS_PER_TOKEN * rows * LENGTH, python=None)
    if not has_libtpu or TPU_PYTHON:
        assert report.compiler == "XLA for the host"
    assert report.compiles
    assert report.problem is None
    assert (report.replicas, report.rows) == (4, 4)
    assert report.flops == FLOPS_PER_TOKEN * 4 * LENGTH == report.model_flops
    np.testing.assert_array_equal(flat_weights(model), before)
    assert model.optimizer.iterations == 0


def test_memory_counts_weights_and_optimizer_once():
    """With 800 rows of 4 wide, arguments are mostly variables: weights and two moments, updated in place."""
    model = compiled()
    specs = [tf.TensorSpec([4, LENGTH], dtype) for dtype in (tf.int32, tf.int32, tf.float32)]
    memory = check_on_tpu(model, specs).memory
    trained = 3 * 4 * sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    assert trained <= memory.aliased <= trained + 400
    assert memory.arguments - memory.aliased == pytest.approx(3 * 4 * LENGTH * 1, abs=200)
    assert memory.outputs - memory.aliased < 400
    assert memory.total == memory.arguments + memory.outputs - memory.aliased + memory.temporaries + memory.code


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_flops_of_a_loop_count_as_often_as_it_goes_round(micro_batches):
    report = check_on_tpu(compiled(micro_batches=micro_batches), token_data(32))
    assert report.flops == FLOPS_PER_TOKEN * 8 * LENGTH


def test_flops_of_branches_and_of_loops_without_a_number():
    square, product = tf.TensorSpec([8, 8]), 2.0 * 8**3

    def lowered(function):
        return tf.function(function, jit_compile=True).experimental_get_compiler_ir(square)(stage="hlo_serialized")

    def branch(x):
        return tf.cond(tf.reduce_sum(x) > 0, lambda: x @ x @ x, lambda: x @ x)

    def endless(x):
        return tf.while_loop(lambda x: tf.reduce_sum(x) > 0, lambda x: [x @ x], [x])[0]

    assert matmul_flops(lowered(branch)) == 2 * product
    assert np.isnan(matmul_flops(lowered(endless)))


def test_the_op_that_cannot_be_compiled_is_named_in_one_line():
    report = check_on_tpu(compiled(Odd(ODD["EagerPyFunc"][0])), token_data(8), python=None)
    assert not report.compiles
    assert report.fits is None
    assert report.problem.startswith("no kernel for a TPU: EagerPyFunc 'EagerPyFunc'")
    assert "\n" not in report.problem
    assert "compiles          no" in str(report)
    assert report.problem in str(report)


def test_a_replica_knows_the_others():
    """One all-reduce of each gradient over the eight cores of a v3:2x2; dropout that depends on which core it is."""
    model = compiled(TokenModel(dropout_rate=0.1))
    step, leaves = tpu_check._traceable(model, tpu_check._share(token_data(16), 8, 1), 8)
    text = step.experimental_get_compiler_ir(*leaves)(stage="hlo")
    sums = re.findall(r"f32\[[\d,]*\][^\n]* all-reduce\([^\n]*replica_groups=\{\{0,1,2,3,4,5,6,7\}\}", text)
    assert len(sums) == len(model.trainable_variables) + 2
    assert " replica-id(" in text


@pytest.mark.parametrize(
    ("topology", "replicas"), [("v5e:2x2", 4), ("v3:2x2", 8), ("v5p:2x2x1", 4), ("v6e:4x8", 32), ("v5e:1x1", 1)]
)
def test_replicas_of_a_topology(topology, replicas):
    assert replicas_of(topology) == replicas


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:2*2", "2x2", ""])
def test_a_topology_that_is_none(topology):
    with pytest.raises(ValueError, match=r"topology must be a generation .*v5e.* but is "):
        check_on_tpu(compiled(), token_data(8), topology)


def test_batches_that_no_tpu_takes():
    spec = [tf.TensorSpec([None, LENGTH], dtype) for dtype in (tf.int32, tf.int32, tf.float32)]
    with pytest.raises(ValueError, match=r"one known shape, but this one has \(None, 4\).*drop_remainder"):
        check_on_tpu(compiled(), spec)
    with pytest.raises(ValueError, match="12 rows must be a multiple of 8 = 4 replicas x 2 micro-batches"):
        check_on_tpu(compiled(micro_batches=2), token_data(12))


def test_an_error_of_the_model_is_not_one_of_the_compiler():
    def extra(hidden, ids):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        check_on_tpu(compiled(Odd(extra)), token_data(8))


def test_an_interpreter_without_a_compiler(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named jax' >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"did not start with .*It needs jax and libtpu; it said:\nNo module named"):
        check_on_tpu(compiled(), token_data(8), python=str(python))


@pytest.mark.parametrize(
    ("answer", "compiles", "fits", "problem"),
    [
        (
            '{"compiler": "libtpu 1", "error": "program", "seconds": 1, "message": "RESOURCE_EXHAUSTED: HLO '
            'temporaries (55.96G) exceeds available HBM (15.75G).\\nSee x"}',
            True,
            False,
            "RESOURCE_EXHAUSTED: HLO temporaries (55.96G) exceeds available HBM (15.75G).",
        ),
        (
            '{"compiler": "libtpu 1", "error": "program", "message": "\\nINTERNAL: no.\\nmore"}',
            False,
            None,
            "INTERNAL: no.",
        ),
        (
            '{"compiler": "libtpu 1", "seconds": 1, "memory": {"arguments": 9, "outputs": 8, "aliased": 7, '
            '"temporaries": 5, "code": 3}}',
            True,
            True,
            None,
        ),
    ],
)
def test_what_the_compiler_of_a_tpu_answers(tmp_path, answer, compiles, fits, problem):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ntest -s "$2" && test "$3" = v5e:2x2 && cat > "$4" <<\'E\'\n{answer}\nE\n')
    python.chmod(0o755)
    report = check_on_tpu(compiled(), token_data(8), python=str(python))
    assert (report.compiles, report.fits, report.problem) == (compiles, fits, problem)
    if fits is False:
        assert report.needed_bytes == int(55.96 * GIB)
        assert "55.96 GiB of 15.75 GiB: does not fit" in str(report)


def test_a_compiler_that_dies(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -11 $$\n")
    python.chmod(0o755)
    report = check_on_tpu(compiled(), token_data(8), python=str(python))
    assert not report.compiles
    assert report.problem == "the compiler died of signal 11."


def test_the_hosts_compiler_does_not_promise_that_a_tpu_has_room():
    shape = {"topology": "v5e:2x2", "replicas": 4, "rows": 1, "micro_batches": 1, "seconds": 1.0, "problem": None}
    rest = {"compiles": True, "available_bytes": 100, "flops": 1.0, "model_flops": None}
    small = Memory(arguments=60, outputs=50, aliased=50, temporaries=30, code=0)
    large = Memory(arguments=101, outputs=50, aliased=50, temporaries=0, code=0)
    fits = {
        (memory.arguments, compiler): TPUReport(
            **shape, **rest, compiler=compiler, memory=memory, needed_bytes=memory.total
        ).fits
        for memory in (small, large)
        for compiler in ("libtpu 1", "XLA for the host")
    }
    assert fits == {
        (60, "libtpu 1"): True,
        (60, "XLA for the host"): None,
        (101, "libtpu 1"): False,
        (101, "XLA for the host"): False,
    }


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_libtpu_compiles_the_step_of_every_optimizer(name):
    keras.utils.set_random_seed(0)
    model = compiled(TokenModel(dropout_rate=0.1), name, 2, ema_momentum=0.9)
    report = check_on_tpu(model, token_data(16), python=TPU_PYTHON)
    assert report.compiler.startswith("libtpu ")
    assert report.problem is None
    assert report.compiles
    assert report.fits
    assert report.memory.aliased > 0.8 * report.memory.arguments


@needs_libtpu
@pytest.mark.slow
def test_libtpu_says_how_much_too_large_a_step_is():
    """40,000,000 rows a replica, 16 wide inside, do not fit."""
    batch = [tf.TensorSpec([160_000_000, LENGTH], dtype) for dtype in (tf.int32, tf.int32, tf.float32)]
    report = check_on_tpu(compiled(), batch, python=TPU_PYTHON)
    assert report.compiles
    assert report.fits is False
    assert report.needed_bytes > report.available_bytes


@needs_libtpu
@pytest.mark.slow
def test_a_topology_that_libtpu_does_not_have():
    with pytest.raises(ValueError, match=r"topology 'v5e:3x3' is none that libtpu .* knows"):
        check_on_tpu(compiled(), token_data(9), "v5e:3x3", python=TPU_PYTHON)
