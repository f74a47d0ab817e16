"""Names of a server: what a Host or Origin header may say."""

import pytest

from jaxprm.errors import UserError
from jaxprm.serving import hosts
from tests.serving import fakes
from tests.serving.fakes import error
from tests.serving.test_app import ACTIONS, served

OWN = frozenset({"prm.example.org", "192.0.2.7"})
ACCEPTED = (
    *("localhost", "LOCALHOST:8000", "localhost.", "agent.localhost:1", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000"),
    *("[::ffff:127.0.0.1]:80", "prm.example.org", "PRM.example.org:443", "prm.example.org.:8000", "192.0.2.7:8000"),
)
REFUSED = (
    *("", "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evil-localhost"),
    *("[::2]:80", "192.0.2.8", "user@localhost", "localhost/", "localhost:80:80", "localhost, evil.example", "[::1"),
    *("xprm.example.org", "prm.example.org.evil", "0.0.0.0:8000", "2130706433", "0x7f.1", "local host", "[localhost]"),
)


@pytest.mark.parametrize("header", ACCEPTED)
def test_loopback_and_configured_names_are_accepted(header):
    assert hosts.is_accepted(hosts.host_of(header), OWN)


@pytest.mark.parametrize("header", REFUSED)
def test_other_names_are_not(header):
    assert not hosts.is_accepted(hosts.host_of(header), OWN)


@pytest.mark.parametrize(
    "text", ["http://prm.example.org", "prm.example.org:80", "", "a b", "a/b", "*", "*.example.org"]
)
def test_an_allowed_host_is_a_name(text):
    with pytest.raises(UserError, match="--allow-host"):
        hosts.parse_host(text)
    assert hosts.parse_host("PRM.example.org.") == "prm.example.org" and hosts.parse_host("[::2]") == "::2"


def test_a_rebound_page_learns_nothing_and_a_real_client_is_answered():
    async def test(client, model):
        for method, path in (("POST", "/v1/score_actions"), ("GET", "/health"), ("GET", "/v1/models"), ("GET", "/no")):
            response = await client.request(method, path, json=ACTIONS, headers={"Host": "evil.example:8000"})
            assert response.status_code == 421 and "--allow-host" in error(response)["message"]
            assert "access-control-allow-origin" not in response.headers
        for origin in ("http://evil.example", "null", "file://", "http://localhost.evil.example:80"):
            headers = {"Host": "localhost:8000", "Origin": origin}
            response = await client.post("/v1/score_actions", json=ACTIONS, headers=headers)
            assert response.status_code == 403 and error(response)
        assert model.batches == []
        for headers in ({"Host": "localhost:8000"}, {"Host": "prm.example.org", "Origin": "https://prm.example.org"}):
            assert (await client.post("/v1/score_actions", json=ACTIONS, headers=headers)).status_code == 200

    served(test, hosts=OWN)


def test_without_names_any_is_accepted():
    """As with a token, which no web page has."""

    async def test(client, model):
        headers = {"Host": "proxy.example", "Origin": "https://proxy.example"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200

    served(test)


def test_owners_of_caches():
    async def test(client, model):
        for salt in ("a", "b", "a", None):
            body = {"input": "abc"} | ({"cache_salt": salt} if salt else {})
            assert (await client.post("/classify", json=body)).status_code == 200
            assert (await client.post("/v1/score_actions", json=ACTIONS | {"cache_salt": salt})).status_code == 200
        a, b, a_again, shared = model.owners[::2]
        assert model.owners[::2] == model.owners[1::2]
        assert a == a_again and len({a, b, shared}) == 3 and shared == 0
        for salt in ("", 5, "x" * 1025):
            response = await client.post("/classify", json={"input": "abc", "cache_salt": salt})
            assert response.status_code == 400 and "cache_salt" in error(response)["message"]

    served(test)


def test_connections_of_a_private_server_have_caches_of_their_own():
    import http.client

    def ask(connection, body=b'{"input": "abc"}'):
        connection.request("POST", "/classify", body, fakes.JSON)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.read()

    with fakes.listening(private=True) as (port, model):
        first, second = (http.client.HTTPConnection("127.0.0.1", port, timeout=30) for _ in range(2))
        for connection in (first, second, first):
            ask(connection)
        ask(second, b'{"input": "abc", "cache_salt": "mine"}')
        first.close(), second.close()
    assert model.owners[0] == model.owners[2] and len(set(model.owners)) == 3 and 0 not in model.owners
