"""Reading and writing Qwen2 checkpoints: equal to the torch models of transformers, and strict about their content."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxprm.errors import UserError
from jaxprm.hf import reader, writer
from jaxprm.model.config import TransformerConfig
from jaxprm.model.transformer import rotary_tables, transformer_graph
from tests.model import tiny

# With JAX's threads running too, several torch threads wait for each other longer than they work.
torch.set_num_threads(1)
RNG = np.random.default_rng(7)
TOKENS = RNG.integers(4, tiny.CONFIG.vocab_size, size=(3, 23))
TOKENS[:, -1] = 1


def write(directory, state, config=tiny.CONFIG):
    writer.write_model(directory, config, state, pad_id=0, end_id=1, max_length=512)
    return directory


def logits(state, tokens, config) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def forward(state):
        model = nnx.merge(transformer_graph(config), state)
        return model.logits(model(tokens, positions, np.ones_like(tokens)).hidden)

    return np.asarray(forward(state))


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """A new torch model has biases of zero and norms of one; random ones show if two are swapped."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def torch_config(**extra) -> transformers.Qwen2Config:
    return transformers.Qwen2Config(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        rope_theta=1000.0,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        **extra,
    )


@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.UNTIED], ids=["tied", "untied"])
def test_a_written_language_model_has_the_same_logits_in_torch(tmp_path, config):
    state = tiny.transformer(config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(write(tmp_path, state, config), dtype=torch.float32)
    assert type(theirs) is transformers.Qwen2ForCausalLM
    with torch.no_grad():
        reference = theirs.eval()(torch.tensor(TOKENS)).logits.numpy()
    assert reference.std() > 0.3
    tiny.assert_close(logits(state, TOKENS, config), reference)


def test_a_written_reward_model_has_the_same_value_in_torch_at_every_length(tmp_path):
    state = tiny.reward_model()
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(write(tmp_path, state)).eval()
    assert type(theirs) is transformers.Qwen2ForSequenceClassification
    ours = tiny.values(state, TOKENS)
    assert ours.std() > 0.3
    with torch.no_grad():
        reference = np.stack(
            [theirs(torch.tensor(TOKENS[:, : end + 1])).logits[:, 0].numpy() for end in range(TOKENS.shape[1])], axis=1
        )
    tiny.assert_close(ours, reference)


def test_long_conversations_do_not_drift_from_torch(tmp_path):
    """A rotary frequency that is one rounding off makes a difference after some hundred tokens."""
    state = tiny.reward_model()
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(write(tmp_path, state)).eval()
    tokens = np.random.default_rng(0).integers(4, tiny.CONFIG.vocab_size, size=(2, 900))
    with torch.no_grad():
        reference = theirs.score(theirs.model(torch.tensor(tokens)).last_hidden_state)[..., 0].numpy()
    tiny.assert_close(tiny.values(state, tokens), reference)


@pytest.mark.parametrize(("theta", "head_dim"), [(500.0, 12), (1e4, 32), (1e6, 64)])
def test_rotary_tables_have_torchs_frequencies(theta, head_dim):
    cos, sin = rotary_tables(np.array([[1]]), head_dim, theta)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    angles = (1.0 / theta**exponents).numpy().astype(np.float64)
    np.testing.assert_allclose(np.arctan2(np.float64(sin), np.float64(cos))[0, 0], angles, rtol=0, atol=1e-7)
    cos, sin = rotary_tables(np.array([[4096]]), head_dim, theta)
    np.testing.assert_allclose(np.float64(cos)[0, 0], np.cos(np.float32(4096 * angles)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_language_model_written_by_torch_has_the_same_logits(tmp_path, tie):
    theirs = randomise(transformers.Qwen2ForCausalLM(torch_config(tie_word_embeddings=tie)))
    theirs.save_pretrained(tmp_path)
    config, state = reader.load_transformer(tmp_path)
    assert (config.rope_theta, config.norm_epsilon, config.tie_embeddings) == (1000.0, 1e-5, tie)
    tokens = TOKENS % 200
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens)).logits.numpy()
    tiny.assert_close(logits(state, tokens, config), reference)


def test_a_classifier_written_by_torch_has_the_same_values(tmp_path):
    theirs = randomise(transformers.Qwen2ForSequenceClassification(torch_config(num_labels=1)))
    theirs.save_pretrained(tmp_path)
    config, state = reader.load_reward_model(tmp_path)
    tokens = TOKENS % 199 + 1
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens)).logits[:, 0].numpy()
    tiny.assert_close(tiny.values(state, tokens, config=config)[:, -1], reference)


def test_reading_what_was_written_gives_the_same_bits_and_config(tmp_path):
    state = tiny.reward_model(tiny.UNTIED)
    config, read = reader.load_reward_model(write(tmp_path, state, tiny.UNTIED))
    # A classifier has no unembedding; everything else is read back.
    assert config == tiny.CONFIG
    del state["transformer"]["unembedding"]
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(read), nnx.to_pure_dict(state))


def test_the_backbone_of_a_reward_model_can_be_loaded_alone(tmp_path):
    state = tiny.reward_model()
    write(tmp_path, state)
    with pytest.raises(UserError, match="is a reward model; give a language model"):
        reader.load_transformer(tmp_path)
    _, backbone = reader.load_transformer(tmp_path, unembedding=False)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(backbone), nnx.to_pure_dict(state["transformer"]))


def test_weights_stored_in_half_precision_are_read_as_float32(tmp_path):
    theirs = transformers.Qwen2ForCausalLM(torch_config(tie_word_embeddings=True)).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    _, state = reader.load_transformer(tmp_path)
    assert state["embedding"][...].dtype == np.float32
    np.testing.assert_array_equal(state["embedding"][...], theirs.model.embed_tokens.weight.detach().float().numpy())


def test_a_v4_config_is_read_like_a_v5_one(tmp_path):
    write(tmp_path, tiny.transformer())
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_parameters"]
    path.write_text(json.dumps(fields | {"rope_scaling": None}))
    assert reader.read_config(tmp_path)[0] == tiny.CONFIG


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"num_attention_heads": 0}, "heads = 0 must be at least 1"),
        ({"num_attention_heads": 0, "head_dim": None}, "heads = 0 must be at least 1"),
        ({"vocab_size": "many"}, "many"),
    ],
)
def test_a_config_that_cannot_be_represented_is_refused_by_field(tmp_path, change, named):
    write(tmp_path, tiny.transformer())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=named) as caught:
        reader.read_config(tmp_path)
    assert "\n" not in str(caught.value)


def write_broken(tmp_path, change, config=tiny.CONFIG, state=None):
    write(tmp_path, tiny.transformer() if state is None else state, config)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"), r"layers.1.self_attn.k_proj.bias is"),
        (lambda tensors: tensors.update({"model.norm.weight": np.ones(3)}), r"shape \[3\], expected \[40\]"),
        (lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": np.ones((56, 40))}), "unknown"),
    ],
)
def test_missing_misshapen_and_unknown_tensors_are_refused_by_name(tmp_path, change, named):
    write_broken(tmp_path, change)
    with pytest.raises(UserError, match=named):
        reader.load_transformer(tmp_path)


def test_an_untied_language_model_without_its_unembedding_is_refused(tmp_path):
    write_broken(tmp_path, lambda tensors: tensors.pop("lm_head.weight"), tiny.UNTIED, tiny.transformer(tiny.UNTIED))
    with pytest.raises(UserError, match=r"lm_head\.weight is missing"):
        reader.load_transformer(tmp_path)


def test_a_language_model_is_no_reward_model(tmp_path):
    write(tmp_path, tiny.transformer())
    with pytest.raises(UserError, match=r"score\.weight"):
        reader.load_reward_model(tmp_path)


def test_missing_and_torn_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no config.json"):
        reader.load_transformer(tmp_path)
    write(tmp_path, tiny.transformer())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UserError, match="cannot be read"):
        reader.load_transformer(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"no model.safetensors"):
        reader.load_transformer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        reader.load_transformer(tmp_path)


@pytest.mark.parametrize("sizes", [{"heads": 4, "kv_heads": 3}, {"head_dim": 7}, {"kv_heads": 0}, {"layers": 0}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(UserError):
        TransformerConfig(**(dataclasses.asdict(tiny.CONFIG) | sizes))
