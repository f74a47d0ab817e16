"""The tensors of a Hugging Face checkpoint, and the parameters that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jaxprm.model import parameters
from jaxprm.model.config import TransformerConfig


class TensorSpec(NamedTuple):
    """A tensor of a checkpoint, and the parameter that holds it.

    name, shape: as stored by Hugging Face. path: of our parameter in the state of a Transformer or a RewardModel.
    layer: index on the first axis of that parameter; None if it is not stacked. transposed: whether our parameter is
    the transpose of the tensor: [out, in] in the checkpoint, [in, out] here. Our parameter may have one axis less: the
    head of one label is [1, D] in the checkpoint and [D] here.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None = None
    transposed: bool = False


# By our names, the tensors below "model.layers.LAYER."; the supported families share them.
LAYER_TENSORS = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
}


def tensors(config: TransformerConfig, *, reward: bool) -> Iterator[TensorSpec]:
    """Every tensor of a checkpoint in the order of the forward pass, of a causal language model or a reward model.

    A reward model has the head that `config.head` describes and no unembedding.
    """
    prefix = ("transformer",) if reward else ()
    table = parameters.EMBEDDING.shape(config)
    yield TensorSpec("model.embed_tokens.weight", table, (*prefix, "embedding"))
    # Lazy: a broken config may claim any number of layers, and the reader stops at the first missing tensor.
    for layer in range(config.layers):
        for parameter in parameters.layer_parameters(config):
            shape, transposed = parameter.shape(config), parameter.is_matrix
            yield TensorSpec(
                f"model.layers.{layer}.{LAYER_TENSORS[parameter.name]}",
                shape[::-1] if transposed else shape,
                (*prefix, "blocks", parameter.name),
                layer,
                transposed,
            )
    yield TensorSpec("model.norm.weight", parameters.NORM.shape(config), (*prefix, "norm"))
    if reward:
        yield TensorSpec("score.weight", parameters.HEAD.shape(config)[::-1], ("head",), transposed=True)
        if config.head.bias:
            yield TensorSpec("score.bias", parameters.HEAD_BIAS.shape(config), ("head_bias",))
    elif not config.tie_embeddings:
        yield TensorSpec("lm_head.weight", table, ("unembedding",))
