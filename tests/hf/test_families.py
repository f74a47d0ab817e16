"""Every family against its torch model in transformers: equal logits and values, read and written back."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import AbstractMesh

from jaxprm.hf import reader, writer
from jaxprm.hf.config import read_config
from jaxprm.hf.names import LAYER_TENSORS, tensors
from jaxprm.model import sharding
from jaxprm.model.config import FAMILIES, Family, Head, RopeScaling
from jaxprm.model.parameters import PARAMETERS, parameter_shapes
from jaxprm.model.transformer import RewardModel, Transformer, reward_model_graph, rotary_frequencies, transformer_graph
from tests.model import tiny

# With JAX's threads running too, several torch threads wait for each other longer than they work.
torch.set_num_threads(1)
VOCABULARY, LENGTHS = 211, (29, 17, 5)
RNG = np.random.default_rng(3)
TOKENS = RNG.integers(1, VOCABULARY, size=(len(LENGTHS), max(LENGTHS)))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Unusual sizes: seven query heads per kv head, head_dim not hidden_size / heads, no two axes of equal size.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 42,
    "num_hidden_layers": 3,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "intermediate_size": 52,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "use_cache": False,
}
CASES = {
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "rope_theta": 1000.0}),
    "qwen2-untied": ("Qwen2", {"tie_word_embeddings": False, "rope_parameters": LLAMA3, "num_key_value_heads": 7}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True, "rope_theta": 1000.0}),
    "qwen3-untied": ("Qwen3", {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-untied": ("Llama", {"tie_word_embeddings": False, "rope_theta": 1000.0}),
}


def torch_model(case: str, kind: str = "CausalLM", **extra) -> torch.nn.Module:
    """A small random model in which every tensor matters and scores vary."""
    name, fields = CASES[case]
    config = getattr(transformers, f"{name}Config")(**SIZES | fields | extra)
    model = getattr(transformers, f"{name}For{kind}")(config).float().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            else:
                scale = 0.7 if "embed" in name or "lm_head" in name else parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        if kind != "CausalLM":
            model.score.weight *= 4
    return model


def as_version_4(directory) -> None:
    """Rewrites config.json with the keys of transformers 4."""
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    fields["torch_dtype"] = fields.pop("dtype")
    path.write_text(json.dumps(fields))


def padded_logits(model: torch.nn.Module) -> np.ndarray:
    """[B, T, ...] of rows of several lengths, padded on the right; `real` removes the values of padding."""
    mask = torch.arange(TOKENS.shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        tokens = torch.tensor(TOKENS) * mask
        hidden = model.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return (model.lm_head if hasattr(model, "lm_head") else model.score)(hidden).float().numpy()


def real(values: np.ndarray) -> np.ndarray:
    """The values of tokens that are not padding."""
    return np.concatenate([row[:length] for row, length in zip(values, LENGTHS, strict=True)])


@jax.jit(static_argnames=("graph", "dtype"))
def _outputs(graph, state, positions, segments, dtype):
    model = nnx.merge(graph, state)
    backbone = getattr(model, "transformer", model)
    hidden = backbone(TOKENS, positions, segments, dtype=dtype).hidden
    return model.logits(hidden) if backbone is model else model.value(hidden)


def our_outputs(config, state, *, reward=False, positions=None, segments=None, dtype=jnp.float32) -> np.ndarray:
    """Logits [B, T, V] of a language model, or values [B, T] of a reward model."""
    graph = (reward_model_graph if reward else transformer_graph)(config)
    own_positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
    own_segments = (np.arange(TOKENS.shape[1]) < np.array(LENGTHS)[:, None]).astype(np.int32)
    positions, segments = (a if b is None else b for a, b in ((own_positions, positions), (own_segments, segments)))
    return np.asarray(_outputs(graph, state, positions, segments, dtype))


def some_slow(cases, fast) -> list:
    """Parameters for pytest, slow unless they are in `fast`."""
    split = lambda case: case if isinstance(case, tuple) else (case,)
    return [case if case in fast else pytest.param(*split(case), marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("case", "version"),
    some_slow(
        [(case, version) for case in CASES for version in (4, 5)],
        fast=[("qwen2-untied", 5), ("qwen3-tied", 4), ("qwen3-untied", 5), ("llama-tied", 4)],
    ),
)
def test_language_models_have_torchs_logits_and_are_written_back(tmp_path, case, version):
    theirs = torch_model(case)
    theirs.save_pretrained(tmp_path / "in")
    if version == 4:
        as_version_4(tmp_path / "in")
    reference = real(padded_logits(theirs))
    assert reference.std() > 0.3
    config, state = reader.load_transformer(tmp_path / "in")
    assert config.tie_embeddings == ("untied" not in case)
    np.testing.assert_allclose(real(our_outputs(config, state)), reference, atol=1e-4)
    _, source = read_config(tmp_path / "in")
    (tmp_path / "out").mkdir()
    writer.write_model(tmp_path / "out", config, state, pad_id=0, end_id=1, max_length=7, source=source)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(again) is type(theirs)
    np.testing.assert_array_equal(real(padded_logits(again)), reference)
    if version == 4:  # transformers 4 does not know rope_parameters
        fields = json.loads((tmp_path / "out/config.json").read_text())
        del fields["rope_parameters"], fields["dtype"]
        (tmp_path / "out/config.json").write_text(json.dumps(fields))
        assert read_config(tmp_path / "out")[0] == config


SEQUENCE, TOKEN = "SequenceClassification", "TokenClassification"


@pytest.mark.parametrize(
    ("case", "kind", "labels"),
    some_slow(
        [(case, kind, labels) for case in CASES for kind in (SEQUENCE, TOKEN) for labels in (1, 2)],
        fast=[("qwen2-tied", TOKEN, 2), ("qwen3-untied", SEQUENCE, 1), ("llama-tied", TOKEN, 1)],
    ),
)
def test_reward_models_have_torchs_values_and_are_written_back(tmp_path, case, kind, labels):
    theirs = torch_model(case, kind, num_labels=labels)
    theirs.save_pretrained(tmp_path / "in")
    if labels == 2:
        as_version_4(tmp_path / "in")
    logits = real(padded_logits(theirs))
    values = logits[:, 0] if labels == 1 else torch.tensor(logits).softmax(-1)[:, 1].numpy()
    assert values.std() > 0.3
    config, state = reader.load_reward_model(tmp_path / "in")
    assert config.head == Head(labels, bias=kind == TOKEN)
    np.testing.assert_allclose(real(our_outputs(config, state, reward=True)), values, atol=1e-4)
    (tmp_path / "out").mkdir()
    source = read_config(tmp_path / "in")[1]
    writer.write_model(tmp_path / "out", config, state, pad_id=0, end_id=1, max_length=7, source=source)
    again = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(again) is type(theirs)
    np.testing.assert_array_equal(real(padded_logits(again)), logits)


def test_the_output_of_a_sequence_classifier_is_the_value_of_the_last_token(tmp_path):
    theirs = torch_model("qwen3-tied", SEQUENCE, num_labels=1)
    theirs.save_pretrained(tmp_path)
    mask = torch.arange(TOKENS.shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        outputs = theirs(input_ids=torch.tensor(TOKENS) * mask, attention_mask=mask.long()).logits[:, 0].numpy()
    config, state = reader.load_reward_model(tmp_path)
    values = our_outputs(config, state, reward=True)
    last = [row[length - 1] for row, length in zip(values, LENGTHS, strict=True)]
    np.testing.assert_allclose(last, outputs, atol=1e-4)


@pytest.mark.parametrize("case", ["qwen2-untied", "qwen3-untied", "llama-tied"])
def test_any_wrong_tensor_mask_or_position_changes_the_logits(tmp_path, case):
    """The logits compared above within 1e-4 change by more than 1e-2 for any single mistake."""
    torch_model(case).save_pretrained(tmp_path)
    config, state = reader.load_transformer(tmp_path)
    right = real(our_outputs(config, state))
    for path, parameter in nnx.to_flat_state(state):
        broken = np.array(parameter[...])
        if path[0] == "blocks":
            broken[1] = np.roll(broken[1], 1, axis=-1)
        else:
            broken = np.roll(broken, 1, axis=-1)
        wrong = nnx.from_flat_state(
            [(p, nnx.Param(jnp.asarray(broken)) if p == path else q) for p, q in nnx.to_flat_state(state)]
        )
        assert np.abs(real(our_outputs(config, wrong)) - right).max() > 1e-2, path
    positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape).copy()
    positions[:, 3] += 1
    assert np.abs(real(our_outputs(config, state, positions=positions)) - right).max() > 1e-2
    segments = np.ones_like(TOKENS)
    segments[:, :2] = 2
    assert np.abs(real(our_outputs(config, state, segments=segments)) - right).max() > 1e-2


@pytest.mark.parametrize("case", some_slow(["qwen2-tied", "qwen3-untied", "llama-untied"], fast=["qwen3-untied"]))
def test_bfloat16_weights_are_kept_bit_for_bit(tmp_path, case):
    theirs = torch_model(case).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    config, state = reader.load_transformer(tmp_path, dtype=jnp.bfloat16)
    table = theirs.model.embed_tokens.weight.detach().view(torch.int16).numpy()
    np.testing.assert_array_equal(np.asarray(state["embedding"][...]).view(np.int16), table)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16)}
    # Loaded again: a model that is cast casts its rotary frequencies too.
    load = transformers.AutoModelForCausalLM.from_pretrained
    exact = real(padded_logits(load(tmp_path, dtype=torch.float32).eval()))
    np.testing.assert_allclose(real(our_outputs(config, state)), exact, atol=1e-4)
    # Computed in bfloat16 as well, eight bits of every product: a few per cent of the logits' spread, as in torch.
    ours, torchs = (
        np.sqrt(np.mean((rounded - exact) ** 2)) / exact.std()
        for rounded in (
            real(our_outputs(config, state, dtype=jnp.bfloat16)),
            real(padded_logits(load(tmp_path, dtype=torch.bfloat16).eval())),
        )
    )
    assert ours < max(1.5 * torchs, 0.02) and torchs < 0.1


@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_every_stored_precision_is_read_in_the_wanted_one(tmp_path, stored, wanted):
    theirs = torch_model("qwen2-untied").to(stored)
    theirs.save_pretrained(tmp_path)
    _, state = reader.load_transformer(tmp_path, dtype=wanted)
    layer = theirs.model.layers[2].mlp.down_proj.weight.detach().float().numpy().T
    expected = jnp.asarray(layer).astype(wanted)
    assert state["blocks"]["down"][...].dtype == wanted
    np.testing.assert_array_equal(np.asarray(state["blocks"]["down"][2], np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 8192), RopeScaling(32.0, 1.0, 4.0, 16)])
@pytest.mark.parametrize(("theta", "head_dim"), [(5e5, 128), (5e5, 64), (1e6, 128), (500.0, 10)])
def test_rotary_frequencies_are_torchs(theta, head_dim, scaling):
    """Bit for bit but for one in sixty-four: torch's vectorised powers differ by a rounding from CPU to CPU."""
    rope = {"rope_theta": theta, "rope_type": "default"}
    if scaling is not None:
        rope |= LLAMA3 | {
            "rope_theta": theta,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    config = transformers.LlamaConfig(**SIZES | {"head_dim": head_dim, "rope_parameters": rope})
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    ours = rotary_frequencies(head_dim, theta, scaling)
    assert ours.dtype == np.float32
    np.testing.assert_array_max_ulp(ours, theirs, maxulp=2)
    assert np.sum(ours != theirs) <= head_dim / 128


@pytest.mark.parametrize("kind", ["CausalLM", SEQUENCE])
def test_a_family_with_known_traits_is_one_record(tmp_path, monkeypatch, kind):
    """Mistral without its window has Llama's layer: registered, it is read, computed and written like the others."""
    monkeypatch.setitem(FAMILIES, "mistral", Family("mistral", "Mistral"))
    monkeypatch.setitem(CASES, "mistral", ("Mistral", {"tie_word_embeddings": False, "rope_theta": 1000.0}))
    theirs = torch_model("mistral", kind, sliding_window=None, **({} if kind == "CausalLM" else {"num_labels": 1}))
    theirs.save_pretrained(tmp_path / "in")
    reference = real(padded_logits(theirs))
    reward = kind != "CausalLM"
    config, state = (reader.load_reward_model if reward else reader.load_transformer)(tmp_path / "in")
    outputs = real(our_outputs(config, state, reward=reward))
    np.testing.assert_allclose(outputs, reference[:, 0] if reward else reference, atol=1e-4)
    mesh = AbstractMesh((1, 2, 1, 1), sharding.AXES)
    placed = sharding.with_shardings(mesh, reader.abstract(config, reward=reward))
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    (tmp_path / "out").mkdir()
    source = read_config(tmp_path / "in")[1]
    writer.write_model(tmp_path / "out", config, state, pad_id=0, end_id=1, max_length=7, source=source)
    again = type(theirs).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    np.testing.assert_array_equal(real(padded_logits(again)), reference)


def test_traits_combine_freely(monkeypatch):
    monkeypatch.setitem(FAMILIES, "both", Family("both", "Both", biases=True, head_norms=True))
    config = tiny.dataclasses.replace(tiny.UNTIED, family="both")
    modules = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))))
    shapes = {path: leaf.shape for path, leaf in modules}
    assert shapes == parameter_shapes(config, reward=False)
    assert shapes["blocks", "query_norm"] == (3, 12) and shapes["blocks", "value_bias"] == (3, 24)
    assert {spec.path for spec in tensors(config, reward=False)} == set(shapes)


def test_every_parameter_of_a_layer_has_a_tensor_name():
    layers = {name for name in PARAMETERS if name not in ("embedding", "unembedding", "norm", "head", "head_bias")}
    assert layers == set(LAYER_TENSORS) and len(set(LAYER_TENSORS.values())) == len(layers)


@pytest.mark.parametrize("head", [Head(), Head(1, bias=True), Head(2), Head(2, bias=True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_has_the_parameters_of_the_modules(family, head):
    config = tiny.dataclasses.replace(tiny.UNTIED, family=family, head=head)
    for reward, kind in ((False, Transformer), (True, RewardModel)):
        expected = nnx.state(nnx.eval_shape(lambda kind=kind: kind(config, rngs=nnx.Rngs(0))))
        if reward:
            del expected["transformer"]["unembedding"]
        expected = {path: leaf.shape for path, leaf in nnx.to_flat_state(expected)}
        assert parameter_shapes(config, reward=reward) == expected
        abstract = reader.abstract(config, reward=reward)
        assert {path: leaf.shape for path, leaf in nnx.to_flat_state(abstract)} == expected
