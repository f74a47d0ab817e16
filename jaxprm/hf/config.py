"""config.json of Hugging Face models, in the forms of transformers 4 and 5: to and from a TransformerConfig.

A config that the transformer cannot represent is refused, with the field, its value and what is supported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline import typed_json
from data_pipeline.errors import shown
from jaxprm.errors import UserError
from jaxprm.model.config import FAMILIES, Family, Head, RopeScaling, TransformerConfig

_ROPE_FIELDS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
}
# Fields of a source config that do not hold for a model made from it.
_NOT_INHERITED = {
    "_name_or_path",
    "auto_map",
    "transformers_version",
    "num_labels",
    "id2label",
    "label2id",
    "problem_type",
    "token_classification_bias",
    "classifier_dropout",
}


def read_config(directory: str | Path) -> tuple[TransformerConfig, dict]:
    """(config, all fields of config.json) of a model directory; `config.head` is meaningful for a reward model only.

    Raises UserError, with file, field, value and what is supported, for a config that cannot be represented.
    """
    path = Path(directory) / "config.json"
    source = _read(path, directory)
    fields = _Fields(source, path)
    family, architecture = _family(fields)
    _check_supported(fields, family)
    heads = fields.count("num_attention_heads")
    hidden_size = fields.count("hidden_size")
    head_dim = fields.count("head_dim", family.head_dim or hidden_size // heads)
    theta, scaling = _rope(fields)
    # The rotary embedding rotates pairs of features.
    if head_dim % 2:
        fields.refuse("head_dim", head_dim, "even sizes")
    kv_heads = fields.count("num_key_value_heads", heads)
    fields.count("max_position_embeddings", 1)  # checked here, because an export inherits it
    if heads % kv_heads:
        raise UserError(f"{path}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    config = TransformerConfig(
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        layers=fields.count("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.count("intermediate_size"),
        rope_theta=theta,
        # transformers' default, the same in all families.
        norm_epsilon=fields.number("rms_norm_eps", fields.get("rms_norm_eps", 1e-6)),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        family=family.model_type,
        rope_scaling=scaling,
        head=_head(fields, family, architecture),
    )
    return config, source


def is_reward_model(source: Mapping[str, Any]) -> bool:
    """Whether the fields of a config.json that `read_config` accepted are those of a classifier."""
    return not source["architectures"][0].endswith("ForCausalLM")


class _Fields:
    """Typed access to the fields of a config; errors name file, field and value. null counts as missing."""

    def __init__(self, source: Mapping[str, Any], path: Path):
        self.source, self.path = source, path

    def get(self, name: str, default: Any = None) -> Any:
        value = self.source.get(name)
        return default if value is None else value

    def refuse(self, name: str, value: Any, supported: str) -> NoReturn:
        raise UserError(f"{self.path}: {name} = {shown(value)} is not supported; supported: {supported}")

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number, at least 1 and below 2^31."""
        value = self.get(name, default)
        if value is None:
            raise UserError(f"{self.path}: field {name!r} is missing")
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{self.path}: {name} = {shown(value)} must be a whole number")
        if not 1 <= value < 1 << 31:
            raise UserError(f"{self.path}: {name} = {value} must be at least 1 and below 2^31")
        return value

    def number(self, name: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise UserError(f"{self.path}: {name} = {shown(value)} must be a number")
        if not 0 < value <= sys.float_info.max:  # JSON can have larger whole numbers, which float() refuses
            raise UserError(f"{self.path}: {name} = {shown(value)} must be above 0 and finite")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.path}: {name} = {shown(value)} must be true or false")
        return value


def _read(path: Path, directory: str | Path) -> dict:
    if not path.is_file():
        raise UserError(f"model {directory}: no config.json; give a directory in Hugging Face format")
    return typed_json.read(path, dict[str, Any], fix="copy or download the model's files again", error=UserError)


def _family(fields: _Fields) -> tuple[Family, str]:
    """(family, architecture); a config must name exactly one architecture."""
    model_type = fields.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        fields.refuse("model_type", model_type, ", ".join(FAMILIES))
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in family.architectures:
        supported = f"one of {', '.join(family.architectures)}"
        raise UserError(
            f"{fields.path}: architectures = {shown(architectures)} with model_type = {model_type!r} is not supported; "
            f"supported: {supported}"
        )
    return family, architectures[0]


def _check_supported(fields: _Fields, family: Family) -> None:
    checks: list[tuple[str, Callable[[Any], bool], str]] = [
        ("hidden_act", lambda value: value in (None, "silu"), "silu"),
        ("attention_bias", lambda value: not value or family.biases, "false"),
        ("mlp_bias", lambda value: not value, "false"),
        ("is_causal", lambda value: value in (None, True), "true"),
        ("quantization_config", lambda value: not value, "none: weights in float32, float16 or bfloat16"),
        ("compression_config", lambda value: not value, "none: weights in float32, float16 or bfloat16"),
        ("layer_types", _all_full, "full_attention in every layer"),
        ("use_sliding_window", lambda value: not value, "false"),
    ]
    if not family.window_switch:
        checks.append(("sliding_window", lambda value: value is None, "none"))
    for name, is_supported, supported in checks:
        value = fields.get(name)
        if not is_supported(value):
            fields.refuse(name, value, supported)


def _all_full(layer_types: Any) -> bool:
    return layer_types is None or (
        isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)
    )


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_parameters` of transformers 5 or the fields of transformers 4."""
    # A config may have both; transformers then reads rope_scaling.
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(name, {})
    if not isinstance(rope, dict):
        fields.refuse(name, rope, "an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        fields.refuse(f"{name}.rope_type", kind, "default, llama3")
    for key in rope:
        if key not in _ROPE_FIELDS:
            fields.refuse(f"{name}.{key}", rope[key], "only " + ", ".join(sorted(_ROPE_FIELDS)))
    for where, factor in ((f"{name}.", rope.get("partial_rotary_factor")), ("", fields.get("partial_rotary_factor"))):
        if factor not in (None, 1):
            fields.refuse(f"{where}partial_rotary_factor", factor, "1")
    theta, nested_theta = fields.get("rope_theta"), rope.get("rope_theta")
    if theta is not None and nested_theta is not None and theta != nested_theta:
        raise UserError(
            f"{fields.path}: rope_theta = {shown(theta)} differs from {name}.rope_theta = {shown(nested_theta)}; "
            "which is read depends on the version of transformers: make them equal"
        )
    theta = nested_theta if nested_theta is not None else theta
    # transformers' default, the same in all families.
    theta = fields.number("rope_theta", 10_000.0 if theta is None else theta)
    return theta, _llama3(fields, name, rope) if kind == "llama3" else None


def _llama3(fields: _Fields, name: str, rope: Mapping[str, Any]) -> RopeScaling:
    def number(key: str) -> float:
        if rope.get(key) is None:
            raise UserError(f"{fields.path}: field '{name}.{key}' is missing")
        return fields.number(f"{name}.{key}", rope[key])

    # The precedence of transformers: top level, then nested, then the longest position.
    length = next(
        (
            value
            for value in (
                fields.get("original_max_position_embeddings"),
                rope.get("original_max_position_embeddings"),
                fields.get("max_position_embeddings"),
            )
            if value is not None
        ),
        None,
    )
    if length is None:
        raise UserError(f"{fields.path}: field '{name}.original_max_position_embeddings' is missing")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise UserError(
            f"{fields.path}: {name}.original_max_position_embeddings = {shown(length)} must be a whole number above 0"
        )
    low, high = number("low_freq_factor"), number("high_freq_factor")
    if not high > low:
        raise UserError(f"{fields.path}: {name}.high_freq_factor = {high} must be above low_freq_factor = {low}")
    return RopeScaling(number("factor"), low, high, original_length=length)


def _head(fields: _Fields, family: Family, architecture: str) -> Head:
    """The head of a classifier; the default one for a causal language model."""
    if architecture == family.causal:
        return Head()
    names, labels = fields.get("id2label"), fields.get("num_labels")
    is_table = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    if names is not None and not (is_table and sorted(names) == [str(index) for index in range(len(names))]):
        fields.refuse("id2label", names, 'an object of texts by "0", "1", ...')
    # transformers saves a classifier of two labels, its default, without either field.
    count = len(names) if names is not None else 2 if labels is None else labels
    if labels is not None and labels != count:
        raise UserError(f"{fields.path}: num_labels = {shown(labels)} differs from the {count} labels of id2label")
    if count not in (1, 2) or isinstance(count, bool):
        fields.refuse("num_labels", count, "1, or 2 of which label 1 is the good one")
    problem = fields.get("problem_type")
    supported = "regression" if count == 1 else "single_label_classification"
    if problem not in (None, supported):
        fields.refuse("problem_type", problem, f"{supported} (or none) with {count} label{'s' * (count > 1)}")
    return Head(count, bias=architecture == family.token and fields.flag("token_classification_bias", True))


def hf_config(
    config: TransformerConfig,
    *,
    reward: bool,
    pad_id: int,
    end_id: int,
    max_length: int,
    source: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """The config.json of a causal language model or a reward model; transformers 4 and 5 read the same from it.

    A reward model is a sequence classifier, or a token classifier if its head has a bias.

    Args:
        reward: whether the model is a reward model.
        max_length: max_position_embeddings, if the source has none.
        source: config.json of the model that this one was made from; its other fields are inherited.
        dtype: of the weights in the same directory, "float32" or "bfloat16".
    """
    family, head = config.traits, config.head
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    classifier = family.token if head.bias else family.sequence
    inherited = {name: value for name, value in (source or {}).items() if name not in _NOT_INHERITED}
    fields: dict[str, Any] = {"max_position_embeddings": max_length, "attention_dropout": 0.0} | inherited
    fields |= {
        "architectures": [classifier if reward else family.causal],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        # transformers 4 reads this field and rope_scaling, transformers 5 the next one.
        "rope_theta": config.rope_theta,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        # A classifier has no unembedding, so the field means nothing there, and that of the source is inherited.
        "tie_word_embeddings": bool(inherited.get("tie_word_embeddings", config.tie_embeddings))
        if reward
        else config.tie_embeddings,
        "pad_token_id": pad_id,
        "eos_token_id": end_id,
        # transformers 4 reads the first, transformers 5 the second.
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    fields.setdefault("bos_token_id", None)
    # An inherited scaling is overwritten: where both are there, transformers reads it and not rope_parameters.
    if scaling is not None or "rope_scaling" in inherited:
        fields["rope_scaling"] = None if scaling is None else rope
    if family.window_switch:
        fields["use_sliding_window"] = False
    return fields | (_label_fields(head, source or {}) if reward else {})


def _label_fields(head: Head, source: Mapping[str, Any]) -> dict[str, Any]:
    if head.labels == 1:
        # Servers such as vLLM apply a sigmoid to a single label, unless the problem is regression.
        names, problem = {"0": "value"}, {"problem_type": "regression"}
    else:
        names, problem = source.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}, {}
    return {
        "num_labels": head.labels,
        **problem,
        "id2label": names,
        "label2id": {name: int(index) for index, name in names.items()},
    }
