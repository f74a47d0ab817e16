"""Configs: every mistake is one line that names field, value and bound."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprm import cli, config
from jaxprm.config import Experiment, RewardModelConfig, SearchConfig
from jaxprm.errors import UserError
from jaxprm.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.py"))

SOURCE = """
import msgspec
from jaxprm.config import Environment, Experiment, RewardModel, Search

config = Experiment(
    name="mine",
    environment=Environment(name="my_module:Game", arguments={"distractors": (0, 4), "names": {"a": "b"}}),
    reward_models=(RewardModel(label="agentprm"), RewardModel(label="pvm", objective="pvm")),
)
small = Search(pool=4, best_of_n=(1, 4), prefix_best_of_n=(1,))
quick = msgspec.structs.replace(config, name="mine_quick", search=small)
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def message(load, *arguments, **options):
    """The error message, which is one line."""
    with pytest.raises(UserError) as error:
        load(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_is_loaded_with_its_defaults(recipe):
    experiment = config.load(recipe)
    assert (experiment.name, experiment.seed, experiment.search) == ("mine", 0, SearchConfig())
    assert [model.label for model in experiment.reward_models] == ["agentprm", "pvm"]
    # Arguments are what they are after a round trip through config.json.
    assert experiment.environment.arguments == {"distractors": [0, 4], "names": {"a": "b"}}
    assert config.load(str(recipe)) == experiment


def test_quick_is_the_files_quick(recipe):
    assert config.load(recipe, quick=True).name == "mine_quick"
    assert config.load(recipe, ["seed=4"], quick=True).search.pool == 4
    recipe.write_text(SOURCE.replace("quick =", "fast ="))
    assert message(config.load, recipe, quick=True) == (
        f"config {recipe}: must define `quick`, a jaxprm.config.Experiment"
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_that_ships_loads(path):
    experiment = config.load(path)
    assert experiment.name == ("mine" if path.stem == "forkme" else path.stem)
    assert config.from_dict(config.to_dict(experiment), where="a round trip") == experiment
    assert "python -m jaxprm" in path.read_text().split('"""')[1]
    if "\nquick =" in path.read_text():
        assert config.load(path, quick=True) != experiment


def test_there_are_recipes():
    assert "textcraft_tiny" in [path.stem for path in RECIPES]


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=7", lambda experiment: experiment.seed == 7),
        ("name=other name", lambda experiment: experiment.name == "other name"),
        ('name="7"', lambda experiment: experiment.name == "7"),
        ("search.temperature=1", lambda experiment: experiment.search.temperature == 1.0),
        ("search.tasks=5", lambda experiment: experiment.search.tasks == 5),
        ("search.beams=[[2,3]]", lambda experiment: experiment.search.beams == ((2, 3),)),
        ("search.beams=[]", lambda experiment: experiment.search.beams == ()),
        ("search.beams.1.0=3", lambda experiment: experiment.search.beams == ((2, 2), (3, 4))),
        ("search.best_of_n.5=31", lambda experiment: experiment.search.best_of_n == (1, 2, 4, 8, 16, 31)),
        (
            "reward_models.1.beta=0.5",
            lambda experiment: [model.beta for model in experiment.reward_models] == [1.0, 0.5],
        ),
        ("reward_models.0.label=first", lambda experiment: experiment.reward_models[0].label == "first"),
        (
            "environment.arguments.distractors=9",
            lambda experiment: experiment.environment.arguments["distractors"] == 9,
        ),
        ("environment.arguments.names.a=c", lambda experiment: experiment.environment.arguments["names"] == {"a": "c"}),
        (
            'environment.arguments.new={"a": [1]}',
            lambda experiment: experiment.environment.arguments.get("new") == {"a": [1]},
        ),
        ("policy.path=runs/a=b", lambda experiment: experiment.policy.path == "runs/a=b"),
    ],
)
def test_an_override_changes_one_field(recipe, override, read):
    experiment = config.load(recipe, [override])
    assert read(experiment)
    assert not read(config.load(recipe))
    assert config.fingerprint(config.to_dict(experiment)) != config.fingerprint(config.to_dict(config.load(recipe)))


def test_later_overrides_win(recipe):
    assert config.load(recipe, ["seed=1", "seed=2"]).seed == 2
    assert config.load(recipe, ["search.tasks=3", "search.tasks=null"]).search.tasks is None


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        # bounds
        ("search.pool=0", "search.pool = 0: expected `int` >= 1"),
        ("seed=-1", "seed = -1: expected `int` >= 0"),
        ("search.temperature=0", "search.temperature = 0: expected `float` > 0.0"),
        ("reward_models.1.gae_lambda=1.5", "reward_models[1].gae_lambda = 1.5: expected `float` <= 1.0"),
        ("reward_models.1.beta=-1", "reward_models[1].beta = -1: expected `float` >= 0.0"),
        ("reward_models.0.beta=NaN", "reward_models[0].beta = NaN: expected `float` >= 0.0"),
        ("reward_models.0.learning_rate=Infinity", "reward_models[0].learning_rate = inf: expected a finite number"),
        ("environment.arguments.names.a=NaN", "environment.arguments.names.a = nan: expected a finite number"),
        ("search.best_of_n=[4,0]", "search.best_of_n[1] = 0: expected `int` >= 1"),
        ("search.best_of_n=[]", "search.best_of_n = []: expected `array` of length >= 1"),
        ("search.prefix_best_of_n=[]", "search.prefix_best_of_n = []: expected `array` of length >= 1"),
        ("search.beams.0.1=0", "search.beams[0][1] = 0: expected `int` >= 1"),
        ("search.beams=[[2]]", "search.beams[0] = [2]: expected `array` of length 2, got 1"),
        ("reward_seeds=[]", "reward_seeds = []: expected `array` of length >= 1"),
        ("mesh.data=-2", "mesh.data = -2: expected `int` >= -1"),
        ("reward_models.0.label=A B", "reward_models[0].label = \"A B\": expected `str` matching regex '^[a-z0-9_]+$'"),
        ("data.too_long=cut", 'data.too_long = "cut": must be one of error, drop, window'),
        (
            "reward_models.1.objective=mc",
            f"reward_models[1].objective is 'mc': use one of {', '.join(OBJECTIVES)}, or your own",
        ),
        # types
        ("search.pool=many", 'search.pool = "many": expected `int`, got `str`'),
        ("search.pool=2.5", "search.pool = 2.5: expected `int`, got `float`"),
        ("search.pool=true", "search.pool = true: expected `int`, got `bool`"),
        ("search=3", "search = 3: expected `object`, got `int`"),
        ("search.best_of_n=8", "search.best_of_n = 8: expected `array`, got `int`; write [8]"),
        (
            'search.custom={"paths": [[2]], "own.search:FIRST": [2]}',
            'search.custom["own.search:FIRST"][0] = 2: expected `array`, got `int`; write [2]',
        ),
        ('search.custom={"a:B": 2}', 'search.custom["a:B"] = 2: expected `array`, got `int`; write [[2]]'),
        ('search.custom={"a:B": [[2, 0]]}', 'search.custom["a:B"][0][1] = 0: expected `int` >= 1'),
        ('search.custom={"a:B": [[2.5]]}', 'search.custom["a:B"][0][0] = 2.5: expected `int`, got `float`'),
        ("environment.name=3", "environment.name = 3: expected `str`, got `int`"),
        ("policy=null", "policy = null: expected `object`, got `null`"),
        ('reward_models=[{"beta": 1}]', 'reward_models[0] = {"beta": 1}: object missing required field `label`'),
        # names
        ("mesh.fdsp=2", "mesh.fdsp: no such field; mesh has data, fsdp"),
        ("reward_models.1.betta=1", "reward_models[1].betta: no such field; reward_models[1] has label, objective,"),
        ("sead=1", "sead: no such field; an experiment has name, seed,"),
        # bounds between two fields
        ("search.pool=8", "search.pool = 8 is smaller than the largest best-of-N"),
        ("reward_seeds=[1,1]", "reward_seeds must differ, got [1, 1]"),
        ("reward_models.1.label=agentprm", "reward_models: labels must differ, got ['agentprm', 'agentprm']"),
        ("reward_models.1.label=random", "reward_models: label 'random' is a control's"),
        ("reward_models.1.label=policy", "reward_models: label 'policy' is a control's"),
        ("reward_models.0.discount=0.9", "reward_models[0].beta is 1.0 with discount 0.9: progress needs discount 1"),
        ("reward_models.0.gae_lambda=0", "reward_models[0].gae_lambda is 0 with bootstrap action"),
    ],
)
def test_a_wrong_value_is_named_with_its_bound(recipe, override, wanted):
    assert message(config.load, recipe, [override]).startswith(f"config {recipe}: {wanted}")


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("seed", "write it as section.field=value"),
        ("searhc.pool=3", "the config has no section 'searhc'"),
        ("search.pools.x=3", "the config has no section 'pools'"),
        ("reward_models.2.beta=3", "the config has no section '2'"),
        ("reward_models.-1.beta=3", "the config has no section '-1'"),
        ("reward_models.agentprm.beta=3", "the config has no section 'agentprm'"),
        ("search.best_of_n.6=3", "search.best_of_n has items 0 to 5, not '6'"),
        ("seed.x=3", "seed has no fields, not 'x'"),
    ],
)
def test_a_wrong_override_is_quoted(recipe, override, wanted):
    assert message(config.load, recipe, [override]) == f"override {override!r}: {wanted}"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("x = 1", "must define `config`, a jaxprm.config.Experiment"),
        ("config = {'name': 'x'}", "must define `config`, a jaxprm.config.Experiment"),
        (SOURCE.replace('name="mine",', 'nam="mine",'), "TypeError: "),
        (SOURCE.replace("Model(label", "Model(betta=1, label"), "TypeError: Unexpected keyword argument 'betta'"),
        ("import no_such_module_xyz", "ModuleNotFoundError: No module named 'no_such_module_xyz'"),
        ("config = (", "SyntaxError: "),
        (SOURCE.replace('{"a": "b"}', "object()"), "Encoding objects of type object is unsupported"),
        (SOURCE.replace("(0, 4)", 'float("nan")'), "environment.arguments.distractors = nan: expected a finite number"),
        (SOURCE.replace('"agentprm"', "3"), "reward_models[0].label = 3: expected `str`, got `int`"),
    ],
)
def test_a_broken_file_is_one_line(recipe, source, wanted):
    recipe.write_text(source)
    error = message(config.load, recipe)
    assert error.startswith(f"config {recipe}")
    assert wanted in error


def test_a_mistake_in_the_file_has_its_line(recipe):
    recipe.write_text("from jaxprm.config import Experiment\n\nconfig = Experiment(name='x', sead=3)\n")
    assert message(config.load, recipe) == f"config {recipe}:3: TypeError: Unexpected keyword argument 'sead'"


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.py", tmp_path):
        assert message(config.load, path).startswith(f"config {path}: no such file; the recipes are colab, forkme, ")


def test_an_experiment_cannot_be_changed():
    with pytest.raises(AttributeError):
        Experiment(name="x").seed = 3


MODELS = st.lists(
    st.builds(
        RewardModelConfig,
        label=st.text("abc_019", min_size=1, max_size=8),
        objective=st.sampled_from(["agentprm", "pvm", "orm"]),
        beta=st.floats(0, 10),
        gae_lambda=st.floats(0.01, 1),  # 0 is refused for agentprm
    ),
    max_size=3,
    unique_by=lambda model: model.label,
).map(tuple)
VALUES = st.integers() | st.text(max_size=4) | st.lists(st.integers(0, 3), max_size=3)
ARGUMENTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=3)


@given(MODELS, ARGUMENTS, st.integers(0), st.lists(st.integers(0), min_size=1, max_size=3, unique=True))
@settings(max_examples=50, deadline=None)
def test_a_config_json_gives_the_experiment_back(models, arguments, seed, reward_seeds):
    first = Experiment(
        name="x",
        seed=seed,
        environment=config.EnvironmentConfig(arguments=arguments),
        reward_models=models,
        reward_seeds=tuple(reward_seeds),
    )
    plain = json.loads(json.dumps(config.to_dict(first)))
    assert plain == config.to_dict(first)
    assert config.from_dict(plain, where="config.json") == first


def test_a_config_json_that_was_edited_is_refused_by_name():
    plain = config.to_dict(Experiment(name="x"))
    plain["data"]["rows"] = 0
    assert message(config.from_dict, plain, where="runs/a/config.json") == (
        "config runs/a/config.json: data.rows = 0: expected `int` >= 1"
    )


def test_a_fingerprint_is_that_of_the_value():
    assert config.fingerprint({"a": 1, "b": [2]}) == config.fingerprint({"b": [2], "a": 1})
    first, second = Experiment(name="x"), msgspec.structs.replace(Experiment(name="x"), seed=1)
    assert config.fingerprint(config.to_dict(first)) != config.fingerprint(config.to_dict(second))


def test_a_config_needs_neither_jax_nor_tensorflow():
    code = (
        "import sys; from jaxprm import config; config.load('configs/textcraft_tiny.py'); "
        "print([name for name in ('jax', 'tensorflow', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "call", ["import sys; sys.exit(0)", "raise SystemExit", "exit()", "import sys\nsys.exit('bye')"]
)
def test_a_config_that_ends_the_program_is_a_mistake(tmp_path, call, capsys):
    path = tmp_path / "ends.py"
    path.write_text(f"# A comment\n{call}\n")
    assert "calls sys.exit; a config only defines `config`, remove that call" in message(config.load, path)
    assert cli.main(["run", str(path), "--workdir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"jaxprm: config {path}:") and "sys.exit" in line and not (tmp_path / "run").exists()


def test_code_that_a_config_names_does_not_end_the_program_in_silence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "inspect", lambda options: sys.exit(0))
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "called sys.exit(0); remove that call" in capsys.readouterr().err


def test_arguments_without_a_class_of_the_users_are_refused(recipe):
    error = message(config.load, recipe, ['policy.arguments={"a": 1}'])
    assert 'policy.arguments need a policy `module:attribute`, not policy.path = "default"; drop them' in error
    assert config.load(recipe, ["policy.path=mine:Policy", 'policy.arguments={"a": 1}']).policy.arguments == {"a": 1}


def test_a_field_that_came_later_is_recorded_only_where_it_is_set():
    """So that a reward model that was trained before the field existed keeps its fingerprint."""
    before = {
        "label",
        "objective",
        "beta",
        "gae_lambda",
        "discount",
        "bootstrap",
        "progress_gradient",
        "target_update",
        "target_decay",
        "target_every",
        "epochs",
        "learning_rate",
        "head_multiplier",
        "warmup_fraction",
        "weight_decay",
        "gradient_clip",
        "evaluate_every",
        "checkpoint_every",
    }
    assert set(config.fingerprint_fields(config.RewardModelConfig(label="a"))) == before
    adapters = config.RewardModelConfig(label="a", trainable="lora", lora=config.LoraConfig(rank=4), dtype="bfloat16")
    assert set(config.fingerprint_fields(adapters)) == before | {"trainable", "lora", "dtype"}
    assert config.fingerprint_fields(adapters)["lora"]["rank"] == 4


def test_the_head_of_a_base_that_has_one_is_recorded_where_earlier_runs_made_another():
    """Before there was a choice, a head was new, whatever the base."""
    plain = config.fingerprint_fields(config.RewardModelConfig(label="a"))
    keep, new = (config.RewardModelConfig(label="a", head=head) for head in ("keep", "new"))
    assert config.fingerprint_fields(keep, base_has_head=True) == plain | {"head": "keep"}
    assert config.fingerprint_fields(new, base_has_head=True) == plain
    assert config.fingerprint_fields(keep) == plain


def test_options_of_memory_and_checkpoints_are_not_recorded():
    options = {"remat": "full", "microbatches": 4, "attention": "reference", "checkpoint_minutes": 5.0, "keep_best": 3}
    assert config.fingerprint_fields(config.RewardModelConfig(label="a", **options)) == config.fingerprint_fields(
        config.RewardModelConfig(label="a")
    )


def test_adapters_of_one_matrix_twice_are_refused():
    plain = config.to_dict(config.Experiment(name="a"))
    plain["reward_models"][0]["lora"]["targets"] = ["query", "query"]
    with pytest.raises(UserError, match=r"reward_models\[0\].lora.targets must differ"):
        config.from_dict(plain, where="test")


def test_a_recipe_is_found_by_its_name_and_a_path_means_a_file(tmp_path, monkeypatch):
    assert config.load("textcraft_tiny") == config.load(ROOT / "configs/textcraft_tiny.py")
    monkeypatch.chdir(tmp_path)
    for path in ("textcraft_tiny.py", "./textcraft_tiny", "configs/textcraft_tiny"):
        assert message(config.load, path).startswith(f"config {path}: no such file; the recipes are")
    assert message(config.load, "textcraft_tinny").startswith("config textcraft_tinny: no such file or recipe; the")
    (tmp_path / "textcraft_tiny").write_text(SOURCE)
    assert config.load("textcraft_tiny").name == "mine"


@pytest.mark.parametrize(
    "text, sizes",
    [
        ("data=-1,fsdp=16", {"data": -1, "fsdp": 16}),
        ("fsdp=4", {"data": -1, "fsdp": 4}),
        ("fsdp=-1, tensor=2", {"data": 1, "fsdp": -1, "tensor": 2}),
        ("fsdp=-1", {"data": 1, "fsdp": -1}),
    ],
)
def test_every_verb_reads_a_mesh_in_the_same_way(text, sizes):
    assert config.parse_mesh(text) == config.MeshConfig(**sizes)


@pytest.mark.parametrize("text", ["fsdp", "fsdp=x", "fsdp=0", "fsdp=-2", "fsdp=1.5", "rows=3", "fsdp=2,fsdp=2", ""])
def test_a_bad_mesh_is_one_line(text):
    assert message(config.parse_mesh, text).startswith(f"--mesh {text}: ")


def test_sections_keep_working_under_the_names_they_had_before(capsys):
    assert config.RewardModel is config.RewardModelConfig and config.Model is config.DecoderConfig
    notices = capsys.readouterr().err.splitlines()
    assert notices[0] == "note: jaxprm.config.RewardModel is now called RewardModelConfig; the old name still works"
    assert len(notices) == 2
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = config.Nothing


def test_an_override_may_fill_the_custom_searches_that_a_config_leaves_out(recipe):
    assert config.load(recipe, ["search.custom.own=[[2]]"]).search.custom == {"own": ((2,),)}


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("search.pool=" + "9" * 5000, r"a number has 5000 digits, more than 400$"),
        ('environment.arguments={"a": ' + "[" * 5000 + "]" * 5000 + "}", r"nested more than 64 levels deep$"),
        ('environment.arguments={"a": ' + "[" * 100 + "]" * 100 + "}", r"nested more than 64 levels deep$"),
        ('name="\\ud800"', r"the text '\\ud800' is no Unicode: it has half of a surrogate pair$"),
        ("name=a\udcff", r"not UTF-8; write it in UTF-8$"),
        ('name={"a": 1, "a": 2}', r"the name 'a' occurs twice with different values$"),
        ("reward_models." + "9" * 5000 + ".beta=1", r"the config has no section"),
    ],
)
def test_overrides_that_no_config_can_hold_are_one_short_line(override, problem, capsys):
    with pytest.raises(UserError, match=problem) as raised:
        config.load("textcraft_tiny", [override])
    assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Experiment(name='a', search=5)", r"search = 5: expected `object`, got `int`"),
        ("Experiment(name='a', seed=10**5000)", r"4300 digits"),
        ("Experiment(name='\\ud800')", r"half of a surrogate pair"),
        (
            "Experiment(name='a', environment=EnvironmentConfig(name='x', arguments={'a': loop}))",
            r"config holds only|deep",
        ),
        (
            "Experiment(name='a', environment=EnvironmentConfig(name='x', arguments={'a': {1, print}}))",
            r"config holds only",
        ),
        ("{'name': 'a'}", r"must define `config`"),
    ],
)
def test_wrong_values_in_a_config_file_are_one_line(text, problem, tmp_path):
    path = tmp_path / "c.py"
    header = "from jaxprm.config import EnvironmentConfig, Experiment\nloop = []\nloop.append(loop)\n"
    path.write_text(f"{header}config = {text}\n")
    with pytest.raises(UserError, match=problem) as raised:
        config.load(path)
    assert str(raised.value).startswith(f"config {path}: ")
