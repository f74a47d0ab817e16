"""The command line: what each verb does.

Exit status: 0, 1 for bad rows or a failed check, 2 for a user's mistake (one line), 75 for interrupted work that the
same command resumes, 130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.terminal import safe_output
from jaxprm.arguments import STAGE_VERBS, parse
from jaxprm.errors import RESUMABLE, Interrupted
from jaxprm.host_memory import keep_freed

if TYPE_CHECKING:
    from data_pipeline.paths import Named

# Errors of the file system that the user can fix. Others may be bugs, and keep their traceback.
_FILE_ERRORS = {
    errno.EACCES,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
}
# Verbs that call compiled programs many times: they keep freed memory (see host_memory.py).
COMPUTING = {*STAGE_VERBS, "imitate", "score", "evaluate", "serve", "check-scorer", "bench"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with safe_output():
        if (undecoded := next((text for text in arguments if not _is_text(text)), None)) is not None:
            print(f"jaxprm: {undecoded!a}: is not valid UTF-8; rename the file or retype the value", file=sys.stderr)
            return 2
        return _run(parse(arguments))


def _run(options: argparse.Namespace) -> int:
    if options.verb in COMPUTING:
        # Before JAX starts its threads.
        keep_freed()
    try:
        with guarded(options):
            return VERBS[options.verb](options)
    except KeyboardInterrupt:
        effect = "starts over" if options.verb in ("evaluate", "export", "serve") else "resumes where it stopped"
        print(f"jaxprm: interrupted; the same command {effect}", file=sys.stderr)
        # 128 + SIGINT, as shells report it.
        return 130
    except Interrupted as stopped:
        print(f"jaxprm: {stopped}", file=sys.stderr)
        return RESUMABLE
    except SystemExit as ended:
        # Otherwise a script would take unfinished work for done.
        print(
            f"jaxprm: a config, or code that it names, called sys.exit({ended.code!r}); remove that call",
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        if (line := _one_line(error)) is None:
            raise
        print(f"jaxprm: {line}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str | None:
    """The message for a user's mistake, or None for a bug of ours, which keeps its traceback."""
    from data_pipeline.errors import DataError
    from jaxprm.errors import UserError

    if isinstance(error, (UserError, DataError)):
        return " ".join(str(error).split())
    number = error.errno if isinstance(error, OSError) else None
    where = str(getattr(error, "filename", None) or "")
    # Orbax and TensorFlow wrap errors of the disk in exceptions that carry no errno.
    if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
        where = f" writing {where}" if where else ""
        return f"no space left on the device{where}; free some and run the same command again: finished work is kept"
    if number == errno.ENAMETOOLONG:
        return f"{where[:80]}...: {os.strerror(number)} ({len(os.fsencode(where))} bytes)"
    if number in _FILE_ERRORS and where:
        return f"{where}: {os.strerror(number)}"
    if number == errno.EROFS or os.strerror(errno.EROFS) in str(error):
        return f"the disk cannot be written: {' '.join(str(error).split())}"
    return None


def _is_text(argument: str) -> bool:
    # Python reads other bytes of a command line as lone surrogates, which no file of ours could hold.
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def guarded(options: argparse.Namespace) -> Iterator[None]:
    """Refuses outputs that are inputs, and excludes other processes that write the same report.

    The verbs with other outputs lock these themselves. Raises DataError or UserError before any work.
    """
    from data_pipeline.locks import locked
    from data_pipeline.output import staging_file_of
    from data_pipeline.paths import check_paths
    from jaxprm.errors import UserError

    report = getattr(options, "json", None)
    # `inspect` has an option --json without a file.
    report = report if isinstance(report, Path) else None
    check_paths(*named_paths(options, report))
    if report is None:
        yield
        return
    if report.is_dir():
        raise UserError(f"--json {report}: is a directory; name a file")
    with locked(report, staging=[staging_file_of(report)]):
        yield


def named_paths(options: argparse.Namespace, report: Path | None) -> tuple[list[Named], list[Named]]:
    """The paths that a verb's options name: those that it reads, and those that it writes but a work directory's."""
    from data_pipeline.paths import Named
    from data_pipeline.splits import parse_inputs

    reads = []
    for name in ("config", "input", "model", "policy", "reference", "tokenizer", "chat_template"):
        value = getattr(options, name, None)
        values = value if isinstance(value, list) else [value]
        reads += [Named(name.replace("_", " "), Path(path)) for path in values if path is not None]
    # [SPLIT=]FILE
    split_files = parse_inputs([*(getattr(options, "files", None) or []), *(getattr(options, "data", None) or [])])
    reads += [Named("input", Path(path)) for paths in split_files.values() for path in paths]
    writes = [Named("output", options.output)] if getattr(options, "output", None) else []
    return reads, writes + ([Named("--json", report)] if report else [])


def _stages(options) -> int:
    # Imports are within the handlers: --help and mistakes in options load no JAX, TensorFlow or torch.
    from jaxprm import config
    from jaxprm.training import distributed
    from jaxprm.workflow.run import run, validation_lines

    experiment = config.load(options.config, options.overrides + _overrides(options), quick=options.quick)
    own_trajectories, until = bool(experiment.collection.files), STAGE_VERBS[options.verb][0]
    if own_trajectories and options.verb == "run":
        until = "train"  # nothing says that the config's environment has the tasks of these trajectories
    profile = _steps(options.profile)
    with distributed.joined(slices=experiment.mesh.dcn_data):
        page = run(experiment, options.workdir, until=until, redo=options.redo, profile=profile)
    if own_trajectories and until == "train":
        print("trained on your own trajectories; on the validation trajectories:")
        print("\n".join(f"  {line}" for line in validation_lines(experiment, options.workdir)))
        if options.verb == "run":
            print("run ends here without a search; `search` and `report` search in the config's environment")
    if page is not None:
        from jaxprm.evaluation.tables import results_table

        print(results_table(options.workdir / "results.json"))
        print(f"\nreport: {page}")
    return 0


def _steps(text: str | None) -> tuple[int, int] | None:
    """The first and last step of START:END, counted from 1."""
    from jaxprm.errors import UserError

    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile {text}: give the first and the last step, from 1, as 10:12")
    return int(first), int(last)


def _inspect(options) -> int:
    from jaxprm.artifacts import checkpoints

    description = checkpoints.inspect(options.directory)
    print(json.dumps(description, indent=2) if options.json else checkpoints.summary(description))
    return 0


def _overrides(options) -> list[str]:
    """Options that stand for config fields, as overrides."""
    fields = {
        "collection.files": options.data,
        "base_model": options.model,
        "policy.chat_template": options.chat_template,
        "policy.reasoning": options.reasoning,
        "policy.special_tokens": options.special_tokens,
        # An absent option must not override the config.
        "collection.skip_bad": options.skip_bad or None,
    }
    return [f"{field}={json.dumps(value)}" for field, value in fields.items() if value is not None]


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
    from jaxprm.config import parse_mesh
    from jaxprm.errors import UserError
    from jaxprm.scoring.files import score_file
    from jaxprm.scoring.loading import all_devices
    from jaxprm.scoring.sources import progress_advantage, reward_model

    _check_pair(options)
    if (options.model is None) == (options.policy is None):
        raise UserError("score: give --model, or --policy and --reference")
    source = reward_model(options.model) if options.model else progress_advantage(options.policy, options.reference)
    counts = score_file(
        source,
        options.input,
        options.output,
        dtype=options.dtype,
        template=options.chat_template,
        reasoning=options.reasoning,
        special_tokens=options.special_tokens,
        mesh=parse_mesh(options.mesh) if options.mesh else all_devices(),
    )
    print(f"scored {counts.scored} trajectories, {counts.errors} errors: {options.output}")
    if counts.longer:
        print(
            f"{counts.longer} of them are longer than all that the model was trained on ({source.trained_length} "
            'tokens): their lines have "tokens"'
        )
    return 1 if counts.errors else 0


def _check_pair(options) -> None:
    from jaxprm.errors import UserError

    if (options.policy is None) != (options.reference is None):
        missing = "--reference" if options.reference is None else "--policy"
        raise UserError(f"{options.verb}: {missing} is missing; a log-ratio needs a policy and its reference")


def _serve(options) -> int:
    from jaxprm.serving import server

    return server.serve_verb(options)


def _check_scorer(options) -> int:
    from jaxprm.scoring.check import check_scorer

    encoding = {"reasoning": options.reasoning, "special_tokens": options.special_tokens}
    check = check_scorer(options.model, options.input, count=options.count, **encoding)
    for way in (*check.ways, check.bfloat16):
        print(f"{way.name:<28} {way.scores:>7} scores, largest difference {way.largest:.2e}")
    print(f"one wrong token in the prompt moves the last score by up to {check.sensitivity:.2e}")
    print(f"float32 arithmetic alone moves scores of this model by up to {check.float32_error:.2e}")
    print(f"{'passed' if check.passed else 'FAILED'}: largest difference {check.largest:.2e}, bound {check.bound:.2e}")
    return 0 if check.passed else 1


def _bench(options) -> int:
    from jaxprm import files
    from jaxprm.scoring.bench import TreeSizes, bench_search, table

    sizes = TreeSizes(**{name: getattr(options, name) for name in TreeSizes._fields})
    measured = bench_search(sizes, torch=options.torch)
    print(table(measured))
    if options.json:
        files.write_json(options.json, measured)
    return 0


def _evaluate(options) -> int:
    from jaxprm import files
    from jaxprm.errors import UserError
    from jaxprm.evaluation.evaluate import Settings, evaluate
    from jaxprm.evaluation.statistics import Resampling
    from jaxprm.evaluation.tables import evaluation_table
    from jaxprm.scoring.sources import progress_advantage, reward_model

    _check_pair(options)
    if options.model is None and options.policy is None:
        raise UserError("evaluate: give --model, or --policy and --reference")
    if (exit_status := _evaluate_pairs(options)) is not None:
        return exit_status
    settings = Settings(
        labels=options.labels,
        label_kind=options.label_kind,
        validation_share=options.validation_share,
        threshold=options.threshold,
        group=options.group,
        resampling=Resampling(samples=options.samples, seed=options.seed),
        reasoning=options.reasoning,
        special_tokens=options.special_tokens,
    )
    sources = [reward_model(model) for model in options.model or ()]
    if options.policy is not None:
        sources.append(progress_advantage(options.policy, options.reference))
    report = evaluate(sources, options.input, settings)
    print(evaluation_table(report))
    if options.json:
        files.write_json(options.json, report)
    return 1 if report["input"]["errors"] else 0


def _evaluate_pairs(options) -> int | None:
    """`evaluate` on a file of preference pairs; None for any other file."""
    from data_pipeline.preferences import holds_preferences
    from jaxprm import files
    from jaxprm.errors import UserError
    from jaxprm.evaluation.evaluate import Settings
    from jaxprm.evaluation.labels import OWN_FIELD
    from jaxprm.evaluation.pairs import evaluate_pairs, pairs_table
    from jaxprm.evaluation.statistics import Resampling

    if not options.input.is_file() or not holds_preferences(options.input):
        return None
    if not options.model:
        raise UserError("evaluate: a file of pairs needs --model")
    ignored = {
        "--policy and --reference": options.policy is not None,
        "--labels": options.labels != OWN_FIELD,
        "--label-kind": options.label_kind is not None,
        "--validation-share": options.validation_share != Settings.validation_share,
        "--threshold": options.threshold is not None,
    }
    if names := [name for name, is_set in ignored.items() if is_set]:
        raise UserError(
            f"evaluate: {', '.join(names)} with {options.input}, a file of pairs, which has no outcomes and no step "
            "labels; leave them out"
        )
    resampling = Resampling(samples=options.samples, seed=options.seed)
    encoding = {"reasoning": options.reasoning, "special_tokens": options.special_tokens}
    report = evaluate_pairs(options.model, options.input, resampling, group=options.group, **encoding)
    print(pairs_table(report))
    if options.json:
        files.write_json(options.json, report)
    return 1 if report["input"]["errors"] else 0


def _export(options) -> int:
    from jaxprm.export.export import export

    report = export(
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
            f"verified: largest difference {report['largest_difference']:.2e}, bound {report['bound']:.2e}, "
            f"at {report['read_positions']} read positions of {report['trajectories']} conversations"
        )
    if "rounding" in report:
        print(f"rounding the weights to {options.dtype} moved scores by up to {report['rounding']:.2e}")
    return 0


def _import_trajectories(options) -> int:
    from data_pipeline import splits
    from data_pipeline.errors import listed
    from data_pipeline.importers import convert, fields
    from jaxprm import progress

    scale = options.outcome_scale
    # "" is the task, which need not be a field of the rows.
    split_by = options.split_by if options.split_by != "task" else ""
    settings = convert.Options(
        format=options.format,
        messages=options.messages_field,
        tools=options.tools_field,
        step_labels=options.step_labels_field,
        roles=convert.parse_roles(options.roles),
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
        report = convert.import_trajectories(
            options.input,
            options.output,
            settings,
            progress=show,
            # The output exists only with its report: after a kill, the command refuses to overwrite the output.
            before_output=functools.partial(_write_report, options.json),
        )
    print("\n".join(convert.to_text(report, options.output)))
    if report.bad:
        print("\n".join(listed(report.bad)), file=sys.stderr)
    return 0


def _validate(options) -> int:
    from data_pipeline.splits import parse_inputs
    from data_pipeline.validate import to_text, validate
    from jaxprm import progress
    from jaxprm.errors import UserError

    of_tokens = (options.max_length, options.reasoning, options.special_tokens)
    if options.tokenizer is None and (options.chat_template != "own" or any(value is not None for value in of_tokens)):
        raise UserError(
            "--max-length, --chat-template, --reasoning and --special-tokens are about tokens: give a --tokenizer too"
        )
    encoder = None
    if options.tokenizer is not None:
        from data_pipeline.encode import Encoder
        from jaxprm.export.exportable import check_exportable

        encoder = Encoder.load(
            options.tokenizer,
            options.chat_template,
            reasoning=options.reasoning or "keep",
            special_tokens=options.special_tokens or "error",
        )
        check_exportable(options.tokenizer, encoder)
    with progress.absolute("validate", unit="row") as show:
        report = validate(parse_inputs(options.files), encoder=encoder, max_length=options.max_length, progress=show)
    _write_report(options.json, report)
    print(to_text(report))
    failed = report.leaks or not (report.trajectories or report.pairs) or (report.bad and not options.skip_bad)
    return 1 if failed else 0


def _write_report(path: Path | None, report) -> None:
    if path is not None:
        import msgspec

        from jaxprm import files

        files.write_json(path, msgspec.to_builtins(report))


VERBS: dict[str, Callable[[argparse.Namespace], int]] = dict.fromkeys(STAGE_VERBS, _stages) | {
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
