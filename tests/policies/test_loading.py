"""Loading the policy of a config: a directory, a user's class or an endpoint; and the base of reward models."""

import importlib
from pathlib import Path

import pytest

from jaxprm.config import EndpointConfig, Experiment, PolicyConfig
from jaxprm.errors import UserError
from jaxprm.policies import language_model, loading
from jaxprm.policies.endpoint import EndpointPolicy
from jaxprm.policies.protocol import State
from jaxprm.workflow import workdir
from jaxprm.workflow.context import Run
from jaxprm.workflow.run import stage_inputs

OWN = """
from jaxprm.policies.protocol import Action


class Parrot:
    usage = {"encoded": 0, "generated": 0}
    closed = 0

    def __init__(self, seed, word="hello"):
        self.text = f"{word} {seed}"

    def propose(self, states, n, temperature):
        return [[Action(self.text, 2)] * n for _ in states]

    def count_tokens(self, messages):
        return 3 * len(messages)

    def close(self):
        self.closed += 1


class Mute:
    def __init__(self, seed):
        pass

    def count_tokens(self, messages):
        return 0
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_policy.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


def experiment(base=None, **policy):
    return Experiment(name="a", seed=5, policy=PolicyConfig(**policy), base_model=base)


ENDPOINT = EndpointConfig(model="m", base_url="http://127.0.0.1:9/v1")


def test_a_users_own_class_gets_the_seed_and_its_arguments(own):
    policy = loading.load(experiment(path="own_policy:Parrot", arguments={"word": "ahoy"}))
    assert policy.propose([State("t", [])], 2, 1.0)[0][1].text == "ahoy 5"


@pytest.mark.parametrize(
    ("path", "arguments", "says"),
    [
        ("own_policy:Mute", {}, "policy 'own_policy:Mute': Mute has no method propose; define it"),
        ("own_policy:Nobody", {}, "policy 'own_policy:Nobody': 'Nobody' does not exist in"),
        ("nowhere_policy:Parrot", {}, "policy 'nowhere_policy:Parrot': no module 'nowhere_policy'; install it"),
        ("own_policy:Parrot", {"voice": 1}, "unexpected keyword argument 'voice'; fix the config's policy arguments"),
    ],
)
def test_a_policy_that_cannot_be_loaded_is_one_line(own, path, arguments, says):
    with pytest.raises(UserError) as error:
        loading.load(experiment(path=path, arguments=arguments))
    assert says in str(error.value)


def test_an_endpoint_reads_its_key_from_the_environment_before_anything_is_asked(monkeypatch):
    served = EndpointConfig(model="m", api_key_env="JAXPRM_TEST_KEY")
    with pytest.raises(UserError, match="JAXPRM_TEST_KEY is not set"):
        loading.load(experiment(endpoint=served))
    monkeypatch.setenv("JAXPRM_TEST_KEY", "something")
    assert isinstance(loading.load(experiment(endpoint=served)), EndpointPolicy)


def test_an_endpoint_counts_with_the_base_models_tokenizer_if_there_is_one():
    messages = [{"role": "user", "content": "Goal: craft oak planks."}]
    counted = loading.load(experiment(endpoint=ENDPOINT, base="default")).count_tokens(messages)
    assert counted == len(language_model.Encoder.load(language_model.default_directory()).prompt(messages))
    assert loading.load(experiment(endpoint=ENDPOINT)).count_tokens(messages) == 4 + 6 != counted


@pytest.mark.parametrize("policy", [{"endpoint": ENDPOINT}, {"path": "own_policy:Parrot"}])
def test_reward_models_of_a_policy_without_a_directory_need_a_base_model(policy):
    with pytest.raises(UserError, match="base_model is null, and this policy has no directory"):
        loading.base_directory(experiment(**policy))
    assert loading.base_directory(experiment(**policy, base="default")) == language_model.default_directory()
    with pytest.raises(UserError, match="base model nowhere: no such directory; give one, or a name on the hub"):
        loading.base_directory(experiment(**policy, base="nowhere"))


def test_a_directory_without_a_model_is_named_with_its_field(tmp_path):
    with pytest.raises(UserError, match=r"policy .*: no config\.json; set policy\.path to a model directory"):
        loading.load(experiment(path=str(tmp_path)))


def test_a_policys_directory_is_the_base_unless_another_is_given(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert loading.base_directory(experiment(path=str(tmp_path))) == tmp_path
    assert loading.base_directory(experiment(base=str(tmp_path))) == tmp_path
    assert loading.base_directory(experiment()) == language_model.default_directory()


def inputs(tmp_path: Path, until="build", **changed):
    return stage_inputs(Run(experiment(**changed), workdir.WorkDirectory(tmp_path / "work")), until)


def test_a_stage_depends_on_the_model_of_an_endpoint_and_not_on_how_it_is_reached(tmp_path):
    moved = EndpointConfig(
        model="m",
        base_url="https://elsewhere/v1",
        api_key_env="KEY",
        served_as="n",
        requests_in_flight=3,
        timeout_seconds=1.0,
        retries=0,
        give_up_after=1,
    )
    before = inputs(tmp_path, endpoint=ENDPOINT, base="default")
    assert inputs(tmp_path, endpoint=moved, base="default", in_flight=3) == before
    for other in (EndpointConfig(model="n"), EndpointConfig(model="m", extra_body={"top_p": 0.5})):
        fingerprints = inputs(tmp_path, endpoint=other, base="default")
        assert fingerprints["collect"] != before["collect"] and fingerprints["build"] != before["build"]


def test_the_base_model_changes_shards_but_not_trajectories(tmp_path, own):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    first, second = (inputs(tmp_path, path="own_policy:Parrot", base=base) for base in ("default", str(other)))
    assert first["collect"] == second["collect"]
    assert first["build"] != second["build"]
    changed = inputs(tmp_path, path="own_policy:Parrot", arguments={"word": "b"}, base="default")
    assert changed["collect"] != first["collect"]


def test_a_run_closes_its_policy_and_prints_its_retries(own, tmp_path, capsys):
    run = Run(experiment(path="own_policy:Parrot"), workdir.WorkDirectory(tmp_path / "work"))
    run.close()
    assert "policy" not in vars(run)  # never loaded
    policy = run.policy
    run.close()
    assert (policy.closed, capsys.readouterr().err) == (1, "")
    importlib.import_module("own_policy").Parrot.usage = {"encoded": 3, "retries": 2}
    run.close()
    assert capsys.readouterr().err == "policy: 3 encoded, 2 retries\n"
