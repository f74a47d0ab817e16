"""Scores an exported reward model as a stranger would: by transformers alone.

    python transformers_scores.py DIRECTORY CASES.json VALUES.json

Run in a process of its own, it imports nothing of this project. CASES holds a list of {"name", "messages", "tools",
"tokens", "read_positions"}; VALUES gets {"values": the value at every read position, "transformers", "torch"}. A wrong
token is an error: equal scores of other tokens would prove nothing. So is a tensor that is missing or left over, which
transformers draws at random or drops.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

BATCH = 16


def main(directory: str, question: str, answer: str) -> None:
    """Scores all cases, in float32 whatever the weights are stored in."""
    with open(question, encoding="utf-8") as file:
        cases = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, of_tokens = _load(directory)
    tokens = [_encode(tokenizer, case) for case in cases]
    if of_tokens:
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
    """(the model, whether it classifies tokens)"""
    of_tokens = AutoConfig.from_pretrained(directory).architectures[0].endswith("ForTokenClassification")
    auto = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    model, report = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    wrong = {name: found for name, found in report.items() if found}
    if wrong:
        raise SystemExit(f"{directory}: loaded with {wrong}")
    return model.eval(), of_tokens


def _values(logits: torch.Tensor) -> torch.Tensor:
    """[..., labels] -> [...]: a label alone is the value, of two the second's probability is."""
    return logits[..., 0] if logits.shape[-1] == 1 else logits.softmax(-1)[..., 1]


def _at_ends(tokenizer, model, prefixes: list[list[int]]) -> list[float]:
    """Each step on its own, as the end of a padded sequence: what a consumer does, pooling included."""
    values = [0.0] * len(prefixes)
    for chunk, logits in _logits(tokenizer, model, prefixes):
        for index, value in zip(chunk, _values(logits).tolist(), strict=True):
            values[index] = value
    return values


def _at_positions(tokenizer, model, tokens: list[list[int]], positions: list[list[int]]):
    """All steps of a conversation from one pass, in the cases' order."""
    found: list[list[float]] = [[] for _ in tokens]
    for chunk, logits in _logits(tokenizer, model, tokens):
        for index, row in zip(chunk, _values(logits), strict=True):
            found[index] = row[positions[index]].tolist()
    return (value for values in found for value in values)


def _logits(tokenizer, model, sequences: list[list[int]]):
    """(indices, logits) of batches of sequences of about the same length, padded on the right."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        padded = {"input_ids": [sequences[index] for index in chunk]}
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
