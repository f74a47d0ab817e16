"""Candidates depend on seed, task, conversation and number alone, and follow the model's distribution."""

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from data_pipeline.encode import Encoder
from jaxprm import config
from jaxprm.errors import UserError
from jaxprm.hf import writer
from jaxprm.model.transformer import transformer_graph
from jaxprm.policies import language_model
from jaxprm.policies.language_model import LanguageModelPolicy
from jaxprm.policies.protocol import Action, State
from tests.model import tiny

ENCODER = tiny.encoder()
BANNED = np.isin(np.arange(tiny.CONFIG.vocab_size), sorted(ENCODER.special_ids - {ENCODER.end_id}))
STEPS, LONGEST = 12, 330


def make_parameters():
    """A broad next-token distribution in which a turn ends after some 20 tokens."""
    parameters = tiny.transformer(tiny.UNTIED)
    table = 0.3 * np.asarray(parameters["unembedding"][...])
    hidden = _hidden(parameters, [ENCODER.prompt(tiny.conversation(seed, turns=1)[:1]) for seed in range(4)])
    mean = np.mean([rows.mean(0) for rows in hidden], axis=0)
    table[ENCODER.end_id] = 3 * mean / (mean @ mean)
    parameters["unembedding"] = nnx.Param(table)
    return parameters


def _hidden(parameters, sequences) -> list[np.ndarray]:
    """Hidden states of every token, uncached: [T, D] for each sequence."""
    tokens, segments = np.zeros((2, len(sequences), LONGEST), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)], segments[row, : len(sequence)] = sequence, 1
    graph = transformer_graph(tiny.UNTIED)
    hidden = tiny.hidden(graph, parameters, tokens, segments)
    return [hidden[row, : len(sequence)] for row, sequence in enumerate(sequences)]


PARAMETERS = make_parameters()
# Prompts of 1 to 5 turns: their lengths use both buckets of the cache.
TURNS = (1, 2, 5, 3, 1)
STATES = [State(f"task/{seed}", tiny.conversation(seed, turns=turns)[:-1]) for seed, turns in enumerate(TURNS)]


def new_policy(*, seed: int = 0, steps: int = STEPS, in_flight: int = 3) -> LanguageModelPolicy:
    settings = config.PolicyConfig(max_action_tokens=steps, max_tokens=LONGEST, in_flight=in_flight)
    return LanguageModelPolicy(tiny.UNTIED, PARAMETERS, ENCODER, seed=seed, settings=settings)


def next_logits(sequences) -> np.ndarray:
    """Logits [N, V] after each sequence, of the tokens that may be sampled."""
    last = np.stack([hidden[-1] for hidden in _hidden(PARAMETERS, sequences)])
    return np.where(BANNED, -np.inf, last @ np.asarray(PARAMETERS["unembedding"][...]).T)


def log_softmax(logits) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def without_log_probability(actions) -> list:
    return [[action._replace(log_probability=None) for action in candidates] for candidates in actions]


@pytest.fixture(scope="module")
def sampled() -> list[list[Action]]:
    """Four candidates of every state, all in one call."""
    return new_policy().propose(STATES, 4, 1.0)


def test_these_candidates_end_differently_and_differ(sampled):
    stops = [action.stop for candidates in sampled for action in candidates]
    assert {"end", "length"} == set(stops)
    assert len({action.text for candidates in sampled for action in candidates}) > 15


def test_candidates_are_the_same_whatever_batch_they_are_in(sampled):
    alone = [new_policy().propose([state], 4, 1.0)[0] for state in STATES]
    assert without_log_probability(alone) == without_log_probability(sampled)
    # The longest turns of a call end in a smaller call: of 2 rows here, of 1 row elsewhere.
    wide = new_policy(in_flight=8).propose(STATES, 4, 1.0)
    assert without_log_probability(wide) == without_log_probability(sampled)
    policy = new_policy()
    backwards = policy.propose(STATES[::-1], 2, 1.0)[::-1]
    assert without_log_probability(backwards) == without_log_probability([candidates[:2] for candidates in sampled])
    later = policy.propose([state._replace(first=1) for state in STATES], 3, 1.0)
    assert without_log_probability(later) == without_log_probability([candidates[1:] for candidates in sampled])


def test_candidates_of_a_state_share_a_copy_of_its_prefix(monkeypatch, sampled):
    """Seven candidates make two groups of four, one with an empty row; single candidates have a copy each."""
    calls, generate = [], language_model._generate

    def spy(graph, parameters, bank, slots, lengths, last, *arguments, **options):
        calls.append((len(last), len(slots), int(arguments[1].sum())))
        return generate(graph, parameters, bank, slots, lengths, last, *arguments, **options)

    monkeypatch.setattr(language_model, "_generate", spy)
    policy = new_policy(in_flight=8)
    assert without_log_probability([policy.propose(STATES[:1], 7, 1.0)[0][:4]]) == without_log_probability(sampled[:1])
    assert sorted(calls) == [(4, 1, 3), (4, 1, 4)]
    calls.clear()
    drawn = policy.propose([STATES[1], STATES[2]._replace(first=3)], 1, 1.0)
    assert calls == [(4, 4, 2)]
    assert without_log_probability(drawn) == without_log_probability([sampled[1][:1], sampled[2][3:]])


def test_a_long_episode_through_the_cache_draws_what_a_fresh_policy_draws():
    policy, messages = new_policy(), STATES[0].messages
    for turn in range(4):
        state = State("task/0", messages)
        (drawn,) = policy.propose([state], 2, 1.0)
        assert without_log_probability([drawn]) == without_log_probability(new_policy().propose([state], 2, 1.0))
        messages = [
            *messages,
            {"role": "assistant", "content": drawn[turn % 2].text},
            {"role": "user", "content": f"Got {turn} stick"},
        ]


def test_seed_task_conversation_and_number_each_change_the_draw(sampled):
    first = sampled[0][0].text
    state = STATES[0]
    others = [
        new_policy(seed=1).propose([state], 1, 1.0)[0][0].text,
        new_policy().propose([state._replace(task="task/other")], 1, 1.0)[0][0].text,
        new_policy().propose([state._replace(messages=tiny.conversation(77)[:1])], 1, 1.0)[0][0].text,
        sampled[0][1].text,
    ]
    assert first not in others


def test_greedy_equals_an_uncached_argmax_loop():
    actions = [candidates[0] for candidates in new_policy().propose(STATES, 1, 0.0)]
    sequences = [ENCODER.prompt(state.messages) for state in STATES]
    log_probabilities, ended = np.zeros(len(STATES)), np.zeros(len(STATES), bool)
    written: list[list[int]] = [[] for _ in STATES]
    for _ in range(STEPS):
        scores = log_softmax(next_logits(sequences))
        for row in np.flatnonzero(~ended):
            token = int(scores[row].argmax())
            log_probabilities[row] += scores[row, token]
            ended[row] = token == ENCODER.end_id
            written[row].append(token)
            sequences[row] = [*sequences[row], token]
    for action, tokens, stopped, expected in zip(actions, written, ended, log_probabilities, strict=True):
        assert action.text == ENCODER.decode(tokens[:-1] if stopped else tokens)
        assert (action.tokens, action.stop) == (len(tokens), "end" if stopped else "length")
        np.testing.assert_allclose(action.log_probability, expected, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_tempered_distribution(temperature):
    count, state = 2048, STATES[1]
    (actions,) = new_policy(steps=1, in_flight=64).propose([state], count, temperature)
    scores = log_softmax(next_logits([ENCODER.prompt(state.messages)]))[0]
    expected = np.exp(log_softmax(scores[None] / temperature)[0])
    # One token each, so a log probability (at temperature 1, as defined) names the token.
    drawn = np.array([np.abs(scores - action.log_probability).argmin() for action in actions])
    np.testing.assert_allclose(scores[drawn], [action.log_probability for action in actions], atol=1e-4)
    frequencies = np.bincount(drawn, minlength=len(expected)) / count
    likely = expected > 0.01
    assert likely.sum() >= 5
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(frequencies - expected) < 4.5 * deviation)[likely].all()
    assert abs(frequencies[~likely].sum() - expected[~likely].sum()) < 0.05


def test_tokens_that_open_a_message_or_pad_are_never_drawn():
    (actions,) = new_policy(steps=1, in_flight=64).propose([STATES[0]], 2048, 50.0)
    assert all(ENCODER.special_in(action.text) is None for action in actions)
    assert sum(action.stop == "end" for action in actions) > 2  # at this temperature every token is as likely
    assert len({action.text for action in actions}) > 150  # half of the tokens are bytes that are no text


def test_a_special_token_spelled_by_plain_ones_is_left_out():
    policy = new_policy()
    ids = [ENCODER.tokenizer.convert_tokens_to_ids(character) for character in "a<<|end|>|end|>b"]
    assert ENCODER.decode(ids) == "a<<|end|>|end|>b"
    assert policy._text(ids) == "ab"


def test_equal_draws_are_sampled_once():
    policy = new_policy()
    first = policy.propose(STATES[:2], 2, 1.0)
    usage = policy.usage
    assert usage["generated"] == sum(action.tokens for candidates in first for action in candidates)
    assert policy.propose(STATES[:2], 2, 1.0) == first
    assert policy.usage == usage
    assert policy.propose(STATES[:1], 3, 1.0)[0][:2] == first[0]
    assert policy.usage["generated"] > usage["generated"]


def test_dropped_candidates_are_drawn_again_the_same(monkeypatch):
    monkeypatch.setattr(language_model, "MAX_CACHED", 2)
    policy = new_policy()
    first = policy.propose(STATES, 2, 1.0)
    assert len(policy._cache) == 2
    cost = policy.generated
    assert without_log_probability(policy.propose(STATES, 2, 1.0)) == without_log_probability(first)
    assert policy.generated > cost


def test_a_state_too_long_gets_an_empty_action_and_its_neighbours_are_unharmed(sampled):
    too_long = State("task/long", tiny.conversation(50, turns=18)[:-1])
    assert len(ENCODER.prompt(too_long.messages)) + STEPS > LONGEST
    actions = new_policy().propose([STATES[0], too_long, STATES[1]], 2, 1.0)
    assert actions[1] == [Action("", 0, None, "length")] * 2
    assert without_log_probability([actions[0], actions[2]]) == without_log_probability([s[:2] for s in sampled[:2]])


def test_nothing_compiles_again_after_the_first_round():
    policy = new_policy()
    policy.propose([STATES[0], STATES[2]], 1, 1.0)
    policy.propose([STATES[2]], 2, 1.0)
    with tiny.compilations() as seen:
        for count, temperature in ((1, 0.7), (3, 1.0), (2, 0.0)):
            policy.propose(STATES, count, temperature)
    assert seen == []


@pytest.fixture
def directory(tmp_path):
    for source in tiny.tokenizer_directory().iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    writer.write_model(
        tmp_path, tiny.UNTIED, PARAMETERS, pad_id=ENCODER.pad_id, end_id=ENCODER.end_id, max_length=LONGEST
    )
    return tmp_path


def test_a_policy_read_from_its_directory_draws_the_same(directory, sampled):
    settings = config.PolicyConfig(max_action_tokens=STEPS, max_tokens=LONGEST, in_flight=3)
    policy = language_model.load(str(directory), seed=0, settings=settings)
    drawn = policy.propose(STATES[:1], 4, 1.0)
    assert without_log_probability(drawn) == without_log_probability(sampled[:1])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(directory):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 300}))
    tensors = load_file(directory / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"tokenizer has 304 tokens.* 300"):
        language_model.load(str(directory), seed=0, settings=config.PolicyConfig())


def test_the_encoder_of_these_tests_fills_the_vocabulary():
    assert isinstance(ENCODER, Encoder)
    assert ENCODER.vocabulary_size == tiny.CONFIG.vocab_size
