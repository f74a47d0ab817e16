"""Scores an exported reward model as a stranger would: by transformers alone.

    python export_check.py DIRECTORY CASES.json VALUES.json

Run in a process of its own, it imports nothing of this project. CASES holds a list of {"name", "messages", "tools",
"tokens", "read_positions"}; VALUES gets {"values": the value at every read position, "transformers", "torch"}. A wrong
token is an error: equal scores of other tokens would prove nothing.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BATCH = 16


def main(directory: str, question: str, answer: str) -> None:
    """Each step is scored on its own, as the end of a padded sequence: what a consumer does, pooling included."""
    with open(question, encoding="utf-8") as file:
        cases = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    if model.num_labels != 1:
        raise SystemExit(f"{directory}: loaded with {model.num_labels} labels instead of 1")
    prefixes = []
    for case in cases:
        tokens = _encode(tokenizer, case)
        prefixes.extend(tokens[: end + 1] for end in case["read_positions"])
    order = sorted(range(len(prefixes)), key=lambda index: len(prefixes[index]))
    values = [0.0] * len(prefixes)
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        inputs = tokenizer.pad({"input_ids": [prefixes[index] for index in chunk]}, return_tensors="pt")
        with torch.no_grad():
            scores = model(**inputs).logits[:, 0]
        for index, score in zip(chunk, scores.tolist(), strict=True):
            values[index] = score
    steps = iter(values)
    reply = {
        "values": [[next(steps) for _ in case["read_positions"]] for case in cases],
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(reply, file)


def _encode(tokenizer, case: dict) -> list[int]:
    text = tokenizer.apply_chat_template(case["messages"], tools=case["tools"], tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokens != case["tokens"]:
        raise SystemExit(f"{case['name']}: the exported tokenizer gives other tokens than the model was trained on")
    return tokens


if __name__ == "__main__":
    main(*sys.argv[1:])
