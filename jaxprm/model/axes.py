"""What every axis of a parameter is, by name. Where such an axis lies on a mesh is decided elsewhere.

Letters as in transformer.py. Parameters under `blocks` have the axis `layers` in front of these. The heads of a matrix
and their dimensions share one axis of H * E, head by head: it may be split between heads only.
"""

from __future__ import annotations

from collections.abc import Sequence

PARAMETERS: dict[str, tuple[str, ...]] = {
    "embedding": ("vocabulary", "width"),  # [V, D]
    "unembedding": ("vocabulary", "width"),  # [V, D]
    "norm": ("vector",),  # [D]
    "head": ("vector",),  # [D], or [D, 2] of two labels
    "head_bias": ("vector",),  # [1] or [2]
    "attention_norm": ("vector",),  # [D]
    "query": ("width", "heads"),  # [D, H * E]
    "query_bias": ("heads",),  # [H * E]
    "query_norm": ("vector",),  # [E]
    "key": ("width", "kv_heads"),  # [D, K * E]
    "key_bias": ("kv_heads",),  # [K * E]
    "key_norm": ("vector",),  # [E]
    "value": ("width", "kv_heads"),  # [D, K * E]
    "value_bias": ("kv_heads",),  # [K * E]
    "output": ("heads", "width"),  # [H * E, D]
    "ffn_norm": ("vector",),  # [D]
    "gate": ("width", "ffn"),  # [D, F]
    "up": ("width", "ffn"),  # [D, F]
    "down": ("ffn", "width"),  # [F, D]
}


def parameter_axes(path: Sequence[str], ndim: int) -> tuple[str, ...] | None:
    """Axes of the parameter that a path of names ends in, as ("transformer", "blocks", "query"); None if none is.

    The path may begin with anything, so that the moments an optimizer keeps of a parameter have its axes. ndim is the
    parameter's: a head has one axis or two.
    """
    found = next((name for name in reversed(path) if name in PARAMETERS), None)
    if found is None:
        return None
    axes = PARAMETERS[found]
    if found == "head":
        axes = ("vector",) * ndim
    if path[-1] in ("a", "b"):  # the factors of an adapter
        axes = (axes[0], "rank") if path[-1] == "a" else ("rank", axes[1])
    return ("layers", *axes) if "blocks" in path else axes
