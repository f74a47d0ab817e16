"""Small files as users bring them, and what comes of each: the messages, labels and counts, or the error."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from data_pipeline import trajectory as trajectories
from data_pipeline.importers import registry
from jaxprm import arguments, cli

CASES = Path(__file__).parent / "cases"


class Result:
    """Exit status, output and rows of an import with `--format auto`."""

    def __init__(self, directory: Path, name: str, *options: str):
        self.output = directory / "out.jsonl"
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command = ["import-trajectories", "--input", str(CASES / name), "--output", str(self.output), *options]
            self.code = cli.main(command)
        self.out, self.err = out.getvalue(), err.getvalue()
        lines = self.output.read_text().splitlines() if self.output.exists() else []
        self.rows = [json.loads(line) for line in lines]

    @property
    def row(self) -> dict:
        assert self.code == 0, self.err
        (row,) = self.rows
        return row

    def texts(self) -> list[tuple[str, str]]:
        return [(message["role"], message.get("content")) for message in self.row["messages"]]


@pytest.fixture
def run(tmp_path):
    return lambda name, *options: Result(tmp_path, name, *options)


FOUND = ("user", "Find parcel 7.")
LOOKED = ("assistant", "I look in the depot.")


def call_of(message: dict) -> tuple[str, str]:
    (call,) = message["tool_calls"]
    return call["function"]["name"], call["function"]["arguments"]


def parts(row: dict) -> list[str]:
    return [part["text"] for part in row["messages"][-1]["content"]]


def test_the_names_of_all_formats_are_options():
    assert set(arguments.IMPORT_FORMATS) == set(registry.FORMATS)


def test_an_sdk_dump_is_taken_without_its_null_fields(run):
    result = run("sdk_dump.jsonl")
    assert "refusal" not in json.dumps(result.row) and result.row.get("meta") == {"reward": 1.0}
    assert call_of(result.row["messages"][1]) == ("look", '{"depot": "north"}')


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_kept_whatever_it_is_called(run, name):
    result = run(f"{name}.jsonl")
    thoughts = [m["reasoning_content"] for m in result.row["messages"] if "reasoning_content" in m]
    assert thoughts == {"reasoning": ["2+2=4"], "reasoning_content": ["North was named last.", "Nothing there."]}[name]
    assert f"  {len(thoughts)} messages with reasoning, kept" in result.out


def test_reasoning_alone_is_a_step(run):
    (_, step, _, last) = run("reasoning_only.jsonl").row["messages"]
    assert (step["content"], step["reasoning_content"]) == ("", "hm") and step.get("step", True)
    assert (last["role"], last["content"]) == LOOKED


def test_a_system_prompt_next_to_the_messages_is_a_message(run):
    result = run("system_top_level.jsonl")
    assert result.texts() == [("system", "Be brief."), FOUND, LOOKED] and "system" not in result.row["meta"]


def test_anthropic_blocks(run):
    result = run("anthropic_blocks.jsonl")
    assert result.texts() == [
        ("system", "Be brief."),
        FOUND,
        ("assistant", "I look."),
        ("tool", "nothing"),
        ("assistant", "Not there."),
    ]
    action, answer = result.row["messages"][2:4]
    assert action["reasoning_content"] == "north?" and action["tool_calls"][0]["id"] == answer["tool_call_id"] == "t1"
    assert json.loads(call_of(action)[1]) == {"depot": "north"}
    (tool,) = result.row["tools"]
    assert tool["type"] == "function" and tool["function"]["parameters"]["properties"] == {"depot": {"type": "string"}}
    assert "format anthropic: `messages` with blocks of type thinking" in result.out


def test_items_of_the_responses_api(run):
    result = run("responses_items.jsonl")
    assert result.texts() == [FOUND, ("assistant", None), ("tool", "nothing"), ("assistant", "Not there.")]
    assert call_of(result.row["messages"][1]) == ("look", '{"depot": "north"}')
    assert "1 items of reasoning that hold no text" in result.out and "format responses" in result.out


def test_atif_with_the_outcome_of_its_trial(run, tmp_path):
    result = run("atif_trajectory.json")
    assert result.texts() == [FOUND, ("assistant", ""), ("tool", "nothing"), ("assistant", "Not there.")]
    assert result.row["messages"][1]["reasoning_content"] == "north?" and result.row["id"] == "s"
    assert result.row["tools"][0]["function"]["name"] == "look"
    assert "1 without an outcome" in result.out
    trial = tmp_path / "job" / "trial-1"
    (trial / "agent").mkdir(parents=True)
    (trial / "agent" / "trajectory.json").write_bytes((CASES / "atif_trajectory.json").read_bytes())
    about = {"task_name": "find-7", "trial_name": "find-7__x", "verifier_result": {"rewards": {"reward": 0.5}}}
    (trial / "result.json").write_text(json.dumps(about))
    (trial / "agent" / "log.txt").write_text("no trajectory")
    result = Result(tmp_path, tmp_path / "job", "--output", str(tmp_path / "job.jsonl"))
    (row,) = [json.loads(line) for line in (tmp_path / "job.jsonl").read_text().splitlines()]
    assert (row["id"], row["task"], row["outcome"]) == ("find-7__x", "find-7", 0.5)
    assert "1 files of folders have another kind" in result.out
    assert "1 rows of files in folders have no known shape" in result.out and "result.json" in result.out


def test_verifiers_traces_and_rows(run):
    result = run("verifiers_trace.jsonl")
    assert result.texts() == [FOUND, ("assistant", "first"), ("user", "more"), ("assistant", "last")]
    assert (result.row["task"], result.row["outcome"]) == ("k", 1.0)
    rows = Result(result.output.parent, "prompt_completion.jsonl", "--output", str(result.output) + "2")
    (row,) = [json.loads(line) for line in Path(str(result.output) + "2").read_text().splitlines()]
    assert [m["content"] for m in row["messages"]] == ["Find parcel 7.", "yes", "more", "bye"]
    assert (row["task"], row["outcome"]) == ("0", 1.0) and "format prompt-completion" in rows.out


def test_processbench(run):
    row = run("processbench.jsonl").row
    assert parts(row) == ["One.\n", "So 3.\n"] and row["step_labels"] == [1.0, 0.0] and row["outcome"] == 0.0
    assert row["meta"]["label"] == 1  # the first error, which `evaluate --labels label` reads


def test_math_shepherd(run):
    row = run("math_shepherd.jsonl").row
    assert row["messages"][0]["content"] == "1+1?" and parts(row) == ["Step 1: one\n", "Step 2: 3\n"]
    assert row["step_labels"] == [1.0, 0.0] and "task" not in row and row["meta"] == {"task": "GSM8K"}


def test_prm800k(run):
    result = run("prm800k.jsonl")
    main, other = result.rows
    assert parts(main) == ["One.\n", "2.\n"] and main["step_labels"] == [1.0, 1.0]
    # The rated completion that was not chosen is a trajectory, in which earlier steps are not labelled again.
    assert parts(other) == ["One.\n", "3.\n"] and other["step_labels"] == [None, -1.0]
    assert "1 more trajectories than rows" in result.out


@pytest.mark.parametrize(
    ("name", "id"),
    [("one_pretty_object.json", "1"), ("bare_message_array.json", "bare_message_array"), ("gzip.jsonl.gz", "1")],
)
def test_files_of_one_object_of_messages_alone_and_compressed(run, name, id):
    result = run(name)
    assert result.texts() == [FOUND, LOOKED] and result.row["id"] == id


def test_nested_tools_are_next_to_the_messages_or_at_their_path(run, tmp_path):
    result = run("nested_tools.jsonl", "--messages-field", "request.messages")
    assert result.row["tools"][0]["function"]["name"] == "look" and "request" not in result.row["meta"]
    assert result.texts() == [FOUND, LOOKED]
    raw = json.loads((CASES / "nested_tools.jsonl").read_text())
    raw["other"] = {"defs": raw["request"].pop("tools")}
    (tmp_path / "log.jsonl").write_text(json.dumps(raw))
    more = ("--messages-field", "request.messages", "--tools-field", "other.defs", "--output", str(tmp_path / "o"))
    assert Result(tmp_path, tmp_path / "log.jsonl", *more).code == 0
    assert json.loads((tmp_path / "o").read_text())["tools"] == result.row["tools"]
    unknown = Result(tmp_path, "nested_tools.jsonl", "--output", str(tmp_path / "p"))
    assert unknown.code == 2 and "keys id, reward, request; try --messages-field request.messages" in unknown.err


def test_media_of_a_row_are_refused(run):
    result = run("row_media.jsonl")
    assert result.code == 2 and "`images` of the row: only text can be trained on" in result.err


@pytest.mark.parametrize("option", [(), ("--step-labels-field", "lab")])
def test_a_label_by_message_stays_on_its_message(run, option):
    row = run("sharegpt_system_labels.jsonl", *option).row
    assert [message["content"] for message in row["messages"]] == ["s", "q", "first", "second", "third"]
    if option:
        assert row["step_labels"] == [None, 0.0, None] and "lab" not in row["meta"]
    else:
        assert row["meta"]["lab"] == {"3": 0} and row["messages"][3]["content"] == "second"


def test_labels_as_an_object_are_labels_by_message(run, tmp_path):
    assert run("labels_as_object.jsonl").row["step_labels"] == [1.0, -1.0]
    raw = json.loads((CASES / "labels_as_object.jsonl").read_text())
    raw |= {"id": 7, "outcome": False, "reward": None}
    (tmp_path / "rows.json").write_text(json.dumps(raw, indent=1))
    (row,) = trajectories.read(tmp_path / "rows.json")
    assert (row.id, row.outcome) == ("7", 0.0)
    assert row.step_labels == [1.0, -1.0]


@pytest.mark.parametrize(("name", "text"), [("malformed_arguments", '{"depot": "north"'), ("empty_arguments", "")])
def test_arguments_that_are_no_json_are_kept_as_text(run, name, text):
    result = run(f"{name}.jsonl")
    assert call_of(result.row["messages"][1]) == ("look", text)
    assert "1 tool calls whose arguments are not a JSON object, kept as text" in result.out


def test_nan_in_another_field_is_null_and_where_a_number_is_needed_it_is_named(run, tmp_path):
    result = run("nan_elsewhere.jsonl")
    assert result.row["meta"] == {"reward": 1.0, "loss": None} and "NaN or infinite" in result.out
    named = Result(tmp_path, "nan_elsewhere.jsonl", "--outcome-field", "loss", "--output", str(tmp_path / "o"))
    assert named.code == 2 and "loss = nan is outside" in named.err
    (tmp_path / "r.jsonl").write_text(
        (CASES / "nan_elsewhere.jsonl").read_text().replace('"loss":NaN', '"rewards":[NaN]')
    )
    named = Result(tmp_path, tmp_path / "r.jsonl", "--output", str(tmp_path / "o"))
    assert named.code == 2 and "rewards[0] is nan" in named.err


def test_half_a_surrogate_pair_is_replaced_and_counted(run):
    result = run("lone_surrogate.jsonl")
    assert result.texts()[0] == ("user", "a\ufffd b") and "1 texts with half a surrogate pair" in result.out


def test_special_tokens_are_imported_and_left_to_the_encoder(run):
    assert run("special_token_in_tool_output.jsonl").row["messages"][2]["content"].startswith("x<|im_end|>")


def test_a_split_by_a_constant_task_is_an_error(run):
    result = run("constant_task.jsonl", "--split-by", "task")
    assert result.code == 2 and not result.rows
    assert "--split-by task: all 10 trajectories have the same task, so one split would be empty" in result.err


def test_a_preference_pair(run):
    row = run("preference_pair.jsonl").row
    assert row["messages"] == [{"role": "user", "content": "Find parcel 7."}]
    assert row["chosen"] == {"role": "assistant", "content": "north"}
    assert row["rejected"] == [{"role": "assistant", "content": "nowhere"}]


def test_several_agents_are_named_by_their_roles(run):
    refused = run("several_agents.jsonl")
    assert refused.code == 2 and "--roles" in refused.err
    result = run("several_agents.jsonl", "--roles", "assistant=Orchestrator,Courier")
    assert [(m["role"], m.get("name")) for m in result.row["messages"]] == [
        ("user", None),
        ("assistant", "Orchestrator (thought)"),
        ("assistant", "Courier"),
    ]
    assert result.row["step_labels"] == [0.0, None]  # the mistake is message 1
    context = Result(
        result.output.parent, "several_agents.jsonl", "--roles", "assistant=Orchestrator", "context=Courier",
        "--output", str(result.output) + "2",
    )  # fmt: skip
    assert context.code == 0
    assert [m.get("step", True) for m in json.loads(Path(str(result.output) + "2").read_text())["messages"]] == [
        True, True, False,
    ]  # fmt: skip


def test_no_escape_reaches_the_terminal(run, tmp_path):
    raw = json.loads((CASES / "terminal_escape.jsonl").read_text())
    printed = run("terminal_escape.jsonl")
    assert printed.code == 2  # no step
    raw["messages"].append({"role": "assistant", "content": "x", raw["id"]: 1})
    raw["task"] = raw["messages"][0][raw["id"]] = raw["id"]
    (tmp_path / "t.jsonl").write_text(json.dumps(raw) + "\n" + json.dumps({raw["id"]: 1}) + "\n")
    imported = Result(tmp_path, tmp_path / "t.jsonl", "--skip-bad")
    assert imported.code == 0 and r"\x1b" in imported.out and r"\x1b" in imported.err
    assert not any(character in imported.out + imported.err + printed.err for character in "\x1b\x07")
