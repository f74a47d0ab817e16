import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxprm import arguments as arguments_lib
from jaxprm import cli
from jaxprm.errors import Interrupted

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "textcraft_tiny.py"


def run(capsys, *arguments):
    """(exit status, what the user reads on stderr)."""
    code = cli.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def assert_one_line(err, *parts):
    assert err.count("\n") == 1 and err.startswith("jaxprm: "), err
    for part in parts:
        assert part in err, err


@pytest.mark.parametrize("verb", [[], *([verb] for verb in cli.VERBS)])
def test_help_loads_no_framework(verb):
    program = (
        "import sys\nfrom jaxprm import cli\n"
        f"try: cli.main({[*verb, '--help']!r})\nexcept SystemExit as stop: assert stop.code == 0\n"
        "print([name for name in ('jax', 'tensorflow', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_verb_has_a_handler():
    listed = arguments_lib.parser()._subparsers._group_actions[0].choices
    assert set(listed) == set(cli.VERBS)


def test_a_missing_config_is_named(capsys, tmp_path):
    code, err = run(capsys, "run", tmp_path / "no.py", "--workdir", tmp_path)
    assert code == 2
    assert_one_line(err, "no.py", "no such file")


def test_an_unknown_field_is_named(capsys, tmp_path):
    code, err = run(capsys, "run", TINY, "search.pol=3", "--workdir", tmp_path)
    assert code == 2
    assert_one_line(err, "pol", "search")


def test_a_value_out_of_range_comes_with_its_bound(capsys, tmp_path):
    code, err = run(capsys, "run", TINY, "collection.trajectories_per_task=0", "--workdir", tmp_path)
    assert code == 2
    assert_one_line(err, "collection.trajectories_per_task", "0", ">= 1")


def test_a_work_directory_of_another_config_is_refused_before_any_work(capsys, tmp_path):
    stages = tmp_path / "stages"
    stages.mkdir()
    (stages / "collect.json").write_text(json.dumps({"inputs": {"seed": 7}, "finished": True, "seconds": 1.0}))
    code, err = run(capsys, "run", TINY, "--workdir", tmp_path)
    assert code == 2
    assert_one_line(err, "stage collect", "--workdir", "--redo")
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "trajectories").exists()


def test_overrides_may_follow_the_options():
    options = cli.parse(["run", "c.py", "a=1", "--workdir", "w", "b.c=2", "--redo", "d=[3]"])
    assert options.overrides == ["a=1", "b.c=2", "d=[3]"] and options.redo


@pytest.mark.parametrize("extra", [["stray"], ["--nothing"], ["--nothing=3"]])
def test_an_argument_that_is_neither_option_nor_override_is_refused(extra, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(["run", "c.py", "a=1", "--workdir", "w", *extra])
    assert stop.value.code == 2 and extra[0] in capsys.readouterr().err


def test_a_missing_model_and_a_missing_input_are_named(capsys, tmp_path):
    code, err = run(capsys, "score", "--model", tmp_path / "none", "--input", "x", "--output", "y")
    assert code == 2
    assert_one_line(err, "none", "no such directory")


def test_a_missing_policy_is_named(capsys, tmp_path):
    code, err = run(capsys, "run", TINY, f"policy.path={tmp_path}/nothing", "--workdir", tmp_path / "w")
    assert code == 2
    assert_one_line(err, "nothing", "policy")


@pytest.mark.parametrize("verb", ["run", "score"])
def test_a_full_disk_is_one_line(capsys, monkeypatch, tmp_path, verb):
    def full(options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "trajectories/train.jsonl")

    monkeypatch.setitem(cli.VERBS, verb, full)
    where = {"run": [TINY, "--workdir", tmp_path], "score": ["--model", "m", "--input", "i", "--output", "o"]}[verb]
    code, err = run(capsys, verb, *where)
    assert code == 2
    assert_one_line(err, "no space left", "trajectories/train.jsonl", "kept")


def test_our_own_mistakes_keep_their_traceback(monkeypatch, tmp_path):
    def broken(options):
        raise ValueError("a bug")

    monkeypatch.setitem(cli.VERBS, "run", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["run", str(TINY), "--workdir", str(tmp_path)])


@pytest.mark.slow
def test_control_c_is_one_line_and_the_same_command_resumes(tmp_path):
    small = ["collection.train_tasks=4", "collection.validation_tasks=2", "collection.trajectories_per_task=3"]
    command = [sys.executable, "-m", "jaxprm", "collect", str(TINY), *small, "policy.in_flight=4", "--workdir"]
    # A shell starts background jobs with Ctrl-C ignored, and so may whatever runs these tests.
    listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [*command, tmp_path / "a"], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=listens
    )
    partial = tmp_path / "a/trajectories/train.jsonl.partial"
    deadline = time.monotonic() + 240
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("jaxprm: interrupted") and "Traceback" not in err
    for name in ("a", "b"):
        subprocess.run([*command, tmp_path / name], cwd=ROOT, check=True, capture_output=True)
    for split in ("train", "validation"):
        texts = [(tmp_path / name / f"trajectories/{split}.jsonl").read_text() for name in ("a", "b")]
        assert texts[0] == texts[1] and texts[0]


TALK = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "left"}]


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_import_is_counted_on_the_screen_and_in_a_file(capsys, tmp_path):
    rows = [{"messages": TALK, "task": "t", "r": 50}, {"messages": TALK, "task": "t", "r": 500}, {"messages": TALK}]
    command = ["import-trajectories", "--format", "openai", "--input", write_rows(tmp_path / "log", *rows)]
    command += ["--output", tmp_path / "out", "--outcome-field", "r", "--outcome-scale", "0,100"]
    code, err = run(capsys, *command)
    assert code == 2 and "log:2: r = 500 is outside [0, 100]" in err and not (tmp_path / "out").exists()
    command += ["--skip-bad", "--validation-share", "0.5", "--json", tmp_path / "report"]
    assert cli.main([str(argument) for argument in command]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"2 trajectories of 3 rows written, 1 left out: {tmp_path / 'out'}\n")
    assert "1 without an outcome" in out and "1 bad row:" in err
    report = json.loads((tmp_path / "report").read_text())
    assert (report["rows"], report["written"], report["skipped"], report["without_outcome"]) == (3, 2, 1, 1)
    written = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["split"] in ("train", "validation") for line in written] == [True, True]
    code, err = run(capsys, *command)
    assert code == 2 and err.endswith("exists already and is not overwritten; name another file, or remove it\n")


def test_validate_ends_with_one_for_bad_rows_unless_they_are_skipped(capsys, tmp_path):
    good, bad = {"id": "a", "messages": TALK, "split": "train", "task": "t"}, {"id": "b"}
    path = write_rows(tmp_path / "rows", good, bad)
    assert run(capsys, "validate", write_rows(tmp_path / "good", good))[0] == 0
    assert run(capsys, "validate", path, "--json", tmp_path / "report")[0] == 1
    assert json.loads((tmp_path / "report").read_text())["bad"] == [
        f"{path}:2: Object missing required field `messages`"
    ]
    assert run(capsys, "validate", path, "--skip-bad")[0] == 0
    assert run(capsys, "validate", write_rows(tmp_path / "none", bad), "--skip-bad")[0] == 1
    leak = write_rows(tmp_path / "leak", good, good | {"split": "test"})
    assert run(capsys, "validate", leak, "--skip-bad")[0] == 1
    assert run(capsys, "validate", f"train={path}", f"test={leak}")[0] == 1


@pytest.mark.parametrize("options", [["--max-length", "9"], ["--chat-template", "chatml"]])
def test_validate_needs_a_tokenizer_for_tokens(capsys, tmp_path, options):
    code, err = run(capsys, "validate", write_rows(tmp_path / "rows", {"id": "a"}), *options)
    assert code == 2
    assert_one_line(err, "--tokenizer")


def test_an_interruption_is_one_line_with_a_separate_exit_status(monkeypatch, capsys, tmp_path):
    def stop(options):
        raise Interrupted("training x: stopped at step 3 of 9; the same command resumes from there")

    monkeypatch.setitem(cli.VERBS, "inspect", stop)
    assert cli.main(["inspect", str(tmp_path)]) == 75
    assert capsys.readouterr().err == (
        "jaxprm: training x: stopped at step 3 of 9; the same command resumes from there\n"
    )


@pytest.mark.parametrize("steps", ["3", "0:4", "5:4", "a:b", "1:2:3"])
def test_invalid_steps_to_profile_are_refused(steps, tmp_path, capsys):
    assert cli.main(["train", str(TINY), "--workdir", str(tmp_path), "--profile", steps]) == 2
    assert f"--profile {steps}: give the first and the last step" in capsys.readouterr().err
