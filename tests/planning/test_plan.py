"""Plans with a compiler that answers at once: what is compiled, what is said, which status comes out."""

from __future__ import annotations

import json

import jax
import pytest

from jaxprm import cli
from jaxprm import config as config_lib
from jaxprm.errors import UserError
from jaxprm.planning import compiling
from jaxprm.planning import plan as plan_lib
from jaxprm.planning.command import MODELS, policy_config
from jaxprm.planning.plan import mesh_of
from jaxprm.planning.report import as_json, as_text
from jaxprm.scoring import engine
from tests.planning import fakes
from tests.planning.fakes import TINY, fake_plan

CONFIG = "configs/forkme.py"


def test_a_plan_compiles_the_step_that_training_jits_and_the_scorer(monkeypatch):
    compiler = fakes.compiles()
    fake_plan(monkeypatch, compiler, TINY)
    step, scoring = compiler.calls
    state, batch, frozen = step.shapes
    assert jax.tree.leaves(state["parameters"]["transformer"]["blocks"]["down"])[0].shape == (3, 40, 16)
    assert batch["tokens"].shape == (2, 128) and batch["rewards"].shape == (2, 4)
    assert not jax.tree.leaves(frozen)
    # The step that training runs gives the state's memory away.
    assert step.function.lower(*step.shapes).args_info[0][0]["step"].donated
    assert scoring.function is engine.values_of_rows
    assert scoring.shapes[2].shape == (engine.TOKENS_A_CALL // 256, 256)


def test_json_has_what_others_read(monkeypatch):
    found = json.loads(json.dumps(as_json(fake_plan(monkeypatch, fakes.compiles(), TINY))))
    assert found["fits"] is True
    assert {"arguments": 7, "temporaries": 40, "total": 50, "limit": 64}.items() <= found["bytes_per_device"].items()
    assert found["free_bytes_per_device"] == 14
    assert found["tokens_per_step"] == 256
    assert found["flops_per_step"] == found["flops"]["forward"] + found["flops"]["backward"]
    assert found["collectives"]["all-gather"] == 1
    assert found["compile_seconds"] == 12.3
    assert found["attention"] == "splash"
    assert {"step_seconds", "tokens_per_second_per_chip", "mfu"} <= set(found["estimate"])
    assert found["scorer"]["fits"] is True


def test_a_refused_program_does_not_fit_and_has_no_estimate(monkeypatch):
    plan = fake_plan(monkeypatch, fakes.too_large(), TINY)
    found = json.loads(json.dumps(as_json(plan)))
    assert found["fits"] is False
    assert found["free_bytes_per_device"] == 64 - 80
    assert found["bytes_per_device"]["temporaries"] is None
    assert [found["estimate"][name] for name in ("step_seconds", "tokens_per_second_per_chip", "mfu")] == [None] * 3
    assert found["attention"] == "reference"  # there is no text to ask; on a CPU nothing else is chosen
    assert "does not fit" in as_text(plan) and "RESOURCE_EXHAUSTED" in as_text(plan)


def test_the_table_of_the_documentation_is_made_of_that_json(monkeypatch):
    from benchmarks import plans

    asked = plans.Plan("tiny", "v5e:1x1", "data=1", 2, 128)
    fitting = plans.row(asked, as_json(fake_plan(monkeypatch, fakes.compiles(), TINY)))
    refused = plans.row(asked, as_json(fake_plan(monkeypatch, fakes.too_large(), TINY)))
    assert {line.count(" | ") for line in (plans.HEAD.splitlines()[0], fitting, refused)} == {11}
    assert "| yes, 0.00 free |" in fitting and "| no, 0.00 too much |" in refused and "| - | - |" in refused


def test_text_labels_its_estimates_and_says_what_was_assumed(monkeypatch):
    text = as_text(fake_plan(monkeypatch, fakes.compiles(), TINY))
    assert text.count("(estimate)") == 2 and text.count("assumed") == 3
    assert "fits: 50 B of 64 B, 14 B free" in text and "MaxText" in text and "splash attention" in text


def test_the_head_alone_needs_the_pass_over_the_data_too(monkeypatch):
    compiler = fakes.compiles()
    plan = fake_plan(monkeypatch, compiler, TINY, trainable="head")
    step, features, _ = compiler.calls
    assert "tokens" not in step.shapes[1] and step.shapes[1]["read_features"].shape == (2, 4, 16)
    assert features.shapes[1]["tokens"].shape == (2, 128)
    assert plan.features is not None and as_json(plan)["features"]["fits"]


@pytest.mark.parametrize(
    "text, sizes",
    [
        ("data=-1,fsdp=16", {"data": -1, "fsdp": 16}),
        ("fsdp=4", {"data": -1, "fsdp": 4}),
        ("fsdp=-1, tensor=2", {"data": 1, "fsdp": -1, "tensor": 2}),
    ],
)
def test_meshes_are_read(text, sizes):
    assert mesh_of(text, config_lib.MeshConfig()) == config_lib.MeshConfig(**sizes)


@pytest.mark.parametrize("text", ["fsdp", "fsdp=x", "fsdp=0", "fsdp=-2", "rows=3", "fsdp=2,fsdp=2", ""])
def test_a_bad_mesh_is_one_line(text):
    with pytest.raises(UserError, match="--mesh"):
        mesh_of(text, config_lib.MeshConfig())


def test_shapes_of_public_models():
    """Parameters as their model cards give them: without the embedding 0.36, 2.77 and 6.53 billion; Llama has 8.03."""
    from math import prod

    from jaxprm.model.parameters import parameter_shapes

    counts = {}
    for name, config in MODELS.items():
        shapes = parameter_shapes(config, reward=True)
        counts[name] = sum(prod(shape) for shape in shapes.values())
        embedding = prod(shapes["transformer", "embedding"])
        counts[name] += embedding if name.startswith("llama") else -embedding
    assert {name: round(count / 1e9, 2) for name, count in counts.items()} == {
        "qwen2.5-0.5b": 0.36,
        "qwen2.5-3b": 2.77,
        "qwen2.5-7b": 6.53,
        "llama-3.1-8b": 8.03,
    }


def test_models_by_name_and_by_directory(tmp_path):
    from jaxprm.policies import language_model

    assert policy_config("Qwen2.5-7B") is MODELS["qwen2.5-7b"]
    assert policy_config(str(language_model.default_directory())).layers > 0
    for missing in (str(tmp_path), "gpt-17"):
        with pytest.raises(UserError, match=r"no (config.json|such directory).*qwen2.5-0.5b"):
            policy_config(missing)


def test_of_the_hub_a_config_alone_is_fetched(monkeypatch):
    import huggingface_hub

    from jaxprm.policies import language_model

    def snapshot(name, *, revision, allow_patterns, ignore_patterns):
        assert (name, revision, allow_patterns) == ("someone/model", "v2", ["config.json"])
        return language_model.default_directory()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert policy_config("someone/model@v2") == policy_config(language_model.default_directory())


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `plan` on this machine's device with a fake compiler: (status, stdout, stderr)."""
    monkeypatch.setattr(compiling, "prepare", lambda environment: None)
    monkeypatch.setattr(plan_lib, "open_slice", lambda topology: fakes.here())

    def run(compiler, *arguments):
        monkeypatch.setattr(plan_lib, "compile_ahead", compiler)
        status = cli.main(["plan", CONFIG, "--topology", "v5e:1x1", *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_status_0_where_it_fits_and_3_where_not(command, tmp_path):
    status, out, _ = command(fakes.compiles(), "--batch", 4, "--length", 256, "--json", tmp_path / "new" / "plan.json")
    found = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert (status, found["fits"], found["rows"], found["length"]) == (0, True, 4, 256)
    assert "4 rows of 256 tokens" in out
    assert command(fakes.too_large())[0] == 3


def test_search_prints_each_and_the_frontier(command, tmp_path):
    status, out, _ = command(fakes.compiles(), "--search", "--batch", 2, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert status == 0
    assert [one["rows"] for one in found["tried"]] == [2, 4, 8, 16]
    assert "frontier" in out and out.count("remat=none") == 4 + len(found["frontier"])
    status, out, _ = command(fakes.too_large(), "--search")
    assert status == 3 and "none fits" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--batch", 0], "--batch 0"),
        (["--length", -1], "--length -1"),
        (["--reward-model", "orm"], "the config has agentprm"),
        (["--mesh", "fsdp=3"], "mesh.fsdp = 3"),
        (["--model", "nothing"], "nothing"),
    ],
)
def test_mistakes_are_one_line(command, arguments, said):
    status, _, err = command(fakes.compiles(), *arguments)
    assert status == 2 and err.count("\n") == 1 and said in err
