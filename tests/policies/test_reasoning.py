"""What a reasoning model thought: kept in conversations, not acted on, and sent back by choice."""

import contextlib
import hashlib
import json

import numpy as np
import pytest

from data_pipeline.encode import Encoder
from data_pipeline.trajectory import parse_line
from jaxprm.environments import StepResult
from jaxprm.errors import UserError
from jaxprm.policies import rollouts
from jaxprm.policies.protocol import Action, State, prefix_hash
from jaxprm.scoring.loading import load_scorer
from jaxprm.search.beam import beam_search
from jaxprm.search.branches import BranchRunner
from jaxprm.search.tree import merge_duplicates
from tests.model import tiny
from tests.policies.fake_server import completion

STATE = State("task/0", [{"role": "user", "content": "a"}])


class Echo:
    """Two steps; what it was told must be the text alone."""

    fork, max_rounds = "clone", 2

    def tasks(self, split):
        return ("t/0",)

    def reset(self, task):
        self.heard = []
        return "begin"

    def step(self, action):
        assert action == "up"
        self.heard.append(action)
        return StepResult("next", 0.0, len(self.heard) == 2)

    def outcome(self):
        return 1.0

    def snapshot(self):
        return list(self.heard)

    def restore(self, state):
        self.heard = list(state)

    def close(self):
        pass


def collect(policy, path):
    settings = {"count": 2, "temperature": 1.0, "in_flight": 2, "split": "train", "environment": "echo", "seed": 0}
    rollouts.collect(Echo, policy, ["t/0"], path, **settings)
    return [parse_line(line, where="row") for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("sends", [False, True])
def test_reasoning_is_recorded_and_sent_back_by_choice(server, make, tmp_path, field, sends):
    server.answers = lambda body: completion("up", **{field: "because"})
    rows = collect(make(send_reasoning=sends), tmp_path / "rows.jsonl")
    turns = [message for row in rows for message in row.messages if message.role == "assistant"]
    assert len(turns) == 4 and {(turn.content, turn.reasoning_content) for turn in turns} == {("up", "because")}
    earlier = [m for body in server.requests for m in body["messages"] if m["role"] == "assistant"]
    assert len(earlier) == 2
    assert {m.get("reasoning_content") for m in earlier} == {"because" if sends else None}


@pytest.mark.parametrize("value", [None, "", 3, ["x"]])
def test_reasoning_that_is_no_text_is_none(server, make, tmp_path, value):
    server.answers = lambda body: completion("up", reasoning_content=value)
    turns = [m for row in collect(make(), tmp_path / "rows.jsonl") for m in row.messages if m.role == "assistant"]
    assert {turn.reasoning_content for turn in turns} == {None}


def test_the_key_is_struck_out_of_reasoning_and_special_tokens_are_refused_in_it(server, make):
    key = "wEird+key/0123456789"
    server.answers = lambda body: completion("up", reasoning_content=f"the key is {json.dumps(key)[1:-1]}")
    ((action,),) = make(key=key).propose([STATE], 1, 1.0)
    assert key not in action.reasoning and action.reasoning.startswith("the key is")
    server.answers = lambda body: completion("up", reasoning_content="<|end|>")
    with pytest.raises(UserError, match=r"the answer spells <\|end\|>"):
        make(encoder=tiny.encoder(), retries=0).propose([STATE], 1, 1.0)


def test_thoughts_are_part_of_what_a_conversation_shows():
    turn, thinking = Action("up", 1).message, Action("up", 1, reasoning="x").message
    named = turn | {"name": "x"}
    assert len({prefix_hash([message]) for message in (turn, thinking, named)}) == 3
    # Hashes decide draws: those of conversations without reasoning must stay.
    assert prefix_hash([turn | {"reasoning_content": None}]) == prefix_hash([turn])
    assert prefix_hash([turn]) == hashlib.sha256(b'[["assistant", "up", null]]').hexdigest()[:32]


def test_draws_that_differ_in_reasoning_alone_are_two_candidates():
    drawn = [Action("up", 1, reasoning="x"), Action("up", 2, reasoning="y"), Action("up", 3, reasoning="x")]
    assert [(action.reasoning, count) for action, count in merge_duplicates(drawn)] == [("x", 2), ("y", 1)]


class Thoughtful:
    def __init__(self):
        self.usage = {"encoded": 0, "generated": 0}

    def propose(self, states, n, temperature):
        return [[Action("up", 1, reasoning=f"thought {number}") for number in range(n)] for _ in states]

    def count_tokens(self, messages):
        return sum(len(message["content"]) for message in messages)


def test_a_search_scores_what_the_template_prints(tmp_path):
    """Candidates of one text have the promises of their own reasoning, as `score` gives them."""
    directory = tiny.write_reward_model(tmp_path)
    template = tmp_path / "chat_template.jinja"
    shown = (
        "{% if message['reasoning_content'] %}<{{ message['reasoning_content'] }}>{% endif %}{{ message['content'] }}"
    )
    template.write_text(template.read_text().replace("{{ message['content'] }}", shown))
    scorer = load_scorer(directory)
    with contextlib.closing(BranchRunner(Echo)) as runner:
        options = {"width": 1, "actions": 3, "temperature": 1.0, "max_rounds": 2}
        (tree,) = beam_search(["t/0"], runner, Thoughtful(), scorer, **options)
    promises = [node.promise for node in tree.nodes if node.parent is tree.root]
    assert len(set(promises)) == 3
    encoder = Encoder.load(directory)
    conversations = [node.messages[:2] for node in tree.nodes if node.parent is tree.root]
    alone = scorer.score_encoded([encoder.trajectory(messages, row="r") for messages in conversations], ["r"] * 3)
    np.testing.assert_allclose(promises, [values[-1] for values in alone], atol=1e-5)
