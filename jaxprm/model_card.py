"""The README.md of an exported reward model: what it is, what it was trained on, how to call it, what was checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_OBJECTIVES = {
    "agentprm": "AgentPRM (arXiv 2511.08325): TD(lambda) estimates of the outcome, and a loss on the progress of steps",
    "pvm": "a process value model: at every step the outcome of its trajectory",
    "orm": "an outcome reward model: the outcome, at the last step of a trajectory only",
}

_TRANSFORMERS = '''\
```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

directory = "."  # this directory, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForSequenceClassification.from_pretrained(directory).eval()

messages = [
    {"role": "user", "content": "Craft 1 oak planks. You have nothing."},
    {"role": "assistant", "content": "I need oak logs. get 1 oak log"},
    {"role": "user", "content": "Got 1 oak log"},
    {"role": "assistant", "content": "craft 4 oak planks using 1 oak log"},
]
before = None
for index, message in enumerate(messages):
    if message["role"] != "assistant":
        continue
    # The value is read at the last token of the rendering that ends with the action: no generation prompt after it.
    text = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        promise = model(**inputs).logits[0, 0].item()
    progress = None if before is None else promise - before
    print({"message": index, "promise": promise, "progress": progress})
    before = promise
```'''

_OTHERS = '''\
With jaxprm, which scores all steps in one pass and candidates after a shared prefix:

```python
import jaxprm

model = jaxprm.load(directory)
print(model.score([messages])[0]["steps"])
print(model.score_actions(messages[:3], ["craft 4 oak planks using 1 oak log", "get 1 oak log"]))
```

With vLLM (`text` as above):

    from vllm import LLM
    llm = LLM(model=directory, runner="pooling")
    promise = llm.classify(text)[0].outputs.probs[0]    # the raw value: config.json says problem_type "regression"

With SGLang:

    python -m sglang.launch_server --model-path DIRECTORY --is-embedding --port 30000
    curl localhost:30000/classify -H 'Content-Type: application/json' -d '{"model": "DIRECTORY", "text": "..."}'

The vLLM and SGLang calls are written from their documentation and were not run on this export. Compare a few scores
with transformers' before you rely on them: SGLang's `/v1/classify` applies a softmax, which is 1 for a single label,
and some of its versions give the head a bias that no checkpoint sets.'''


def model_card(
    recipe: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    verified: Mapping[str, Any] | None,
) -> str:
    """The card of a model with this reward_model.json, config.json and tokenizer_config.json, checked or not."""
    label = recipe.get("label", "reward model")
    low, high = recipe.get("value_range") or (0.0, 1.0)
    sections = [
        _front_matter(recipe),
        f"# {label}: a process reward model for agents\n\n"
        "For every action (assistant turn) of a conversation it predicts the **promise**: the outcome to expect once "
        f"the action is taken, as a number in [{low:g}, {high:g}] but for errors of estimation. **Progress** is the "
        f"difference between an action's promise and the one before. {_progress_note(recipe)}",
        "\n".join(["## What it is", "", *_facts(recipe, config, tokenizer)]),
        "\n".join(["## How to call it", "", "With transformers:", "", _TRANSFORMERS, "", _OTHERS]),
        "\n".join(["## What was checked", "", _checked(verified, config)]),
    ]
    results = list(_results(recipe))
    if results:
        sections.append("\n".join(["## Results", "", "| | value |", "|---|---|", *results]))
    return "\n\n".join(sections) + "\n"


def _front_matter(recipe: Mapping[str, Any]) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-classification"]
    base = str(recipe.get("base", ""))
    if base.count("/") == 1:
        lines.append(f"base_model: {base}")
    return "\n".join(["---", *lines, "tags: [jaxprm, process-reward-model, agents]", "---"])


def _progress_note(recipe: Mapping[str, Any]) -> str:
    if recipe.get("targets", {}).get("discount", 1.0) == 1.0:
        return "It has none at the first."
    return "This model discounts, so promises of neighbouring steps cannot be compared, and progress is undefined."


def _facts(recipe: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Iterator[str]:
    objective = recipe.get("objective")
    yield f"- Base model: {recipe.get('base', 'unknown')}"
    yield f"- Target: {_OBJECTIVES.get(objective, objective or 'unknown')}"
    settings = ", ".join(f"{name} {value}" for name, value in recipe.get("targets", {}).items())
    if settings:
        yield f"- Settings: {settings}"
    trained_on = recipe.get("trained_on", {})
    if trained_on:
        yield "- Data: " + ", ".join(f"{value:,} {name}" for name, value in trained_on.items())
    else:
        yield "- Data: not recorded"
    yield f"- Read position: {recipe.get('read_position', 'last token of the rendering that ends with the action')}"
    low, high = recipe.get("value_range") or (0.0, 1.0)
    yield f"- Value range of the targets: [{low:g}, {high:g}]; the value is linear, no sigmoid belongs on it"
    yield f"- Trained on up to {recipe.get('max_tokens') or config['max_position_embeddings']} tokens"
    if recipe.get("seed") is not None:
        yield f"- Seed: {recipe['seed']}"
    yield "- Chat template: chat_template.jinja, the one it was trained with; scores of another rendering mean nothing"
    if "auto_map" in tokenizer:
        yield (
            "- Tokenizer: it does not split words as Qwen2's does. The `auto_map` in tokenizer_config.json names a "
            "class of transformers itself and keeps AutoTokenizer from rebuilding it; load it without "
            "`trust_remote_code`"
        )


def _checked(verified: Mapping[str, Any] | None, config: Mapping[str, Any]) -> str:
    if verified is None:
        text = "Nothing: exported without `--verify`."
    else:
        text = (
            f"Scores of transformers {verified['transformers']} (torch {verified['torch']}, float32, padded batches) "
            f"against the model as it was trained, at all {verified['read_positions']} read positions of "
            f"{verified['trajectories']} conversations: largest difference {verified['largest_difference']:.1e}, "
            f"bound {verified['bound']:.1e}. Other consumers and other precisions were not checked."
        )
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        text += " Its head_dim is not hidden_size / heads, which not every consumer supports."
    return text


def _results(recipe: Mapping[str, Any]) -> Iterator[str]:
    for group in ("validation", "results"):
        for name, value in _numbers(recipe.get(group) or {}, group):
            yield f"| {name} | {value:.4g} |"


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix} {name}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix} {name}", value
