"""The roofline of a step by hand, and against a published run."""

import pytest

from jaxprm import config as config_lib
from jaxprm.planning.models import MODELS
from jaxprm.planning.plan import estimate_step_time
from jaxprm.training.flops import CHIPS, Chip, Efficiency, train_step_flops

CHIP = Chip(flops=100.0, hbm=10.0, interconnect=5.0, source="here", efficiency=Efficiency(0.5, 0.8, "there"))
STEP = {"model_flops": 800.0, "computed_flops": 1000.0, "memory_bytes": 20.0, "sent_bytes": 5.0, "tokens": 60}


def test_the_largest_of_the_three_binds():
    time = estimate_step_time(CHIP, 2, **STEP)
    assert (time.compute_seconds, time.memory_seconds, time.interconnect_seconds) == (5.0, 2.0, 1.0)
    assert (time.binds, time.bound_seconds, time.bound_tokens_per_second_per_chip) == ("compute", 5.0, 6.0)
    assert estimate_step_time(CHIP, 2, **STEP | {"memory_bytes": 200.0}).binds == "memory"
    assert estimate_step_time(CHIP, 2, **STEP | {"sent_bytes": 200.0}).binds == "interconnect"


def test_the_expectation_uses_the_lowest_efficiency():
    time = estimate_step_time(CHIP, 2, **STEP)
    assert time.expected
    assert (time.step_seconds, time.best_seconds) == (8.0, 5.0)  # 400 FLOPs at half of 100, and at 0.8
    assert (time.tokens_per_second_per_chip, time.mfu) == (3.75, 0.5)


def test_nothing_is_expected_to_be_faster_than_its_bound():
    time = estimate_step_time(CHIP, 2, **STEP | {"sent_bytes": 100.0})
    assert time.step_seconds == time.best_seconds == time.bound_seconds == 20.0
    assert time.mfu == pytest.approx(0.2)


def test_without_a_published_run_the_expectation_is_the_bound():
    time = estimate_step_time(Chip(100.0, 10.0, 5.0, "here"), 2, **STEP)
    assert not time.expected
    assert time.step_seconds == time.bound_seconds == 5.0


def test_the_efficiency_predicts_the_run_it_was_published_for():
    """tpu-recipes, v6e-8: Llama 3.1 8B, three rows of 8192 tokens a chip, 3.443 s and 7,139 tokens/s/chip.

    The published run trains an unembedding too, which a reward model does not have.
    """
    data = config_lib.DataConfig(rows=24, length=8192, steps_per_row=1)
    flops = train_step_flops(MODELS["llama-3.1-8b"], config_lib.RewardModelConfig(label="x"), data, "splash")
    unembedding = 6 * 24 * 8192 * 4096 * 128_256
    time = estimate_step_time(
        CHIPS["v6e"],
        8,
        model_flops=flops.model + unembedding,
        computed_flops=0.0,
        memory_bytes=0.0,
        sent_bytes=1.0,
        tokens=24 * 8192,
    )
    assert time.tokens_per_second_per_chip == pytest.approx(7139, rel=0.01)
    assert time.step_seconds == pytest.approx(3.443, rel=0.01)


@pytest.mark.parametrize("name", CHIPS)
def test_every_figure_has_its_source(name):
    chip = CHIPS[name]
    assert "/" in chip.source
    assert chip.efficiency is None or (0 < chip.efficiency.low <= chip.efficiency.high < 1 and chip.efficiency.source)
