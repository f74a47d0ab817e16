"""Served policies in configs: endpoints that cannot be, and secrets, which no message repeats."""

import pytest

from jaxprm import config
from jaxprm.errors import UserError
from tests.test_config import message

ENDPOINT = """
from jaxprm.config import Endpoint, Experiment, Policy

config = Experiment(name="mine", base_model="default", policy=Policy(endpoint=Endpoint(model="org/model")))
"""


@pytest.fixture
def served(tmp_path):
    path = tmp_path / "served.py"
    path.write_text(ENDPOINT)
    return path


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("policy.endpoint.model=", 'policy.endpoint.model = "": expected `str` of length >= 1'),
        ("policy.endpoint.retries=-1", "policy.endpoint.retries = -1: expected `int` >= 0"),
        ("policy.endpoint.requests_in_flight=0", "policy.endpoint.requests_in_flight = 0: expected `int` >= 1"),
        ("policy.endpoint.timeout_seconds=0", "policy.endpoint.timeout_seconds = 0: expected `float` > 0"),
        ("policy.endpoint.modle=a", "policy.endpoint.modle: no such field; policy.endpoint has model, base_url,"),
        ("policy.endpoint.base_url=localhost:8000", "write it as http://host:port/v1"),
        ("policy.endpoint.base_url=ftp://a/v1", 'policy.endpoint.base_url = "ftp://a/v1": write it as http://'),
        ("policy.endpoint.base_url=http:///v1", "write it as http://host:port/v1"),
        ("policy.endpoint.base_url=http://a:b/v1", "policy.endpoint.base_url is no URL"),
        ("policy.endpoint.base_url=http://a b/v1", "write it as http://host:port/v1"),
        ("policy.endpoint.base_url=http://a/v1?key=1", "policy.endpoint.base_url has a user, a query or a fragment"),
        ("policy.endpoint.base_url=http://a/v1/chat/completions", "leave out /chat/completions, which is added"),
        ('policy.endpoint.extra_body={"stream": true}', "policy.endpoint.extra_body.stream is set for every request"),
        ('policy.endpoint.extra_body={"tools": []}', "policy.endpoint.extra_body.tools: environments take text"),
        ('policy.endpoint.extra_body={"seed": 3}', "extra_body.seed = 3: every sample needs its own seed"),
        ("policy.path=runs/policy", "policy.endpoint replaces policy.path"),
        ('policy.arguments={"a": 1}', "policy.endpoint replaces policy.path and policy.arguments"),
    ],
)
def test_an_endpoint_that_cannot_be_is_one_line(served, override, says):
    assert says in message(config.load, served, [override])


@pytest.mark.parametrize(
    "override",
    [
        'policy.endpoint.extra_body={"top_p": 0.9, "seed": null, "max_completion_tokens": 9, "a": {"b": [1]}}',
        "policy.endpoint.base_url=https://[::1]:80/",
        "policy.endpoint.api_key_env=MY_KEY",
        "policy.endpoint.api_key_env=null",
        "base_model=runs/hf_qwen2_5_0_5b_instruct-sk-experiment_of_november",
        "policy.endpoint.model=Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4-a-rather-long-name",
        'environment.arguments={"password": "open sesame", "url": "http://127.0.0.1:9/a@b"}',
    ],
)
def test_an_endpoint_of_another_kind_is_fine(served, override):
    assert config.load(served, [override]) != config.load(served) or "null" in override


SECRET = "Zq3xW8nB5vC1mK7pL2jH4gF6dS9a"


@pytest.mark.parametrize(
    ("override", "field"),
    [
        (f"policy.endpoint.api_key_env=sk-{SECRET}", "policy.endpoint.api_key_env"),
        (f"policy.endpoint.api_key_env={SECRET}", "policy.endpoint.api_key_env"),
        (f"policy.endpoint.model=hf_{SECRET}", "policy.endpoint.model"),
        (f"base_model=models/sk-ant-api03-{SECRET}", "base_model"),
        (f"policy.endpoint.base_url=http://me:{SECRET}@host/v1", "policy.endpoint.base_url"),
        (f"policy.endpoint.base_url=http://{SECRET}@host/v1", "policy.endpoint.base_url"),
        (f'policy.endpoint.extra_body={{"api_key": "{SECRET}"}}', "policy.endpoint.extra_body.api_key"),
        (f'policy.endpoint.extra_body={{"a": [{{"X-Api-Key": "{SECRET}"}}]}}', "extra_body.a[0].X-Api-Key"),
        (f'policy.endpoint.extra_body={{"h": "Authorization: Bearer {SECRET}"}}', "policy.endpoint.extra_body.h"),
        (f'environment.arguments={{"server": "https://u:{SECRET}@host"}}', "environment.arguments.server"),
        (f'environment.arguments={{"token": "ghp_{SECRET}"}}', "environment.arguments.token"),
        (f'policy.endpoint.api_key="{SECRET}"', "policy.endpoint.api_key"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(served, override, field):
    error = message(config.load, served, [override])
    assert field in error
    assert SECRET not in error


@pytest.mark.parametrize(
    "override",
    [
        "policy.endpoint.api_key=sk-proj-AbCdEf0123456789AbCdEf01",
        "policy.endpoint.token=hunter2hunter2",
        "x.hf_token=a1b2c3d4e5f6",
    ],
)
def test_an_override_that_fails_does_not_show_a_secret(override):
    with pytest.raises(UserError, match="its value is like a secret") as error:
        config.load("configs/textcraft_tiny.py", [override])
    assert override.partition("=")[2] not in str(error.value)
