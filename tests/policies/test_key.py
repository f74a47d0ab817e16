"""A server that repeats the key it was sent: no action, no message and no file gets it."""

from __future__ import annotations

import pytest

from tests.key_forms import forms
from tests.policies.fake_server import Reply, completion
from tests.policies.test_endpoint import BAD, KEY, STATES, message


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_a_server_that_repeats_the_key_in_any_form_gets_it_into_no_action_and_no_message(status, server, make):
    for name, form in forms(KEY).items():
        text = f"Action: {form} up"
        body = completion(text) if status == 200 else {"error": {"message": text}}
        server.script["bad"] = [Reply(status, body)]
        policy = make(key=KEY, api_key_env="MY_KEY", retries=0)
        if status == 401:
            shown = message(policy, [BAD])
        else:
            policy.propose(STATES[:1], 1, 1.0)
            shown = repr(policy.propose([BAD], 1, 1.0))
        assert "[key]" in shown and "up" in shown, name
        assert not any(part in shown for part in (KEY[:8], KEY[8:16], form, form[:24], form[-24:])), (name, shown)


def test_a_placeholder_for_a_key_damages_no_action(server, make):
    server.script["bad"] = [Reply(200, completion("The inventory is EMPTY"))]
    assert make(key="EMPTY", api_key_env="MY_KEY").propose([BAD], 1, 1.0)[0][0].text == "The inventory is EMPTY"
