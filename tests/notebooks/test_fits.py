"""The notebook's arithmetic, compared with the shapes of the model, the optimizers and the adapters."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from jaxprm import config as config_lib
from jaxprm.model import transformer
from jaxprm.model.config import TransformerConfig
from jaxprm.training import optimizer, trainable
from jaxprm.training.step import initial_state
from notebooks import colab, fits

QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
}
OTHERS = [
    {
        "model_type": "qwen3",
        "vocab_size": 500,
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 384,
    },
    {
        "model_type": "llama",
        "vocab_size": 700,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
    },
]
# Peak memory of the train step, from libtpu's compiler: of QWEN on v5e:1x1, rows 8, length 2048, microbatches 2.
COMPILED = {"lora": 3.90e9, "adafactor": 7.15e9, "adamw": 11.10e9}


def abstract(config: dict) -> tuple[TransformerConfig, nnx.State]:
    """The shapes of the reward model of a config.json."""
    heads = config["num_attention_heads"]
    sizes = TransformerConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim", config["hidden_size"] // heads),
        intermediate_size=config["intermediate_size"],
        rope_theta=1e4,
        family=config["model_type"],
    )
    return sizes, jax.eval_shape(lambda: nnx.state(transformer.RewardModel(sizes, rngs=nnx.Rngs(0))))


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def needs(config: dict, train: str) -> fits.Needs:
    return fits.needs(config, train=train, rows=8, length=2048, microbatches=2, export_bytes=2)


@pytest.mark.parametrize("config", [QWEN, *OTHERS], ids=lambda config: config["model_type"])
def test_counts_of_parameters_and_adapters_match_the_model(config):
    _, parameters = abstract(config)
    assert fits.parameters(config) == count(parameters)
    settings = config_lib.RewardModelConfig(label="a", trainable="lora")
    trained, _ = jax.eval_shape(lambda params: trainable.split(settings, params, jax.random.key(0)), parameters)
    assert needs(config, "lora").trained == count(trained)


@pytest.mark.parametrize("train", fits.OVERRIDES)
def test_a_checkpoint_is_as_large_as_the_training_state(train):
    _, parameters = abstract(QWEN)
    options = dict(override.split("=") for override in fits.OVERRIDES[train])
    settings = config_lib.RewardModelConfig(label="a", **options)
    if train == "lora":
        parameters, _ = jax.eval_shape(lambda params: trainable.split(settings, params, jax.random.key(0)), parameters)
    update = optimizer.make_optimizer(
        learning_rate=1e-4, steps=10, warmup_steps=1, weight_decay=0.0, clip=1.0, optimizer=settings.optimizer
    )
    state = jax.eval_shape(lambda params: initial_state(params, update, settings), parameters)
    assert needs(QWEN, train).checkpoint == pytest.approx(4 * count(state), rel=0.01)


@pytest.mark.parametrize("train, peak", COMPILED.items())
def test_the_estimate_of_the_chip_bounds_the_compilers_peak(train, peak):
    assert peak < sum(needs(QWEN, train).chip.values()) < 1.15 * peak


def test_settings_that_do_not_fit_are_rejected_with_a_fix():
    fits.check(needs(QWEN, "lora"), disk=15e9)
    fits.check(needs(QWEN, "adafactor"), disk=15e9)
    with pytest.raises(colab.Stop, match=r"the disk of WORKDIR has 15.0 GB, and this needs about 20.7: .*TRAIN lora"):
        fits.check(needs(QWEN, "adamw"), disk=15e9)
    large = QWEN | {"hidden_size": 2048, "num_hidden_layers": 36, "intermediate_size": 11008}
    with pytest.raises(colab.Stop, match="the chip has 16.9 GB, .*a smaller LENGTH or MODEL"):
        fits.check(needs(large, "lora"), disk=1e12)
    with pytest.raises(colab.Stop, match="the host's memory has 8.0 GB, .* needs about 8.9: .*"):
        fits.check(needs(QWEN, "adamw"), disk=1e12, host=8e9)


def test_the_table_has_every_need_in_gigabytes():
    lines = fits.table(needs(QWEN, "adamw")).splitlines()
    assert lines[0] == "494 M parameters, 494.0 M trained; GB:"
    shown = {line[:36].strip(): float(line[36:]) for line in lines[1:]}
    assert shown["optimizer"] == 3.95 and shown["checkpoint"] == 5.93 and shown["disk, at most"] == 20.75
    parts = [size for line, size in shown.items() if line in needs(QWEN, "adamw").chip]
    assert shown["chip, of 16.9"] == pytest.approx(sum(parts), abs=0.04)


def test_files_of_the_run_count_as_free_space(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    (tmp_path / "c").write_bytes(b"678")
    assert fits.used(tmp_path) == 8


@pytest.mark.parametrize("model_type", ["mistral", None])
def test_a_family_that_is_not_read_stops_the_notebook_with_one_line(model_type):
    with pytest.raises(colab.Stop, match=rf"MODEL: model_type {model_type!r} is not supported; use one of qwen2, "):
        fits.parameters({"num_attention_heads": 4, "hidden_size": 64, "model_type": model_type})
