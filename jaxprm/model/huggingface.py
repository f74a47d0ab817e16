"""Hugging Face checkpoints of the Qwen2 family: read into our parameters, written from them.

Only safetensors and JSON are read; anything the transformer cannot represent is refused with the field and its value.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprm.errors import UserError
from jaxprm.model.transformer import RewardModel, Transformer, TransformerConfig

CAUSAL = "Qwen2ForCausalLM"
SEQUENCE = "Qwen2ForSequenceClassification"

# Per layer: our parameter -> Hugging Face name, and whether the matrix is stored transposed ([out, in] there).
LAYER_TENSORS = {
    "attention_norm": ("input_layernorm.weight", False),
    "query": ("self_attn.q_proj.weight", True),
    "query_bias": ("self_attn.q_proj.bias", False),
    "key": ("self_attn.k_proj.weight", True),
    "key_bias": ("self_attn.k_proj.bias", False),
    "value": ("self_attn.v_proj.weight", True),
    "value_bias": ("self_attn.v_proj.bias", False),
    "output": ("self_attn.o_proj.weight", True),
    "ffn_norm": ("post_attention_layernorm.weight", False),
    "gate": ("mlp.gate_proj.weight", True),
    "up": ("mlp.up_proj.weight", True),
    "down": ("mlp.down_proj.weight", True),
}


def read_config(directory: str | Path) -> tuple[TransformerConfig, dict]:
    """Sizes and the source's own keys. Raises UserError naming an unsupported field."""
    path = Path(directory) / "config.json"
    try:
        source = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"model {directory}: no config.json; give a directory in Hugging Face format") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(source, dict):
        raise UserError(f"{path}: must hold an object")
    _check_supported(source, path)
    rope = source.get("rope_parameters") or {}
    try:
        heads = int(source["num_attention_heads"])
        config = TransformerConfig(
            vocab_size=int(source["vocab_size"]),
            hidden_size=int(source["hidden_size"]),
            layers=int(source["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(source.get("num_key_value_heads") or heads),
            head_dim=int(source.get("head_dim") or source["hidden_size"] // heads),
            intermediate_size=int(source["intermediate_size"]),
            rope_theta=float(rope.get("rope_theta") or source.get("rope_theta") or 10_000.0),
            norm_epsilon=float(source.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(source.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise UserError(f"{path}: field {error} is missing") from None
    except ZeroDivisionError:
        raise UserError(f"{path}: num_attention_heads = 0 must be at least 1") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    return config, source


def _check_supported(source: dict, path: Path) -> None:
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    rules = [
        ("model_type", source.get("model_type"), source.get("model_type") == "qwen2", "qwen2"),
        ("hidden_act", source.get("hidden_act"), source.get("hidden_act", "silu") == "silu", "silu"),
        ("use_sliding_window", True, not source.get("use_sliding_window"), "false"),
        ("quantization_config", "...", not source.get("quantization_config"), "none"),
        ("rope type", rope_type, rope_type == "default", "default"),
    ]
    for field, value, supported, wanted in rules:
        if not supported:
            raise UserError(f"{path}: {field} = {value!r} is not supported; supported: {wanted}")


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    path = directory / "model.safetensors"
    if not path.is_file():
        raise UserError(f"model {directory}: no model.safetensors; only a single safetensors file is read")
    try:
        return {name: np.asarray(tensor, np.float32) for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _take(tensors: dict, name: str, shape: tuple[int, ...], directory: Path) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"model {directory}: tensor {name} is missing")
    tensor = tensors.pop(name)
    if tensor.shape != shape:
        raise UserError(f"model {directory}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    return tensor


def load_transformer(directory: str | Path) -> tuple[TransformerConfig, Any]:
    """(config, nnx.State of a Transformer) from a causal language model or the trunk of a reward model."""
    config, state, _ = _load(Path(directory))
    return config, state


def load_reward_model(directory: str | Path) -> tuple[TransformerConfig, Any]:
    """(config, nnx.State of a RewardModel) from a sequence classifier with one label."""
    config, trunk, head = _load(Path(directory))
    if head is None:
        raise UserError(f"model {directory}: no score.weight [1, D]; this is not a reward model with one label")
    state = nnx.State({"transformer": trunk, "head": nnx.Param(jnp.asarray(head[0]))})
    return config, state


def _load(directory: Path) -> tuple[TransformerConfig, Any, np.ndarray | None]:
    config, _ = read_config(directory)
    tensors = _read_tensors(directory)
    abstract = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    width = config.hidden_size

    def block(name: str, leaf) -> np.ndarray:
        theirs, transposed = LAYER_TENSORS[name]
        shape = leaf.shape[1:][::-1] if transposed else leaf.shape[1:]
        layers = [_take(tensors, f"model.layers.{i}.{theirs}", shape, directory) for i in range(config.layers)]
        return np.stack([layer.T if transposed else layer for layer in layers])

    state = {"blocks": {name: nnx.Param(jnp.asarray(block(name, leaf))) for name, leaf in abstract["blocks"].items()}}
    shape = (config.vocab_size, width)
    state["embedding"] = nnx.Param(jnp.asarray(_take(tensors, "model.embed_tokens.weight", shape, directory)))
    state["norm"] = nnx.Param(jnp.asarray(_take(tensors, "model.norm.weight", (width,), directory)))
    head = _take(tensors, "score.weight", (1, width), directory) if "score.weight" in tensors else None
    # A classifier has no unembedding; the transformer's is never read by a reward model.
    needed = head is None and not config.tie_embeddings
    unembedding = _take(tensors, "lm_head.weight", shape, directory) if needed or "lm_head.weight" in tensors else None
    if not config.tie_embeddings:
        state["unembedding"] = nnx.Param(jnp.zeros(shape) if unembedding is None else jnp.asarray(unembedding))
    if tensors:
        raise UserError(f"model {directory}: unknown tensor {sorted(tensors)[0]} ({len(tensors)} in all)")
    return config, nnx.State(state), head


def tensors_of(state: Any) -> dict[str, np.ndarray]:
    """A Transformer's or a RewardModel's parameters under their Hugging Face names, float32."""
    reward = "transformer" in state
    trunk = state["transformer"] if reward else state
    tensors = {
        "model.embed_tokens.weight": np.asarray(trunk["embedding"][...]),
        "model.norm.weight": np.asarray(trunk["norm"][...]),
    }
    for name, (theirs, transposed) in LAYER_TENSORS.items():
        for index, layer in enumerate(np.asarray(trunk["blocks"][name][...])):
            tensors[f"model.layers.{index}.{theirs}"] = np.ascontiguousarray(layer.T if transposed else layer)
    if reward:
        tensors["score.weight"] = np.asarray(state["head"][...])[None]
    elif "unembedding" in trunk:
        tensors["lm_head.weight"] = np.asarray(trunk["unembedding"][...])
    return tensors


def hf_config(config: TransformerConfig, *, reward: bool, pad_id: int, end_id: int, max_length: int) -> dict:
    """The config.json of a causal language model or of a regression reward model with one label."""
    common = {
        "architectures": [SEQUENCE if reward else CAUSAL],
        "model_type": "qwen2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": max_length,
        "tie_word_embeddings": config.tie_embeddings,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "pad_token_id": pad_id,
        "eos_token_id": end_id,
        "bos_token_id": None,
        "torch_dtype": "float32",
    }
    if reward:
        common |= {
            "num_labels": 1,
            "problem_type": "regression",
            "id2label": {"0": "value"},
            "label2id": {"value": 0},
        }
    return common


def write_model(directory: Path, config: TransformerConfig, state: Any, *, pad_id: int, end_id: int, max_length: int):
    """Writes config.json and model.safetensors into an existing directory."""
    from safetensors.numpy import save_file

    reward = "transformer" in state
    described = hf_config(config, reward=reward, pad_id=pad_id, end_id=end_id, max_length=max_length)
    (directory / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    save_file(tensors_of(jax.device_get(state)), directory / "model.safetensors", metadata={"format": "pt"})


def check_vocabulary(directory: str | Path, config: TransformerConfig, tokens: int) -> None:
    """Raises UserError where a tokenizer has ids that the embedding has not; JAX would read some other row."""
    if tokens > config.vocab_size:
        raise UserError(
            f"model {directory}: its tokenizer has {tokens} tokens, its embedding {config.vocab_size}; "
            "put the tokenizer it was trained with beside it"
        )


def reward_model_graph(config: TransformerConfig):
    """Static definition of a RewardModel, to be merged with its state inside jit."""
    return nnx.split(nnx.eval_shape(lambda: RewardModel(config, rngs=nnx.Rngs(0))))[0]


def transformer_graph(config: TransformerConfig):
    """Static definition of a Transformer, to be merged with its state inside jit."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]
