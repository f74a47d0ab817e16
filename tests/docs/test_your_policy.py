"""docs/your-policy.md, executed: against a scripted server, and with the page's own class."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from data_pipeline.trajectory import parse_line
from jaxprm import cli, config
from jaxprm.policies import language_model
from jaxprm.policies.protocol import State
from tests.docs import pages
from tests.policies.fake_server import FakeServer, Reply, completion

PAGE = "your-policy.md"
MODEL = "Qwen/Qwen2.5-7B-Instruct"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files, importable, in the current directory."""
    for name, text in pages.files(PAGE).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server():
    server = FakeServer(model=MODEL)
    yield server
    server.close()


def commands() -> dict[str, list[str]]:
    return {arguments[3]: arguments[2:] for arguments in pages.shell(PAGE)}


def trajectories(workdir: str) -> list:
    return [
        parse_line(line, where=split)
        for split in ("train", "validation")
        for line in Path(workdir, f"trajectories/{split}.jsonl").read_bytes().splitlines()
    ]


def test_a_collection_through_the_server_loses_and_invents_nothing(server, capsys, monkeypatch):
    key = "wEird0123456789key"
    monkeypatch.setenv("SERVER_KEY", key)
    server.answers = lambda body: completion("Action: get 1 oak log" if len(body["messages"]) < 5 else "Action: wait")
    overrides = [
        f"policy.endpoint.base_url={server.base_url}",
        "policy.endpoint.api_key_env=SERVER_KEY",
        "environment.arguments.max_rounds=4",
    ]
    command = commands()["served_config.py"]
    assert command[0] == "collect"
    assert cli.main([*command[:2], *overrides, *command[2:]]) == 0
    lines = trajectories("runs/served")
    assert len(lines) == (6 + 4) * 4
    assert {line.ended for line in lines} == {"max_rounds"}
    actions = [message.content for line in lines for message in line.messages if message.role == "assistant"]
    assert len(actions) == len(lines) * 4 == len(server.requests)
    assert {body["max_tokens"] for body in server.requests} == {64}
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key}"}
    assert len({(body["seed"], json.dumps(body["messages"])) for body in server.requests}) == len(server.requests)
    assert capsys.readouterr().err.count("policy:") == 0
    for path in Path("runs").rglob("*"):
        assert path.is_dir() or key not in path.read_text("utf-8", "replace"), path
    # The address of the server is not part of the fingerprint: the same command has nothing left to do.
    asked = len(server.requests)
    assert cli.main([*command[:2], "environment.arguments.max_rounds=4", *command[2:]]) == 0
    assert len(server.requests) == asked


def test_failures_are_counted_and_reported(server, capsys):
    server.answers = lambda body: completion("Action: wait") if body["seed"] % 5 else Reply(200, b"{", Server="a")
    overrides = [
        f"policy.endpoint.base_url={server.base_url}",
        "policy.endpoint.retries=0",
        "environment.arguments.max_rounds=4",
    ]
    command = commands()["served_config.py"]
    assert cli.main([*command[:2], *overrides, *command[2:]]) == 0
    lines = trajectories("runs/served")
    assert len(lines) == (6 + 4) * 4
    failed = [line for line in lines if line.ended == "error"]
    assert 5 < len(failed) < 39
    assert all(line.meta["error"].startswith("policy: no chat completion") for line in failed)
    assert all(line.outcome is None and line.messages[-1].role == "user" for line in failed)
    assert re.search(rf"^policy: \d+ requests, 0 retries, {len(failed)} failures, ", capsys.readouterr().err, re.M)


def test_an_unreachable_server_is_one_line(capsys):
    arguments = commands()["served_config.py"]
    assert cli.main([*arguments, "policy.endpoint.base_url=http://127.0.0.1:9/v1", "policy.endpoint.retries=0"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jaxprm: ")]
    assert len(lines) == 1 and "not one of 24 requests was answered, the first: ConnectError" in lines[0]
    assert cli.main(["build", *arguments[1:], "base_model=null"]) == 2
    assert "base_model is null" in capsys.readouterr().err


def test_the_pages_own_class_is_collected_with(capsys):
    command = commands()["own_config.py"]
    assert cli.main(command) == 0
    lines = trajectories("runs/own")
    assert len(lines) == (6 + 4) * 4
    actions = [message.content for line in lines for message in line.messages if message.role == "assistant"]
    share = sum("Action: craft" in action for action in actions) / len(actions)
    assert 0.3 < share < 0.5  # 0.4 expected, in a few hundred draws
    first = Path("runs/own/trajectories/train.jsonl").read_bytes()
    assert cli.main([*command[:-1], "runs/again", "policy.in_flight=1"]) == 0
    assert Path("runs/again/trajectories/train.jsonl").read_bytes() == first


def test_the_table_has_every_field_and_its_default():
    text = (pages.ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    table = text.partition("| field of")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table]
    fields = {field.name: field.default for field in msgspec.structs.fields(config.EndpointConfig)}
    assert [name for name, _ in rows] == [f"`{name}`" for name in fields]
    for (name, default), (_, shown) in zip(fields.items(), rows, strict=True):
        if name == "model":
            assert default is msgspec.NODEFAULT and shown == ""
        elif name == "extra_body":
            assert config.EndpointConfig(model="a").extra_body == json.loads(shown)
        else:
            assert default == (shown.strip("`") if isinstance(default, str) else json.loads(shown))


@pytest.mark.slow
def test_the_full_loop_runs_through_a_server(server):
    """The shipped policy behind the scripted server: searches through the API reach what sampling reaches."""
    settings = config.PolicyConfig(max_action_tokens=64, max_tokens=896, in_flight=1)
    embedded = language_model.load("default", seed=0, settings=settings)

    def answer(body):
        state = State(str(body["seed"]), body["messages"])
        ((action,),) = embedded.propose([state], 1, body["temperature"])
        return completion(action.text, tokens=action.tokens, finish="stop" if action.stop == "end" else "length")

    server.answers, server.serial = answer, True
    # The shipped policy learned TextCraft without its instructions, which would only make everything longer.
    plain = ["environment.arguments.instructions=false", "data.length=896"]
    arguments = ["served_config.py", f"policy.endpoint.base_url={server.base_url}", *plain, "--workdir", "runs/served"]
    assert cli.main(["run", *arguments]) == 0
    results = json.loads(Path("runs/served/results.json").read_text())
    assert results["policy"]["sampled"]["mean"] > 0
    cost = results["compute"]["methods"]["agentprm"]["2x2"]
    assert cost["policy_tokens"] > 0 and cost["flops"] is None and cost["failed"] == cost["errors"] == 0
    assert Path("runs/served/report/index.html").is_file()
