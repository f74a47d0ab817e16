"""Logs in the shapes that their tools write, beyond the smallest cases."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
import zstandard

from data_pipeline import source
from data_pipeline.errors import DataError
from data_pipeline.importers import inputs
from data_pipeline.importers.convert import Options, import_trajectories, parse_roles
from data_pipeline.preferences import Preference, read_rows

USER = {"role": "user", "content": "go"}
REPLY = {"role": "assistant", "content": "left"}


@pytest.fixture
def load(tmp_path):
    """Imports files by name and content (text, or an object as JSON); returns rows and the report."""

    def run(files, *inputs, **options):
        for name, content in files.items():
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not isinstance(content, bytes):
                content = (content if isinstance(content, str) else json.dumps(content)).encode()
            path.write_bytes(content)
        output = tmp_path / "out.jsonl"
        output.unlink(missing_ok=True)
        paths = [tmp_path / "in" / name for name in inputs or files]
        report = import_trajectories(paths, output, Options(**options))
        assert report.rows + report.additional == report.written + report.skipped + len(report.unknown)
        return [json.loads(line) for line in output.read_text().splitlines()], report

    return run


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts(row):
    return [(message["role"], message.get("content")) for message in row["messages"]]


def event(kind, uuid, parent, content, **fields):
    message = {"role": kind, "content": content, **fields.pop("message", {})}
    return {
        "type": kind,
        "uuid": uuid,
        "parentUuid": parent,
        "sessionId": "s",
        "cwd": "/w",
        "message": message,
    } | fields


def test_a_claude_code_session_joins_responses_and_separates_subagents(load):
    said = {"message": {"id": "m1", "model": "m"}}
    use = [{"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "ls"}}]
    result = [{"type": "tool_result", "tool_use_id": "t1", "content": "a.py", "is_error": False}]
    session = lines(
        {"type": "summary", "summary": "x", "leafUuid": "u9"},
        event("user", "u1", None, "list files"),
        event("assistant", "u2", "u1", [{"type": "thinking", "thinking": "hm", "signature": "s"}], **said),
        event("assistant", "u3", "u2", [{"type": "text", "text": "I look."}], **said),
        event("assistant", "u4", "u3", use, **said),
        event("user", "u5", "u4", result, toolUseResult={"stdout": "a.py"}),
        event("user", "a1", None, "sub task", isSidechain=True, agentId="7"),
        event("assistant", "a2", "a1", [{"type": "text", "text": "sub done"}], isSidechain=True, agentId="7"),
        event("assistant", "u6", "u5", [{"type": "text", "text": "One file."}], message={"id": "m2"}),
        event("user", "u7", "u6", "wrong turn"),
        event("assistant", "u8", "u7", [{"type": "text", "text": "abandoned"}], message={"id": "m3"}),
        event("user", "u9", "u6", "thanks"),
        event("assistant", "u10", "u9", [{"type": "text", "text": "Bye."}], message={"id": "m4"}),
    )
    (main, sub), report = load({"s.jsonl": session})
    assert texts(main) == [
        ("user", "list files"),
        ("assistant", "I look."),
        ("tool", "a.py"),
        ("assistant", "One file."),
        ("user", "thanks"),
        ("assistant", "Bye."),
    ]
    assert main["messages"][1]["reasoning_content"] == "hm" and main["id"] == "s" and main["meta"]["cwd"] == "/w"
    assert texts(sub) == [("user", "sub task"), ("assistant", "sub done")] and sub["id"] == "s/7"
    assert report.notes["session events that the user went back before, left out"] == 2
    assert report.notes["session events of type summary, left out"] == 1 and report.additional == 1


def test_openhands_events_of_both_versions(load):
    call = {"id": "c", "type": "function", "function": {"name": "execute_bash", "arguments": '{"command": "ls"}'}}
    reply = {"role": "assistant", "content": "I look.", "tool_calls": [call]}
    metadata = {"function_name": "execute_bash", "tool_call_id": "c"}
    old = [
        {"id": 0, "source": "agent", "action": "system", "args": {"content": "rules", "tools": None}},
        {"id": 1, "source": "user", "action": "message", "args": {"content": "list files"}},
        {"id": 2, "source": "environment", "observation": "recall", "content": "x"},
        {
            "id": 3,
            "source": "agent",
            "action": "run",
            "args": {"command": "ls", "thought": "I look."},
            "tool_call_metadata": metadata | {"model_response": {"id": "r", "choices": [{"message": reply}]}},
        },
        {"id": 4, "source": "agent", "observation": "run", "content": "a.py", "tool_call_metadata": metadata},
        {"id": 5, "source": "agent", "action": "finish", "args": {"outputs": {}, "thought": "Done."}},
    ]
    history = {"instance_id": "django-1", "history": old, "report": {"resolved": True}}
    (row,), report = load({"output.jsonl": lines(history)})
    assert texts(row) == [
        ("system", "rules"),
        ("user", "list files"),
        ("assistant", "I look."),
        ("tool", "a.py"),
        ("assistant", "Done."),
    ]
    assert (row["id"], row["task"], row["outcome"]) == ("django-1", "django-1", 1.0)
    assert row["messages"][2]["tool_calls"] == [call] and report.notes["events of type recall, left out"] == 1
    (alone,), _ = load({"trajectory.json": old})
    assert texts(alone) == texts(row)
    text = [{"type": "text", "text": "list files"}]
    new = [
        {
            "kind": "SystemPromptEvent",
            "source": "agent",
            "system_prompt": {"type": "text", "text": "rules"},
            "tools": [],
        },
        {"kind": "MessageEvent", "source": "user", "llm_message": {"role": "user", "content": text}},
        {
            "kind": "ActionEvent",
            "source": "agent",
            "thought": [{"type": "text", "text": "I look."}],
            "reasoning_content": "hm",
            "tool_name": "execute_bash",
            "tool_call_id": "c",
            "tool_call": {"id": "c", "name": "execute_bash", "arguments": '{"command": "ls"}'},
            "llm_response_id": "r",
        },
        {
            "kind": "ObservationEvent",
            "source": "environment",
            "tool_call_id": "c",
            "observation": {"kind": "X", "content": [{"type": "text", "text": "a.py"}]},
        },
    ]
    (sdk,), _ = load({"events.json": new})
    assert texts(sdk) == texts(row)[:4] and sdk["messages"][2]["reasoning_content"] == "hm"


def test_swe_agent_and_mini_swe_agent(load):
    history = [
        {"role": "system", "content": "rules", "agent": "main", "message_type": "system_prompt"},
        {"role": "user", "content": "demo", "is_demo": True, "agent": "main"},
        {"role": "assistant", "content": "demo reply", "is_demo": True, "agent": "main"},
        {"role": "user", "content": [{"type": "text", "text": "fix it"}], "agent": "main"},
        {"role": "assistant", "content": "I run\nls", "thought": "I run", "action": "ls", "agent": "main"},
        {"role": "tool", "content": [{"type": "text", "text": "a.py"}], "tool_call_ids": ["c"], "agent": "main"},
    ]
    trajectory = [{"action": "ls", "observation": "a.py", "response": "I run\nls", "thought": "I run", "state": "{}"}]
    swe = {
        "environment": "swe_main",
        "trajectory": trajectory,
        "history": history,
        "info": {"exit_status": "submitted"},
    }
    (row,), report = load({"django-1.traj": json.dumps(swe, indent=2)})
    assert row["id"] == "django-1" and [m.get("step", True) for m in row["messages"]] == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]
    assert row["messages"][5]["tool_call_id"] == "c" and report.formats == {"swe-agent": 1}
    assert report.notes["message field `action`, which the message repeats, left out"] == 1
    messages = [USER, REPLY | {"extra": {"cost": 1}}, {"role": "exit", "content": "Submitted", "extra": {}}]
    mini = {"info": {"exit_status": "LimitsExceeded"}, "messages": messages, "trajectory_format": "mini-swe-agent-1.1"}
    (row,), report = load({"django-2.traj.json": mini})
    assert texts(row) == [("user", "go"), ("assistant", "left")] and (row["id"], row["ended"]) == (
        "django-2",
        "max_rounds",
    )
    assert row["meta"]["message_fields"] == {"1": {"extra": {"cost": 1}}}


def sample(id, score, **fields):
    messages = [
        {"id": "a", "role": "user", "source": "input", "content": "attachment://h"},
        {
            "id": "b",
            "role": "assistant",
            "source": "generate",
            "content": [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "I look."}],
            "tool_calls": [{"id": "c", "function": "bash", "arguments": {"cmd": "ls"}, "type": "function"}],
        },
        {"id": "d", "role": "tool", "content": "", "tool_call_id": "c", "function": "bash", "error": {"message": "no"}},
    ]
    scores = {"match": {"value": score, "answer": "x"}}
    events = [{"event": "model", "tools": [{"name": "bash", "parameters": {"type": "object"}}]}]
    return {
        "id": id, "epoch": 1, "target": "x", "messages": messages, "scores": scores, "attachments": {"h": "go"},
        "events": events,
    } | fields  # fmt: skip


def test_inspect_logs_and_archives(load):
    log = {"version": 2, "status": "success", "eval": {"task": "t"}, "samples": [sample(1, "C"), sample(2, "I")]}
    (first, second), report = load({"log.json": log})
    assert texts(first) == [("user", "go"), ("assistant", "I look."), ("tool", "no")]
    assert (first["id"], first["task"], first["outcome"], second["outcome"]) == ("1#1", "t/1", 1.0, 0.0)
    assert first["messages"][1]["reasoning_content"] == "hm" and first["tools"][0]["function"]["name"] == "bash"
    assert report.notes["field `events` of samples, left out"] == 2 and report.additional == 1
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps({"eval": {"task": "t"}}))
        for number in (1, 2):
            archive.writestr(f"samples/{number}_epoch_1.json", json.dumps(sample(number, 0.5)))
        archive.writestr("samples/3_epoch_1.json", "{broken")
    rows, report = load({"log.eval": buffer.getvalue()}, skip_bad=True)
    assert [row["messages"] for row in rows] == [first["messages"], first["messages"]]
    assert [row["outcome"] for row in rows] == [0.5, 0.5] and report.skipped == 1
    assert "log.eval: samples/3_epoch_1.json: not JSON" in report.bad[0]
    two = sample(3, "C") | {"scores": {"a": {"value": "C"}, "b": {"value": "P"}}}
    (row,), report = load({"log.json": lines(two)}, outcome="scores.b.value")
    assert row["outcome"] == 0.5 and any("name one with --outcome-field" in note for note in report.notes)
    with pytest.raises(DataError, match="a zip archive without samples"):
        with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
            archive.writestr("x.txt", "x")
        load({"x.eval": buffer.getvalue()})


def test_langchain_in_its_three_forms(load):
    calls = [{"name": "f", "args": {"a": 1}, "id": "c", "type": "tool_call"}]
    bad = [{"name": "g", "args": '{"a": ', "id": "d", "error": "no JSON", "type": "invalid_tool_call"}]
    data = [
        ("human", {"content": "go"}),
        ("ai", {"content": "x", "tool_calls": calls, "invalid_tool_calls": bad, "usage_metadata": {"n": 1}}),
        ("tool", {"content": "y", "tool_call_id": "c", "name": "f"}),
    ]
    flat = [{"type": kind, **fields} for kind, fields in data]
    dumped = [{"type": kind, "data": {"type": kind, **fields}} for kind, fields in data]
    names = {"human": "HumanMessage", "ai": "AIMessageChunk", "tool": "ToolMessage"}
    built = [
        {"lc": 1, "type": "constructor", "id": ["langchain", "schema", names[kind]], "kwargs": fields}
        for kind, fields in data
    ]
    for files in (
        {"a.jsonl": lines({"messages": flat})},
        {"b.json": dumped},
        {"c.jsonl": lines({"inputs": {"x": 1}, "outputs": {"messages": built}})},
    ):
        (row,), report = load(files)
        assert texts(row) == [("user", "go"), ("assistant", "x"), ("tool", "y")] and report.formats == {"langchain": 1}
        called = [call["function"] for call in row["messages"][1]["tool_calls"]]
        assert called == [{"name": "f", "arguments": '{"a":1}'}, {"name": "g", "arguments": '{"a": '}]


def test_branches_of_a_trace_share_no_step(load):
    nodes = [
        {"parent": None, "message": USER, "sampled": False},
        {"parent": 0, "message": REPLY, "sampled": True},
        {"parent": 1, "message": {"role": "user", "content": "a"}, "sampled": False},
        {"parent": 2, "message": REPLY, "sampled": True},
        {"parent": 1, "message": {"role": "user", "content": "b"}, "sampled": False},
        {"parent": 4, "message": REPLY, "sampled": True},
    ]
    rows, report = load({"t.jsonl": lines({"id": "t", "nodes": nodes, "reward": 0.5})})
    assert [[m.get("step", True) for m in row["messages"] if m["role"] == "assistant"] for row in rows] == [
        [True, True],
        [False, True],
    ]
    assert [row["id"] for row in rows] == ["t", "t#2"] and [row["outcome"] for row in rows] == [0.5, 0.5]
    broken = {"nodes": [{"parent": 3, "message": USER}], "id": "x"}
    with pytest.raises(DataError, match=r"nodes\[0\]: parent is not the index of an earlier node"):
        load({"t.jsonl": lines(broken)})


def test_agents_sdk_items_and_pairs_of_conversations(load):
    raw = [{"type": "message_output_item", "raw_item": {"type": "message", "role": "assistant", "content": []}}]
    raw[0]["raw_item"]["content"] = [{"type": "output_text", "text": "left"}]
    (row,), _ = load({"r.jsonl": lines({"input": "go", "new_items": [item["raw_item"] for item in raw]})})
    assert texts(row) == [("user", "go"), ("assistant", "left")]
    pair = {"chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "right"}]}
    four = {"prompt": "go", "chosen": "left", "rejected": ["right", "up"]}
    rows, report = load({"p.jsonl": lines(pair, four)})
    assert [row["messages"] for row in rows] == [[USER], [USER]] and report.pairs == 2
    assert [[m["content"] for m in row["rejected"]] for row in rows] == [["right"], ["right", "up"]]
    with pytest.raises(DataError, match="1 preference pairs and 1 trajectories"):
        load({"p.jsonl": lines(pair, {"messages": [USER, REPLY]})})
    with pytest.raises(DataError, match="chosen is not one assistant message but 2"):
        load({"p.jsonl": lines({"prompt": "go", "chosen": [REPLY, USER], "rejected": "x"})})


def test_what_a_pair_has_no_field_for_goes_to_meta(load, tmp_path):
    """Rows of DPO data that say how the chosen answer went, or which model gave it."""
    pair = {"prompt": "go", "chosen": "left", "rejected": "right"}
    others = [
        {"success": True},
        {"policy": {"name": "p"}},
        {"rewards": [1, 0]},  # of the chosen and the rejected answer
        {"outcome": 1, "ended": "done", "meta": {"origin": "x"}},
        {"step_labels": [1]},
    ]
    rows, report = load({"p.jsonl": lines(*(pair | other for other in others))})
    assert [type(row) for _, row in read_rows(tmp_path / "out.jsonl")] == [Preference] * 5
    assert [row["meta"] for row in rows] == [*others[:3], {"ended": "done", "outcome": 1, "origin": "x"}, others[4]]
    assert report.pairs == 5


def test_folders_and_files_of_messages(load, tmp_path):
    compressed = zstandard.ZstdCompressor().compress(json.dumps({"messages": [USER, REPLY], "id": "z"}).encode())
    files = {
        "runs/a/messages.json": [USER, REPLY],
        "runs/b/messages.jsonl": lines(USER, REPLY),
        "runs/c.jsonl": lines([USER, REPLY], [USER, REPLY]),
        "runs/d.json.zst": compressed,
        "runs/config.json": {"seed": 1},
        "runs/notes.txt": "x",
    }
    rows, report = load(files, "runs")
    assert [row["id"] for row in rows] == ["c:1", "c:2", "z", "a/messages", "b/messages"]
    assert all(texts(row) == [("user", "go"), ("assistant", "left")] for row in rows)
    assert (report.files, report.other_files, len(report.unknown)) == (5, 1, 1) and "config.json" in report.unknown[0]
    with pytest.raises(DataError, match=r"config\.json.*keys seed; name the field of its conversation"):
        load({}, "runs/config.json")
    (tmp_path / "in" / "empty").mkdir()
    with pytest.raises(DataError, match="a folder without a file of"):
        load({}, "empty")
    with pytest.raises(DataError, match="zstd data that are truncated or corrupt"):
        load({"cut.jsonl.zst": compressed[:-3]})


def test_an_outcome_that_was_not_named_is_pointed_out(load):
    _, report = load({"a.jsonl": lines({"messages": [USER, REPLY], "reward": 1.0})})
    from data_pipeline.importers.report import to_text

    assert any("they may have one in --outcome-field reward" in line for line in to_text(report, "o"))


@pytest.mark.parametrize("value", ["x", "robot=A", "assistant=", "assistant=A,,B"])
def test_malformed_roles_are_refused(value):
    with pytest.raises(DataError, match="ROLE=NAME,NAME"):
        parse_roles([value])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, None], [1.0, None]),
        ([True, False], [1.0, 0.0]),
        ({"1": 0.5}, [0.5, None]),
        (0, [0.0, None]),
        (1, [1.0, 0.0]),
        (-1, [1.0, 1.0]),
        ([1], "has 1 values, the messages have 2 steps"),
        ({"0": 1}, "labels message '0', which is not a step"),
        (5, "a first wrong step is in"),
        ("x", "lab is a text"),
        ([1, "x"], r"lab\[1\] is a text"),
        ([float("nan"), 1], r"lab\[0\] = nan"),
    ],
)
def test_step_labels_in_every_form(load, labels, expected):
    files = {"a.jsonl": lines({"messages": [USER, REPLY, USER, REPLY], "lab": labels})}
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            load(files, step_labels="lab")
        return
    (row,), _ = load(files, step_labels="lab")
    assert row["step_labels"] == expected


def test_few_long_rows_are_held_to_see_what_a_file_is(tmp_path, monkeypatch):
    path, taken = tmp_path / "in.jsonl", []
    path.write_text("\n".join(json.dumps({"id": str(n), "text": "x" * 600}) for n in range(30)))

    def counted(*arguments, **options):
        for row in source.read_rows(*arguments, **options):
            taken.append(row.number)
            yield row

    monkeypatch.setattr(inputs, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(inputs, "read_rows", counted)
    rows = inputs.read_file(inputs.InputFile(path, "in", True))
    assert next(rows).number == 1 and taken == [1, 2]
    assert [row.number for row in rows] == list(range(2, 31))
