"""reward_model.json: how a reward model was trained and how to read it. Every verb that loads a model reads it here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from data_pipeline import typed_json
from jaxprm.errors import UserError

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Length = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
_FIX = "correct the field, or copy the file again from the training output"


class _Targets(msgspec.Struct):
    discount: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    beta: float | None = None
    gae_lambda: float | None = None
    bootstrap: str | None = None
    progress_gradient: str | None = None
    target_update: str | None = None


class _Settings(msgspec.Struct):
    trainable: str = "full"


class _Fingerprints(msgspec.Struct):
    tokenizer: str = ""


class TurnLengths(msgspec.Struct, frozen=True):
    """Tokens of the turns of one role in the training data: `most` for 99 of 100."""

    median: _Count
    most: _Count


class TurnTokenCounts(msgspec.Struct, frozen=True):
    """Lengths of the turns that a model was trained on."""

    action: TurnLengths
    observation: TurnLengths


class _Recipe(msgspec.Struct):
    """The fields that some code of this package reads; all may be missing, and files may have others."""

    format: Literal["jaxprm-reward-model"] = "jaxprm-reward-model"
    version: Literal[1] = 1
    label: str | None = None
    objective: str | None = None
    objective_text: str | None = None
    read_position: str | None = None
    base: str | None = None
    seed: int | None = None
    max_tokens: _Length | None = None
    reasoning: Literal["keep", "drop"] = "keep"
    special_tokens: Literal["error", "break"] = "error"
    steps: _Count | None = None
    unfinished: bool = False
    value_range: tuple[float, float] | None = None
    targets: _Targets = msgspec.field(default_factory=_Targets)
    config: _Settings = msgspec.field(default_factory=_Settings)
    fingerprints: _Fingerprints = msgspec.field(default_factory=_Fingerprints)
    turn_tokens: TurnTokenCounts | None = None
    trained_on: dict[str, float | None] | None = None
    validation: dict[str, Any] | None = None
    results: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        # msgspec turns a ValueError raised here into a ValidationError.
        if self.value_range is not None and not all(map(math.isfinite, self.value_range)):
            raise ValueError(f"value_range {list(self.value_range)} is not finite")
        for name in ("label", "base"):
            if not (getattr(self, name) or "").isprintable():
                raise ValueError(f"{name} has characters that cannot be printed")


def read(path: Path) -> dict[str, Any]:
    """The fields of a reward_model.json, those of this package checked. Raises UserError for any other content."""
    recipe = typed_json.read(path, dict[str, Any], fix=_FIX, error=UserError)
    typed_json.convert(recipe, _Recipe, where=str(path), fix=_FIX, error=UserError)
    # A later reader looks for a field that is missing, not for null.
    return {name: value for name, value in recipe.items() if value is not None or name not in _Recipe.__struct_fields__}
