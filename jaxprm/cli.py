"""The command line: one verb, one line for every mistake, exit 2 for the user's and 130 for Ctrl-C."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

STAGE_VERBS = {
    "run": ("report", "the whole loop: collect, build, train, search, report"),
    "collect": ("collect", "sample trajectories of the training and validation tasks"),
    "build": ("build", "... and encode them into shards"),
    "train": ("train", "... and train the reward models"),
    "search": ("search", "... and search the held-out tasks"),
    "report": ("report", "... and write results.json and the page"),
}


def parser() -> argparse.ArgumentParser:
    """All verbs and their options. Nothing heavy is imported to show the help."""
    main = argparse.ArgumentParser(prog="jaxprm", description="Process reward models for LLM agents, in JAX.")
    verbs = main.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (_, text) in STAGE_VERBS.items():
        one = _config_verb(verbs, verb, text)
        one.add_argument("--redo", action="store_true", help="make stages again whose config changed")
    _config_verb(verbs, "imitate", "train a small policy by imitation of the environment's expert")
    score = verbs.add_parser("score", help="score every step of a file of trajectories")
    score.add_argument("--model", type=Path, required=True, help="a reward model: directory, training output or run")
    score.add_argument("--input", type=Path, required=True, help="trajectories, JSON Lines")
    score.add_argument("--output", type=Path, required=True, help="scores, one line for each line of the input")
    check = verbs.add_parser("check-scorer", help="check that a model scores the same batched, packed and cached")
    check.add_argument("--model", type=Path, required=True, help="a reward model: directory, training output or run")
    check.add_argument("--input", type=Path, help="trajectories to check on; made up when not given")
    export = verbs.add_parser("export", help="write a reward model as a Hugging Face directory")
    export.add_argument("--model", type=Path, required=True, help="a reward model: directory, training output or run")
    export.add_argument("--output", type=Path, required=True, help="the directory to write")
    export.add_argument("--verify", action="store_true", help="compare with transformers' scores (needs torch)")
    export.add_argument("--input", type=Path, help="trajectories to verify on; made up when not given")
    return main


def _config_verb(verbs, verb: str, text: str) -> argparse.ArgumentParser:
    one = verbs.add_parser(verb, help=text, description=f"{verb}: {text}.")
    one.add_argument("config", type=Path, help="a Python file that defines `config`")
    one.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the config")
    one.add_argument("--workdir", type=Path, required=True, help="where everything is written")
    if verb != "imitate":
        one.add_argument("--quick", action="store_true", help="the file's `quick` config: a smoke run")
    return one


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
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return VERBS[options.verb](options)
    except KeyboardInterrupt:
        print("jaxprm: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
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
    from jaxprm.run import run

    experiment = config.load(options.config, options.overrides, quick=options.quick)
    page = run(experiment, options.workdir, until=STAGE_VERBS[options.verb][0], redo=options.redo)
    if page is not None:
        from jaxprm.evaluation.table import results_table

        print(results_table(options.workdir / "results.json"))
        print(f"\nreport: {page}")
    return 0


def _imitate(options) -> int:
    from jaxprm import config
    from jaxprm.stages import WorkDirectory
    from jaxprm.training.imitate import imitate

    experiment = config.load(options.config, options.overrides)
    with WorkDirectory(options.workdir).lock():
        print(f"policy: {imitate(experiment, options.workdir)}")
    return 0


def _score(options) -> int:
    from jaxprm.scoring.files import score_file

    counts = score_file(options.model, options.input, options.output)
    print(f"scored {counts.scored} trajectories, {counts.errors} errors: {options.output}")
    return 1 if counts.errors else 0


def _check_scorer(options) -> int:
    from jaxprm.scoring.check import check_scorer

    found = check_scorer(options.model, options.input)
    for way in (*found.ways, found.bfloat16):
        print(f"{way.name:<28} {way.scores:>7} scores, largest difference {way.largest:.2e}")
    print(f"one wrong token in the prompt moves the last score by up to {found.control:.2e}")
    print(f"{'passed' if found.passed else 'FAILED'}: largest difference {found.largest:.2e}, bound {found.bound:.2e}")
    return 0 if found.passed else 1


def _export(options) -> int:
    from jaxprm.export import export

    made = export(options.model, options.output, verify=options.verify, trajectories=options.input)
    print(f"exported: {options.output}")
    if options.verify:
        print(f"verified: largest difference {made['largest_difference']:.2e}, bound {made['bound']:.2e}")
    return 0


VERBS = dict.fromkeys(STAGE_VERBS, _stages) | {
    "imitate": _imitate,
    "score": _score,
    "check-scorer": _check_scorer,
    "export": _export,
}
