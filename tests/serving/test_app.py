"""The endpoints, without a socket: answers, refusals and tokens."""

import asyncio
import logging

import pytest

from jaxprm.serving.app import ServerMetrics
from jaxprm.serving.requests import RequestLimits
from tests.serving import fakes
from tests.serving.fakes import JSON, MESSAGES, error

ACTIONS = {"messages": MESSAGES, "candidates": ["abc", "a"]}
SECRET = "a-long-secret"


def served(
    test,
    *,
    limits: RequestLimits = RequestLimits(),
    token: str | None = None,
    metrics: ServerMetrics | None = None,
    **settings,
):
    """Runs `test(client, model)` against the application."""

    async def run():
        model = fakes.Model()
        batcher = fakes.batcher(model, limits)
        await fakes.ready(batcher)
        try:
            async with fakes.client(batcher, limits, token, metrics, **settings) as client:
                await test(client, model)
        finally:
            model.going.set()
            await asyncio.to_thread(batcher.close)

    asyncio.run(run())


def test_questions_are_answered():
    async def test(client, model):
        response = await client.post("/v1/score_actions", json=ACTIONS)
        scores = [{"promise": 3.0, "progress": None}, {"promise": 1.0, "progress": None}]
        assert response.status_code == 200 and response.json() == {"model": "some-model", "scores": scores}
        response = (await client.post("/classify", json={"input": ["abc", "de"]})).json()
        assert [item["probs"] for item in response["data"]] == [[3.0], [2.0]] and response["model"] == "some-model"
        assert (await client.post("/classify", json={"input_ids": [5, 6]})).json()["embedding"] == [2.0]
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "some-model"
        assert (await client.get("/health")).json() == {"status": "ready"}

    served(test)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/v1/score_actions", b"{", JSON, 400),
        ("POST", "/v1/score_actions", b"", JSON, 400),
        ("POST", "/v1/score_actions", b'{"messages": []}', JSON, 400),
        ("POST", "/v1/score_actions", b"[" * 33 + b"]" * 33, JSON, 400),
        ("POST", "/v1/score_actions", b" " * 300, JSON, 413),
        ("POST", "/classify", b'{"input": "a"}', {"Content-Type": "text/plain"}, 415),
        ("POST", "/classify", b'{"input": "a"}', {}, 415),
        ("POST", "/classify", b'{"input": ["a", "b", "c"]}', JSON, 400),
        ("POST", "/nothing%0A%20here", b"", {}, 404),
        ("POST", "/classify/", b"{}", JSON, 404),
        ("GET", "/classify", b"", {}, 405),
        ("DELETE", "/health", b"", {}, 405),
    ],
)
def test_every_refusal_is_a_line_of_json(method, path, body, headers, status):
    async def test(client, model):
        response = await client.request(method, path, content=body, headers=headers)
        assert response.status_code == status and error(response)["message"]
        assert model.batches == []
        assert (await client.post("/classify", json={"input": "abc"})).status_code == 200

    served(test, limits=RequestLimits(body_bytes=200, candidates=2))


def test_a_full_queue_is_a_429_with_the_time_to_come_back():
    async def test(client, model):
        model.going.clear()
        asked = [asyncio.create_task(client.post("/classify", json={"input": "a" * n})) for n in (1, 2)]
        await asyncio.to_thread(model.begun.wait, 10)
        await asyncio.sleep(0.05)
        response = await client.post("/classify", json={"input": "abc"})
        assert response.status_code == 429 and error(response) and int(response.headers["retry-after"]) >= 1
        model.going.set()
        assert [item.json()["data"][0]["probs"] for item in await asyncio.gather(*asked)] == [[1.0], [2.0]]

    served(test, limits=RequestLimits(waiting=2))


def test_requests_without_the_token_are_refused(caplog):
    async def test(client, model):
        wrong = ("", SECRET, f"Basic {SECRET}", "Bearer", "Bearer \xe9", f"Bearer {SECRET}x", f"Bearer {SECRET[:-1]}")
        guarded = (("POST", "/classify"), ("POST", "/v1/score_actions"), ("GET", "/metrics"), ("GET", "/v1/models"))
        for header in wrong:
            for method, path in guarded:
                response = await client.request(method, path, headers={"Authorization": header.encode("latin-1")})
                assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
                assert SECRET not in error(response)["message"]
        right = {"Authorization": f"Bearer {SECRET}"}
        assert (await client.post("/classify", json={"input": "abc"}, headers=right)).status_code == 200
        assert (await client.get("/metrics", headers=right)).status_code == 200
        assert (await client.get("/health")).status_code == 200  # probes have no token
        model.fail = RuntimeError("broken")
        assert (await client.post("/classify", json={"input": "abc"}, headers=right)).status_code == 500

    caplog.set_level(logging.DEBUG)
    served(test, token=SECRET)
    assert SECRET not in caplog.text and "broken" in caplog.text


def test_an_internal_failure_is_a_500_without_details():
    async def test(client, model):
        model.fail = RuntimeError("/secret/path")
        response = await client.post("/classify", json={"input": "abc"})
        assert response.status_code == 500 and "secret" not in error(response)["message"]
        model.fail = None
        assert (await client.post("/classify", json={"input": "abc"})).status_code == 200

    served(test)


def test_metrics_count_requests_batches_and_tokens():
    async def test(client, model):
        for body in ({"input": "abc"}, {"input": "ab"}, {"input": 1}):
            await client.post("/classify", json=body)
        metrics.count_batch(2, 0.5, {"encoded": 7, "reused": 3})
        lines = (await client.get("/metrics")).text.splitlines()
        for line in (
            'jaxprm_requests_total{endpoint="/classify",status="200"} 2.0',
            'jaxprm_requests_total{endpoint="/classify",status="400"} 1.0',
            'jaxprm_request_seconds_count{endpoint="/classify"} 2.0',
            "jaxprm_batch_requests_sum 2.0",
            "jaxprm_model_seconds_total 0.5",
            'jaxprm_tokens_total{kind="encoded"} 7.0',
            'jaxprm_tokens_total{kind="reused"} 3.0',
        ):
            assert line in lines
        assert any(line.startswith("process_resident_memory_bytes ") for line in lines)

    metrics = ServerMetrics()
    served(test, metrics=metrics)


def test_before_the_warm_up_health_says_so_and_requests_are_refused():
    async def run():
        batcher = fakes.batcher(fakes.Model())  # not started
        async with fakes.client(batcher) as client:
            response = await client.get("/health")
            assert (response.status_code, response.json()["status"]) == (503, "warming up")
            response = await client.post("/classify", json={"input": "abc"})
            assert response.status_code == 503 and error(response) and "retry-after" in response.headers

    asyncio.run(run())
