"""A page in a real Chromium that tries to use a server of the same machine, as DNS rebinding and other sites would."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.report.test_browser import FLAGS
from tests.serving import fakes

pytestmark = pytest.mark.slow

EVIL = "evil.example"
SCRIPT = """
async function attempt(url, options) {
  try {
    const response = await fetch(url, options);
    return {status: response.status, type: response.type, text: await response.text()};
  } catch (error) {
    return {error: String(error)};
  }
}
"""
PAGE = f"<!doctype html><title>page</title><script>{SCRIPT}</script>".encode()
ASK = {"messages": [{"role": "user", "content": "x"}], "candidates": ["abc"]}


class Page(http.server.BaseHTTPRequestHandler):
    """The attacker's own server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator:
    from selenium import webdriver

    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    assert all(programs.values()), f"missing: {programs}; run tests/install_browser.sh"
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    # The attacker's name server answers with this machine, for its page and for the server alike.
    rules = f"--host-resolver-rules=MAP {EVIL} 127.0.0.1"
    # Otherwise the browser asks a person before a page may reach this machine: what the server does is tested here.
    checks = "--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests,HttpsUpgrades"
    for flag in (*FLAGS, rules, checks, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(programs["chromedriver"]))
    browser.set_script_timeout(30)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def attacker() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def attempt(driver, url: str, **options) -> dict:
    script = "const done = arguments[2]; attempt(arguments[0], arguments[1]).then(done);"
    return driver.execute_async_script(script, url, options)


ATTEMPTS = (
    {"path": "/v1/models"},
    {"path": "/health"},
    {"path": "/v1/score_actions", "method": "POST", "body": json.dumps(ASK), "type": "application/json"},
    {"path": "/v1/score_actions", "method": "POST", "body": json.dumps(ASK), "type": "text/plain"},
)


def attempts(driver, origin: str, mode: str = "cors") -> list[dict]:
    results = []
    for each in ATTEMPTS:
        options = {"method": each.get("method", "GET"), "mode": mode}
        if "body" in each:
            options |= {"body": each["body"], "headers": {"Content-Type": each["type"]}}
        results.append(attempt(driver, origin + each["path"], **options))
    return results


def test_a_rebound_page_gets_no_answer(driver, attacker):
    """The page's name now has this server's address: to the browser the requests are of the same origin."""
    with fakes.listening(hosts=frozenset()) as (port, model):
        # The page comes from the server's own port, as after rebinding. Any answer of the server is a page.
        driver.get(f"http://{EVIL}:{port}/")
        assert urlsplit(driver.current_url).hostname == EVIL and "some-model" not in driver.page_source
        driver.execute_script(SCRIPT + "window.attempt = attempt;")
        results = attempts(driver, f"http://{EVIL}:{port}")
        assert [result["status"] for result in results] == [421] * 4
        assert "some-model" not in json.dumps(results) and model.batches == []


def test_a_page_from_elsewhere_gets_no_answer(driver, attacker):
    with fakes.listening(hosts=frozenset()) as (port, model):
        for page in (f"http://{EVIL}:{attacker}/", f"http://localhost:{attacker}/"):
            driver.get(page)
            for name in ("127.0.0.1", "localhost"):
                for mode in ("cors", "no-cors"):
                    for result in attempts(driver, f"http://{name}:{port}", mode):
                        # "opaque": the browser has an answer, and shows the page nothing of it.
                        assert "error" in result or (result["type"], result["text"]) == ("opaque", ""), result
        assert model.batches == []


def test_the_same_attempts_succeed_without_the_check(driver, attacker):
    """What the other tests prevent is possible: a server that accepts any name answers the rebound page."""
    with fakes.listening(hosts=None) as (port, model):
        driver.get(f"http://{EVIL}:{port}/")
        driver.execute_script(SCRIPT + "window.attempt = attempt;")
        results = attempts(driver, f"http://{EVIL}:{port}")
        assert [result["status"] for result in results] == [200, 200, 200, 415]
        assert "some-model" in results[0]["text"] and model.batches == [1]


def test_a_page_of_the_server_itself_is_answered(driver):
    """As from a tool that is served on this machine under an accepted name."""
    with fakes.listening(hosts=frozenset({"prm.example"})) as (port, model):
        driver.get(f"http://localhost:{port}/health")
        driver.execute_script(SCRIPT + "window.attempt = attempt;")
        results = attempts(driver, f"http://localhost:{port}")
        assert [result["status"] for result in results] == [200, 200, 200, 415] and model.batches == [1]
