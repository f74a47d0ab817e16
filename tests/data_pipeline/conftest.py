"""Small tokenizers made in code, and trajectories to go with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_pipeline.build import build
from data_pipeline.encode import Encoder
from data_pipeline.trajectory import Message, Trajectory, to_line

PLAIN = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LINES = [
    "Crafting commands: craft 4 oak planks using 1 oak log. Goal: craft oak sign.",
    "Thought: I need planks first. Action: get 2 oak log",
    "Got 2 oak log. Could not find enough items to craft oak planks",
]


def make_tokenizer(
    template: str, specials: tuple[str, ...], end: str, extra: tuple[AddedToken, ...] = ()
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|pad|>", *specials], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    if extra:
        for token in extra:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token=end, chat_template=template)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(PLAIN, ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>"), "<|end|>")


@pytest.fixture(scope="session")
def chatml_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>")


@pytest.fixture
def with_template() -> Callable[..., Encoder]:
    """An encoder with the ChatML tokenizer and any template."""

    def make(template: str, extra: tuple[AddedToken, ...] = ()) -> Encoder:
        tokenizer = make_tokenizer(template, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", extra)
        return Encoder(tokenizer, source="test/template")

    return make


@pytest.fixture(scope="session")
def plain_encoder(plain_tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(plain_tokenizer)


@pytest.fixture(scope="session")
def chatml_encoder(chatml_tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(chatml_tokenizer)


@pytest.fixture(params=["plain", "chatml"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return request.getfixturevalue(f"{request.param}_encoder")


def make_messages(rounds: int, seed: int = 0) -> list[Message]:
    messages = [Message(role="user", content=f"{LINES[0]} Task {seed}.")]
    for turn in range(rounds):
        if turn:
            messages.append(Message(role="user", content=f"Got {turn} oak log"))
        messages.append(Message(role="assistant", content=f"Action: get {turn + seed} oak log"))
    return messages


@pytest.fixture(scope="session")
def make_trajectory() -> Callable[..., Trajectory]:
    """`make(seed, rounds=..., **fields)`: one episode; equal seed and rounds give equal messages."""

    def make(seed: int = 0, *, rounds: int = 2, id: str | None = None, **fields) -> Trajectory:
        fields = {"task": f"textcraft/{seed}", "outcome": 1.0, "ended": "done", **fields}
        fields.setdefault("messages", make_messages(rounds, seed))
        return Trajectory(id=id or f"row-{seed}", **fields)

    return make


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, Iterable[Trajectory]], Path]:
    """Writes trajectories to a JSONL file and returns its path."""

    def write(path: Path, trajectories: Iterable[Trajectory]) -> Path:
        path.write_text("".join(to_line(trajectory) + "\n" for trajectory in trajectories))
        return path

    return write


@pytest.fixture(scope="session")
def dataset_directory(tmp_path_factory, plain_encoder, make_trajectory, write_rows) -> Path:
    """A dataset of forty training and five validation trajectories; train.jsonl is next to it. Not to be changed."""
    directory = tmp_path_factory.mktemp("dataset")
    train = [make_trajectory(seed, rounds=1 + seed % 5, outcome=seed / 40) for seed in range(40)]
    held_out = [make_trajectory(seed, rounds=2, id=f"held-{seed}") for seed in range(100, 105)]
    inputs = {
        "train": [write_rows(directory / "train.jsonl", train)],
        "validation": [write_rows(directory / "validation.jsonl", held_out)],
    }
    build(inputs, plain_encoder, directory / "data", max_length=None)
    return directory / "data"
