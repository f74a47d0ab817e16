"""A scripted server, and policies that ask it."""

from __future__ import annotations

import pytest

from jaxprm.config import EndpointConfig, PolicyConfig
from jaxprm.policies import endpoint as endpoint_module
from jaxprm.policies.endpoint import ChatClient, EndpointPolicy, Pauses
from tests.policies.fake_server import MODEL, FakeServer


@pytest.fixture
def server():
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def make(server):
    """A function that makes policies of the server. They are closed after the test."""
    policies = []

    def make(*, seed=0, key=None, encoder=None, max_tokens=1024, pauses=Pauses(0.004, 0.01, 0.05), **endpoint):
        options = {"base_url": server.base_url, "model": MODEL, "timeout_seconds": 5.0, "retries": 2} | endpoint
        settings = PolicyConfig(endpoint=EndpointConfig(**options), max_action_tokens=50, max_tokens=max_tokens)
        finder = endpoint_module.special_token_finder(encoder)
        client = ChatClient(settings.endpoint, key, find_special=finder, pauses=pauses)
        policies.append(EndpointPolicy(settings, seed=seed, encoder=encoder, client=client))
        return policies[-1]

    yield make
    for policy in policies:
        policy.close()
