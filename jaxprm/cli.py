"""The command line: one verb, one line for every mistake, exit 2 for the user's, 75 to be resumed, 130 for Ctrl-C."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxprm.errors import RESUMABLE, Interrupted
from jaxprm.host_memory import keep_freed

STAGE_VERBS = {
    "run": ("report", "the whole loop: collect, build, train, search, report"),
    "collect": ("collect", "sample trajectories of the training and validation tasks"),
    "build": ("build", "... and encode them into shards"),
    "train": ("train", "... and train the reward models"),
    "search": ("search", "... and search the held-out tasks"),
    "report": ("report", "... and write results.json and the page"),
}
# The verbs that call compiled programs over and over.
COMPUTING = {*STAGE_VERBS, "imitate", "score", "evaluate", "serve", "check-scorer", "bench"}

_MODEL = "a reward model: its directory, a training's output or checkpoint, a run with a single one, or its hub name"
_TEMPLATE = "own (the tokenizer's, default), chatml, llama3, or a file"
_MESH = "devices that share the work: tensor=4; default: all, by rows"
_DTYPES = ("float32", "bfloat16")


def parser() -> argparse.ArgumentParser:
    """All verbs and their options. Nothing heavy is imported to show the help."""
    main = argparse.ArgumentParser(prog="jaxprm", description="Process reward models for LLM agents, in JAX.")
    verbs = main.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (_, text) in STAGE_VERBS.items():
        one = _config_verb(verbs, verb, text)
        one.add_argument("--redo", action="store_true", help="make stages again whose config changed")
        one.add_argument("--profile", metavar="START:END", help="trace these steps of every training")
        one.add_argument(
            "--data",
            action="append",
            metavar="[SPLIT=]FILE",
            help="trajectories of your own instead of sampled ones; again for more (collection.files)",
        )
        one.add_argument("--model", metavar="DIR", help="the model reward models start from (base_model)")
        one.add_argument("--chat-template", metavar="TEMPLATE", help=f"{_TEMPLATE} (policy.chat_template)")
        one.add_argument("--skip-bad", action="store_true", help="leave bad rows of --data out (collection.skip_bad)")
    _config_verb(verbs, "imitate", "train a small policy by imitation of the environment's expert")
    inspect = verbs.add_parser("inspect", help="what is in a checkpoint: step, fingerprints, sizes, position, config")
    inspect.add_argument("directory", type=Path, help="a training output, a run, or a step's own directory")
    inspect.add_argument("--json", action="store_true", help="everything, as one JSON object")
    _plan_verb(verbs)
    score = verbs.add_parser("score", help="score every step of a file of trajectories")
    score.add_argument("--model", type=Path, required=True, help=_MODEL)
    score.add_argument("--input", type=Path, required=True, help="trajectories, JSON Lines")
    score.add_argument("--output", type=Path, required=True, help="scores, one line for each line of the input")
    score.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the arithmetic; default float32")
    score.add_argument("--chat-template", default="own", metavar="TEMPLATE", help=_TEMPLATE)
    score.add_argument("--mesh", type=_axes, metavar="AXIS=N,...", help=_MESH)
    _serve_verb(verbs)
    _evaluate_verb(verbs)
    check = verbs.add_parser("check-scorer", help="check that a model scores the same batched, packed and cached")
    check.add_argument("--model", type=Path, required=True, help=_MODEL)
    check.add_argument("--input", type=Path, help="trajectories to check on; made up when not given")
    _bench_verb(verbs)
    export = verbs.add_parser("export", help="write a reward model as a Hugging Face directory")
    export.add_argument("--model", type=Path, required=True, help=_MODEL)
    export.add_argument("--output", type=Path, required=True, help="the directory to write")
    export.add_argument(
        "--format",
        choices=("sequence", "token"),
        default="sequence",
        help="a value for a conversation (default), or for each of its tokens",
    )
    export.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights; default float32")
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights; default 5GB")
    export.add_argument("--chat-template", default="own", metavar="TEMPLATE", help=_TEMPLATE)
    export.add_argument("--verify", action="store_true", help="compare with transformers' scores (needs torch)")
    export.add_argument("--input", type=Path, help="trajectories to verify on; made up when not given")
    _import_verb(verbs)
    validate = verbs.add_parser("validate", help="count what is in files of trajectories, and find every bad row")
    validate.add_argument("files", nargs="+", metavar="[SPLIT=]FILE", help="trajectories, JSON Lines")
    validate.add_argument("--tokenizer", type=Path, metavar="DIR", help="also encode every conversation with this one")
    validate.add_argument("--chat-template", default="own", metavar="TEMPLATE", help=_TEMPLATE)
    validate.add_argument("--max-length", type=_count, metavar="TOKENS", help="count what is longer")
    validate.add_argument("--json", type=Path, metavar="FILE", help="write everything there, with all bad rows")
    validate.add_argument("--skip-bad", action="store_true", help="bad rows are counted, but no reason to fail")
    return main


def _serve_verb(verbs) -> None:
    serve = verbs.add_parser("serve", help="answer requests for scores over HTTP")
    serve.add_argument("--model", type=Path, required=True, help=_MODEL)
    serve.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1; others need JAXPRM_TOKEN to be set")
    serve.add_argument("--port", type=int, default=8000, help="default 8000; 0 for any that is free")
    serve.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the arithmetic; default float32")
    serve.add_argument("--chat-template", default="own", metavar="TEMPLATE", help=_TEMPLATE)
    serve.add_argument("--mesh", type=_axes, metavar="AXIS=N,...", help=_MESH)
    for name, default, text in (
        ("rows", 8, "conversations computed at once"),
        ("max-tokens", 2048, "of a conversation with a candidate"),
        ("max-candidates", 64, "of a request"),
        ("max-body", 1 << 20, "bytes of a request"),
        ("max-waiting", 256, "requests that wait for an answer"),
    ):
        serve.add_argument(f"--{name}", type=_count, default=default, metavar="N", help=f"{text}; default {default}")


def _bench_verb(verbs) -> None:
    bench = verbs.add_parser("bench", help="measure what scoring a search costs, on a synthetic tree")
    bench.add_argument("what", choices=("search",), help="what to measure")
    lengths = {"prompt": 1500, "action": 60, "observation": 200}
    for name, default in lengths.items():
        bench.add_argument(f"--{name}-tokens", type=_count, default=default, metavar="N", help=f"default {default}")
    for name, default in {"beams": 4, "candidates": 4, "depth": 15}.items():
        bench.add_argument(f"--{name}", type=_count, default=default, metavar="N", help=f"default {default}")
    bench.add_argument("--size", choices=("tiny", "small"), default="tiny", help="of the model; default tiny")
    bench.add_argument("--no-torch", dest="torch", action="store_false", help="leave out the runs that need torch")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write everything there")


def _evaluate_verb(verbs) -> None:
    one = verbs.add_parser("evaluate", help="judge reward models on trajectories with outcomes or step labels")
    one.add_argument(
        "--model", type=Path, required=True, action="append", help="a reward model, as for score; again to compare"
    )
    one.add_argument("--input", type=Path, required=True, help="trajectories, JSON Lines")
    one.add_argument("--labels", default="step_labels", metavar="FIELD", help="step_labels, or a path into meta")
    one.add_argument("--label-kind", choices=("binary", "ternary", "first-error", "soft"), help="found if not given")
    chosen = one.add_mutually_exclusive_group()
    chosen.add_argument("--validation-share", type=float, default=0.5, help="of the tasks, to choose thresholds on")
    chosen.add_argument("--threshold", type=float, help="a step of lower promise is judged wrong; none is chosen then")
    one.add_argument("--group", metavar="FIELD", help="numbers by environment, split, ..., or by a path into meta")
    one.add_argument("--json", type=Path, metavar="FILE", help="where to write everything")
    one.add_argument("--seed", type=int, default=0, help="of the split and the resamples")
    one.add_argument("--samples", type=int, default=2000, help="bootstrap resamples")


def _import_verb(verbs) -> None:
    one = verbs.add_parser("import-trajectories", help="turn chat logs of other tools into trajectories")
    formats = ("openai", "sharegpt", "agentgym", "trl-prm")
    one.add_argument("--format", choices=formats, required=True, help="what a row looks like")
    one.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help="JSON Lines, array, Parquet")
    one.add_argument("--output", type=Path, required=True, metavar="FILE", help="trajectories to write, JSON Lines")
    for name, text in (
        ("messages", "the conversation"),
        ("outcome", "the outcome: true, false or a number in [0, 1]"),
        ("success", "whether it succeeded"),
        ("id", "the trajectory's name"),
        ("task", "the name of what was attempted"),
    ):
        one.add_argument(f"--{name}-field", metavar="PATH", help=f"{text}, as info.reward or metrics[0].score")
    one.add_argument("--outcome-scale", metavar="LOW,HIGH", help="outcomes run from LOW to HIGH instead of 0 to 1")
    one.add_argument("--split-by", metavar="FIELD", help="put whole groups of this field (such as task) in validation")
    one.add_argument("--validation-share", type=float, metavar="SHARE", help="of the groups (default: 0.1)")
    one.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    one.add_argument("--skip-bad", action="store_true", help="leave bad rows out, show and count them")
    one.add_argument("--json", type=Path, metavar="FILE", help="write all counts there, with all bad rows")


def _axes(text: str) -> dict[str, int]:
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        return {axis.strip(): int(size) for axis, _, size in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give axes and sizes, as tensor=4,fsdp=2") from None


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def _config_verb(verbs, verb: str, text: str) -> argparse.ArgumentParser:
    one = verbs.add_parser(verb, help=text, description=f"{verb}: {text}.")
    one.add_argument("config", type=Path, help="a Python file that defines `config`")
    one.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the config")
    one.add_argument("--workdir", type=Path, required=True, help="where everything is written")
    if verb != "imitate":
        one.add_argument("--quick", action="store_true", help="the file's `quick` config: a smoke run")
    return one


def _plan_verb(verbs) -> None:
    plan = verbs.add_parser("plan", help="whether a training fits a TPU slice and how fast it may be, without a TPU")
    plan.add_argument("config", type=Path, help="a Python file that defines `config`")
    plan.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the config")
    plan.add_argument("--topology", required=True, metavar="NAME", help="the slice: v5e:1x1, v5e:4x4, v5p:2x2x2, ...")
    plan.add_argument("--mesh", metavar="AXIS=N,...", help="as data=-1,fsdp=16; else the config's")
    plan.add_argument("--batch", type=int, metavar="ROWS", help="rows of a batch; else the config's data.rows")
    plan.add_argument("--length", type=int, metavar="TOKENS", help="tokens of a row; else the config's data.length")
    plan.add_argument("--model", metavar="DIR|ID|NAME", help="the policy's shape; else the config's policy")
    plan.add_argument("--reward-model", metavar="LABEL", help="which of the config's; else the first")
    plan.add_argument("--quick", action="store_true", help="the file's `quick` config")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON too")
    plan.add_argument("--search", action="store_true", help="try meshes, batches and remat: many compilations")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line; overrides may stand anywhere after the config."""
    known = parser()
    options, rest = known.parse_known_args(arguments)
    late = [one for one in rest if "=" in one and not one.startswith("-")]
    if len(late) < len(rest) or (late and not hasattr(options, "overrides")):
        known.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        options.overrides = [*options.overrides, *late]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status."""
    options = parse(arguments)
    # What TensorFlow and XLA say at start-up drowns the one line that matters.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch
    if options.verb in COMPUTING:
        keep_freed()
    try:
        return VERBS[options.verb](options)
    except KeyboardInterrupt:
        again = "starts anew" if options.verb in ("evaluate", "export", "serve") else "goes on where it stopped"
        print(f"jaxprm: interrupted; the same command {again}", file=sys.stderr)
        return 130
    except Interrupted as stopped:
        print(f"jaxprm: {stopped}", file=sys.stderr)
        return RESUMABLE
    except Exception as error:
        if (line := _one_line(error)) is None:
            raise
        print(f"jaxprm: {line}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str | None:
    """What to tell the user, or None where the mistake is ours."""
    from data_pipeline.errors import DataError
    from jaxprm.errors import UserError

    if isinstance(error, (UserError, DataError)):
        return " ".join(str(error).split())
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # Checkpoints are written by a library that raises errors of its own.
    if full or "No space left on device" in str(error):
        where = f" writing {error.filename}" if getattr(error, "filename", None) else ""
        return (
            f"no space left on the device{where}; free some and run the same command again: what was finished is kept"
        )
    if (
        isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError))
        and error.filename
    ):
        return f"{error.filename}: {error.strerror}"
    return None


def _stages(options) -> int:
    from jaxprm import config
    from jaxprm.training import distributed
    from jaxprm.workflow.run import run, validation_lines

    experiment = config.load(options.config, options.overrides + _spelled_out(options), quick=options.quick)
    own, until = bool(experiment.collection.files), STAGE_VERBS[options.verb][0]
    if own and options.verb == "run":
        until = "train"
    profile = _steps(options.profile)
    with distributed.joined(slices=experiment.mesh.dcn_data):
        page = run(experiment, options.workdir, until=until, redo=options.redo, profile=profile)
    if own and until == "train":
        print("trained on your own trajectories; on those of validation:")
        print("\n".join(f"  {line}" for line in validation_lines(experiment, options.workdir)))
        if options.verb == "run":
            print("run ends here: nothing is searched; `search` and `report` do, in the config's environment")
    if page is not None:
        from jaxprm.evaluation.tables import results_table

        print(results_table(options.workdir / "results.json"))
        print(f"\nreport: {page}")
    return 0


def _steps(text: str | None) -> tuple[int, int] | None:
    """START:END, from 1."""
    from jaxprm.errors import UserError

    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile {text}: give the first and the last step, from 1, as 10:12")
    return int(first), int(last)


def _inspect(options) -> int:
    import json

    from jaxprm.artifacts import checkpoints

    found = checkpoints.inspect(options.directory)
    print(json.dumps(found, indent=2) if options.json else checkpoints.summary(found))
    return 0


def _spelled_out(options) -> list[str]:
    """The options that stand for fields of the config, as overrides."""
    found = [f"collection.files={json.dumps(options.data)}"] if options.data else []
    found += [f"base_model={json.dumps(str(options.model))}"] if options.model is not None else []
    found += [f"policy.chat_template={json.dumps(options.chat_template)}"] if options.chat_template is not None else []
    return found + (["collection.skip_bad=true"] if options.skip_bad else [])


def _imitate(options) -> int:
    from jaxprm import config
    from jaxprm.training.imitate import imitate
    from jaxprm.workflow.workdir import WorkDirectory

    experiment = config.load(options.config, options.overrides)
    with WorkDirectory(options.workdir).lock():
        print(f"policy: {imitate(experiment, options.workdir)}")
    return 0


def _plan(options) -> int:
    from jaxprm.planning import command

    return command.run(options)


def _score(options) -> int:
    from jaxprm.api import mesh_of
    from jaxprm.scoring.files import score_file
    from jaxprm.scoring.loading import all_devices

    counts = score_file(
        options.model,
        options.input,
        options.output,
        dtype=options.dtype,
        template=options.chat_template,
        mesh=mesh_of(options.mesh) or all_devices(),
    )
    print(f"scored {counts.scored} trajectories, {counts.errors} errors: {options.output}")
    return 1 if counts.errors else 0


def _serve(options) -> int:
    from jaxprm.serving import command

    return command.run(options)


def _check_scorer(options) -> int:
    from jaxprm.scoring.check import check_scorer

    found = check_scorer(options.model, options.input)
    for way in (*found.ways, found.bfloat16):
        print(f"{way.name:<28} {way.scores:>7} scores, largest difference {way.largest:.2e}")
    print(f"one wrong token in the prompt moves the last score by up to {found.control:.2e}")
    print(f"{'passed' if found.passed else 'FAILED'}: largest difference {found.largest:.2e}, bound {found.bound:.2e}")
    return 0 if found.passed else 1


def _bench(options) -> int:
    from jaxprm import files
    from jaxprm.scoring.bench import TreeSizes, bench_search, table

    found = bench_search(TreeSizes(**{name: getattr(options, name) for name in TreeSizes._fields}), torch=options.torch)
    print(table(found))
    if options.json:
        files.write_json(options.json, found)
    return 0


def _evaluate(options) -> int:
    from jaxprm import files
    from jaxprm.errors import UserError
    from jaxprm.evaluation.evaluate import Settings, evaluate
    from jaxprm.evaluation.statistics import Resampling
    from jaxprm.evaluation.tables import evaluation_table

    if options.json and (options.json.is_dir() or options.json.resolve() == options.input.resolve()):
        raise UserError(f"json {options.json}: is a directory, or the input; name another file")
    settings = Settings(
        labels=options.labels,
        label_kind=options.label_kind,
        validation_share=options.validation_share,
        threshold=options.threshold,
        group=options.group,
        resampling=Resampling(samples=options.samples, seed=options.seed),
    )
    report = evaluate(options.model, options.input, settings)
    print(evaluation_table(report))
    if options.json:
        files.write_json(options.json, report)
    return 1 if report["input"]["errors"] else 0


def _export(options) -> int:
    from jaxprm.export.export import export

    made = export(
        options.model,
        options.output,
        head_format=options.format,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        template=options.chat_template,
        verify=options.verify,
        trajectories=options.input,
    )
    print(f"exported: {options.output}")
    if options.verify:
        print(
            f"verified: largest difference {made['largest_difference']:.2e}, bound {made['bound']:.2e}, "
            f"at {made['read_positions']} read positions of {made['trajectories']} conversations"
        )
    if "rounding" in made:
        print(f"rounding the weights to {options.dtype} moved scores by up to {made['rounding']:.2e}")
    return 0


def _import_trajectories(options) -> int:
    from data_pipeline import splits
    from data_pipeline.errors import listed
    from data_pipeline.importers import convert, fields
    from jaxprm import progress

    scale = options.outcome_scale
    split_by = options.split_by if options.split_by != "task" else ""
    settings = convert.Options(
        format=options.format,
        messages=options.messages_field,
        outcome=options.outcome_field,
        success=options.success_field,
        id=options.id_field,
        task=options.task_field,
        scale=fields.Scale.parse(scale) if scale is not None else fields.Scale(),
        split_by="" if split_by is None and options.validation_share is not None else split_by,
        validation_share=splits.VALIDATION_SHARE if options.validation_share is None else options.validation_share,
        seed=options.seed,
        skip_bad=options.skip_bad,
    )
    with progress.absolute("import", unit="B", unit_scale=True) as show:
        report = convert.import_trajectories(options.input, options.output, settings, progress=show)
    _write_report(options.json, report)
    print("\n".join(convert.to_text(report, options.output)))
    if report.bad:
        print("\n".join(listed(report.bad)), file=sys.stderr)
    return 0


def _validate(options) -> int:
    from data_pipeline.splits import parse_inputs
    from data_pipeline.validate import to_text, validate
    from jaxprm import progress
    from jaxprm.errors import UserError

    if options.tokenizer is None and (options.max_length is not None or options.chat_template != "own"):
        raise UserError("--max-length and --chat-template are about tokens: give a --tokenizer too")
    encoder = None
    if options.tokenizer is not None:
        from data_pipeline.encode import Encoder

        encoder = Encoder.load(options.tokenizer, options.chat_template)
    with progress.absolute("validate", unit="row") as show:
        report = validate(parse_inputs(options.files), encoder=encoder, max_length=options.max_length, progress=show)
    _write_report(options.json, report)
    print(to_text(report))
    failed = report.leaks or not report.trajectories or (report.bad and not options.skip_bad)
    return 1 if failed else 0


def _write_report(path: Path | None, report) -> None:
    if path is not None:
        import msgspec

        from jaxprm import files

        files.write_json(path, msgspec.to_builtins(report))


VERBS = dict.fromkeys(STAGE_VERBS, _stages) | {
    "imitate": _imitate,
    "inspect": _inspect,
    "plan": _plan,
    "score": _score,
    "serve": _serve,
    "check-scorer": _check_scorer,
    "bench": _bench,
    "export": _export,
    "import-trajectories": _import_trajectories,
    "validate": _validate,
    "evaluate": _evaluate,
}
