"""Scores an exported reward model as a third party would: with transformers alone.

    python transformers_scores.py DIRECTORY CASES.json VALUES.json

Run in a separate process, it imports nothing of this project. CASES is a list of {"name", "messages", "tools",
"tokens", "read_positions"}; VALUES gets {"values": the value at every read position, "transformers", "torch"}.

A wrong token is an error: equal scores of other tokens would prove nothing. So is a missing tensor, which transformers
would initialize at random, and an unexpected one, which it would drop.
"""

from __future__ import annotations

import json
import os
import sys

# Before transformers is imported, which reads it once: everything must come from the directory.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

BATCH = 16


def main(directory: str, question: str, answer: str) -> None:
    """Scores all cases of the file `question` into the file `answer`, in float32 whatever dtype the weights have."""
    with open(question, encoding="utf-8") as file:
        cases = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, token_classifier = _load(directory)
    tokens = [_encode(tokenizer, case) for case in cases]
    if token_classifier:
        steps = _at_positions(tokenizer, model, tokens, [case["read_positions"] for case in cases])
    else:
        prefixes = [ids[: end + 1] for ids, case in zip(tokens, cases, strict=True) for end in case["read_positions"]]
        steps = iter(_at_ends(tokenizer, model, prefixes))
    reply = {
        "values": [[next(steps) for _ in case["read_positions"]] for case in cases],
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(reply, file)


def _load(directory: str):
    """(model, whether it is a token classifier)."""
    token_classifier = AutoConfig.from_pretrained(directory).architectures[0].endswith("ForTokenClassification")
    auto = AutoModelForTokenClassification if token_classifier else AutoModelForSequenceClassification
    model, report = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    wrong = {name: keys for name, keys in report.items() if keys}
    if wrong:
        raise SystemExit(f"{directory}: loaded with {wrong}")
    return model.eval(), token_classifier


def _values(logits: torch.Tensor) -> torch.Tensor:
    """[..., labels] -> [...]: the logit of a single label, or the probability of the second of two."""
    return logits[..., 0] if logits.shape[-1] == 1 else logits.softmax(-1)[..., 1]


def _at_ends(tokenizer, model, prefixes: list[list[int]]) -> list[float]:
    """Values of steps, each the end of a padded sequence: what a consumer of a sequence classifier does."""
    values = [0.0] * len(prefixes)
    for chunk, logits in _logits(tokenizer, model, prefixes):
        for index, value in zip(chunk, _values(logits).tolist(), strict=True):
            values[index] = value
    return values


def _at_positions(tokenizer, model, tokens: list[list[int]], positions: list[list[int]]):
    """Values of all steps, one pass for each conversation, in the order of the cases."""
    by_case: list[list[float]] = [[] for _ in tokens]
    for chunk, logits in _logits(tokenizer, model, tokens):
        for index, row in zip(chunk, _values(logits), strict=True):
            # Batches are sorted by length, so values are put back by their index.
            by_case[index] = row[positions[index]].tolist()
    return (value for values in by_case for value in values)


def _logits(tokenizer, model, sequences: list[list[int]]):
    """(indices, logits) of batches, padded on the right; sequences of similar length share a batch."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        padded = {"input_ids": [sequences[index] for index in chunk]}
        # On the right, whatever the tokenizer's default: read positions count from the left.
        inputs = tokenizer.pad(padded, padding_side="right", return_tensors="pt")
        with torch.no_grad():
            yield chunk, model(**inputs).logits


def _encode(tokenizer, case: dict) -> list[int]:
    text = tokenizer.apply_chat_template(case["messages"], tools=case["tools"], tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokens != case["tokens"]:
        raise SystemExit(f"{case['name']}: the exported tokenizer gives other tokens than the model was trained on")
    return tokens


if __name__ == "__main__":
    main(*sys.argv[1:])
