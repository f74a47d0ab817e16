"""A score depends on the conversation alone: not on the batch, the padding, the cache or earlier calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from jaxprm.errors import UserError
from jaxprm.scoring import engine as engine_module
from jaxprm.scoring.scorer import Scorer
from tests.model import tiny

STATE = tiny.reward_model()
# From one turn to more than the first bucket of 256 tokens.
CONVERSATIONS = [tiny.conversation(seed, turns=turns) for seed, turns in enumerate((1, 2, 7, 3, 13, 5))]
CANDIDATES = ["Action: get 3 stick", "Action: craft oak planks", "x", "Action: get 3 sticks, and then the lantern"]


def new_scorer(encoder: Encoder | None = None) -> Scorer:
    """A scorer with two rows and a short cache: every test drops prefixes and packs several candidates a row."""
    return Scorer(tiny.CONFIG, STATE, encoder or tiny.encoder(), rows=2, max_tokens=480)


def reference(messages) -> np.ndarray:
    """Values of every step by one unpadded, uncached forward pass."""
    encoded = tiny.encoder().trajectory(messages, row="reference")
    return tiny.values(STATE, encoded.tokens[None])[0, encoded.read_positions]


def with_action(messages, text) -> list[dict]:
    return [*messages, {"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def references() -> list[np.ndarray]:
    return [reference(messages) for messages in CONVERSATIONS]


@pytest.fixture(scope="module")
def full_scores() -> dict[tuple[int, str], float]:
    """Scores by `score` of every candidate after every state, by (conversation, turn, text)."""
    scorer, keys, conversations = new_scorer(), [], []
    for number, messages in enumerate(CONVERSATIONS):
        for end in range(1, len(messages), 2):
            for text in CANDIDATES:
                keys.append((number, end, text))
                conversations.append(with_action(messages[:end], text))
    values = scorer.score(conversations)
    return {key: float(steps[-1]) for key, steps in zip(keys, values, strict=True)}


def test_the_scores_of_these_tests_spread_and_cover_two_buckets(references):
    assert np.concatenate(references).std() > 0.3
    lengths = [len(tiny.encoder().trajectory(messages, row="").tokens) for messages in CONVERSATIONS]
    assert min(lengths) <= 256 < max(lengths) <= 512


def test_every_step_equals_an_unpadded_pass_in_any_batch_and_order(references):
    scorer = new_scorer()
    for order in (range(6), (5, 0, 3, 3, 1, 4, 2), (2,)):
        scores = scorer.score([CONVERSATIONS[index] for index in order])
        for index, steps in zip(order, scores, strict=True):
            assert steps.dtype == np.float32
            tiny.assert_close(steps, references[index])


def test_more_conversations_than_rows_come_back_in_order(references, monkeypatch):
    monkeypatch.setattr(engine_module, "TOKENS_A_CALL", 512)
    order = [index % 6 for index in range(11)]
    for index, steps in zip(order, new_scorer().score([CONVERSATIONS[index] for index in order]), strict=True):
        tiny.assert_close(steps, references[index])


def test_a_pool_encodes_the_prompt_that_its_conversations_share_once(references):
    """Conversations that share a prompt, and one with another prompt."""
    pool = [with_action(CONVERSATIONS[2][:5], text) for text in CANDIDATES]
    pool = [*pool[::2], CONVERSATIONS[1], *pool[1::2]]
    scorer = new_scorer()
    for messages, steps in zip(pool, scorer.score(pool), strict=True):
        tiny.assert_close(steps, reference(messages))
    encoded = [tiny.encoder().trajectory(messages, row="") for messages in pool]
    prompt = len(encoded[0].tokens[: encoded[0].state_positions[0] + 1])
    assert scorer.usage["encoded"] == sum(len(conversation.tokens) for conversation in encoded) - 3 * prompt


def test_candidates_equal_the_whole_conversations_for_growing_and_forking_states(full_scores):
    scorer = new_scorer()
    for end in (1, 3, 1, 5, 9):
        states = [number for number, messages in enumerate(CONVERSATIONS) if end < len(messages)]
        scores = scorer.score_actions([CONVERSATIONS[number][:end] for number in states], [CANDIDATES] * len(states))
        for number, values in zip(states, scores, strict=True):
            tiny.assert_close(values, [full_scores[number, end, text] for text in CANDIDATES])


def test_order_and_repetition_of_candidates_do_not_matter(full_scores):
    scorer = new_scorer()
    messages = CONVERSATIONS[2][:5]
    for texts in (CANDIDATES[::-1], [CANDIDATES[1]] * 3, CANDIDATES * 2, []):
        (values,) = new_scorer().score_actions([messages], [texts])
        expected = [full_scores[2, 5, text] for text in texts]
        if expected:
            tiny.assert_close(values, expected)
        (again,) = scorer.score_actions([messages], [texts])
        np.testing.assert_allclose(again, values, atol=1e-5)


def test_scores_are_cached_and_only_new_tokens_are_encoded():
    scorer = new_scorer()
    messages = CONVERSATIONS[3]
    scorer.score_actions([messages[:1]], [CANDIDATES])
    encoded = scorer.usage["encoded"]
    scorer.score_actions([messages[:1]] * 2, [CANDIDATES[:2], CANDIDATES[1:]])
    assert scorer.usage["encoded"] == encoded
    scorer.score_actions([messages[:3]], [CANDIDATES[:1]])
    prompt, longer = (len(tiny.encoder().prompt(messages[:end])) for end in (1, 3))
    action = len(tiny.encoder().trajectory(with_action(messages[:3], CANDIDATES[0]), row="").tokens) - longer
    assert scorer.usage["encoded"] == encoded + longer - prompt + action


def test_the_cache_of_scores_is_bounded_and_drops_the_least_recently_used(monkeypatch):
    monkeypatch.setattr("jaxprm.scoring.scorer.MAX_CACHED", 3)
    scorer, state = new_scorer(), CONVERSATIONS[0][:1]
    texts = [f"Action: get {number} stick" for number in range(5)]
    (first,) = scorer.score_actions([state], [texts])
    assert len(scorer._cache) == 3
    before = scorer.usage["encoded"]
    assert scorer.score_actions([state], [texts[2:]])[0].tolist() == first[2:].tolist()
    assert scorer.usage["encoded"] == before
    scorer.score_actions([state], [[texts[2]]])
    scorer.score_actions([state], [texts[:2]])  # two are dropped for them, but not the one used last
    before = scorer.usage["encoded"]
    assert scorer.score_actions([state], [[texts[2]]])[0].tolist() == first[2:3].tolist()
    assert scorer.usage["encoded"] == before


def test_candidates_prepared_together_are_scored_as_alone():
    """Cached scores may be dropped in between: those that were cached are part of the prepared candidates."""
    scorer, state = new_scorer(), CONVERSATIONS[0][:1]
    (cached,) = scorer.score_actions([state], [["Action: get 1 stick"]])
    questions = [scorer.prepare(state, ["Action: get 1 stick", "Action: get 2 stick"]) for _ in range(2)]
    questions.append(scorer.prepare(CONVERSATIONS[1][:3], ["Action: get 1 stick"]))
    scorer.forget()
    first, second, third = scorer.score_prepared(questions)
    assert first[0] == cached[0] and first.tolist() == second.tolist()
    tiny.assert_close(first[1:], reference(with_action(state, "Action: get 2 stick"))[-1:])
    tiny.assert_close(third, reference(with_action(CONVERSATIONS[1][:3], "Action: get 1 stick"))[-1:])
    assert questions[2].longest == len(
        tiny.encoder().trajectory(with_action(CONVERSATIONS[1][:3], "Action: get 1 stick"), row="").tokens
    )


def test_a_candidate_longer_than_a_row_and_a_state_longer_than_the_cache_are_scored_whole():
    scorer = new_scorer()
    long_text = " ".join(f"get {number} stick" for number in range(60))
    long_state = tiny.conversation(9, turns=28)[:-1]
    assert len(tiny.encoder().prompt(long_state)) > scorer.max_tokens
    states = [CONVERSATIONS[0][:1], long_state]
    scores = scorer.score_actions(states, [[long_text, "x"], ["x"]])
    expected = [reference(with_action(states[0], text))[-1] for text in (long_text, "x")]
    tiny.assert_close(scores[0], expected)
    tiny.assert_close(scores[1], [reference(with_action(long_state, "x"))[-1]])


def test_a_template_whose_prompt_is_no_prefix_is_scored_whole(with_template):
    encoder = with_template(
        "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{{ m['content'] }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>think{% endif %}"
    )
    messages = CONVERSATIONS[0][:1]
    (values,) = new_scorer(encoder).score_actions([messages], [CANDIDATES])
    for value, text in zip(values, CANDIDATES, strict=True):
        encoded = encoder.trajectory(with_action(messages, text), row="")
        tiny.assert_close(value, tiny.values(STATE, encoded.tokens[None])[0, -1])


def test_tools_are_part_of_the_conversation(with_template):
    encoder = with_template(
        "{% if tools %}<|user|>{% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}<|end|>{% endif %}"
        "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{{ m['content'] or '' }}"
        "{% for call in m['tool_calls'] or [] %}{{ call['function']['name'] }}{% endfor %}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tools = [[{"type": "function", "function": {"name": name}}] for name in ("craft", "look")]
    messages = CONVERSATIONS[0][:1]
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "craft"}}]}
    scorer = new_scorer(encoder)
    scores = scorer.score_actions([messages] * 3, [["x", call]] * 3, tools=[*tools, None])
    for tool, values in zip([*tools, None], scores, strict=True):
        expected = scorer.score([with_action(messages, "x"), [*messages, call]], tools=[tool, tool])
        tiny.assert_close(values, [steps[-1] for steps in expected])
    assert np.abs(scores[0] - scores[1]).min() > 1e-2


def test_nothing_compiles_again_after_the_first_round():
    scorer = new_scorer()
    for end in (1, 7):
        scorer.score_actions([messages[:end] for messages in CONVERSATIONS[2:]], [CANDIDATES[:1]] * 4)
        scorer.score_actions([CONVERSATIONS[4][:end]], [CANDIDATES + [f"Action: get {n} lantern" for n in range(5)]])
    scorer.score(CONVERSATIONS)
    with tiny.compilations() as seen:
        for end in (3, 5, 9):
            states = [messages[:end] for messages in CONVERSATIONS if end < len(messages)]
            scorer.score_actions(states, [CANDIDATES] * len(states))
        scorer.score(CONVERSATIONS[::-1][:4])
    assert seen == []


def test_what_cannot_be_encoded_or_is_too_long_is_named(monkeypatch):
    scorer = new_scorer()
    with pytest.raises(DataError, match=r"row-7.*<\|end\|>"):
        scorer.score([with_action(CONVERSATIONS[0][:1], "say <|end|> twice")], rows=["row-7"])
    monkeypatch.setattr(engine_module, "LENGTH_BUCKETS", (64, 128))
    with pytest.raises(UserError, match=r"row-8: [0-9]+ tokens, more than the 128"):
        scorer.score([CONVERSATIONS[4]], rows=["row-8"])


def test_parameters_in_bfloat16_are_computed_with_in_either_precision():
    """In float32 they mean the numbers they hold; in bfloat16 scores move by its rounding, cached or not."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), STATE)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    conversations = CONVERSATIONS[:2]
    exact, rounded = (
        Scorer(tiny.CONFIG, half, tiny.encoder(), rows=2, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    for messages, ours in zip(conversations, exact.score(conversations), strict=True):
        encoded = tiny.encoder().trajectory(messages, row="reference")
        tiny.assert_close(ours, tiny.values(wide, encoded.tokens[None])[0, encoded.read_positions])
    far = np.abs(np.concatenate(rounded.score(conversations)) - np.concatenate(exact.score(conversations)))
    assert 1e-5 < far.max() < 0.1
    cached, uncached = rounded.score_actions([conversations[1]], [CANDIDATES[:2]])[0], []
    for text in CANDIDATES[:2]:
        uncached.append(exact.score([with_action(conversations[1], text)])[0][-1])
    assert 1e-5 < np.abs(cached - np.array(uncached)).max() < 0.1


def test_owners_of_caches_find_nothing_of_each_other_and_get_the_same_scores():
    scorer, (messages, *_) = new_scorer(), CONVERSATIONS
    prompt, action = [messages[0]], "Action: get 1 oak log"
    longer = [*with_action(prompt, action), {"role": "user", "content": "Got 1 oak log"}]

    def computed(owner: int, state) -> tuple[int, float]:
        before = scorer.usage["encoded"]
        scorer.isolate(owner)
        (scores,) = scorer.score_actions([state], [[action]])
        return scorer.usage["encoded"] - before, float(scores[0])

    cost, score = computed(0, prompt)
    for owner in (1 << 120, 7):
        # As if nobody had asked before: not from the scores in memory, nor from keys and values.
        other_cost, other = computed(owner, prompt)
        assert other_cost == cost > 0 and other == pytest.approx(score, abs=1e-5)
    for owner in (0, 7, 1 << 120):
        assert computed(owner, prompt)[0] == 0
    grown = computed(7, longer)[0]
    assert 0 < grown == computed(0, longer)[0] < computed(5, longer)[0]
    assert scorer.usage["again"] == 0
