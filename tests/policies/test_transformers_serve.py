"""An endpoint policy against a real server, `transformers serve` with the shipped policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.encode import Encoder
from data_pipeline.trajectory import parse_line
from jaxprm import environments
from jaxprm.config import EndpointConfig, PolicyConfig
from jaxprm.errors import UserError
from jaxprm.policies import endpoint as endpoint_module
from jaxprm.policies import language_model
from jaxprm.policies.protocol import State
from jaxprm.policies.rollouts import collect
from tests.policies.transformers_server import transformers_server

pytestmark = pytest.mark.slow

SEED, TOKENS = 0, 48
# Without these fields the server rebuilds the tokenizer by Qwen2's rules, and parses its answers as ChatML.
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "auto_map": {"AutoTokenizer": [None, "PreTrainedTokenizerFast"]},
    "unk_token": None,
    "response_template": {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|assistant|>",
        "fields": {"content": {"close": "<|end|>", "content": "text"}},
    },
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The shipped policy unchanged, and prepared for this server."""
    folder = tmp_path_factory.mktemp("served")
    plain, ready = folder / "plain", folder / "textcraft-policy"
    for directory in (plain, ready):
        shutil.copytree(language_model.default_directory(), directory)
    path = ready / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | TOKENIZER))
    # This server samples only if the model's generation config says so, whatever the requested temperature.
    (ready / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": 1, "pad_token_id": 0}))
    return plain, ready


@pytest.fixture(scope="module")
def base_url(tmp_path_factory):
    with transformers_server(tmp_path_factory.mktemp("home")) as url:
        yield url


@pytest.fixture
def make(base_url):
    policies = []

    def make(directory: Path, *, encoder=True, **endpoint):
        options = {"base_url": base_url, "model": str(directory), "retries": 1} | endpoint
        settings = PolicyConfig(endpoint=EndpointConfig(**options), max_action_tokens=TOKENS, max_tokens=896)
        tokenizer = Encoder.load(directory) if encoder else None
        policies.append(endpoint_module.load(settings, seed=SEED, encoder=tokenizer))
        return policies[-1]

    yield make
    for policy in policies:
        policy.close()


@pytest.fixture(scope="module")
def embedded():
    settings = PolicyConfig(max_action_tokens=TOKENS, max_tokens=896, in_flight=8)
    return language_model.load("default", seed=SEED, settings=settings)


def make_environment():
    return environments.create("textcraft", {"max_rounds": 5})


def sample(policy, output: Path):
    """The greedy episodes of a few tasks."""
    tasks, about = make_environment().tasks("test")[::40][:4], {"environment": "textcraft", "seed": SEED}
    collect(make_environment, policy, tasks, output, count=1, temperature=0.0, in_flight=4, split="test", **about)
    return [parse_line(line, where="served") for line in output.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def states():
    environment = make_environment()
    tasks = environment.tasks("test")[:2]
    return [State(task, [{"role": "user", "content": environment.reset(task)}]) for task in tasks]


def test_greedy_episodes_are_those_of_the_same_model_embedded(make, embedded, directories, tmp_path):
    policy = make(directories[1], requests_in_flight=4)
    served, ours = sample(policy, tmp_path / "served.jsonl"), sample(embedded, tmp_path / "ours.jsonl")
    assert sum(len(line.messages) // 2 for line in ours) > 8
    for served_line, our_line in zip(served, ours, strict=True):
        assert served_line.messages == our_line.messages
        # Token counts too, by two independent programs.
        assert (served_line.meta["tokens"], served_line.meta["actions_cut"]) == (
            our_line.meta["tokens"],
            our_line.meta["actions_cut"],
        )
        assert (served_line.outcome, served_line.ended) == (our_line.outcome, our_line.ended)
    usage = policy.usage
    assert (usage["retries"], usage["failures"]) == (0, 0)
    assert usage["generated"] == sum(line.meta["tokens"] for line in served)
    plain = [[{"role": message.role, "content": message.content} for message in line.messages] for line in ours]
    prompts = [messages[: index + 1] for messages in plain for index in range(0, len(messages), 2)]
    assert usage["encoded"] == sum(embedded.count_tokens(messages) for messages in prompts)


def test_samples_are_drawn_by_their_seeds(make, directories, states):
    # The server has one random state: requests in parallel would mix their seeds.
    first, again = (make(directories[1], requests_in_flight=1).propose(states, 3, 1.5) for _ in range(2))
    assert first == again
    assert len({action.text for actions in first for action in actions}) > 3


def test_an_answer_is_cut_at_the_token_limit(make, embedded, directories, states):
    short = make(directories[1], extra_body={"max_completion_tokens": 5})
    ((action,),) = short.propose(states[:1], 1, 0.0)
    assert (action.tokens, action.stop) == (5, "length")
    ((uncut,),) = embedded.propose(states[:1], 1, 0.0)
    assert uncut.text.startswith(action.text) and len(action.text) > 5


@pytest.mark.parametrize("encoder", [True, False])
def test_a_server_that_gives_the_prompt_back_is_found_out(encoder, make, directories, states):
    """This server returns the prompt with the answer if it cannot parse the template."""
    policy = make(directories[0], encoder=encoder)
    with pytest.raises(UserError, match=r"the answer spells <\|user\|>, which no message may contain"):
        policy.propose(states[:1], 1, 0.0)


def test_a_model_that_is_not_there_is_one_line(make, tmp_path, states):
    with pytest.raises(UserError, match="not one of 1 requests was answered, the first: status 500") as error:
        make(tmp_path / "nowhere", encoder=False).propose(states[:1], 1, 0.0)
    assert "\n" not in str(error.value)


def test_a_path_that_is_not_there_is_one_line(make, directories, base_url, states):
    policy = make(directories[1], base_url=base_url.removesuffix("/v1"))
    with pytest.raises(UserError, match="status 404 Not Found: Not Found; see that policy.endpoint.base_url"):
        policy.propose(states[:1], 1, 0.0)


def test_a_field_that_the_server_does_not_know_is_one_line(make, directories, states):
    policy = make(directories[1], extra_body={"top_q": 1})
    with pytest.raises(UserError, match="status 422 .*Unexpected fields in the request: {'top_q'}"):
        policy.propose(states[:1], 1, 0.0)
