"""Around the TPU compiler: its messages, its figures, and its absence. The compiler itself runs in the slow tier."""

from __future__ import annotations

import importlib.util
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxprm.errors import UserError
from jaxprm.planning import compiling
from jaxprm.planning.compiling import argument_bytes, compile_ahead, compiled_memory, refused_memory
from jaxprm.training.flops import chip_of

GIB = 1 << 30
LIMIT = 16 * GIB


def test_outputs_that_reuse_the_memory_of_arguments_count_once():
    analysis = SimpleNamespace(
        argument_size_in_bytes=100,
        output_size_in_bytes=90,
        alias_size_in_bytes=80,
        temp_size_in_bytes=30,
        generated_code_size_in_bytes=7,
    )
    memory = compiled_memory(analysis, 150)
    assert memory.total == 100 + 10 + 30 + 7
    assert memory.fits and not compiled_memory(analysis, 146).fits


def test_the_figures_in_the_compilers_message_are_read():
    memory = refused_memory(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity "
        "by 1.75G.",
        5 * GIB,
        LIMIT,
    )
    assert (memory.total, memory.limit, memory.arguments) == (17.5 * GIB, 15.75 * GIB, 5 * GIB)
    assert memory.temporaries is None and not memory.fits


def test_the_figure_for_temporaries_is_that_of_the_program():
    """Its message of the 7B scorer on a v6e chip; on a v5p chip, with room, the same program needs 39.7 GiB in all."""
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (39.87G) exceeds "
        "available HBM (31.25G)."
    )
    memory = refused_memory(message, 26 * GIB, LIMIT)
    assert (memory.total, memory.limit, memory.temporaries) == (round(39.87 * GIB), 31.25 * GIB, None)


def test_a_refusal_without_figures_still_does_not_fit():
    assert not refused_memory("RESOURCE_EXHAUSTED: no", 1, LIMIT).fits


class Refuses:
    """A jitted function whose compilation raises."""

    def __init__(self, message: str):
        self.message = message

    def lower(self, *shapes):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_too_large_is_a_result_and_any_other_refusal_an_error():
    shape = jax.ShapeDtypeStruct((256, 4), jnp.float32, sharding=SingleDeviceSharding(jax.devices()[0]))
    compilation = compile_ahead(Refuses("RESOURCE_EXHAUSTED: Used 20G of 16G hbm"), shape, limit=LIMIT)
    assert not compilation.memory.fits and compilation.text == "" and "Used 20G" in compilation.refused
    assert compilation.memory.arguments == 4096
    with pytest.raises(UserError, match="refuses the program: INTERNAL: Mosaic"):
        compile_ahead(Refuses("INTERNAL: Mosaic failed\nmore"), shape, limit=LIMIT)


def test_a_program_for_this_machine_compiles():
    device = SingleDeviceSharding(jax.devices()[0])
    shape = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=device)
    compilation = compile_ahead(jax.jit(lambda x: x @ x.T), shape, limit=LIMIT)
    assert compilation.memory.arguments == 128 == argument_bytes([shape, None])
    assert compilation.memory.outputs == 8 * 8 * 4 and compilation.memory.fits and "ENTRY" in compilation.text


def test_without_the_compiler_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    environment = {}
    with pytest.raises(UserError, match=rf"pip install 'jax\[tpu\]=={re.escape(jax.__version__)}'"):
        compiling.prepare_environment(environment)
    assert environment == {}


def test_the_environment_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    environment = {"TPU_WORKER_HOSTNAMES": "mine"}
    compiling.prepare_environment(environment)
    assert environment["TPU_WORKER_HOSTNAMES"] == "mine" and environment["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("name", ["v9:2x2", "2x2", ""])
def test_an_unknown_generation_is_named(name):
    with pytest.raises(UserError, match="known: v4, v5e, v5p, v6e"):
        chip_of(name)
