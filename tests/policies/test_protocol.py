"""What names a conversation and seeds a draw."""

import pytest

from jaxprm.policies.protocol import candidate_seed, prefix_hash

MESSAGES = [{"role": "user", "content": "craft a stick"}, {"role": "assistant", "content": "get 1 oak log"}]


@pytest.mark.parametrize(
    "other",
    [
        MESSAGES[:1],
        [MESSAGES[0], {"role": "assistant", "content": "get 2 oak log"}],
        [MESSAGES[0], {"role": "user", "content": "get 1 oak log"}],
        [MESSAGES[0], MESSAGES[1] | {"tool_calls": [{"function": {"name": "craft"}}]}],
        [MESSAGES[0] | {"name": "steve"}, MESSAGES[1]],
        [MESSAGES[0], MESSAGES[1] | {"tool_call_id": "call-1"}],
        [{"role": "user", "content": 'craft a stick"], ["assistant", "get 1 oak log'}],
    ],
)
def test_whatever_a_template_can_show_changes_the_name(other):
    assert prefix_hash(other) != prefix_hash(MESSAGES)


def test_what_no_template_shows_does_not_change_the_name():
    same = [MESSAGES[0] | {"name": None}, MESSAGES[1] | {"step": False}]
    assert prefix_hash(same) == prefix_hash(MESSAGES)


def test_names_and_seeds_are_the_same_in_every_process():
    # sha256 by hand: `printf '%s' '[["user", "a", null]]' | sha256sum`, `printf '0\x1ft\x1fp\x1f3' | sha256sum`
    assert prefix_hash([{"role": "user", "content": "a"}]) == "1d35943c9f9ccc05dc052ea460833bf3"
    assert candidate_seed(0, "t", "p", 3) == (0x7B6AD55A, 0x69CC7B17)


def test_every_part_of_a_seed_matters():
    parts = [(0, "t", "p", 1), (1, "t", "p", 1), (0, "u", "p", 1), (0, "t", "q", 1), (0, "t", "p", 2)]
    assert len({candidate_seed(*part) for part in parts}) == 5
