"""README.md of an exported reward model: what it is, how to call it, what was checked, and its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from data_pipeline import typed_json
from jaxprm.errors import UserError
from jaxprm.objectives import OBJECTIVES
from jaxprm.scoring.loading import predicts_outcomes
from jaxprm.search.methods import SEARCHES

# The words for each search. Searches from outside the package come with a run's results.
_METHODS = {kind: method.card for kind, method in SEARCHES.items() if method.card} | {"best_of_n": "best of {}"}

_FIX = "run `report` in the work directory again"


class _Estimate(msgspec.Struct):
    """A mean with its interval over n units; all null where it is not defined."""

    n: float
    mean: float | None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.mean is not None and (self.low is None or self.high is None):
            raise ValueError("a mean needs its interval, low and high")


class _CustomSearch(msgspec.Struct):
    card: str | None = None

    def __post_init__(self) -> None:
        # str.format would look up other names between braces.
        if set("{}") & set((self.card or "").replace("{}", "")):
            raise ValueError("card may have braces only as {}, in place of the size")


class _Provenance(msgspec.Struct):
    seeds: list[int] | None = None


class _Results(msgspec.Struct):
    """The parts of results.json that the card shows."""

    policy: dict[str, _Estimate]
    methods: dict[str, dict[str, Any]]
    name: str | None = None
    provenance: _Provenance = msgspec.field(default_factory=_Provenance)
    searches: dict[str, _CustomSearch] = {}


def model_card(
    recipe: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    verified: Mapping[str, Any] | None,
) -> str:
    """The text of the card.

    Args:
        recipe, config, tokenizer: reward_model.json, config.json and tokenizer_config.json of the export.
        verified: what `jaxprm.export.verify.verify` returned, or None without verification.
    """
    label = recipe.get("label", "reward model")
    sections = [
        _front_matter(recipe, config),
        f"# {label}: a process reward model for agents\n\n"
        "For every action (assistant turn) of a conversation it predicts the **promise**: "
        f"{_promise_text(recipe, config)}. "
        "**Progress** is the difference between an action's promise and the one before. "
        f"{_progress_note(recipe)}",
        "\n".join(["## What it is", "", *_facts(recipe, config, tokenizer)]),
        "\n\n".join(["## How to call it", *_usage(config)]),
        "\n".join(["## What was checked", "", _checked(verified, config)]),
    ]
    if results := recipe.get("results"):
        sections.append("\n".join(["## Results", "", *_results_table(results)]))
    if validation := list(_flat_numbers(recipe.get("validation") or {})):
        rows = [f"| {name} | {value:.4g} |" for name, value in validation]
        sections.append("\n".join(["## On validation trajectories", "", "| | value |", "|---|---|", *rows]))
    return "\n\n".join(sections) + "\n"


def run_results(model: Path, label: str | None) -> dict[str, Any] | None:
    """The part of a run's results.json that the card of its reward model shows; None for a model outside a run.

    label: the label of the reward model.
    """
    # WORKDIR/reward_models/LABEL/seed-N/model
    parents = model.absolute().parents
    path = parents[3] / "results.json" if len(parents) > 3 else Path()
    if len(parents) <= 3 or parents[2].name != "reward_models" or not path.is_file():
        return None
    results = typed_json.read(path, dict[str, Any], fix=_FIX, error=UserError)
    check_results(results, str(path))
    methods = {name: results["methods"][name] for name in (label, "random") if name in results["methods"]}
    if label not in methods:
        return None
    custom = {"searches": results["searches"]} if "searches" in results else {}
    return custom | {
        "label": label,
        "name": results.get("name"),
        "policy": results["policy"],
        "methods": methods,
        "seeds": results.get("provenance", {}).get("seeds"),
    }


def check_results(results: Any, where: str) -> None:
    """Raises UserError, which starts with `where`, unless the card can show these results of a run."""
    parsed = typed_json.convert(results, _Results, where=where, fix=_FIX, error=UserError)
    for label, numbers in parsed.methods.items():
        # Other keys of a method may have any form: the card shows these only.
        for kind in (*_METHODS, *parsed.searches):
            if curve := numbers.get(kind):
                place = f"{where}: methods.{label}.{kind}"
                typed_json.convert(curve, dict[str, _Estimate], where=place, fix=_FIX, error=UserError)


def _front_matter(recipe: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    token_classifier = _is_token_classifier(config)
    lines = ["library_name: transformers", f"pipeline_tag: {'token' if token_classifier else 'text'}-classification"]
    base = str(recipe.get("base", ""))
    if base.count("/") == 1:  # a Hub id; anything else would be a broken link
        lines.append(f"base_model: {base}")
    return "\n".join(["---", *lines, "tags: [jaxprm, process-reward-model, agents]", "---"])


def _is_token_classifier(config: Mapping[str, Any]) -> bool:
    return config["architectures"][0].endswith("ForTokenClassification")


def _promise_text(recipe: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if not predicts_outcomes(recipe):
        return "a number that is higher for the better of two actions in the same state, and no expected outcome"
    limits = _range(recipe, config)
    bounds = f", as a number in [{limits[0]:g}, {limits[1]:g}] but for errors of estimation" if limits else ""
    return f"the outcome to expect once the action is taken{bounds}"


def _progress_note(recipe: Mapping[str, Any]) -> str:
    if recipe.get("targets", {}).get("discount", 1.0) == 1.0:
        return "It has none at the first."
    return "This model discounts, so promises of neighbouring steps cannot be compared, and progress is undefined."


def _range(recipe: Mapping[str, Any], config: Mapping[str, Any]) -> Sequence[float] | None:
    """Lowest and highest value of the targets, or None if not recorded. Two labels give a probability."""
    return (0.0, 1.0) if config.get("num_labels", 1) == 2 else recipe.get("value_range")


def _objective_text(recipe: Mapping[str, Any]) -> str:
    """What the model was trained towards. The recipe describes an objective from outside the package."""
    name = recipe.get("objective", "")
    objective = OBJECTIVES.get(name)
    return objective.card_text if objective else recipe.get("objective_text") or name or "unknown"


def _facts(recipe: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Iterator[str]:
    yield f"- Base model: {recipe.get('base', 'unknown')}"
    yield f"- Architecture: {config['architectures'][0]}, weights in {config['dtype']}"
    yield f"- Target: {_objective_text(recipe)}"
    targets = dict(recipe.get("targets", {}))
    targets |= {f"labels.{name}": value for name, value in targets.pop("labels", {}).items()}
    settings = ", ".join(f"{name} {value}" for name, value in targets.items())
    if settings:
        yield f"- Settings: {settings}"
    trained_on = recipe.get("trained_on", {})
    if trained_on:
        yield "- Data: " + ", ".join(f"{value:,} {name}" for name, value in trained_on.items())
    else:
        yield "- Data: not recorded"
    if recipe.get("unfinished"):
        yield f"- Training: not finished, a checkpoint after {recipe['steps']:,} steps"
    yield f"- Read position: {recipe.get('read_position', 'last token of the rendering that ends with the action')}"
    yield _value_fact(recipe, config)
    if recipe.get("max_tokens"):
        yield f"- Trained on up to {recipe['max_tokens']} tokens"
    if recipe.get("seed") is not None:
        yield f"- Seed: {recipe['seed']}"
    yield "- Chat template: chat_template.jinja, the one it was trained with; scores of another rendering mean nothing"
    yield f"- Padding: token {config['pad_token_id']}, which ends no message; keep it, or others read the wrong token"
    if "auto_map" in tokenizer:
        yield (
            "- Tokenizer: it does not split words as Qwen2's does. The `auto_map` in tokenizer_config.json names a "
            "class of transformers itself and keeps AutoTokenizer from rebuilding it; load it without "
            "`trust_remote_code`"
        )


def _value_fact(recipe: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if config.get("num_labels", 1) == 2:
        return f"- Value: the probability of label 1, {config['id2label']['1']!r}, softmax(logits)[1], in [0, 1]"
    if recipe.get("objective") == "preference":
        return "- Value: it orders the actions of one state, and has no range; no sigmoid belongs on it"
    limits = _range(recipe, config)
    shown = f"[{limits[0]:g}, {limits[1]:g}]" if limits else "not recorded"
    return f"- Value range of the targets: {shown}; the value is linear, no sigmoid belongs on it"


# Capital words in these texts are replaced by `_usage`.
_PRELUDE = '''\
import torch
from transformers import CLASS, AutoTokenizer

directory = "."  # this directory, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(directory)
model = CLASS.from_pretrained(directory, dtype=torch.float32).eval()

messages = [
    {"role": "user", "content": "Craft 1 oak planks. You have nothing."},
    {"role": "assistant", "content": "I need oak logs. get 1 oak log"},
    {"role": "user", "content": "Got 1 oak log"},
    {"role": "assistant", "content": "craft 4 oak planks using 1 oak log"},
]


def tokens_of(messages):
    """The rendering that ends with the last message: no generation prompt, and no special tokens added to it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)  # tools=..., where the agent has them
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")
'''

_SEQUENCE = f"""\
```python
{_PRELUDE.replace("CLASS", "AutoModelForSequenceClassification")}

before = None
for index, message in enumerate(messages):
    if message["role"] != "assistant":
        continue
    with torch.no_grad():
        promise = model(**tokens_of(messages[: index + 1])).logits[0]VALUE.item()
    progress = None if before is None else promise - before
    print({{"message": index, "promise": promise, "progress": progress}})
    before = promise
```"""

_TOKEN = f"""\
```python
{_PRELUDE.replace("CLASS", "AutoModelForTokenClassification")}

with torch.no_grad():  # one pass for all steps
    values = model(**tokens_of(messages)).logits[0]VALUE
before = None
for index, message in enumerate(messages):
    if message["role"] != "assistant":
        continue
    # The value of a step is that of the last token of the rendering that ends with it.
    end = tokens_of(messages[: index + 1])["input_ids"].shape[1] - 1
    promise = values[end].item()
    progress = None if before is None else promise - before
    print({{"message": index, "promise": promise, "progress": progress}})
    before = promise
```"""

_JAXPRM = """\
With jaxprm, which scores all steps in one pass and candidates after a shared prefix:

```python
import jaxprm

model = jaxprm.load(directory)
print(model.score([messages])[0]["steps"])
print(model.score_actions(messages[:3], ["craft 4 oak planks using 1 oak log", "get 1 oak log"]))
```"""

_VLLM_SEQUENCE = """\
With vLLM, given tokens, to which it adds none of its own:

    from vllm import LLM
    llm = LLM(model=directory, runner="pooling", dtype="DTYPE")
    prompt = {"prompt_token_ids": tokens_of(messages)["input_ids"][0].tolist()}
    promise = llm.classify([prompt])[0].outputs.probs[INDEX]    # NOTE"""

_VLLM_TOKEN = """\
With vLLM, given tokens, to which it adds none of its own:

    from vllm import LLM
    llm = LLM(model=directory, runner="pooling", dtype="DTYPE")
    prompt = {"prompt_token_ids": tokens_of(messages)["input_ids"][0].tolist()}
    values = llm.encode([prompt], pooling_task="token_classify")[0].outputs.data[:, INDEX]    # NOTE"""

_SGLANG_SEQUENCE = """\
With SGLang:

    python -m sglang.launch_server --model-path DIRECTORY --is-embedding --dtype DTYPE --port 30000

    import requests
    body = {"model": directory, "input_ids": tokens_of(messages)["input_ids"][0].tolist()}
    promise = requests.post("http://localhost:30000/classify", json=body).json()["embedding"][0]"""

_TRL_SEQUENCE = """\
With TRL, as the reward of a policy (conversations; the reward of a completion is the promise of its last turn):

    from trl import GRPOTrainer
    trainer = GRPOTrainer(model=..., reward_funcs=directory, train_dataset=..., args=...)"""

_UNSEEN = (
    "The calls of vLLM{others} need a server or packages that were not there when this was written: they follow their "
    "documentation and were not run on this export. Compare a few scores with transformers' before you rely on them."
)


def _usage(config: Mapping[str, Any]) -> list[str]:
    """Paragraphs on calling the model from transformers, jaxprm, vLLM, SGLang and TRL."""
    two = config.get("num_labels", 1) == 2
    if two:
        words = {"INDEX": "1", "NOTE": "a softmax, as config.json has two labels"}
    else:
        words = {"INDEX": "0", "NOTE": 'the raw value: config.json says problem_type "regression"'}
    if _is_token_classifier(config):
        value = ".softmax(-1)[:, 1]" if two else "[:, 0]"
        parts = [_TOKEN, _JAXPRM, _VLLM_TOKEN, _token_consumers(), _UNSEEN.format(others="")]
    else:
        value = ".softmax(-1)[1]" if two else "[0]"
        parts = [_SEQUENCE, _JAXPRM, _VLLM_SEQUENCE]
        # SGLang and TRL read the first logit, which of two labels is not the value.
        parts += [] if two else [_SGLANG_SEQUENCE, _sglang_note(), _TRL_SEQUENCE]
        parts.append(_UNSEEN.format(others="" if two else ", SGLang and TRL"))
    # Not str.format: the code has braces itself.
    for name, text in (words | {"DTYPE": config["dtype"], "VALUE": value}).items():
        parts = [part.replace(name, text) for part in parts]
    return ["With transformers:", *parts]


def _sglang_note() -> str:
    return (
        "SGLang's `/classify` gives the value itself; its `/v1/classify` applies a softmax, which is 1 for a single "
        "label. Some versions give the head of a sequence classifier a bias that no checkpoint sets."
    )


def _token_consumers() -> str:
    return (
        "SGLang and TRL's reward functions load sequence classifiers: for them, export with `--format sequence`. TRL's "
        "own process reward models are token classifiers of two labels; this one is called as above."
    )


def _checked(verified: Mapping[str, Any] | None, config: Mapping[str, Any]) -> str:
    if verified is None:
        text = "Nothing: exported without `--verify`."
    else:
        rounding = verified.get("rounding")
        ours = "the model as it was trained" if rounding is None else "jaxprm's of the same weights"
        text = (
            f"Scores of transformers {verified['transformers']} (torch {verified['torch']}, computed in float32, in "
            f"padded batches) against {ours}, at all {verified['read_positions']} read positions of "
            f"{verified['trajectories']} conversations: largest difference {verified['largest_difference']:.1e}, "
            f"bound {verified['bound']:.1e}."
        )
        if rounding is not None:
            text += (
                f" Rounding the weights to bfloat16 moved scores by up to {rounding:.1e}. Arithmetic in bfloat16 moves "
                "them too, which was not measured."
            )
        text += " Other consumers and other precisions were not checked."
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        text += " Its head_dim is not hidden_size / heads, which not every consumer supports."
    return text


def _results_table(results: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Success on held-out tasks of the run `{results['name']}`, in per cent, mean and 95 % interval over tasks; "
        f"guided search is a mean over reward models of seeds {results['seeds']}, this one among them."
    )
    yield from ("", "| method | success | tasks |", "|---|---|---|")
    names = {"sampled": "the policy alone, one sample", "greedy": "the policy alone, greedy"}
    for key, estimate in results["policy"].items():
        yield _result_row(names.get(key, key), estimate)
    custom = {kind: search["card"] for kind, search in results.get("searches", {}).items() if search.get("card")}
    for label, numbers in results["methods"].items():
        by = "random scores" if label == "random" else f"guided by {label}"
        for kind, title in (_METHODS | custom).items():
            for size, estimate in (numbers.get(kind) or {}).items():
                yield _result_row(f"{title.format(size)}, {by}", estimate)


def _result_row(name: str, estimate: Mapping[str, Any]) -> str:
    if estimate["mean"] is None:
        return f"| {name} | not defined | {estimate['n']} |"
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"| {name} | {mean:.1f} [{low:.1f}, {high:.1f}] | {estimate['n']} |"


def _flat_numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of a nested mapping; the names of nested ones are joined by spaces."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat_numbers(value, f"{prefix}{name} ")
        # To Python, true is an int.
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", value
