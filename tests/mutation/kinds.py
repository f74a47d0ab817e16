"""Every kind of file that a verb reads: a healthy example, how it is broken, and the verbs that read it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.mutation import mutations as mutate
from tests.mutation import verbs
from tests.mutation.outcomes import changes, json_reason
from tests.mutation.verbs import Verb

Reason = Callable[[bytes, bytes], str | None]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        make: writes a directory that holds a healthy file at `file`, a pattern of which the largest match is taken.
        mutators: each makes one random mutation.
        verbs: what reads it, by name: a function of the directory that returns the comparable output.
        reason: why other content may change the output.
        names: an error names one of these; by default the file's name.
        share: of the inputs of a sweep; less where a verb takes long.
    """

    name: str
    make: Callable[[Path], None]
    file: str
    mutators: tuple[mutate.Mutate, ...]
    verbs: dict[str, Verb]
    reason: Reason = json_reason
    names: tuple[str, ...] = ()
    share: float = 1.0

    def path(self, directory: Path) -> Path:
        return max(directory.glob(self.file), key=lambda path: path.stat().st_size)


SCORING: dict[str, Verb] = {
    "load": verbs.load,
    "score": verbs.score,
    "evaluate": verbs.evaluate,
    "export": verbs.export,
    "serve": verbs.serve,
}
BYTES, JSON = (mutate.one_bytes,), (mutate.one_json, mutate.one_json, mutate.one_bytes)


def of_run(verb: Verb) -> Verb:
    return functools.partial(verb, name="run")


def any_text(before: bytes, after: bytes) -> str | None:
    """A file whose every valid content has a meaning."""
    return "another valid content"


def any_number(before: bytes, after: bytes) -> str | None:
    """Orbax finds arrays by their offset and stores no checksums: other bytes, or moved ones, are other numbers."""
    return "other numbers in a tensor"


def trees_reason(before: bytes, after: bytes) -> str | None:
    """As for rows: there may be many trees. A seed may be a number or a text, which is shown as it is."""
    return free_reason("seed")(before, after) or _repeated(after)


def free_reason(*fields: str) -> Reason:
    """As `json_reason`, and anything may be in these fields, which are shown or compared as they are."""

    def reason(before: bytes, after: bytes) -> str | None:
        if known := json_reason(before, after):
            return known
        with suppress(ValueError):
            for path, _ in changes(json.loads(before), json.loads(after)):
                if any(f".{field}" in path for field in fields):
                    return "a field of any form, shown as it is"
        return None

    return reason


def lines_reason(before: bytes, after: bytes) -> str | None:
    """Why other rows may give another output, where they are not reported as bad."""
    old, new = before.splitlines(), after.splitlines()
    if len(old) != len(new):
        return "other rows"
    of_line = free_reason("meta", "policy", "tools", "tool_calls")
    changed = [pair for pair in zip(old, new, strict=True) if pair[0] != pair[1]]
    reasons = [of_line(*pair) or _repeated(pair[1]) or _integer_id(pair[1]) for pair in changed]
    return reasons[0] if reasons and all(reasons) else None


def _integer_id(line: bytes) -> str | None:
    """Data sets number their rows; a number of any other form is refused."""
    with suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and type(row.get("id")) is int:
            return "an integer id, which is read as its text"
    return None


def overrides_reason(before: bytes, after: bytes) -> str | None:
    """As `free_reason`; and of an option that is given twice the last counts. Within a value, a repeat is refused."""
    if known := free_reason("arguments", "extra_body")(before, after):
        return known
    with suppress(ValueError, RecursionError):
        names = [name for name, _ in json.loads(after, object_pairs_hook=list)]
        if len(set(names)) < len(names):
            return "an override that is given twice: the last counts"
    return None


def _repeated(line: bytes) -> str | None:
    """Rows are too many to look for repeated names: msgspec takes the last, as JSON parsers do."""
    names: list[str] = []

    def count(pairs: list) -> dict:
        names.extend([name for name, _ in pairs][len(dict(pairs)) :])
        return dict(pairs)

    with suppress(ValueError):
        json.loads(line, object_pairs_hook=count)
    return "a name that occurs twice in a row: the last counts" if names else None


def weights_reason(before: bytes, after: bytes) -> str | None:
    """Any bytes of a tensor are numbers; a header has one meaning."""
    length = int.from_bytes(before[:8], "little")
    same_header = after[: 8 + length] == before[: 8 + length]
    return (
        "other numbers in a tensor"
        if same_header and len(before) == len(after)
        else json_reason_of_header(before, after)
    )


def json_reason_of_header(before: bytes, after: bytes) -> str | None:
    headers = [text[8 : 8 + int.from_bytes(text[:8], "little")] for text in (before, after)]
    with suppress(ValueError):
        return json_reason(*headers)
    return None


MODELS = (
    Kind("reward_model.json", verbs.make_model, "model/reward_model.json", JSON, SCORING, names=("/model",)),
    Kind("config.json", verbs.make_model, "model/config.json", JSON, SCORING | {"plan": verbs.plan}, names=("/model",)),
    Kind("tokenizer.json", verbs.make_model, "model/tokenizer.json", JSON, SCORING, names=("/model",)),
    Kind("tokenizer_config.json", verbs.make_model, "model/tokenizer_config.json", JSON, SCORING, names=("/model",)),
    Kind(
        "special_tokens_map.json",
        verbs.make_model,
        "model/special_tokens_map.json",
        JSON,
        {"export": verbs.export},
        names=("/model",),
    ),
    Kind(
        "chat_template.jinja",
        verbs.make_model,
        "model/chat_template.jinja",
        BYTES,
        SCORING,
        any_text,
        names=("/model",),
    ),
    Kind(
        "model.safetensors",
        verbs.make_model,
        "model/model.safetensors",
        (mutate.one_safetensors,),
        {"load": verbs.load, "score": verbs.score, "export": verbs.export},
        weights_reason,
        names=("/model",),
    ),
    Kind(
        "index of safetensors",
        verbs.make_sharded_model,
        "model/model.safetensors.index.json",
        JSON,
        {"load": verbs.load, "export": verbs.export},
        names=("/model",),
    ),
)

CHECKPOINTS = tuple(
    Kind(
        f"checkpoint: {name}",
        verbs.make_checkpoint,
        f"run/{name}",
        mutators,
        readers,
        reason,
        names=("/run",),
    )
    for name, mutators, readers, reason in (
        (
            "checkpoints/7/meta/metadata",
            JSON,
            {"inspect": verbs.inspect, "resume": verbs.resume},
            free_reason("identity", "position", "config"),
        ),
        (
            "checkpoints/7/state/_METADATA",
            JSON,
            {"inspect": verbs.inspect, "load": of_run(verbs.load), "resume": verbs.resume},
            json_reason,
        ),
        (
            "checkpoints/7/state/_sharding",
            JSON,
            {"inspect": verbs.inspect, "load": of_run(verbs.load), "resume": verbs.resume},
            json_reason,
        ),
        (
            "checkpoints/7/_CHECKPOINT_METADATA",
            JSON,
            {"inspect": verbs.inspect, "load": of_run(verbs.load), "resume": verbs.resume},
            any_text,
        ),
        (
            "checkpoints/7/state/manifest.ocdbt",
            BYTES,
            {"inspect": verbs.inspect, "load": of_run(verbs.load), "resume": verbs.resume},
            json_reason,
        ),
        (
            "checkpoints/7/state/ocdbt.process_0/d/*",
            BYTES,
            {"inspect": verbs.inspect, "load": of_run(verbs.load), "resume": verbs.resume},
            any_number,
        ),
        (
            "checkpoints/7/state/array_metadatas/process_0",
            JSON,
            {"inspect": verbs.inspect, "load": of_run(verbs.load), "resume": verbs.resume},
            json_reason,
        ),
        (
            "metrics.jsonl",
            (mutate.one_of_lines, mutate.one_bytes),
            {"export": of_run(verbs.export), "load": of_run(verbs.load)},
            any_text,
        ),
        ("model-files/config.json", JSON, {"load": of_run(verbs.load), "export": of_run(verbs.export)}, json_reason),
    )
)
DATASETS = tuple(
    Kind(
        f"dataset: {name}",
        verbs.make_dataset,
        f"shards/{name}",
        mutators,
        {"read": verbs.read_dataset},
        names=("/shards",),
    )
    for name, mutators in (
        ("metadata.json", JSON),
        ("features.json", JSON),
        ("dataset_info.json", JSON),
        ("trajectories-train.tfrecord-00000-of-00001", BYTES),
    )
)
LINES = (mutate.one_of_lines, mutate.one_of_lines, mutate.one_bytes)
OTHERS = (
    Kind(
        "trajectories",
        verbs.make_trajectories,
        "t.jsonl",
        LINES,
        {
            "score": verbs.score,
            "evaluate": verbs.evaluate,
            "evaluate --labels": lambda directory: verbs.evaluate(directory, "model", "--labels", "own.labels"),
            "evaluate --group": lambda directory: verbs.evaluate(directory, "model", "--group", "level"),
            "validate": verbs.validate,
            "import": verbs.import_rows,
            "collect": verbs.collect,
        },
        lines_reason,
        # Fewer rows may be too few for what is evaluated: then the line names the labels.
        names=("t.jsonl", "labels step_labels"),
    ),
    Kind(
        "results.json",
        verbs.make_report,
        "run/results.json",
        JSON,
        {"report": verbs.report},
        free_reason("compute", "data", "provenance", "seconds", "validation"),
        share=0.5,
    ),
    Kind(
        "trees.json",
        verbs.make_report,
        "run/search/trees.json",
        JSON,
        {"report": verbs.report},
        trees_reason,
        share=0.5,
    ),
    Kind("results.json of a model", verbs.make_run, "run/results.json", JSON, {"export": of_run(verbs.export)}),
    Kind(
        "overrides",
        verbs.make_overrides,
        "overrides.json",
        JSON,
        {"load": verbs.load_config},
        overrides_reason,
        names=("config", "override"),
    ),
)
KINDS = MODELS + CHECKPOINTS + DATASETS + OTHERS
