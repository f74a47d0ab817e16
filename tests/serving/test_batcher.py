"""The batcher: answers go to their requests, refusals when it is full, and a shutdown that answers everything."""

import asyncio
import time

import pytest

from jaxprm.errors import UserError
from jaxprm.serving.requests import RequestLimits, RequestRefused
from tests.serving import fakes


def echo(asked):
    return [f"answer to {request}" for request in asked]


async def begun(model) -> None:
    await asyncio.to_thread(model.begun.wait, 10)


class Slow:
    """Echoes, once `going` is set."""

    def __init__(self):
        self.model = fakes.Model()
        self.model._answer = lambda request: f"answer to {request}"
        self.going, self.begun, self.batches = self.model.going, self.model.begun, self.model.batches

    def __call__(self, asked):
        return self.model(asked)


def test_every_request_gets_its_own_answer_and_waiting_requests_are_batched():
    async def ask():
        model = Slow()
        model.going.clear()
        batcher = fakes.batcher(model, RequestLimits(batch=8))
        await fakes.ready(batcher)
        first = asyncio.create_task(batcher("first"))
        await begun(model)
        others = [asyncio.create_task(batcher(index)) for index in range(20)]
        await asyncio.sleep(0)
        assert batcher.unanswered == 21
        model.going.set()
        answers = await asyncio.gather(first, *others)
        assert answers == ["answer to first", *(f"answer to {index}" for index in range(20))]
        assert model.batches == [1, 8, 8, 4]
        await asyncio.to_thread(batcher.close)
        assert batcher.unanswered == 0

    asyncio.run(ask())


def test_a_full_queue_refuses_with_a_time_to_retry():
    async def ask():
        model = Slow()
        model.going.clear()
        batcher = fakes.batcher(model, RequestLimits(waiting=3))
        await fakes.ready(batcher)
        accepted = [asyncio.create_task(batcher(index)) for index in range(3)]
        await begun(model)
        with pytest.raises(RequestRefused) as caught:
            await batcher("one too many")
        assert caught.value.status == 429 and int(caught.value.headers["Retry-After"]) >= 1
        model.going.set()
        assert len(await asyncio.gather(*accepted)) == 3
        assert await batcher("now") == "answer to now"
        await asyncio.to_thread(batcher.close)

    asyncio.run(ask())


def test_a_cancelled_request_is_not_computed():
    async def ask():
        model = Slow()
        model.going.clear()
        batcher = fakes.batcher(model, RequestLimits(waiting=3))
        await fakes.ready(batcher)
        first = asyncio.create_task(batcher("first"))
        await begun(model)
        gone, stays = (asyncio.create_task(batcher(name)) for name in ("gone", "stays"))
        await asyncio.sleep(0)
        gone.cancel()
        first.cancel()  # cancelled while its answer is computed
        model.going.set()
        assert await stays == "answer to stays"
        assert model.batches == [1, 1]
        await asyncio.to_thread(batcher.close)

    asyncio.run(ask())


def test_closing_waits_for_the_last_answer():
    async def ask():
        model = Slow()
        model.going.clear()
        batcher = fakes.batcher(model, RequestLimits(batch=2))
        await fakes.ready(batcher)
        asked = [asyncio.create_task(batcher(index)) for index in range(7)]
        await begun(model)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        await asyncio.sleep(0.05)
        with pytest.raises(RequestRefused, match="shutting down") as caught:
            await batcher("too late")
        assert caught.value.status == 503 and not closing.done()
        model.going.set()
        await closing
        assert await asyncio.gather(*asked) == [f"answer to {index}" for index in range(7)]

    asyncio.run(ask())


def test_a_failure_affects_its_batch_only():
    async def ask():
        def answer(asked):
            if "bad" in asked:
                raise ZeroDivisionError
            return echo(asked)[: 0 if "lost" in asked else None]

        batcher = fakes.batcher(answer)
        await fakes.ready(batcher)
        for request in ("bad", "lost"):
            with pytest.raises(RequestRefused) as caught:
                await batcher(request)
            assert caught.value.status == 500
        assert await batcher("good") == "answer to good"
        await asyncio.to_thread(batcher.close)

    asyncio.run(ask())


def test_an_answer_may_be_a_refusal_to_one_of_them():
    async def ask():
        model = Slow()
        model.going.clear()
        model.model._answer = lambda request: RequestRefused(400, "no") if request == "bad" else request
        batcher = fakes.batcher(model)
        await fakes.ready(batcher)
        tasks = [asyncio.create_task(batcher(request)) for request in ("good", "bad", "better")]
        await asyncio.sleep(0.05)
        model.going.set()
        good, bad, better = await asyncio.gather(*tasks, return_exceptions=True)
        assert (good, bad.status, better) == ("good", 400, "better")
        await asyncio.to_thread(batcher.close)

    asyncio.run(ask())


def test_requests_are_refused_during_the_warm_up_which_can_be_aborted():
    async def ask():
        programs = []

        def warm_up(go_on):
            for number in range(10_000):
                go_on()
                programs.append(number)
                time.sleep(0.001)

        batcher = fakes.batcher(echo, warm_up=warm_up)
        batcher.start()
        with pytest.raises(RequestRefused, match="warming up") as caught:
            await batcher("early")
        assert caught.value.status == 503 and "Retry-After" in caught.value.headers
        await asyncio.to_thread(batcher.close)
        assert len(programs) < 10_000 and batcher.state == "warming up" and batcher.error is None

    asyncio.run(ask())


def test_a_warm_up_that_fails_is_told():
    def warm_up(go_on):
        raise UserError("too small")

    batcher = fakes.batcher(echo, warm_up=warm_up)
    batcher.start()
    batcher.close()
    assert str(batcher.error) == "too small" and batcher.state != "ready"
