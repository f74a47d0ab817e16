"""What a user's own policy returns is checked: an error of one line with class, method and value."""

import numpy as np
import pytest

from jaxprm import cli
from jaxprm.errors import UserError
from jaxprm.policies.checked import CheckedPolicy
from jaxprm.policies.protocol import Action, State

STATES = [State("t", [{"role": "user", "content": "go"}])] * 2
GOOD = Action("get log", 2)


class Own:
    """Returns what it was made with."""

    def __init__(self, proposals=None, count=3, usage=None):
        self.proposals, self.count = proposals, count
        self.usage = {"encoded": 0, "generated": 1} if usage is None else usage

    def propose(self, states, n, temperature):
        return self.proposals

    def count_tokens(self, messages):
        return self.count

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("proposals", "problem"),
    [
        (None, r"Own\.propose gave None \(NoneType\); it must return a list with 2 lists"),
        ([[GOOD]], r"gave \[\[Action\(.*\(list\); it must return a list with 2 lists, one for each state"),
        ("ab", r"gave 'ab' \(str\)"),
        ([[GOOD], GOOD], r"Own\.propose gave Action\(.* must return 1 actions for each state, and state 1 has this"),
        ([[GOOD], []], r"gave \[\] \(list\); it must return 1 actions for each state, and state 1"),
        ([[GOOD], ["get log"]], r"gave 'get log' \(str\); it must return actions, each a jaxprm"),
        ([[GOOD], [("get log", 2)]], r"gave \('get log', 2\) \(tuple\); it must return actions"),
        ([[GOOD], [Action(None, 2)]], r"gave None \(NoneType\); it must return actions whose text is a str"),
        ([[GOOD], [Action("\ud800", 2)]], r"gave '\\ud800' \(str\); it must return actions whose text"),
        ([[GOOD], [Action("a", "2")]], r"gave '2' \(str\); it must return actions whose tokens are a whole number"),
        ([[GOOD], [Action("a", -1)]], r"gave -1 \(int\); it must return actions whose tokens"),
        ([[GOOD], [Action("a", True)]], r"gave True \(bool\); it must return actions whose tokens"),
        ([[GOOD], [Action("a", 2, "x")]], r"gave 'x' \(str\); it must return log_probability as a number"),
        ([[GOOD], [Action("a", 2, None, "stop")]], r"gave 'stop' \(str\); it must return actions whose stop is one of"),
        ([[GOOD], [Action("a", 2, None, [])]], r"gave \[\] \(list\); it must return actions whose stop"),
        ([[GOOD], [Action("a", 2, error=5)]], r"gave 5 \(int\); it must return actions whose error"),
    ],
)
def test_wrong_proposals(proposals, problem):
    with pytest.raises(UserError, match=r"^policy 'own:Own': .*" + problem):
        CheckedPolicy(Own(proposals), "own:Own").propose(STATES, 1, 1.0)


@pytest.mark.parametrize("count", [None, "3", 3.0, -1, True, [3]])
def test_wrong_counts_of_tokens(count):
    with pytest.raises(UserError, match=r"Own\.count_tokens gave .*; it must return a whole number, 0 or more"):
        CheckedPolicy(Own(count=count), "own:Own").count_tokens([])


@pytest.mark.parametrize("usage", [3, [], "encoded", {"encoded": "x"}, {"encoded": None}, {3: 1}, {"generated": -1}])
def test_a_wrong_usage_is_refused_before_the_run(usage):
    with pytest.raises(UserError, match=r"^policy 'own:Own': Own\.usage.* gave .*; it must be"):
        CheckedPolicy(Own(usage=usage), "own:Own")


def test_what_is_right_passes_with_numbers_of_python():
    action = Action("get log", np.int64(2), np.float32(-0.5))
    own = Own([(action,), [GOOD]], np.int32(7), {"encoded": np.int64(4)})
    policy = CheckedPolicy(own, "own:Own")
    proposals = policy.propose(STATES, 1, 1.0)
    assert proposals == [[Action("get log", 2, -0.5)], [GOOD]]
    assert type(proposals[0][0].tokens) is int and type(proposals[0][0].log_probability) is float
    assert type(policy.count_tokens([])) is int and policy.usage == {"encoded": 4}
    policy.close()
    assert own.closed and not hasattr(policy, "missing")


def test_a_run_ends_with_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "own.py").write_text(
        "class Own:\n"
        "    usage = {}\n"
        "    def __init__(self, seed): pass\n"
        "    def propose(self, states, n, temperature): return [None for _ in states]\n"
        "    def count_tokens(self, messages): return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["collect", "textcraft_tiny", "policy.path=own:Own", "base_model=default", "--quick"]
    assert cli.main([*arguments, "--workdir", str(tmp_path / "run")]) == 2
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jaxprm: ")]
    assert line == [
        "jaxprm: policy 'own:Own': Own.propose gave None (NoneType); it must return 1 actions for each state, and "
        "state 0 has this"
    ]
