"""The command line: one verb, one line for every mistake, exit 2 for the user's, 75 to be resumed, 130 for Ctrl-C."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxprm.errors import RESUMABLE, Interrupted

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
        one.add_argument("--profile", metavar="START:END", help="trace these steps of every training")
    _config_verb(verbs, "imitate", "train a small policy by imitation of the environment's expert")
    inspect = verbs.add_parser("inspect", help="what is in a checkpoint: step, fingerprints, sizes, position, config")
    inspect.add_argument("directory", type=Path, help="a training output, a run, or a step's own directory")
    inspect.add_argument("--json", action="store_true", help="everything, as one JSON object")
    _plan_verb(verbs)
    score = verbs.add_parser("score", help="score every step of a file of trajectories")
    score.add_argument("--model", type=Path, required=True, help="a reward model: directory, training output or run")
    score.add_argument("--input", type=Path, required=True, help="trajectories, JSON Lines")
    score.add_argument("--output", type=Path, required=True, help="scores, one line for each line of the input")
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
    if options.verb != "plan":  # which may fetch a config.json
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return VERBS[options.verb](options)
    except KeyboardInterrupt:
        print("jaxprm: interrupted; the same command goes on where it stopped", file=sys.stderr)
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
    from jaxprm.run import run
    from jaxprm.training import distributed

    experiment = config.load(options.config, options.overrides, quick=options.quick)
    profile = _steps(options.profile)
    until = STAGE_VERBS[options.verb][0]
    with distributed.joined(slices=experiment.mesh.dcn_data):
        page = run(experiment, options.workdir, until=until, redo=options.redo, profile=profile)
    if page is not None:
        from jaxprm.evaluation.table import results_table

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

    from jaxprm.training import inspection

    found = inspection.inspect(options.directory)
    print(json.dumps(found, indent=2) if options.json else inspection.summary(found))
    return 0


def _imitate(options) -> int:
    from jaxprm import config
    from jaxprm.stages import WorkDirectory
    from jaxprm.training.imitate import imitate

    experiment = config.load(options.config, options.overrides)
    with WorkDirectory(options.workdir).lock():
        print(f"policy: {imitate(experiment, options.workdir)}")
    return 0


def _plan(options) -> int:
    from jaxprm.planning import command

    return command.run(options)


def _score(options) -> int:
    from jaxprm.scoring.files import score_file

    counts = score_file(options.model, options.input, options.output)
    print(f"scored {counts.scored} trajectories, {counts.errors} errors: {options.output}")
    return 1 if counts.errors else 0


def _export(options) -> int:
    from jaxprm.export import export

    made = export(options.model, options.output, verify=options.verify, trajectories=options.input)
    print(f"exported: {options.output}")
    if options.verify:
        print(f"verified: largest difference {made['largest_difference']:.2e}, bound {made['bound']:.2e}")
    return 0


VERBS = dict.fromkeys(STAGE_VERBS, _stages) | {
    "imitate": _imitate,
    "inspect": _inspect,
    "plan": _plan,
    "score": _score,
    "export": _export,
}
