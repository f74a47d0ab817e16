"""Draws of a candidate depend only on seed, task, prefix and index; random scores likewise."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxprm.policies.protocol import candidate_seed, prefix_hash
from jaxprm.policies.rollouts import rollouts
from jaxprm.search.beam import beam_search
from jaxprm.search.branches import BranchRunner
from jaxprm.search.methods import RandomScorer
from tests.search.fakes import SeededPolicy, Walk

MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=8)})
CONVERSATION = st.lists(MESSAGE, max_size=4)
KEY = st.tuples(st.integers(0, 3), st.sampled_from(["t/1", "t/11"]), CONVERSATION, st.integers(0, 12))


@given(KEY, KEY)
def test_seeds_are_equal_exactly_where_everything_is(first, second):
    def seed(key):
        return candidate_seed(key[0], key[1], prefix_hash(key[2]), key[3])

    assert (seed(first) == seed(second)) == (first == second)
    assert all(0 <= word < 2**32 for word in seed(first))


def test_a_seed_is_the_start_of_a_sha256():
    digest = hashlib.sha256(b"7\x1ftextcraft/3\x1fabc\x1f5").digest()
    assert candidate_seed(7, "textcraft/3", "abc", 5) == tuple(np.frombuffer(digest[:8], ">u4").tolist())


def test_a_prefix_is_roles_contents_and_tool_calls():
    plain = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "go"}]
    assert prefix_hash(plain) == prefix_hash([{**message, "step": True} for message in plain])
    others = [
        plain[:1],
        plain[::-1],
        [{"role": "user", "content": "higo"}],
        [{"role": "user", "content": "h"}, {"role": "assistant", "content": "igo"}],
        [plain[0], {"role": "user", "content": "go"}],
        [plain[0], {**plain[1], "tool_calls": [{"id": "1"}]}],
    ]
    assert len({prefix_hash(messages) for messages in [plain, *others]}) == 1 + len(others)


def test_a_pool_and_a_beam_share_their_first_actions():
    """Trajectory i of a pool begins with candidate i of the start: methods are compared on equal draws."""
    jobs = [("walk/test/0", number) for number in range(6)]
    episodes = rollouts(Walk, SeededPolicy(3, texts="abcdefghijkl"), jobs, temperature=1.0, in_flight=2)
    pool = {episode.number: episode.messages[1]["content"] for episode in episodes}
    runner = BranchRunner(Walk)
    policy = SeededPolicy(3, texts="abcdefghijkl")
    (tree,) = beam_search(
        ["walk/test/0"], runner, policy, RandomScorer(0), width=3, actions=2, temperature=1.0, max_rounds=1
    )
    assert [node.messages[1]["content"] for node in tree.nodes] == list(dict.fromkeys(pool[n] for n in range(6)))
    assert len(tree.nodes) > 1


def states(count):
    return [[{"role": "user", "content": f"state {index}"}] for index in range(count)]


def test_a_random_score_does_not_depend_on_other_candidates():
    together = RandomScorer(1).score_actions(states(3), [["a", "b"], ["a"], ["c", "b", "a"]])
    assert [scores.shape for scores in together] == [(2,), (1,), (3,)]
    alone = RandomScorer(1).score_actions(states(3)[2:], [["a"]])
    assert alone[0][0] == together[2][2]
    # Seed, conversation and action each change them.
    other = RandomScorer(2).score_actions(states(1), [["a"]])
    different = [together[0][0], together[0][1], together[1][0], other[0][0]]
    assert len(set(map(float, different))) == 4


def test_random_scores_are_uniform():
    (scores,) = RandomScorer(0).score_actions(states(1), [[str(index) for index in range(4000)]])
    assert 0 <= scores.min() < 0.01
    assert 0.99 < scores.max() < 1
    # The standard error of a mean of 4000 is .0046, that of a quarter's share .0068.
    assert abs(scores.mean() - 0.5) < 0.025
    assert np.allclose(np.histogram(scores, 4, (0, 1))[0] / 4000, 0.25, atol=0.035)
