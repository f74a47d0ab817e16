"""Hundreds of broken configs, headers and indexes: each is refused in one line, before any memory is allocated."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxprm import cli
from jaxprm.errors import UserError
from jaxprm.hf import reader, writer
from jaxprm.hf.config import read_config
from jaxprm.hf.safetensors import INDEX, WEIGHTS, model_files, open_tensors, weight_files
from tests.model import tiny

CONFIG = tiny.UNTIED
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
HUGE = 10**18


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """A model in one file, without metadata in its header."""
    directory = tmp_path_factory.mktemp("single")
    writer.write_model(directory, CONFIG, tiny.transformer(CONFIG), pad_id=0, end_id=1, max_length=512)
    save_file(load_file(directory / WEIGHTS), directory / WEIGHTS)
    return directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, single) -> Path:
    """The same in three files with an index."""
    directory = tmp_path_factory.mktemp("sharded")
    shutil.copyfile(single / "config.json", directory / "config.json")
    tensors = load_file(single / WEIGHTS)
    index: dict[str, str] = {}
    for number, shard in enumerate(SHARDS):
        part = {name: tensors[name] for name in sorted(tensors)[number::3]}
        save_file(part, directory / shard)
        index |= dict.fromkeys(part, shard)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return directory


def refuse(directory: Path, what: Any, read: Callable = reader.load_transformer) -> str:
    """The error of reading a model: one line, within two seconds, before a parameter is allocated."""
    began = time.process_time()
    try:
        with mock.patch.object(reader, "_fill", side_effect=AssertionError("memory was allocated")):
            read(directory)
    except UserError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 700, what
        assert str(directory) in message, what
        assert time.process_time() - began < 2, what
        return message
    return pytest.fail(f"accepted: {what}")


def test_the_checkpoints_of_these_tests_are_read_when_they_are_intact(single, sharded):
    _, from_one_file = reader.load_transformer(single)
    _, from_shards = reader.load_transformer(sharded)
    for name in ("embedding", "unembedding", "norm"):
        np.testing.assert_array_equal(from_one_file[name][...], from_shards[name][...])
    np.testing.assert_array_equal(from_one_file["blocks"]["down"][...], from_shards["blocks"]["down"][...])
    assert weight_files(sharded) == [INDEX, *SHARDS]
    assert model_files(single) == ["config.json", WEIGHTS]


COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def broken_configs(intact: dict) -> Iterator[dict]:
    """Configs with a single field wrong."""
    for name in COUNTS:
        for value in (0, -1, 1.5, "40", True, [], {}, math.nan, math.inf, HUGE, 1 << 31):
            yield intact | {name: value}
        yield intact | {name: intact[name] * 2}
        yield intact | {name: intact[name] + 1}
        if intact[name] > 1:
            yield intact | {name: intact[name] - 1}
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        yield intact | {name: None}
        yield {key: value for key, value in intact.items() if key != name}
    for name in ("rms_norm_eps", "rope_theta"):
        for value in (0, -1.0, "1", True, [], math.nan, math.inf, 10**400):
            yield intact | {name: value}
    for value in ("yes", 1, 0, [], {}):
        yield intact | {"tie_word_embeddings": value}
    for value in ("mistral", "qwen2_moe", "Qwen2", "", 3, ["qwen2"], {}, None):
        yield intact | {"model_type": value}
    for value in (
        "Qwen2ForCausalLM",
        [],
        None,
        ["Qwen2ForCausalLM"] * 2,
        [3],
        [[]],
        ["Qwen3ForCausalLM"],
        ["LlamaForCausalLM"],
        ["Qwen2Model"],
        ["Qwen2ForQuestionAnswering"],
        ["Qwen2ForProcessRewardModel"],
        [None],
        {"0": "Qwen2ForCausalLM"},
    ):
        yield intact | {"architectures": value}
    for name, values in {
        "hidden_act": ("gelu", "relu", 1, ["silu"]),
        "use_sliding_window": (True, 1, "yes"),
        "layer_types": (["sliding_attention"] * 3, ["full_attention", "linear_attention"], "full", {}),
        "quantization_config": ({"bits": 4}, {"quant_method": "fp8"}, "awq"),
        "compression_config": ({"format": "int"},),
        "mlp_bias": (True,),
        "is_causal": (False, "no"),
        "partial_rotary_factor": (0.5, "half"),
        "rope_scaling": (
            "dynamic",
            3,
            [1],
            {"type": "linear", "factor": 2.0},
            {"rope_type": "dynamic", "factor": 2.0},
            {"rope_type": "yarn", "factor": 4.0},
            {"type": "longrope"},
            {"rope_type": None},
            {"rope_type": 3},
            {"rope_type": []},
            {"rope_type": "default", "mrope_section": [1, 2]},
            LLAMA3 | {"factor": 0},
            LLAMA3 | {"factor": "8"},
            LLAMA3 | {"low_freq_factor": 4.0},
            LLAMA3 | {"high_freq_factor": None},
            LLAMA3 | {"original_max_position_embeddings": 1.5},
            LLAMA3 | {"original_max_position_embeddings": -2},
            LLAMA3 | {"original_max_position_embeddings": "64"},
            LLAMA3 | {"attention_factor": 2.0},
            LLAMA3 | {"rope_theta": 7.0},
            LLAMA3 | {"partial_rotary_factor": 0.5},
            LLAMA3 | {"low_freq_factor": math.nan},
        ),
        "rope_parameters": (
            "default",
            1,
            {"full_attention": {"rope_type": "default"}},
            {"rope_type": "default", "rope_theta": "x"},
            {"rope_type": "default", "rope_theta": -1},
            {"rope_type": "proportional"},
            {"rope_theta": 1e9},
        ),
    }.items():
        for value in values:
            yield intact | {name: value}
    # Another family's decoder has other tensors.
    for model_type, name in (("qwen3", "Qwen3"), ("llama", "Llama")):
        yield intact | {"model_type": model_type, "architectures": [f"{name}ForCausalLM"]}
    llama = intact | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    yield from (llama | {"attention_bias": True}, llama | {"sliding_window": 4096}, llama | {"mlp_bias": True})
    yield intact | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": True}


def test_every_broken_config_is_refused_by_field(single, tmp_path):
    intact = json.loads((single / "config.json").read_text())
    (tmp_path / WEIGHTS).symlink_to(single / WEIGHTS)
    count = 0
    for config in broken_configs(intact):
        (tmp_path / "config.json").write_text(json.dumps(config))
        changed = {name: config.get(name) for name in {*config, *intact} if config.get(name) != intact.get(name)}
        refuse(tmp_path, changed)
        count += 1
    assert count > 200


CLASSIFIER_CHANGES = [
    {"num_labels": 3, "id2label": None},
    {"num_labels": 0, "id2label": None},
    {"num_labels": "1", "id2label": None},
    {"num_labels": True, "id2label": None},
    {"num_labels": None, "id2label": None},
    {"num_labels": 2},
    {"id2label": {}},
    {"id2label": []},
    {"id2label": "value"},
    {"id2label": {"0": "a", "1": "b", "2": "c"}},
    {"problem_type": "multi_label_classification"},
    {"problem_type": "single_label_classification"},
    {"problem_type": 3},
    {"architectures": ["Qwen2ForTokenClassification"]},
    {"architectures": ["Qwen2ForCausalLM"]},
    {"architectures": ["Qwen2ForTokenClassification"], "token_classification_bias": "no"},
]


def test_every_broken_classifier_is_refused(tmp_path):
    tiny.write_reward_model(tmp_path)
    intact = json.loads((tmp_path / "config.json").read_text())
    for change in CLASSIFIER_CHANGES:
        (tmp_path / "config.json").write_text(json.dumps(intact | change))
        refuse(tmp_path, change, reader.load_reward_model)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 50_000, b"1e999"])
def test_a_config_or_an_index_must_be_an_object(single, sharded, tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    refuse(tmp_path, text[:20], read_config)
    (tmp_path / INDEX).write_bytes(text)
    refuse(tmp_path, text[:20], open_tensors)


def split(path: Path) -> tuple[dict, bytes]:
    """(header, data) of a file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: dict | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def broken_entries(header: dict, data: bytes) -> Iterator[tuple[str, dict]]:
    """Headers with one tensor's entry wrong."""
    name = "model.layers.1.mlp.up_proj.weight"
    entry = header[name]
    start, end = entry["data_offsets"]
    for value in (None, 3, [], "x", {}, {"dtype": "F32"}, {"dtype": "F32", "shape": entry["shape"]}):
        yield f"entry {value}", header | {name: value}
    for dtype in (None, 4, "", "f32", "FP32", "I8", "F8_E4M3", "F16", "BF16", "F64", "I32", "U8", ["F32"], "BOOL"):
        yield f"dtype {dtype}", header | {name: entry | {"dtype": dtype}}
    for shape in (
        None,
        "40",
        40,
        [40],
        [40, 56],
        [56, 41],
        [56, 40, 1],
        [56.0, 40.0],
        [-56, -40],
        [HUGE, HUGE],
        [56, True],
        [[56, 40]],
        [0, 40],
        [],
        ["56", "40"],
        [1] * 40,
        [56 * 40],
    ):
        yield f"shape {shape}", header | {name: entry | {"shape": shape}}
    for offsets in (
        None,
        0,
        [],
        [start],
        [start, end, end],
        [end, start],
        [start, end + 4],
        [start + 4, end],
        [start - 4, end - 4],
        [start + 4, end + 4],
        [-4, end],
        [0, end - start],
        [len(data), len(data) + end - start],
        [start, HUGE],
        [float(start), float(end)],
        [str(start), str(end)],
        [start, None],
        [1 << 64, 1 << 65],
    ):
        yield f"offsets {offsets}", header | {name: entry | {"data_offsets": offsets}}
    yield "missing", {other: value for other, value in header.items() if other != name}
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    yield "surplus", header | {"model.layers.3.mlp.up_proj.weight": nothing}
    yield "renamed", {(other + "_" if other == name else other): value for other, value in header.items()}
    yield "shared", header | {name: header["model.layers.0.mlp.up_proj.weight"]}
    yield "name of many lines", header | {"a\nb": nothing}
    yield "surrogate", header | {"\ud800": nothing}


def test_every_broken_header_is_refused(single, tmp_path):
    shutil.copyfile(single / "config.json", tmp_path / "config.json")
    header, data = split(single / WEIGHTS)
    text = json.dumps(header).encode()
    intact = join(header, data)
    cases = [(what, join(changed, data)) for what, changed in broken_entries(header, data)]
    name = b'"model.norm.weight":'
    assert text.count(name) == 1
    twice = text[:-1] + b', "model.norm.weight": ' + json.dumps(header["model.norm.weight"]).encode() + b"}"
    cases += [("twice", join(twice, data)), ("no object", join(b"[1]", data)), ("empty", b""), ("short", b"123")]
    cases += [("not utf-8", join(text.replace(b"norm", b"n\xffrm"), data)), ("unclosed", join(text[:-1], data))]
    cases += [("no data", join(text, b"")), ("too much", join(text, data + b"1234"))]
    cases += [("deep", join(b"[" * 99_999, data))]
    lengths = (0, 1, 2, 7, len(text) - 1, len(text) + 1, 1 << 40, (1 << 64) - 1)
    cases += [(f"length {length}", join(text, data, length)) for length in lengths]
    cases += [(f"cut at {n}", intact[:n]) for n in np.linspace(0, len(intact) - 1, 60, dtype=int)]
    rng = np.random.default_rng(0)
    for position in rng.choice(len(text), size=200, replace=False):
        if chr(text[position]).isspace():
            continue
        changed = bytearray(text)
        changed[position] = rng.choice([byte for byte in range(33, 127) if byte != text[position]])
        cases.append(
            (f"byte {position}: {bytes(changed[max(position - 20, 0) : position + 20])!r}", join(bytes(changed), data))
        )
    for what, content in cases:
        (tmp_path / WEIGHTS).write_bytes(content)
        refuse(tmp_path, what)
    assert len(cases) > 300
    (tmp_path / WEIGHTS).write_bytes(intact)
    assert len(open_tensors(tmp_path)) == len(header)


def broken_indexes(index: dict, directory: Path) -> Iterator[tuple[str, Any]]:
    files = index["weight_map"]
    name = "model.norm.weight"
    for value in (
        "../model.safetensors",
        str(directory / SHARDS[0]),
        "/etc/passwd",
        f"./{SHARDS[0]}",
        f"sub/{SHARDS[0]}",
        "",
        ".",
        "..",
        "config.json",
        "model.bin",
        "missing.safetensors",
        "a\0b.safetensors",
        "a\nb.safetensors",
        ".safetensors",
        "\ud800.safetensors",
        f"..\\{SHARDS[0]}",
        "x" * 5000 + ".safetensors",
        "folder.safetensors",
        3,
        None,
        [],
        {},
        [SHARDS[0]],
        True,
    ):
        yield f"file {value!r}"[:60], index | {"weight_map": files | {name: value}}
    for value in (None, [], {}, "x", 3):
        yield f"weight_map {value!r}", index | {"weight_map": value}
    yield "no weight_map", {"metadata": {}}
    for other in SHARDS:
        if other != files[name]:
            yield f"in {other}", index | {"weight_map": files | {name: other}}
    yield "surplus", index | {"weight_map": files | {"model.layers.3.mlp.up_proj.weight": SHARDS[0]}}
    for tensor in itertools.islice(files, 0, None, 4):
        yield f"without {tensor}", index | {"weight_map": {a: b for a, b in files.items() if a != tensor}}


def test_every_broken_index_is_refused(sharded, tmp_path):
    for file in sharded.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    (tmp_path / "folder.safetensors").mkdir()
    index = json.loads((sharded / INDEX).read_text())
    cases = list(broken_indexes(index, tmp_path))
    for what, changed in cases:
        (tmp_path / INDEX).write_text(json.dumps(changed))
        refuse(tmp_path, what)
    assert len(cases) > 35
    text = json.dumps(index)
    (tmp_path / INDEX).write_text(text[:-2] + f', "lm_head.weight": "{SHARDS[0]}"}}}}')
    assert "occurs twice" in refuse(tmp_path, "twice")
    (tmp_path / INDEX).write_text(text)
    # Shards that do not agree with an intact index.
    for number, shard in enumerate(SHARDS):
        (tmp_path / shard).write_bytes((sharded / SHARDS[(number + 1) % 3]).read_bytes())
        refuse(tmp_path, f"{shard} is another shard")
        (tmp_path / shard).write_bytes((sharded / shard).read_bytes()[:-4])
        assert "bytes are missing" in refuse(tmp_path, f"{shard} is cut")
        (tmp_path / shard).unlink()
        assert "which is missing" in refuse(tmp_path, f"{shard} is gone")
        shutil.copyfile(sharded / shard, tmp_path / shard)
    name = "model.norm.weight"
    holder = SHARDS.index(index["weight_map"][name])
    tensor = load_file(sharded / SHARDS[holder])[name]
    other = SHARDS[holder - 1]
    save_file(load_file(sharded / other) | {name: tensor}, tmp_path / other)
    assert name in refuse(tmp_path, "tensor in two files")


def test_a_pipe_instead_of_weights_does_not_hang(single, tmp_path):
    shutil.copyfile(single / "config.json", tmp_path / "config.json")
    os.mkfifo(tmp_path / WEIGHTS)
    assert "no model.safetensors" in refuse(tmp_path, "pipe")


def test_tensors_of_other_precisions_are_refused_by_name(single, tmp_path):
    shutil.copyfile(single / "config.json", tmp_path / "config.json")
    tensors = load_file(single / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj.weight"
    for dtype in (np.float64, np.int8, np.uint8, np.int64, np.bool_):
        save_file(tensors | {name: tensors[name].astype(dtype)}, tmp_path / WEIGHTS)
        assert f"{name} has dtype" in refuse(tmp_path, dtype)


def test_rotary_buffers_of_old_checkpoints_are_ignored(single, tmp_path):
    shutil.copyfile(single / "config.json", tmp_path / "config.json")
    tensors = load_file(single / WEIGHTS)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float64) for layer in range(3)}
    save_file(tensors | buffers | {"model.rotary_emb.inv_freq": np.ones(6, np.float32)}, tmp_path / WEIGHTS)
    reader.load_transformer(tmp_path)


def test_a_tied_models_unembedding_must_be_its_embedding(tmp_path):
    writer.write_model(tmp_path, tiny.CONFIG, tiny.transformer(), pad_id=0, end_id=1, max_length=512)
    tensors = load_file(tmp_path / WEIGHTS)
    table = tensors["model.embed_tokens.weight"]
    other = table.copy()
    other[-1, -1] += 1
    for wrong in (other, table[:-1], table.astype(np.float16)):
        save_file(tensors | {"lm_head.weight": wrong}, tmp_path / WEIGHTS)
        assert "tie_word_embeddings = true" in refuse(tmp_path, wrong.shape)
    save_file(tensors | {"lm_head.weight": table}, tmp_path / WEIGHTS)
    reader.load_transformer(tmp_path)


def test_the_command_line_prints_one_line_and_no_traceback(tmp_path, capsys):
    model = tiny.write_reward_model(tmp_path / "model")
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "messages": tiny.conversation(0)}) + "\n")
    options = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    weight_bytes, config = (model / WEIGHTS).read_bytes(), (model / "config.json").read_text()
    for name, content in (
        (WEIGHTS, weight_bytes[:-1]),
        (WEIGHTS, b"\xff" * 64),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "gpt2"}'),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"["),
    ):
        (model / WEIGHTS).write_bytes(weight_bytes)
        (model / "config.json").write_text(config)
        (model / name).write_bytes(content)
        assert cli.main(["score", "--model", str(model), *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith("jaxprm: ") and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out.jsonl").exists()
