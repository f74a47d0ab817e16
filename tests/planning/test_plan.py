"""Plans with a fake compiler that answers at once: what is compiled, the report, and the exit status."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import pytest

from jaxprm import cli
from jaxprm.errors import UserError
from jaxprm.planning import compiling
from jaxprm.planning import plan as plan_lib
from jaxprm.planning.models import MODELS, policy_config
from jaxprm.planning.report import as_json, as_text
from jaxprm.scoring import engine
from tests.planning import fakes
from tests.planning.fakes import TINY, fake_plan

CONFIG = "configs/forkme.py"


def test_a_plan_compiles_the_jitted_training_step_and_the_scorer(monkeypatch):
    compiler = fakes.compiles()
    fake_plan(monkeypatch, compiler, TINY)
    step, scoring = compiler.calls
    state, batch, frozen = step.shapes
    assert jax.tree.leaves(state["parameters"]["transformer"]["blocks"]["down"])[0].shape == (3, 40, 16)
    assert batch["tokens"].shape == (2, 128) and batch["rewards"].shape == (2, 4)
    assert not jax.tree.leaves(frozen)
    # The step of training donates its state.
    assert step.function.lower(*step.shapes).args_info[0][0]["step"].donated
    assert scoring.function is engine.values_of_rows
    assert scoring.shapes[2].shape == (engine.TOKENS_A_CALL // 256, 256)


def test_the_json_of_a_plan_that_fits(monkeypatch):
    report = json.loads(json.dumps(as_json(fake_plan(monkeypatch, fakes.compiles(), TINY))))
    assert report["fits"] is True
    assert {"arguments": 7, "temporaries": 40, "total": 50, "limit": 64}.items() <= report["bytes_per_device"].items()
    assert report["free_bytes_per_device"] == 14
    assert report["tokens_per_step"] == 256
    assert report["flops_per_step"] == report["flops"]["forward"] + report["flops"]["backward"]
    assert report["collectives"]["all-gather"] == 1
    assert report["compile_seconds"] == 12.3
    assert report["attention"] == "splash"
    assert {"step_seconds", "tokens_per_second_per_chip", "mfu"} <= set(report["estimate"])
    assert report["scorer"]["fits"] is True


def test_a_refused_program_does_not_fit_and_has_no_estimate(monkeypatch):
    plan = fake_plan(monkeypatch, fakes.too_large(), TINY)
    report = json.loads(json.dumps(as_json(plan)))
    assert report["fits"] is False
    assert report["free_bytes_per_device"] == 64 - 80
    assert report["bytes_per_device"]["temporaries"] is None
    assert [report["estimate"][name] for name in ("step_seconds", "tokens_per_second_per_chip", "mfu")] == [None] * 3
    assert report["attention"] == "reference"  # no text to read it from; on a CPU it is always chosen
    assert "does not fit" in as_text(plan) and "RESOURCE_EXHAUSTED" in as_text(plan)


def test_the_table_of_the_documentation_is_made_from_that_json(monkeypatch):
    from benchmarks import plans

    plan = plans.Plan("tiny", "v5e:1x1", "data=1", 2, 128)
    fitting = plans.row(plan, as_json(fake_plan(monkeypatch, fakes.compiles(), TINY)))
    refused = plans.row(plan, as_json(fake_plan(monkeypatch, fakes.too_large(), TINY)))
    assert {line.count(" | ") for line in (plans.HEAD.splitlines()[0], fitting, refused)} == {11}
    assert "| yes, 0.00 free |" in fitting and "| no, 0.00 too much |" in refused and "| - | - |" in refused


def test_the_text_labels_estimates_and_states_assumptions(monkeypatch):
    text = as_text(fake_plan(monkeypatch, fakes.compiles(), TINY))
    assert text.count("(estimate)") == 2 and text.count("assumed") == 3
    assert "fits: 50 B of 64 B, 14 B free" in text and "MaxText" in text and "splash attention" in text


def test_training_only_the_head_needs_the_pass_over_the_data_too(monkeypatch):
    compiler = fakes.compiles()
    plan = fake_plan(monkeypatch, compiler, TINY, trainable="head")
    step, features, _ = compiler.calls
    assert "tokens" not in step.shapes[1] and step.shapes[1]["read_features"].shape == (2, 4, 16)
    assert features.shapes[1]["tokens"].shape == (2, 128)
    assert plan.features is not None and as_json(plan)["features"]["fits"]


def test_shapes_of_public_models():
    """Parameters as on their model cards: 0.36, 2.77 and 6.53 billion without the embedding; Llama 8.03 with it."""
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


def test_a_model_is_a_name_or_a_directory(tmp_path):
    from jaxprm.policies import language_model

    assert policy_config("Qwen2.5-7B") is MODELS["qwen2.5-7b"]
    assert policy_config(str(language_model.default_directory())).layers > 0
    for missing in (str(tmp_path), "gpt-17"):
        with pytest.raises(UserError, match=r"no (config.json|such directory).*qwen2.5-0.5b"):
            policy_config(missing)


def test_only_the_config_is_fetched_from_the_hub(monkeypatch):
    import huggingface_hub

    from jaxprm.policies import language_model

    def snapshot(name, *, revision, allow_patterns, ignore_patterns):
        assert (name, revision, allow_patterns) == ("someone/model", "v2", ["config.json"])
        return language_model.default_directory()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert policy_config("someone/model@v2") == policy_config(language_model.default_directory())


def test_jax_is_not_imported_before_its_environment_is_prepared():
    """JAX and libtpu read their environment variables when they are loaded."""
    program = (
        "import sys; from jaxprm import cli, config; from jaxprm.planning import command; "
        f"config.load({CONFIG!r}, []); sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `plan` on this machine's device with a fake compiler: (status, stdout, stderr)."""
    monkeypatch.setattr(compiling, "prepare_environment", lambda environment: None)
    monkeypatch.setattr(plan_lib, "open_slice", lambda topology: fakes.here())

    def run(compiler, *arguments):
        monkeypatch.setattr(plan_lib, "compile_ahead", compiler)
        status = cli.main(["plan", CONFIG, "--topology", "v5e:1x1", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_status_is_0_if_it_fits_and_3_if_not(command, tmp_path):
    status, out, _ = command(fakes.compiles(), "--batch", 4, "--length", 256, "--json", tmp_path / "new" / "plan.json")
    report = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert (status, report["fits"], report["rows"], report["length"]) == (0, True, 4, 256)
    assert "4 rows of 256 tokens" in out
    assert command(fakes.too_large())[0] == 3


def test_search_prints_each_candidate_and_the_frontier(command, tmp_path):
    status, out, _ = command(fakes.compiles(), "--search", "--batch", 2, "--json", tmp_path / "search.json")
    report = json.loads((tmp_path / "search.json").read_text())
    assert status == 0
    assert [plan["rows"] for plan in report["tried"]] == [2, 4, 8, 16]
    assert "frontier" in out and out.count("remat=none") == 4 + len(report["frontier"])
    status, out, _ = command(fakes.too_large(), "--search", "--json", tmp_path / "none.json")
    assert status == 3 and "none fits" in out
    report = json.loads((tmp_path / "none.json").read_text())
    assert [plan["remat"] for plan in report["tried"]] == ["none", "minimal", "full"] and not report["frontier"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch", 0], "--batch 0"),
        (["--length", -1], "--length -1"),
        (["--reward-model", "orm"], "the config has agentprm"),
        (["--mesh", "fsdp=3"], "mesh.fsdp = 3"),
        (["--model", "nothing"], "nothing"),
    ],
)
def test_a_mistake_gives_a_message_of_one_line(command, arguments, message):
    status, _, err = command(fakes.compiles(), *arguments)
    assert status == 2 and err.count("\n") == 1 and message in err
