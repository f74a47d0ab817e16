"""Addresses and tokens of a server, and its messages when it cannot start."""

import socket
import sys

import pytest

from jaxprm import cli
from jaxprm.errors import UserError
from jaxprm.serving import server

SECRET = "a-long-secret"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_a_host_that_others_can_reach_needs_a_token(host):
    with pytest.raises(UserError, match=f"host {host}: others can reach it; set JAXPRM_TOKEN"):
        server.bind(host, 0, None)


def test_with_a_token_others_can_reach_it():
    with server.bind("0.0.0.0", 0, SECRET) as listening:
        assert listening.getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_this_machine_needs_no_token(host):
    with server.bind(host, 0, None) as listening:
        assert listening.getsockname()[0].startswith("127.") or listening.getsockname()[0] == "::1"


def test_a_port_in_use_is_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: Address already in use; choose another --port"):
            server.bind("127.0.0.1", port, None)


def test_a_port_of_a_server_that_is_still_starting_is_in_use():
    with server.bind("127.0.0.1", 0, None) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: Address already in use"):
            server.bind("127.0.0.1", port, None)


def test_the_name_of_a_model_is_no_path(tmp_path):
    assert server.public_name(str(tmp_path), {"label": "agentprm"}, tmp_path) == "agentprm"
    for recipe in ({}, {"label": 5}, {"label": ""}):
        assert server.public_name(str(tmp_path), recipe, tmp_path / "my-prm") == "my-prm"
    (tmp_path / "org").mkdir()
    assert server.public_name("org/name@main", {}, tmp_path / "snapshots/0123") == "org/name@main"


@pytest.mark.parametrize(("host", "port"), [("no such host", 0), ("127.0.0.1", 65536), ("127.0.0.1", -1)])
def test_an_address_that_cannot_be_bound_is_one_line(host, port):
    with pytest.raises(UserError, match=host):
        server.bind(host, port, None)


@pytest.mark.parametrize("token", ["", "short", "with a space", "tab\tinside", "with-an-\xe9", "newline-at-the-end\n"])
def test_a_token_that_no_header_carries_is_refused_and_not_shown(token):
    with pytest.raises(UserError) as caught:
        server.read_token({"JAXPRM_TOKEN": token})
    assert "JAXPRM_TOKEN" in str(caught.value) and (not token or token not in str(caught.value))


def test_a_token_is_optional():
    assert server.read_token({}) is None
    assert server.read_token({"JAXPRM_TOKEN": SECRET}) == SECRET


def test_a_service_does_not_show_its_token():
    from jaxprm.serving.app import Service

    assert SECRET not in repr(Service(None, None, None, "m", SECRET))


def test_mistakes_are_one_line(tmp_path, capsys):
    assert cli.main(["serve", "--model", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert cli.main(["serve", "--model", str(tmp_path), "--port", "0"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "JAXPRM_TOKEN" in first and str(tmp_path) in second


def test_without_the_extra_one_line_says_what_to_install(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "uvicorn" or name == "jaxprm.serving.server"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("jaxprm.serving.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", "--model", "anything"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "serve needs uvicorn" in line and "pip install uvicorn starlette" in line
