"""Environments by name, mistakes in them, and what importing them loads."""

import subprocess
import sys
from pathlib import Path

import pytest

import jaxprm
from jaxprm.environments.protocol import create
from jaxprm.environments.textcraft import TextCraft
from jaxprm.errors import UserError

COUNTER = """
from jaxprm.environments.protocol import StepResult

class Counter:
    fork = "replay"

    def __init__(self, upto=3):
        self.max_rounds = upto

    def tasks(self, split):
        return ["counter/0"]

    def reset(self, task):
        self.count = 0
        return "count"

    def step(self, action):
        self.count += 1
        return StepResult(str(self.count), 0.0, self.count == self.max_rounds)

    def outcome(self):
        return float(self.count == self.max_rounds)

    def close(self):
        pass

class Cloner(Counter):
    fork = "clone"

class Forkless(Counter):
    fork = "sometimes"

class Boundless(Counter):
    def __init__(self):
        self.max_rounds = None

class Broken(Counter):
    def __init__(self):
        len(3)

not_a_class = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "user_counter.py").write_text(COUNTER)
    (tmp_path / "user_needs.py").write_text("import surely_not_installed_xyz")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_registered_environment_is_made_with_its_arguments():
    env = create("textcraft", {"max_rounds": 7, "distractors": [0, 3]})
    assert isinstance(env, TextCraft)
    assert env.max_rounds == 7
    assert env.fork == "clone"


def test_a_users_class_is_made_from_module_and_attribute(module):
    env = create("user_counter:Counter", {"upto": 2})
    assert env.reset("counter/0") == "count"
    assert [env.step("on").done for _ in range(2)] == [False, True]
    assert env.outcome() == 1.0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("textcraftt", {}, "no such name; use one of textcraft, or your own as 'module:attribute'"),
        ("user_counter:", {}, "no such name"),
        ("user_nowhere:Counter", {}, "no module 'user_nowhere'"),
        ("user_counter.inner:Counter", {}, "user_counter.inner"),
        ("user_counter:Missing", {}, "'Missing' does not exist in"),
        ("user_counter:not_a_class", {}, "user_counter:not_a_class is not callable; name a class"),
        ("user_counter:Cloner", {}, r"Cloner has no method snapshot, restore \(fork is 'clone'\)"),
        ("user_counter:Forkless", {}, "Forkless.fork is 'sometimes'; set it to one of clone, replay, none"),
        ("user_counter:Boundless", {}, "Boundless.max_rounds is None"),
        ("user_counter:Counter", {"speed": 2}, "unexpected keyword argument 'speed'"),
        ("textcraft", {"distractor": 2}, "unexpected keyword argument 'distractor'"),
    ],
)
def test_mistakes_are_one_line_errors(module, name, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        create(name, arguments)
    assert "\n" not in str(caught.value)


def test_errors_within_a_users_code_are_not_converted(module):
    with pytest.raises(TypeError, match="has no len"):
        create("user_counter:Broken")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed_xyz"):
        create("user_needs:Anything")


def test_environments_load_no_array_library():
    code = (
        "import sys; from jaxprm.environments import protocol; from jaxprm.environments.textcraft import planner\n"
        "protocol.create('textcraft').reset('textcraft/1')\n"
        "print(sorted({'jax', 'tensorflow', 'torch', 'numpy'} & set(sys.modules)))"
    )
    root = str(Path(jaxprm.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
