"""The model families: what sets each apart, and under which names a Hugging Face checkpoint holds its tensors.

Letters: D model, H heads, K kv heads, E head dim, F ffn, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from jaxprm.model.config import FAMILIES

if TYPE_CHECKING:
    from jaxprm.model.config import TransformerConfig


class TensorSpec(NamedTuple):
    """A tensor of a checkpoint, and the parameter that holds it.

    name, shape: as stored by Hugging Face. path: of our parameter within a Transformer's or a RewardModel's state.
    layer: its index along the first axis of that parameter; None where the parameter is not stacked. transposed:
    whether ours is the transpose ([out, in] there, [in, out] here). Ours may have one axis less: a head of one label is
    [1, D] there and [D] here.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None = None
    transposed: bool = False


class _Part(NamedTuple):
    theirs: str
    shape: tuple[int, ...]  # ours
    transposed: bool = False


def _block(config: TransformerConfig) -> dict[str, _Part]:
    """The parameters of one block by our names."""
    width, ffn, head = config.hidden_size, config.intermediate_size, config.head_dim
    query, kv = config.heads * head, config.kv_heads * head
    family = FAMILIES[config.family]
    parts = {
        "attention_norm": _Part("input_layernorm.weight", (width,)),
        "query": _Part("self_attn.q_proj.weight", (width, query), True),
        "key": _Part("self_attn.k_proj.weight", (width, kv), True),
        "value": _Part("self_attn.v_proj.weight", (width, kv), True),
        "output": _Part("self_attn.o_proj.weight", (query, width), True),
        "ffn_norm": _Part("post_attention_layernorm.weight", (width,)),
        "gate": _Part("mlp.gate_proj.weight", (width, ffn), True),
        "up": _Part("mlp.up_proj.weight", (width, ffn), True),
        "down": _Part("mlp.down_proj.weight", (ffn, width), True),
    }
    if family.biases:
        parts |= {
            "query_bias": _Part("self_attn.q_proj.bias", (query,)),
            "key_bias": _Part("self_attn.k_proj.bias", (kv,)),
            "value_bias": _Part("self_attn.v_proj.bias", (kv,)),
        }
    if family.head_norms:
        parts |= {
            "query_norm": _Part("self_attn.q_norm.weight", (head,)),
            "key_norm": _Part("self_attn.k_norm.weight", (head,)),
        }
    return parts


def tensors(config: TransformerConfig, *, reward: bool) -> Iterator[TensorSpec]:
    """Every tensor of the checkpoint, in the order of the forward pass: a causal language model's or a reward model's.

    A reward model has the head that `config.head` describes and no unembedding. Lazy: a config may claim any number of
    layers before it is checked against a file.
    """
    prefix = ("transformer",) if reward else ()
    table = (config.vocab_size, config.hidden_size)
    yield TensorSpec("model.embed_tokens.weight", table, (*prefix, "embedding"))
    block = _block(config)
    for layer in range(config.layers):
        for ours, part in block.items():
            shape = part.shape[::-1] if part.transposed else part.shape
            path = (*prefix, "blocks", ours)
            yield TensorSpec(f"model.layers.{layer}.{part.theirs}", shape, path, layer, part.transposed)
    yield TensorSpec("model.norm.weight", (config.hidden_size,), (*prefix, "norm"))
    if reward:
        yield TensorSpec("score.weight", (config.head.labels, config.hidden_size), ("head",), transposed=True)
        if config.head.bias:
            yield TensorSpec("score.bias", (config.head.labels,), ("head_bias",))
    elif not config.tie_embeddings:
        yield TensorSpec("lm_head.weight", table, ("unembedding",))


def parameter_shapes(config: TransformerConfig, *, reward: bool) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of every parameter by its path, blocks stacked on a leading layer axis."""
    one_layer = {
        tensor.path: tensor.shape[::-1] if tensor.transposed else tensor.shape
        for tensor in tensors(replace(config, layers=1), reward=reward)
    }
    shapes = {path: (config.layers, *shape) if "blocks" in path else shape for path, shape in one_layer.items()}
    if reward and config.head.labels == 1:
        shapes["head",] = (config.hidden_size,)
    return shapes
