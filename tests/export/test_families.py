"""Import and export of every family: values of torch for the source, ours, and values of torch for the export."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import jaxprm
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from jaxprm.errors import UserError
from jaxprm.export.export import export
from jaxprm.hf import reader
from jaxprm.scoring import loading
from tests.hf.test_families import CASES, LENGTHS, TOKENS, as_version_4, padded_logits, real, torch_model
from tests.model import tiny

torch.set_num_threads(1)
AUTO = {
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
}
A_BIAS = torch.tensor([0.4, -0.3])
SEGMENTS = (np.arange(TOKENS.shape[1]) < np.array(LENGTHS)[:, None]).astype(np.int32)


def cases(fast) -> list:
    """All cases; those that are not in `fast` run in the slow tier."""
    return [pytest.param(case, marks=[] if case in fast else pytest.mark.slow) for case in CASES]


def source(directory, case: str, kind: str, *, bias=None, **fields):
    """(torch model, its directory with a tokenizer), as transformers saves it."""
    model = torch_model(case, f"{kind}Classification", vocab_size=tiny.CONFIG.vocab_size, **fields)
    if kind == "Token":
        with torch.no_grad():
            model.score.bias.copy_(bias)
    model.save_pretrained(directory)
    for file in tiny.tokenizer_directory().iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return model, directory


def read_back(directory, head_format: str) -> torch.nn.Module:
    model, report = AUTO[head_format].from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    return model.eval()


def our_values(directory) -> np.ndarray:
    config, state = loading.load_reward_model(directory)
    return real(tiny.values(state, TOKENS, segments=SEGMENTS, config=config))


def value(logits: np.ndarray) -> np.ndarray:
    """The logit of a single label, or the probability of the second of two."""
    return logits[:, 0] if logits.shape[-1] == 1 else torch.tensor(logits).softmax(-1)[:, 1].numpy()


@pytest.mark.parametrize("case", cases(fast=("qwen2-tied", "qwen3-untied", "llama-tied")))
def test_values_survive_import_and_export_in_both_formats(tmp_path, case):
    """Sequence classifier -> ours -> token classifier -> ours -> sequence classifier: the weights never change."""
    theirs, directory = source(tmp_path / "in", case, "Sequence", num_labels=1)
    if "qwen2" in case:
        as_version_4(directory)
    reference = real(padded_logits(theirs))
    assert reference.std() > 0.3
    np.testing.assert_allclose(our_values(directory), reference[:, 0], atol=1e-4)
    for head_format, origin in (("token", directory), ("sequence", tmp_path / "token")):
        export(origin, tmp_path / head_format, head_format=head_format)
        again = read_back(tmp_path / head_format, head_format)
        assert type(again).__name__ == f"{CASES[case][0]}For{head_format.title()}Classification"
        np.testing.assert_array_equal(real(padded_logits(again)), reference)
        np.testing.assert_allclose(our_values(tmp_path / head_format), reference[:, 0], atol=1e-4)
        described = json.loads((tmp_path / head_format / "config.json").read_text())
        assert (described["num_labels"], described["problem_type"]) == (1, "regression")
        # Read by the last token that is not padding, as consumers do.
        if head_format == "sequence":
            encoder = Encoder.load(tmp_path / head_format)
            row = torch.tensor([[*TOKENS[1, :17].tolist(), encoder.pad_id, encoder.pad_id]])
            with torch.no_grad():
                pooled = again(input_ids=row, attention_mask=(row != encoder.pad_id).long()).logits
            ends = reference[29 + 17 - 1]
            np.testing.assert_allclose(pooled[0].numpy(), ends, atol=1e-5)


def test_the_config_keeps_the_sources_keys_and_replaces_ours(tmp_path):
    _, directory = source(tmp_path / "in", "llama-tied", "Sequence", num_labels=1)
    path = directory / "config.json"
    theirs = json.loads(path.read_text())
    theirs |= {
        "pretraining_tp": 1,
        "my_note": "kept",
        "eos_token_id": [1, 2],
        "auto_map": {"AutoModel": "evil.Evil"},
        "_name_or_path": "/home/someone/model",
    }
    path.write_text(json.dumps(theirs))
    export(directory, tmp_path / "out", dtype="bfloat16")
    ours = json.loads((tmp_path / "out/config.json").read_text())
    assert (ours["my_note"], ours["pretraining_tp"], ours["max_position_embeddings"]) == ("kept", 1, 128)
    assert "auto_map" not in ours and "/home/someone" not in json.dumps(ours)
    assert (ours["dtype"], ours["torch_dtype"]) == ("bfloat16", "bfloat16")
    encoder = Encoder.load(directory)
    assert (ours["pad_token_id"], ours["eos_token_id"]) == (encoder.pad_id, encoder.end_id)
    # Both generations of transformers find the rotary embedding.
    assert ours["rope_scaling"]["factor"] == ours["rope_parameters"]["factor"] == 8.0
    assert ours["rope_theta"] == ours["rope_parameters"]["rope_theta"] == 500.0


@pytest.mark.parametrize("case", cases(fast=("qwen3-tied",)))
def test_bfloat16_weights_are_rounded_as_by_torch_and_readable_in_shards(tmp_path, case):
    theirs, directory = source(tmp_path / "in", case, "Sequence", num_labels=1)
    result = export(directory, tmp_path / "out", dtype="bfloat16", max_shard_size="20KB")
    shards = [name for name in result["files"] if name.endswith(".safetensors")]
    assert len(shards) > 2 and "model.safetensors.index.json" in result["files"]
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in theirs.state_dict().items()}
    written = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / "out" / shard).items()}
    assert written.keys() == rounded.keys()
    assert all(torch.equal(written[name], rounded[name]) for name in written)
    stored = read_back(tmp_path / "out", "sequence")
    np.testing.assert_allclose(our_values(tmp_path / "out"), real(padded_logits(stored))[:, 0], atol=1e-4)
    # They stay in bfloat16, and a second export has the same bits.
    assert str(loading.load_reward_model(tmp_path / "out")[1]["transformer"]["embedding"][...].dtype) == "bfloat16"
    export(tmp_path / "out", tmp_path / "again", dtype="bfloat16", max_shard_size="20KB")
    for shard in shards:
        assert (tmp_path / "again" / shard).read_bytes() == (tmp_path / "out" / shard).read_bytes()


@pytest.mark.parametrize("labels", [1, 2])
def test_a_head_with_a_bias_is_exported_as_a_token_classifier_only(tmp_path, labels):
    theirs, directory = source(tmp_path / "in", "qwen3-tied", "Token", num_labels=labels, bias=A_BIAS[:labels])
    reference = real(padded_logits(theirs))
    np.testing.assert_allclose(our_values(directory), value(reference), atol=1e-4)
    export(directory, tmp_path / "token", head_format="token")
    again = read_back(tmp_path / "token", "token")
    np.testing.assert_array_equal(real(padded_logits(again)), reference)
    with pytest.raises(UserError, match="Qwen3ForSequenceClassification has none; use --format token"):
        export(directory, tmp_path / "sequence", head_format="sequence")
    assert not (tmp_path / "sequence").exists()


def test_two_labels_without_a_bias_are_exported_in_both_formats(tmp_path):
    theirs, directory = source(tmp_path / "in", "llama-tied", "Sequence", num_labels=2, id2label={0: "bad", 1: "good"})
    reference = real(padded_logits(theirs))
    for head_format in ("token", "sequence"):
        export(directory, tmp_path / head_format, head_format=head_format)
        again = read_back(tmp_path / head_format, head_format)
        np.testing.assert_array_equal(real(padded_logits(again)), reference)
        np.testing.assert_allclose(our_values(tmp_path / head_format), value(reference), atol=1e-4)
        assert again.config.id2label == {0: "bad", 1: "good"}
        assert "softmax(logits)[1]" in (tmp_path / head_format / "README.md").read_text()


def test_a_given_chat_template_replaces_the_models_own(tmp_path):
    """The model's own template rewrites earlier turns, so that steps have no read position; the given one does not."""
    _, directory = source(tmp_path / "in", "qwen3-tied", "Sequence", num_labels=1)
    own = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text("{{ messages | length }}" + own)
    with pytest.raises(DataError, match="rewrites earlier turns"):
        export(directory, tmp_path / "out")
    (tmp_path / "mine.jinja").write_text("{{ '<|user|>' }}" + own)
    export(directory, tmp_path / "out", template=str(tmp_path / "mine.jinja"))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == (tmp_path / "mine.jinja").read_text()
    conversation = tiny.conversation(1, turns=2)
    theirs = jaxprm.load(directory, chat_template=str(tmp_path / "mine.jinja")).score([conversation])
    assert jaxprm.load(tmp_path / "out").score([conversation]) == theirs


def test_a_language_model_is_refused_without_leftovers(tmp_path):
    torch_model("qwen2-tied").save_pretrained(tmp_path / "in")
    for file in tiny.tokenizer_directory().iterdir():
        (tmp_path / "in" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="is no reward model"):
        export(tmp_path / "in", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_unsupported_options_are_refused_before_the_model_is_read(tmp_path):
    for options, words in (
        ({"head_format": "rows"}, "format = 'rows' is not supported; supported: sequence, token"),
        ({"dtype": "float16"}, "dtype = 'float16' is not supported; supported: float32, bfloat16"),
        ({"max_shard_size": "many"}, "max_shard_size = 'many' is not a size"),
    ):
        with pytest.raises(UserError, match=words):
            export(tmp_path / "missing", tmp_path / "out", **options)


def test_a_wrong_tensor_shows_in_the_values(tmp_path):
    """The round trips above would detect it: here the keys of a layer are those of another."""
    theirs, directory = source(tmp_path / "in", "llama-tied", "Sequence", num_labels=1)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] = tensors["model.layers.2.self_attn.k_proj.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert np.abs(our_values(directory) - real(padded_logits(theirs))[:, 0]).max() > 1e-2
    assert reader.read_config(directory)[0].traits.name == "Llama"
