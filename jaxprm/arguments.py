"""The options of every verb. Nothing heavy is imported here, so that `--help` is fast."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

# verb: (last stage that it runs, help)
STAGE_VERBS = {
    "run": ("report", "the whole loop: collect, build, train, search, report"),
    "collect": ("collect", "sample trajectories of the training and validation tasks"),
    "build": ("build", "... and encode them into shards"),
    "train": ("train", "... and train the reward models"),
    "search": ("search", "... and search the held-out tasks"),
    "report": ("report", "... and write results.json and the page"),
}

_CONFIG = "a Python file that defines `config`, or the name of a recipe, such as textcraft_tiny"
_MODEL = "model directory, training output, checkpoint, run with exactly one model, or Hub id"
_TEMPLATE = "chat template: own (the tokenizer's, default), chatml, llama3, or a file"
_ROWS = "trajectories: JSON Lines, a JSON array or Parquet, also compressed with gzip or zstd"
_MESH = "device mesh, e.g. tensor=4 or fsdp=-1 (default: data parallel over all local devices)"
_DTYPES = ("float32", "bfloat16")
_REASONING = "whether to encode what the model thought: keep (default) or drop"
_SPECIAL_TOKENS = "special tokens in the text of messages: error (default), or break, which makes them text"
# The readers of data_pipeline/importers/registry.py, which is not imported here.
IMPORT_FORMATS = (
    "atif", "inspect", "mini-swe-agent", "claude-code", "openhands", "swe-agent", "verifiers", "processbench",
    "prm800k", "math-shepherd", "trl-prm", "preference", "who-when", "agentgym", "sharegpt", "responses", "langchain",
    "anthropic", "prompt-completion", "openai", "auto",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs and their options."""
    main = argparse.ArgumentParser(prog="jaxprm", description="Process reward models for LLM agents, in JAX.")
    verbs = main.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (_, text) in STAGE_VERBS.items():
        _stage_verb(verbs, verb, text)
    _config_verb(verbs, "imitate", "train a small policy by imitation of the environment's expert")
    inspect = verbs.add_parser("inspect", help="show a checkpoint: step, fingerprints, sizes, data position, config")
    inspect.add_argument("directory", type=Path, help="a training output, a run, or the directory of one step")
    inspect.add_argument("--json", action="store_true", help="print everything as one JSON object")
    _plan_verb(verbs)
    _score_verb(verbs)
    _serve_verb(verbs)
    _evaluate_verb(verbs)
    check = verbs.add_parser("check-scorer", help="check that scores do not depend on batching, packing and caching")
    check.add_argument("--model", type=Path, required=True, help=_MODEL)
    check.add_argument("--input", type=Path, help="trajectories to check with (default: generated ones)")
    check.add_argument("--count", type=_count, default=16, metavar="N", help="trajectories of --input; default 16")
    _encoding(check)
    _bench_verb(verbs)
    _export_verb(verbs)
    _import_verb(verbs)
    _validate_verb(verbs)
    return main


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line; overrides may stand anywhere after the config."""
    main = parser()
    options, unparsed = main.parse_known_args(arguments)
    overrides = [argument for argument in unparsed if "=" in argument and not argument.startswith("-")]
    if len(overrides) < len(unparsed) or (overrides and not hasattr(options, "overrides")):
        main.error(f"unrecognized arguments: {' '.join(unparsed)}")
    if overrides:
        options.overrides = [*options.overrides, *overrides]
    return options


def _config_verb(verbs, name: str, text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=f"{name}: {text}.")
    verb.add_argument("config", help=_CONFIG)
    verb.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the config")
    verb.add_argument("--workdir", type=Path, required=True, help="directory where everything is written")
    if name != "imitate":
        verb.add_argument("--quick", action="store_true", help="use the file's `quick` config: a smoke run")
    return verb


def _stage_verb(verbs, name: str, text: str) -> None:
    verb = _config_verb(verbs, name, text)
    verb.add_argument("--redo", action="store_true", help="repeat stages whose config changed")
    verb.add_argument("--profile", metavar="START:END", help="trace these steps of every training run")
    verb.add_argument(
        "--data",
        action="append",
        metavar="[SPLIT=]FILE",
        help="use your own trajectories instead of sampling; may be repeated (collection.files)",
    )
    verb.add_argument("--model", metavar="DIR", help="model that reward models start from (base_model)")
    verb.add_argument("--chat-template", metavar="TEMPLATE", help=f"{_TEMPLATE} (policy.chat_template)")
    _encoding(verb, " (policy.reasoning)", " (policy.special_tokens)")
    verb.add_argument("--skip-bad", action="store_true", help="leave out bad rows of --data (collection.skip_bad)")


def _plan_verb(verbs) -> None:
    plan = verbs.add_parser("plan", help="estimate, without a TPU, whether training fits a slice and how fast it is")
    plan.add_argument("config", help=_CONFIG)
    plan.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the config")
    plan.add_argument("--topology", required=True, metavar="NAME", help="the slice: v5e:1x1, v5e:4x4, v5p:2x2x2, ...")
    plan.add_argument("--mesh", metavar="AXIS=N,...", help="e.g. data=-1,fsdp=16 (default: the config's)")
    plan.add_argument("--batch", type=int, metavar="ROWS", help="rows per batch (default: the config's data.rows)")
    plan.add_argument("--length", type=int, metavar="TOKENS", help="tokens per row (default: the config's data.length)")
    plan.add_argument("--model", metavar="DIR|ID|NAME", help="the policy's sizes (default: the config's policy)")
    plan.add_argument("--reward-model", metavar="LABEL", help="which reward model of the config (default: the first)")
    plan.add_argument("--quick", action="store_true", help="use the file's `quick` config")
    plan.add_argument("--json", type=Path, metavar="FILE", help="also write the plan as JSON")
    plan.add_argument("--search", action="store_true", help="try meshes, batch sizes and remat: many compilations")


def _score_verb(verbs) -> None:
    score = verbs.add_parser("score", help="score every step of a file of trajectories")
    score.add_argument("--model", type=Path, help=_MODEL)
    _add_pair(score)
    score.add_argument("--input", type=Path, required=True, help=_ROWS)
    score.add_argument("--output", type=Path, required=True, help="scores, one line for each row of the input")
    score.add_argument("--dtype", choices=_DTYPES, default="float32", help="dtype of the arithmetic (default: float32)")
    score.add_argument("--chat-template", default="own", metavar="TEMPLATE", help=_TEMPLATE)
    _encoding(score)
    score.add_argument("--mesh", metavar="AXIS=N,...", help=_MESH)


def _add_pair(verb) -> None:
    pair = "score steps by the log-ratio of two language models (Progress Advantage)"
    verb.add_argument("--policy", metavar="DIR|ID", help=f"{pair}: the policy trained with reinforcement learning")
    verb.add_argument("--reference", metavar="DIR|ID", help="the model that its training started from")


def _serve_verb(verbs) -> None:
    serve = verbs.add_parser("serve", help="serve scores over HTTP")
    serve.add_argument("--model", type=Path, required=True, help=_MODEL)
    serve.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1; any other needs JAXPRM_TOKEN to be set")
    serve.add_argument("--port", type=int, default=8000, help="default 8000; 0 picks a free port")
    serve.add_argument("--dtype", choices=_DTYPES, default="float32", help="dtype of the arithmetic (default: float32)")
    serve.add_argument("--chat-template", default="own", metavar="TEMPLATE", help=_TEMPLATE)
    _encoding(serve)
    serve.add_argument("--mesh", metavar="AXIS=N,...", help=_MESH)
    serve.add_argument(
        "--add-bos", action="store_true", help="/classify: add the begin-of-text token to texts that lack it (verl)"
    )
    serve.add_argument(
        "--allow-host", action="append", metavar="NAME", help="a name that clients use for this server; may be repeated"
    )
    serve.add_argument("--private", action="store_true", help="connections share no caches")
    serve.add_argument("--served-model-name", metavar="NAME", help="the model's name for clients (default: its label)")
    for name, default, text in (
        ("rows", 8, "conversations per batch"),
        ("max-tokens", 2048, "tokens of a conversation with a candidate"),
        ("max-candidates", 64, "candidates per request"),
        ("max-body", 1 << 20, "bytes per request"),
        ("max-waiting", 256, "requests that may wait"),
    ):
        serve.add_argument(f"--{name}", type=_count, default=default, metavar="N", help=f"{text}; default {default}")


def _evaluate_verb(verbs) -> None:
    evaluate = verbs.add_parser("evaluate", help="judge reward models on trajectories with outcomes or step labels")
    evaluate.add_argument("--model", type=Path, action="append", help=f"{_MODEL}; repeat it to compare models")
    _add_pair(evaluate)
    evaluate.add_argument("--input", type=Path, required=True, help=_ROWS)
    evaluate.add_argument("--labels", default="step_labels", metavar="FIELD", help="step_labels, or a path into meta")
    evaluate.add_argument(
        "--label-kind", choices=("binary", "ternary", "first-error", "soft"), help="default: inferred from the labels"
    )
    thresholds = evaluate.add_mutually_exclusive_group()
    thresholds.add_argument("--validation-share", type=float, default=0.5, help="share of tasks to set thresholds on")
    thresholds.add_argument("--threshold", type=float, help="judge steps below this promise wrong; set no other")
    _encoding(evaluate)
    evaluate.add_argument("--group", metavar="FIELD", help="report by environment, split, ..., or path into meta")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the split and the resamples")
    evaluate.add_argument("--samples", type=int, default=2000, help="bootstrap resamples")


def _bench_verb(verbs) -> None:
    bench = verbs.add_parser("bench", help="measure the cost of scoring a search, on a synthetic tree")
    bench.add_argument("what", choices=("search",), help="what to measure")
    lengths = {"prompt": 1500, "action": 60, "observation": 200}
    for name, default in lengths.items():
        bench.add_argument(f"--{name}-tokens", type=_count, default=default, metavar="N", help=f"default {default}")
    for name, default in {"beams": 4, "candidates": 4, "depth": 15}.items():
        bench.add_argument(f"--{name}", type=_count, default=default, metavar="N", help=f"default {default}")
    bench.add_argument("--size", choices=("tiny", "small"), default="tiny", help="size of the model (default: tiny)")
    bench.add_argument("--no-torch", dest="torch", action="store_false", help="leave out the runs that need torch")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write everything there")


def _export_verb(verbs) -> None:
    export = verbs.add_parser("export", help="write a reward model as a Hugging Face directory")
    export.add_argument("--model", type=Path, required=True, help=_MODEL)
    export.add_argument("--output", type=Path, required=True, help="the directory to write")
    export.add_argument(
        "--format",
        choices=("sequence", "token"),
        help="one value per conversation (default), or one per token (default for a head with a bias)",
    )
    export.add_argument("--dtype", choices=_DTYPES, default="float32", help="dtype of the weights (default: float32)")
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="size of a weights file (default: 5GB)")
    export.add_argument("--chat-template", default="own", metavar="TEMPLATE", help=_TEMPLATE)
    export.add_argument("--verify", action="store_true", help="compare with transformers' scores (needs torch)")
    export.add_argument("--input", type=Path, help="trajectories to verify with (default: generated ones)")


def _import_verb(verbs) -> None:
    imports = verbs.add_parser("import-trajectories", help="convert chat logs of other tools into trajectories")
    imports.add_argument(
        "--format",
        choices=IMPORT_FORMATS,
        default="auto",
        metavar="NAME",
        help=f"{', '.join(IMPORT_FORMATS)} (default)",
    )
    imports.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or folders: JSON Lines, JSON, Parquet, .eval, also with gzip or zstd",
    )
    imports.add_argument("--output", type=Path, required=True, metavar="FILE", help="trajectories to write, JSON Lines")
    for name, text in (
        ("messages", "the conversation"),
        ("tools", "the definitions of tools"),
        ("step-labels", "a label for each step, labels by message, or the first wrong step"),
        ("outcome", "the outcome: true, false or a number in [0, 1]"),
        ("success", "whether it succeeded"),
        ("id", "the trajectory's name"),
        ("task", "the name of the task"),
    ):
        imports.add_argument(f"--{name}-field", metavar="PATH", help=f"{text}, e.g. info.reward or metrics[0].score")
    imports.add_argument(
        "--roles",
        nargs="+",
        default=(),
        metavar="ROLE=NAME,...",
        help="roles of your own: assistant=Planner,Coder; context=NAME is an assistant whose messages are no steps",
    )
    imports.add_argument("--outcome-scale", metavar="LOW,HIGH", help="outcomes run from LOW to HIGH instead of 0 to 1")
    imports.add_argument("--split-by", metavar="FIELD", help="put whole groups of this field (e.g. task) in validation")
    imports.add_argument("--validation-share", type=float, metavar="SHARE", help="share of the groups (default: 0.1)")
    imports.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")
    imports.add_argument("--skip-bad", action="store_true", help="leave bad rows out; show and count them")
    imports.add_argument("--json", type=Path, metavar="FILE", help="write all counts there, with all bad rows")


def _validate_verb(verbs) -> None:
    validate = verbs.add_parser("validate", help="count what is in files of trajectories, and find every bad row")
    validate.add_argument("files", nargs="+", metavar="[SPLIT=]FILE", help=_ROWS)
    validate.add_argument("--tokenizer", type=Path, metavar="DIR", help="also encode every conversation with it")
    validate.add_argument("--chat-template", default="own", metavar="TEMPLATE", help=_TEMPLATE)
    _encoding(validate)
    validate.add_argument("--max-length", type=_count, metavar="TOKENS", help="count longer trajectories")
    validate.add_argument("--json", type=Path, metavar="FILE", help="write everything there, with all bad rows")
    validate.add_argument("--skip-bad", action="store_true", help="count bad rows, but do not fail because of them")


def _encoding(verb, *fields: str) -> None:
    """Options that change how messages are encoded; without them, models do as they were trained."""
    reasoning, special = fields or ("", "")
    verb.add_argument("--reasoning", choices=("keep", "drop"), help=_REASONING + reasoning)
    verb.add_argument("--special-tokens", choices=("error", "break"), help=_SPECIAL_TOKENS + special)


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value
