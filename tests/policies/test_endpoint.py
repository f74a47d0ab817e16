"""Endpoint policies: seeded draws, and servers that misbehave without a wrong or a lost action."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest
from openai.types.chat import ChatCompletion

from jaxprm.config import EndpointConfig
from jaxprm.errors import UserError
from jaxprm.policies import endpoint as endpoint_module
from jaxprm.policies.endpoint import Pauses
from jaxprm.policies.protocol import Action, State, candidate_seed, prefix_hash
from tests.model import tiny
from tests.policies import fake_server
from tests.policies.fake_server import MODEL, Reply, completion, hang, raw, reset

KEY = "wEird+key/0123456789"
STATES = [State(f"task/{number}", [{"role": "user", "content": f"prompt {number}"}]) for number in range(5)]
BAD = State("task/bad", [{"role": "user", "content": "bad"}])
GOOD = completion("Got 3 planks", tokens=7)


def message(policy, states, n=1):
    """The error of a call, checked to be one line."""
    with pytest.raises(UserError) as error:
        policy.propose(states, n, 1.0)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_candidate_is_a_request_of_its_own_with_its_own_seed(server, make):
    state = State("task/0", [{"role": "user", "content": "a", "step": False, "name": None}], first=3)
    drawn = make(seed=9).propose([state], 2, 0.7)
    assert [len(actions) for actions in drawn] == [2]
    sent = sorted(server.requests, key=lambda body: body["seed"])
    # The first 31 of the draw's 64 bits: servers may keep the seed in a signed word of 32 bits.
    seeds = [candidate_seed(9, "task/0", prefix_hash(state.messages), index)[0] // 2 for index in (3, 4)]
    assert sent == [
        {
            "path": "/v1/chat/completions",
            "model": MODEL,
            "messages": [{"role": "user", "content": "a"}],
            "temperature": 0.7,
            "top_p": 1.0,
            "seed": seed,
            "max_tokens": 50,
        }
        for seed in sorted(seeds)
    ]


def test_draws_do_not_depend_on_the_batch_or_on_how_many_are_in_flight(make):
    together = make().propose(STATES, 4, 1.0)
    assert len({action for actions in together for action in actions}) > 6
    assert [make(requests_in_flight=1).propose([state], 4, 1.0)[0] for state in STATES] == together
    later = make().propose([state._replace(first=2) for state in STATES[::-1]], 2, 1.0)[::-1]
    assert later == [actions[2:] for actions in together]
    assert make(seed=1).propose(STATES, 4, 1.0) != together


def test_equal_draws_are_requested_once(server, make):
    policy = make()
    first = policy.propose([*STATES, STATES[0]], 2, 1.0)
    assert first[0] == first[-1]
    assert len(server.requests) == 2 * len(STATES)
    assert policy.propose(STATES, 2, 1.0) == first[:-1]
    assert len(server.requests) == 2 * len(STATES)
    assert policy.propose(STATES[:1], 3, 1.0)[0][:2] == first[0]
    assert len(server.requests) == 2 * len(STATES) + 1


def test_the_least_recently_used_draws_are_dropped_and_requested_again(server, make, monkeypatch):
    monkeypatch.setattr(endpoint_module, "MAX_CACHED", 4)
    policy = make()
    first = policy.propose(STATES, 1, 1.0)
    assert policy.propose(STATES[1:], 1, 1.0) == first[1:]
    assert len(server.requests) == len(STATES)
    assert policy.propose(STATES[:1], 1, 1.0) == first[:1]  # replaces STATES[1], used longest ago
    assert policy.propose(STATES[2:], 1, 1.0) == first[2:]
    assert len(server.requests) == len(STATES) + 1
    # All of a call that is larger than the memory is answered.
    assert policy.propose(STATES, 2, 1.0) == make().propose(STATES, 2, 1.0)


def test_as_many_requests_as_allowed_are_in_flight_and_no_more(server, make):
    server.delay = 0.05
    make(requests_in_flight=6).propose(STATES, 4, 1.0)
    assert server.max_in_flight == 6


def test_the_deadline_of_a_request_starts_when_it_is_sent(server, make):
    server.delay = 0.2
    drawn = make(requests_in_flight=1, timeout_seconds=1.2, retries=0).propose(STATES, 2, 1.0)
    assert {action.stop for actions in drawn for action in actions} == {"end"}


def test_usage_is_the_servers_count(server, make):
    cached = completion("up", tokens=3)
    cached["usage"]["prompt_tokens_details"] = {"cached_tokens": 4}
    server.script["bad"] = [Reply(200, cached)]
    policy = make()
    drawn = policy.propose([BAD, *STATES], 2, 1.0)
    tokens = [action.tokens for actions in drawn for action in actions]
    assert tokens[:2] == [3, 3]
    assert policy.usage == {
        "requests": 12,
        "retries": 0,
        "failures": 0,
        "encoded": 12 * 10 - 2 * 4,
        "cached": 8,
        "generated": sum(tokens),
    }


def test_an_answer_is_cut_at_the_token_limit_and_may_be_empty(server, make):
    server.script["bad"] = [Reply(200, completion("abc", finish="length")), Reply(200, completion("", tokens=0))]
    policy = make(requests_in_flight=1)
    assert policy.propose([BAD], 2, 1.0) == [[Action("abc", 2, None, "length"), Action("", 0, None, "end")]]


def test_log_probabilities_are_asked_for_and_added_up(server, make):
    tokens = completion("a b")
    tokens["choices"][0]["logprobs"] = {"content": [{"token": "a", "logprob": -0.5}, {"token": " b", "logprob": -1.25}]}
    server.script["bad"] = [Reply(200, tokens), Reply(200, GOOD)]
    policy = make(log_probabilities=True, requests_in_flight=1)
    (drawn,) = policy.propose([BAD], 2, 1.0)
    assert [action.log_probability for action in drawn] == [-1.75, None]
    assert all(body["logprobs"] is True for body in server.requests)


def test_extra_fields_are_sent_and_take_the_place_of_some(server, make):
    make(extra_body={"top_k": -1, "top_p": 0.5, "seed": None, "max_completion_tokens": 9}).propose([BAD], 1, 1.0)
    (body,) = server.requests
    assert (body["top_k"], body["top_p"], body["max_completion_tokens"]) == (-1, 0.5, 9)
    assert {"seed", "max_tokens"}.isdisjoint(body)


@pytest.mark.parametrize("served", ["small-model", "ORG/Small-Model", f"/models/{MODEL}@main", f"{MODEL}-2026-01-31"])
def test_a_model_may_go_by_its_folder_and_version(server, make, served):
    server.script["bad"] = [Reply(200, GOOD | {"model": served})]
    assert make().propose([BAD], 1, 1.0) == [[Action("Got 3 planks", 7)]]


def test_a_model_may_go_by_another_name_that_is_given(server, make):
    server.script["bad"] = [Reply(200, GOOD | {"model": "production"})]
    assert make(served_as="production").propose([BAD], 1, 1.0) == [[Action("Got 3 planks", 7)]]


HTML = b"<!DOCTYPE html><html><body>Sign in to the network</body></html>"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNK = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
TWICE = GOOD | {"choices": GOOD["choices"] * 2}
NO_TOKENS = GOOD | {"usage": {"prompt_tokens": 3, "completion_tokens": 0}}
CALL = {"id": "1", "type": "function", "function": {"name": "craft", "arguments": "{}"}}

MISBEHAVIOUR = {
    "too many requests": (Reply(429, {"error": {"message": "slow down"}}), "status 429 Too Many Requests: slow down"),
    "server error": (Reply(500, b"oh\x1b[31m no", Content_Type="text/plain"), "Internal Server Error: oh [31m no"),
    "bad gateway": (Reply(502, HTML, Content_Type="text/html"), "status 502 Bad Gateway: <!DOCTYPE html>"),
    "unavailable": (Reply(503, {"detail": [{"loc": "a"}]}), 'status 503 Service Unavailable: [{"loc":"a"}]'),
    "overloaded": (Reply(529, {"error": "overloaded"}), "status 529: overloaded"),
    "nothing to say": (raw(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"), "status 204 No Content"),
    "garbage": (Reply(200, b"\x00\xff{]["), "no chat completion"),
    "not even HTTP": (raw(b"SSH-2.0-OpenSSH_9.6\r\n"), "RemoteProtocolError"),
    "a login page": (Reply(200, HTML, Content_Type="text/html"), "Content-Type text/html in place of JSON: <!DOCTYPE"),
    "another type": (Reply(200, GOOD, Content_Type="text/plain"), "Content-Type text/plain in place of JSON"),
    "a stream": (Reply(200, b"data: {}\n\n", Content_Type="text/event-stream"), "Content-Type text/event-stream"),
    "truncated JSON": (Reply(200, json.dumps(GOOD).encode()[:-30]), "no chat completion (Input data was truncated)"),
    "half a body": (raw(HEAD + b"Content-Length: 900\r\n\r\n{"), "RemoteProtocolError"),
    "deep nesting": (Reply(200, b"[" * 100_000), "no chat completion"),
    "half a character": (Reply(200, json.dumps(completion("\ud800")).encode()), "no chat completion"),
    "a list": (Reply(200, [GOOD]), "Expected `object`, got `array`"),
    "no choices": (Reply(200, GOOD | {"choices": []}), "0 choices, expected 1"),
    "two choices": (Reply(200, TWICE), "2 choices, expected 1"),
    "null choices": (Reply(200, GOOD | {"choices": None}), "`$.choices`"),
    "null content": (Reply(200, completion(None)), "no content"),
    "cut in its thoughts": (Reply(200, completion(None, finish="length")), "raise max_action_tokens"),
    "parts": (Reply(200, completion([{"type": "text", "text": "a"}])), "`$.choices[0].message.content`"),
    "tool calls": (Reply(200, completion(None, tool_calls=[CALL])), "the answer calls tools"),
    "tool calls beside text": (Reply(200, completion("a", finish="tool_calls")), "the answer calls tools"),
    "another speaker": (Reply(200, completion("a", role="user")), "`$.choices[0].message.role`"),
    "another model": (Reply(200, GOOD | {"model": "org/small-model2"}), "another model answered"),
    "no usage": (Reply(200, {k: v for k, v in GOOD.items() if k != "usage"}), "no usage: the tokens were not counted"),
    "usage below zero": (Reply(200, GOOD | {"usage": {"prompt_tokens": -1, "completion_tokens": 1}}), "prompt_tokens"),
    "a free text": (Reply(200, NO_TOKENS), "usage counts no token"),
    "filtered": (Reply(200, completion("a", finish="content_filter")), "finish_reason is neither stop nor length"),
    "no reason to finish": (Reply(200, completion("a", finish=None)), "finish_reason is neither"),
    "an error in disguise": (Reply(200, {"error": {"message": "CUDA out of memory"}}), "200: CUDA out of memory"),
    "reset": (reset, "ReadError"),
    "closed at once": (raw(), "RemoteProtocolError"),
    "silence": (hang, "no complete answer within 0.5 seconds"),
    "a slow drip": (raw(HEAD + b"Content-Length: 9000\r\n\r\n", b"{", pause=0.03, times=30), "complete answer within"),
    "no end": (raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[CHUNK] * 140), "more than 8388608 bytes"),
    "headers without end": (raw(b"HTTP/1.1 200 OK\r\n", *[b"a: " + b"b" * 4096 + b"\r\n"] * 40), "RemoteProtocolError"),
}


SLOW = {"silence", "a slow drip"}


@pytest.mark.parametrize("case", MISBEHAVIOUR)
def test_an_invalid_response_is_retried_and_costs_one_candidate_only(case, server, make):
    reply, reason = MISBEHAVIOUR[case]
    server.script["bad"] = [reply, reply, reply, Reply(200, GOOD)]
    policy = make(timeout_seconds=0.5 if case in SLOW else 20.0, retries=1)
    first, bad, last = policy.propose([STATES[0], BAD, STATES[1]], 1, 1.0)
    expected = {body["messages"][0]["content"]: fake_server.answer(body) for body in server.requests}
    for action, state in zip((*first, *last), STATES, strict=False):
        assert action.text == expected[state.messages[0]["content"]]["choices"][0]["message"]["content"]
    ((text, tokens, log_probability, stop, error, _),) = bad
    assert (text, tokens, log_probability, stop) == ("", 0, None, "error")
    assert reason in error
    assert error.endswith("(2 attempts)") and len(error) < 500 and error.isprintable()
    usage = policy.usage
    assert (usage["requests"], usage["retries"], usage["failures"]) == (4, 1, 1)
    # A failure is not cached. This time the second attempt succeeds, and all requests were equal.
    assert policy.propose([BAD], 1, 1.0) == [[Action("Got 3 planks", 7)]]
    usage = policy.usage
    assert (usage["requests"], usage["retries"], usage["failures"]) == (6, 2, 1)
    assert len({json.dumps(body) for body in server.requests if body["messages"] == BAD.messages}) == 1


def test_tokens_of_an_answer_that_could_not_be_used_are_counted(server, make):
    server.script["bad"] = [Reply(200, completion(None, tokens=5)), Reply(200, GOOD)]
    policy = make()
    policy.propose([BAD], 1, 1.0)
    assert (policy.usage["encoded"], policy.usage["generated"]) == (20, 12)


def test_retry_after_is_respected(server, make):
    server.script["bad"] = [Reply(429, {}, Retry_After="0.25"), Reply(200, GOOD)]
    make(pauses=Pauses(0.004, 0.01, asked=0.3)).propose([BAD], 1, 1.0)
    assert server.times[1] - server.times[0] >= 0.25


@pytest.mark.parametrize(
    ("attempt", "asked", "shortest", "longest"),
    # Drawn from [first / 2, min(longest, first * 2 ** (attempt - 1))], and at least what was asked for, up to a bound.
    [(1, 0, 1, 2), (2, 0, 1, 4), (3, 0, 1, 8), (900, 0, 1, 8), (1, 5, 5, 5), (3, 3, 3, 8), (1, 3600, 60, 60)],
)
def test_pauses_double_up_to_a_bound_and_heed_the_server_up_to_another(attempt, asked, shortest, longest, make):
    client = make(pauses=Pauses(2.0, 8.0, 60.0))._client
    error = endpoint_module.TransientError("later", asked)
    state = SimpleNamespace(attempt_number=attempt, outcome=SimpleNamespace(exception=lambda: error))
    drawn = [client._pause(state) for _ in range(300)]
    assert shortest <= min(drawn) <= shortest + 0.3 and longest - 0.3 <= max(drawn) <= longest
    assert shortest == longest or len(set(drawn)) > 100


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("2", 2), ("-5", 0), ("nan", 0), ("", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Wed, 99 Oct", 0)],
)
def test_retry_after_is_seconds_or_a_date(header, seconds):
    assert endpoint_module._retry_after(header) == seconds


def test_retry_after_may_be_a_date_in_the_future():
    assert (
        60 < endpoint_module._retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)) <= 90
    )


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (
            Reply(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}),
            "status 401 Unauthorized: Incorrect API key provided: [key]; it was sent the key in MY_KEY; name",
        ),
        (Reply(403, b"x" * 290 + KEY.encode()), "status 403 Forbidden: " + "x" * 290 + "[key]; it was sent the key"),
        (Reply(404, {"detail": "Not Found"}), "status 404 Not Found: Not Found; see that policy.endpoint.base_url is"),
        (
            Reply(307, b"", Location="https://elsewhere/v1"),
            "status 307 Temporary Redirect: https://elsewhere/v1; fix policy.endpoint.base_url",
        ),
        (Reply(402, {"error": {"message": "no credit"}}), "status 402 Payment Required: no credit; fix"),
    ],
)
def test_what_a_retry_cannot_fix_is_one_line_at_once(reply, says, server, make):
    server.script["bad"] = [reply]
    policy = make(key=KEY, api_key_env="MY_KEY")
    policy.propose(STATES, 1, 1.0)
    error = message(policy, [BAD])
    assert error.startswith(f"policy at {server.base_url}/chat/completions, model {MODEL}: {says}")
    assert len(server.requests) == len(STATES) + 1
    assert KEY[:8] not in error


def test_without_a_key_the_line_says_so(server, make):
    server.script["bad"] = [Reply(401, {})]
    error = message(make(), [BAD])
    assert "it was sent no key; name the variable of a valid one in policy.endpoint.api_key_env" in error


def test_a_request_that_is_refused_ends_the_run_if_all_are_and_costs_a_failure_otherwise(server, make):
    refusal = Reply(400, {"error": {"message": "top_q is not a field"}})
    server.script[""] = [refusal]
    policy = make()
    error = message(policy, [BAD, BAD._replace(first=1)])
    assert "not one of 2 requests was answered, the first: status 400 Bad Request: top_q is not a field" in error
    assert len(server.requests) == 2 + 1  # not retried; and a greeting, to see whether it is the server
    server.script = {"bad": [refusal]}
    actions = policy.propose([BAD, STATES[0]], 1, 1.0)
    assert actions[0] == [Action("", 0, None, "error", "status 400 Bad Request: top_q is not a field")]
    assert actions[1] == make().propose(STATES[:1], 1, 1.0)[0]


@pytest.mark.parametrize(
    "text",
    [
        # vLLM, SGLang, llama.cpp, OpenAI
        "This model's maximum context length is 32768 tokens. However, you requested 40000 tokens in the messages",
        "Requested token count exceeds the model's maximum context length of 4096 tokens.",
        "the request exceeds the available context size, try increasing it",
        "Your input exceeds the context window of this model.",
    ],
)
def test_a_conversation_that_the_server_finds_too_long_gets_an_action_without_text(text, server, make):
    server.script["bad"] = [Reply(400, {"error": {"message": text}})]
    policy = make()
    drawn = policy.propose([BAD, STATES[0]], 1, 1.0)
    assert drawn[0] == [Action("", 0, None, "length")]
    assert policy.usage["failures"] == 0
    # If not even a greeting fits, the limits are wrong.
    assert make().propose([BAD], 1, 1.0) == [[Action("", 0, None, "length")]]
    server.script = {"": server.script["bad"]}
    assert text in message(make(), [BAD])


def test_a_conversation_that_always_fails_does_not_stop_a_run(server, make):
    """As after a kill, when no other conversation is left."""
    server.script["bad"] = [Reply(400, {"error": "filtered"})]
    policy = make()
    for _ in range(2):
        assert policy.propose([BAD], 1, 1.0) == [[Action("", 0, None, "error", "status 400 Bad Request: filtered")]]
    assert [body["messages"][0]["content"] for body in server.requests] == ["bad", "Hello", "bad"]


def test_a_dead_server_is_one_line(make):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        error = message(make(base_url=url), STATES)
    assert error.startswith(f"policy at {url}/chat/completions, model {MODEL}: not one of 5 requests was answered, the")
    assert "ConnectError" in error and "(3 attempts)" in error
    assert error.endswith("run the same command again: it resumes where it stopped")


def test_a_server_that_dies_ends_the_run_after_so_many_failures_in_a_row(server, make):
    policy = make(give_up_after=4, requests_in_flight=1, retries=0)
    policy.propose(STATES, 1, 1.0)
    server.script["prompt"] = [Reply(500, {})] * 3 + [Reply(200, GOOD)]
    stops = [action.stop for action in policy.propose(STATES[:1], 4, 0.5)[0]]
    assert stops == ["error", "error", "error", "end"]
    server.script["prompt"] = [Reply(500, {})]
    asked = len(server.requests)
    assert "4 requests in a row failed, the last: status 500" in message(policy, STATES, n=9)
    assert len(server.requests) == asked + 4


def test_the_key_is_sent_and_shown_nowhere(server, make):
    policy = make(key=KEY, api_key_env="MY_KEY")
    policy.propose(STATES[:1], 1, 1.0)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in repr([policy, policy._client, policy._client._http, vars(policy), policy.usage])
    assert KEY not in str(server.requests)


def test_no_key_is_sent_unless_one_is_named(server, make, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert endpoint_module.read_key(EndpointConfig(model="a")) is None
    make().propose(STATES[:1], 1, 1.0)
    assert "Authorization" not in server.headers[0]


def test_the_key_comes_from_the_environment(monkeypatch):
    endpoint = EndpointConfig(model="a", api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    assert endpoint_module.read_key(endpoint) == KEY
    monkeypatch.setenv("MY_KEY", f"{KEY}\nHost: elsewhere")
    with pytest.raises(UserError, match="MY_KEY: holds characters that no key has") as error:
        endpoint_module.read_key(endpoint)
    assert KEY not in str(error.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UserError, match="MY_KEY is not set; export it"):
        endpoint_module.read_key(endpoint)


def test_a_request_past_its_deadline_is_disconnected(server, make):
    server.script["bad"] = [hang]
    policy = make(timeout_seconds=0.1, retries=0)
    policy.propose([BAD, *STATES], 1, 1.0)
    assert server.gone.acquire(timeout=5)  # the server saw the connection end


def test_ctrl_c_leaves_at_once_and_closes_what_is_open(server, make):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    server.script["bad"] = [hang]
    policy = make(timeout_seconds=60)
    timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            policy.propose([BAD], 3, 1.0)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert all(server.gone.acquire(timeout=2) for _ in range(3))
    policy.close()
    assert time.monotonic() - started < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "chat-client"]


def test_closed_it_keeps_no_thread_and_can_be_used_again(server, make):
    policy = make(requests_in_flight=2)
    policy.close()
    first = policy.propose(STATES, 2, 1.0)
    assert [thread.name for thread in threading.enumerate()].count("chat-client") == 1
    policy.close()
    policy.close()
    assert "chat-client" not in [thread.name for thread in threading.enumerate()]
    assert policy.propose([*STATES, BAD], 2, 1.0)[:-1] == first


def test_it_works_inside_a_running_event_loop(make):
    async def notebook():
        return make().propose(STATES, 1, 1.0)

    assert asyncio.run(notebook()) == make().propose(STATES, 1, 1.0)


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_an_answer_that_spells_a_special_token_is_not_one_message(has_tokenizer, server, make):
    server.script["bad"] = [Reply(200, completion("a<|end|>b")), Reply(200, completion("<b> | <i>"))]
    policy = make(encoder=tiny.encoder() if has_tokenizer else None, retries=0, requests_in_flight=1)
    (failed,), (had,), _ = policy.propose([BAD, BAD._replace(first=1), STATES[0]], 1, 1.0)
    assert failed.error.startswith("the answer spells <|end|>, which no message may contain: ")
    assert had == Action("<b> | <i>", 2)


def test_a_tokenizer_counts_tokens(server, make):
    encoder = tiny.encoder()
    policy = make(encoder=encoder, max_tokens=100)
    policy.propose([BAD], 1, 1.0)
    assert policy.count_tokens(BAD.messages) == len(encoder.prompt(BAD.messages))
    # 50 tokens are reserved for the answer.
    room = "x" * (50 - len(encoder.prompt([{"role": "user", "content": ""}])))
    fits, full = (State("t", [{"role": "user", "content": text}]) for text in (room, room + "x"))
    assert len(encoder.prompt(fits.messages)) == 50
    asked = len(server.requests)
    assert policy.propose([full, fits], 1, 1.0)[0] == [Action("", 0, None, "length")]
    assert len(server.requests) == asked + 1


def test_without_a_tokenizer_tokens_are_estimated(make):
    messages = [{"role": "user", "content": "12345"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]
    # Four for each message, and a token for every four bytes, rounded up.
    assert make().count_tokens(messages) == 4 + 2 + 4


def test_the_fakes_good_answer_is_what_a_real_server_sends():
    """Checked with the types of the client library that defines the API."""
    for body in (GOOD, completion("a", finish="length"), fake_server.answer({"messages": []})):
        parsed = ChatCompletion.model_validate(body | {"created": 1})
        assert parsed.choices[0].message.content == body["choices"][0]["message"]["content"]
