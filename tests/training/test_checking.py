import pytest

from lmzoo import PretrainConfig
from lmzoo.training import check_pretraining

TINY = {"vocab_size": 64, "context_length": 8, "num_layers": 1, "num_heads": 2, "model_dim": 16, "steps": 10}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"micro_batches": 2, "remat": "block", "dropout_rate": 0.1, "ema_momentum": 0.9}]
)
def test_the_step_of_a_run_compiles(changes):
    report = check_pretraining(PretrainConfig(**TINY, batch_size=16, **changes), "v5e:2x2")
    assert report.compiles, report.problem
    assert (report.replicas, report.rows) == (4, 4)
    assert 0 < report.needed_bytes < report.available_bytes
    assert report.flops >= 0.9 * report.model_flops


@pytest.mark.parametrize("objective", ["mlm", pytest.param("mlm+nsp", marks=pytest.mark.slow)])
def test_the_step_of_a_masked_lm_compiles_for_the_longer_rows(objective):
    fields = {**TINY, "context_length": 32, "seq_length": 8, "long_seq_length": 32, "batch_size": 16}
    report = check_pretraining(PretrainConfig(preset="bert-tiny", objective=objective, **fields), "v5e:2x2")
    assert report.compiles, report.problem
    assert (report.replicas, report.rows) == (4, 1)
    assert report.flops >= 0.9 * report.model_flops


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("t5-small", {"objective": "ul2", "mode_tokens": True, "micro_batches": 2}),
        pytest.param("t5-small", {"separate_documents": False, "remat": "block"}, marks=pytest.mark.slow),
        pytest.param("t5-small", {"objective": "decoder", "dropout_rate": 0.1}, marks=pytest.mark.slow),
        pytest.param("byt5-small", {"objective": "span", "num_decoder_layers": 1}, marks=pytest.mark.slow),
    ],
)
def test_the_step_of_an_encoder_with_a_decoder_compiles(preset, changes):
    fields = {**TINY, "context_length": 32, "head_dim": 8, "feedforward_dim": 32, "batch_size": 16}
    report = check_pretraining(PretrainConfig(preset=preset, **{**fields, **changes}), "v5e:2x2")
    assert report.compiles, report.problem
    assert (report.replicas, report.rows) == (4, 4)
    assert report.flops >= report.model_flops * 0.999
    if "remat" not in changes:
        assert report.flops <= report.model_flops * 1.001


def test_chips_that_cannot_share_the_batch():
    with pytest.raises(ValueError, match="batch_size is 12, but must be a multiple of 4 replicas x 2 micro-batches"):
        check_pretraining(PretrainConfig(**TINY, batch_size=12, micro_batches=2), "v5e:2x2")
