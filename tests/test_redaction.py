"""Secrets in configs are found, plain fields are not mistaken for them, and a known key is struck out in any form."""

import base64
import random
import string
import time

import pytest

from jaxprm.redaction import redact, secret_field
from tests.key_forms import forms

ALPHANUMERIC = string.ascii_letters + string.digits
KEY = "Zq3xW8nB5vC1mK7pL2jH4gF6dS9a"


def random_text(length: int, alphabet: str = ALPHANUMERIC, seed: int = 0) -> str:
    rng = random.Random(f"{length} {alphabet} {seed}")
    return "".join(rng.choice(alphabet) for _ in range(length))


HEX = string.digits + "abcdef"
# The forms that services document, with random content.
KEYS = {
    "GitHub, fine-grained": "github_pat_" + random_text(22) + "_" + random_text(59),
    "GitHub": "ghp_" + random_text(36),
    "AWS, id": "AKIA" + random_text(16, string.ascii_uppercase + string.digits),
    "AWS, secret": "wJalrXUtnFEMIK7MDENGbPxRfiCYzEXAMPLE3Key"[:40],
    "Slack, bot": "xoxb-" + "123456789012-1234567890123-" + random_text(24),
    "Slack, app": "xapp-1-A0" + random_text(9) + "-123-" + random_text(64, HEX),
    "GitLab": "glpat-" + random_text(20),
    "Databricks": "dapi" + random_text(32, HEX),
    "npm": "npm_" + random_text(36),
    "Together": "tgp_v1_" + random_text(43),
    "Together, old": random_text(64, HEX),
    "OpenAI, project": "sk-proj-" + random_text(40),
    "Hugging Face": "hf_" + random_text(34),
    "Stripe": "sk_live_" + random_text(24),
    "SendGrid": "SG." + random_text(22) + "." + random_text(43),
    "Twilio": "SK" + random_text(32, HEX),
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0." + random_text(43),
    "basic": "Basic " + base64.b64encode(b"me:open sesame").decode(),
    "bearer": "Bearer " + random_text(20),
    "PEM": "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
    "PEM, new": "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg",
    "in a query": "http://127.0.0.1:9/v1?api_key=" + random_text(10),
    "in a query, short": "http://127.0.0.1:9/v1?a=1&key=" + random_text(12),
    "in a command": "curl -H 'x-api-key: " + random_text(12) + "'",
    "in a URL": "postgres://me:pass@host/db",
    "32 digits": random_text(32, HEX),
    "32 characters": random_text(32),
    "40 digits": random_text(40, HEX),
    "40 characters": random_text(40),
    "40 of upper case": random_text(40, string.ascii_uppercase + string.digits),
}


@pytest.mark.parametrize("value", KEYS.values(), ids=KEYS.keys())
def test_a_key_of_any_service_is_found_wherever_it_is(value):
    for plain in (
        {"policy": {"path": value}},
        {"environment": {"arguments": {"server": value}}},
        {"environment": {"arguments": {"list": ["a", [value]]}}},
        {"environment": {"arguments": {"text": f"use {value} now"}}},
        {"base_model": value},
    ):
        assert secret_field(plain) is not None, plain
    assert secret_field({"environment": {"arguments": {value: 1}}}) == "environment.arguments"


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "hf_token",
        "secret_key",
        "key",
        "passwd",
        "cookie",
        "private_key",
        "password",
        "api-key",
        "X-Api-Key",
        "Authorization",
        "client_secret",
        "access_token",
        "aws_secret_access_key",
        "tokens",
        "HF_TOKEN",
        "sessionToken",
    ],
)
def test_a_field_with_the_name_of_a_secret_holds_none(name):
    value = "k9X2m4Q7w1Z8"
    assert secret_field({"policy": {"endpoint": {"extra_body": {name: value}}}}) == f"policy.endpoint.extra_body.{name}"
    assert secret_field({"policy": {"arguments": {name: [value]}}}) == f"policy.arguments.{name}[0]"
    assert secret_field({"environment": {"arguments": {name: "k9X2m4Q7w1Z8b3V6"}}}) == f"environment.arguments.{name}"


def test_pairs_in_lists_are_fields():
    for pair in (["X-Api-Key", "k9X2m4Q7w1"], ["--hf-token", "k9X2m4Q7w1"]):
        assert secret_field({"policy": {"arguments": {"headers": [pair]}}}) == "policy.arguments.headers[0][1]"


LEGITIMATE = {
    "base_model": [
        "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4-a-rather-long-name",
        "org/name@" + random_text(40, HEX),
        "/root/.cache/huggingface/hub/models--Qwen--Qwen2.5-0.5B/snapshots/" + random_text(40, HEX),
        "runs/" + random_text(40, HEX) + "/model",
        "gs://bucket/" + random_text(32, HEX) + "/model",
        "gs://bucket/runs/2026-11-30T17-53-21/textcraft_small_agentprm_seed_0/checkpoints/000012000",
        "meta-llama/Llama-3.3-70B-Instruct",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
        "mistralai/Mixtral-8x22B-Instruct-v0.1",
        "runs/hf_qwen2_5_0_5b_instruct-sk-experiment_of_november",
        "Qwen3VLMoeForConditionalGenerationWithValueHead2",
    ],
    "environment.arguments.image": ["sha256:" + random_text(64, HEX), "reg.io/env@sha256:" + random_text(64, HEX)],
    "environment.arguments.revision": [random_text(40, HEX)],
    "environment.arguments.sha256": [random_text(64, HEX)],
    "environment.arguments.dataset_hash": [random_text(32, HEX)],
    "environment.arguments.run_id": [random_text(32, HEX), "123e4567-e89b-12d3-a456-426614174000"],
    "environment.arguments.key": ["red", "goal", "door_key_12", "KeyInBox", "minecraft:oak_planks"],
    "environment.arguments.token": ["<|im_end|>", "coin", "game token"],
    "environment.arguments.password": ["open sesame", "xyzzy"],
    "environment.arguments.cookie": ["chocolate chip"],
    "environment.arguments.token_weights": ["uniform", "inverse_frequency_2"],
    "environment.arguments.prompt": [
        "Basic instructions: get the key, then open the door. Your password: {password}",
        "basic understanding of authorization and tokens is required",
        "The bearer of the key wins. Action: craft 4 minecraft:oak_planks using 1 minecraft:oak_log",
        "http://127.0.0.1:9/a@b",
    ],
    "policy.endpoint.extra_body.stop": ["<|im_end|>", "</s>", "Observation:"],
    "policy.endpoint.extra_body.eos_token": ["<|endoftext|>"],
    "policy.endpoint.extra_body.pad_token": ["[PAD]"],
    "policy.endpoint.extra_body.token": ["<|tool_call|>"],
    "policy.endpoint.extra_body.key": ["value", "content"],
    "policy.endpoint.extra_body.tokenizer": ["auto"],
    "policy.endpoint.extra_body.max_token_policy": ["drop_oldest_1024"],
    "policy.endpoint.api_key_env": ["OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY_2"],
    "policy.endpoint.base_url": ["http://34.120.7.9:8000/v1", "https://[::1]:80/", "https://api.example.com/v2beta"],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in LEGITIMATE.items() for value in values]
)
def test_what_looks_like_a_key_and_is_none_is_left(field, value):
    plain = value
    for name in reversed(field.split(".")):
        plain = {name: plain}
    assert secret_field(plain) is None


def test_random_keys_are_rarely_missed_and_names_never_taken():
    missed = sum(
        secret_field({"base_model": random_text(length, alphabet, seed)}) is None
        for length in (32, 40)
        for alphabet in (HEX, ALPHANUMERIC, string.ascii_lowercase + string.digits)
        for seed in range(50)
    )
    assert missed <= 6  # of 300


@pytest.mark.parametrize("key", [KEY, "sk-proj-" + random_text(40), 'a/b+c=d&e"f\\g7h', "x" + random_text(9, HEX)])
def test_a_known_key_is_struck_out_in_any_form(key):
    for name, form in forms(key).items():
        if name == "middle" and len(key) < 16:
            continue
        text = redact(f"before {form} after", key)
        assert text.startswith("before ") and text.endswith(" after") and "[key]" in text, (name, text)
        # At most what stood around the key, in base64.
        kept = text.replace("[key]", "").removeprefix("before ").removesuffix(" after")
        assert len(kept) <= 13, (name, text)


def test_every_occurrence_is_struck_out_and_nothing_else():
    text = f"{KEY}, {KEY[:9]} and {KEY.lower()}; %20 &amp; \\u0041 \\n is kept, Ünïcode İ too. {KEY}"
    assert redact(text, KEY) == "[key], [key] and [key]; %20 &amp; \\u0041 \\n is kept, Ünïcode İ too. [key]"
    for text in ("&#1;&#x0;&#1114112;&foo;&lt;", "%zz\\u00\\x4"):
        assert redact(f"{text}{KEY}{text}", KEY) == f"{text}[key]{text}"
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab %&#;\\u0041x/İ") for _ in range(60))
        assert redact(text, KEY) == text


def test_words_of_a_key_are_left_in_texts():
    assert redact("craft the textcraft item", "my-secret-textcraft-key-number-12345") == "craft the textcraft item"
    assert redact("EMPTY is the inventory", "EMPTY") == "[key] is the inventory"
    assert redact("text", None) == redact("text", "") == "text"


def test_a_long_hostile_text_takes_linear_time():
    began = time.perf_counter()
    for text in ("\\" * 60_000, "%25" * 20_000, "&#" * 30_000, KEY * 2000):
        redact(text, KEY)
    assert time.perf_counter() - began < 5
