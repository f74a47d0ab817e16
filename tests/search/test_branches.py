"""The three ways to fork, their errors, and that every environment is closed once."""

import pytest

from jaxprm.environments import StepResult
from jaxprm.errors import UserError
from jaxprm.search.branches import BranchRunner, check_can_fork
from tests.search.fakes import Factory, TreeGame, Walk

GAME = {
    "t": {"a": {"x": 1.0, "y": {"z": 0.5}}, "b": {"x": 0.0}, "bad": RuntimeError("fell over")},
    "u": {"a": 0.75},
    **{task: {"a": 0.5} for task in "vwx"},
    "never": OSError("no such task today"),
}


def runner_of(fork, **options):
    factory = Factory(lambda: TreeGame(GAME, fork, **options))
    return BranchRunner(factory), factory


@pytest.mark.parametrize("fork", ["clone", "replay"])
def test_a_branch_can_be_continued_twice_and_in_any_order(fork):
    runner, factory = runner_of(fork)
    prompt, root = runner.start("t")
    a, b = runner.step(root, "a"), runner.step(root, "b")
    other_prompt, other = runner.start("u")
    other = runner.step(other, "a")
    ax, bx, ay = runner.step(a, "x"), runner.step(b, "x"), runner.step(a, "y")
    assert (prompt, other_prompt) == ("play t", "play u")
    assert (a.actions, a.observations, a.done, a.outcome) == (("a",), ("at a",), False, None)
    assert (ax.done, ax.outcome, bx.outcome, other.outcome) == (True, 1.0, 0.0, 0.75)
    assert (ay.actions, ay.observations, ay.done) == (("a", "y"), ("at a", "at a/y"), False)
    # The first branches are what they were.
    assert runner.step(a, "x") == ax
    assert len(factory.environments) == 1
    assert runner.errors == 0
    runner.close()
    assert factory.closes == [1]


def test_steps_are_counted_with_those_of_replays():
    for fork, expected in (("clone", 3), ("replay", 1 + 2 + 3)):
        runner, factory = runner_of(fork)
        _, branch = runner.start("t")
        for action in ("a", "y", "z"):
            branch = runner.step(branch, action)
        assert branch.outcome == 0.5
        assert runner.steps == len(factory.environments[0].executed) == expected


def test_a_clone_has_its_own_state():
    runner = BranchRunner(lambda: Walk(tasks=1))
    _, root = runner.start("walk/test/0")
    up = runner.step(root, "up")
    for _ in range(2):
        runner.step(up, "down")
    assert runner.step(up, "up").observations == ("you are at 1", "you are at 2")


def test_without_forks_every_task_has_an_environment_while_it_lasts():
    runner, factory = runner_of("none")
    branches = [runner.start(task)[1] for task in ("t", "u")]
    t = runner.step(branches[0], "a")
    u = runner.step(branches[1], "a")
    t = runner.step(t, "x")
    assert (t.outcome, u.outcome) == (1.0, 0.75)
    assert sum(bool(environment.executed) for environment in factory.environments) == 2
    count = len(factory.environments)
    # The next tasks use the environments of those that are done.
    for task in ("v", "w", "x"):
        assert runner.step(runner.start(task)[1], "a").outcome == 0.5
    assert len(factory.environments) == count
    runner.close()
    assert set(factory.closes) == {1}


@pytest.mark.parametrize("fork", ["clone", "replay", "none"])
def test_an_environment_that_raises_costs_that_branch_only(fork):
    runner, factory = runner_of(fork)
    _, root = runner.start("t")
    bad = runner.step(root, "bad")
    assert (bad.done, bad.outcome, bad.error) == (True, 0.0, "RuntimeError: fell over")
    assert (bad.actions, bad.observations) == (("bad",), ())
    _, again = runner.start("t")
    good = runner.step(runner.step(again, "a"), "x")
    assert (good.outcome, good.error, runner.errors) == (1.0, None, 1)
    runner.close()
    assert set(factory.closes) == {1}


@pytest.mark.parametrize("fork", ["clone", "replay", "none"])
def test_a_task_that_cannot_start_is_a_branch_that_is_over(fork):
    runner, factory = runner_of(fork)
    prompt, branch = runner.start("never")
    assert (prompt, branch.done, branch.outcome) == ("", True, 0.0)
    assert branch.error == "OSError: no such task today"
    assert runner.errors == 1
    assert runner.start("t")[0] == "play t"
    runner.close()
    assert set(factory.closes) == {1}


class Fickle:
    """Replays, but observations change from reset number `diverge_on`, and the prompt with every reset if asked to."""

    fork, max_rounds = "replay", 5
    resets = 0

    def __init__(self, prompt_changes=False, diverge_on=99):
        self._prompt_changes, self._diverge_on, self.closes = prompt_changes, diverge_on, 0

    def reset(self, task):
        Fickle.resets += 1
        return f"prompt {Fickle.resets}" if self._prompt_changes else "prompt"

    def step(self, action):
        extra = "!" if Fickle.resets >= self._diverge_on else ""
        return StepResult(f"did {action}{extra}", 0.0, False)

    def outcome(self):
        return 0.0

    def close(self):
        self.closes += 1


@pytest.fixture(autouse=True)
def _no_resets():
    Fickle.resets = 0


def test_a_replay_that_diverges_ends_the_branch_with_a_counted_error():
    factory = Factory(lambda: Fickle(diverge_on=4))
    runner = BranchRunner(factory)
    _, root = runner.start("t")  # reset 1
    first = runner.step(root, "go")  # reset 2
    second = runner.step(first, "on")  # reset 3
    assert second.observations == ("did go", "did on")
    lost = runner.step(second, "end")  # reset 4 sees "did go!"
    assert lost.done
    assert lost.outcome == 0.0
    assert lost.error == "RuntimeError: replay diverged: 'did go!' where 'did go' was seen before"
    assert runner.errors == 1
    runner.close()
    assert set(factory.closes) == {1}


def test_a_replay_whose_prompt_diverges_ends_the_branch():
    runner = BranchRunner(lambda: Fickle(prompt_changes=True))
    _, root = runner.start("t")
    assert "replay diverged: 'prompt 2'" in runner.step(root, "go").error


class Fragile(TreeGame):
    """Raises on every call after its first error, on close() too."""

    broken = False

    def step(self, action):
        if self.broken:
            raise RuntimeError("still broken")
        try:
            return super().step(action)
        except RuntimeError:
            self.broken = True
            raise

    def close(self):
        super().close()
        if self.broken:
            raise RuntimeError("cannot close")


@pytest.mark.parametrize("fork", ["replay", "none"])
def test_a_broken_environment_is_closed_and_replaced(fork):
    factory = Factory(lambda: Fragile(GAME, fork))
    runner = BranchRunner(factory)
    _, root = runner.start("t")
    runner.step(root, "bad")
    _, again = runner.start("t")
    assert runner.step(again, "a").error is None
    assert sum(environment.broken for environment in factory.environments) == 1
    assert [environment.closes for environment in factory.environments if environment.broken] == [1]
    runner.close()
    assert set(factory.closes) == {1}


def test_all_environments_are_closed_even_if_one_cannot_be():
    factory = Factory(lambda: Fragile(GAME, "none"))
    runner = BranchRunner(factory)
    for task in ("t", "u"):
        runner.start(task)
    factory.environments[1].broken = True
    with pytest.raises(RuntimeError, match="cannot close"):
        runner.close()
    assert factory.closes == [1, 1, 1]


@pytest.mark.parametrize("fork", ["clone", "replay", "none"])
def test_a_branch_is_cut_at_the_round_limit_and_graded(fork):
    runner, _ = runner_of(fork, max_rounds=2)
    _, branch = runner.start("t")
    branch = runner.step(runner.step(branch, "a"), "y")
    assert (branch.done, branch.outcome, branch.error) == (True, 0.25, None)


class Odd(TreeGame):
    """Returns values that the protocol forbids."""

    answer = StepResult("fine", 0.0, True)
    grade = 1.0

    def step(self, action):
        return self.answer

    def outcome(self):
        return self.grade


@pytest.mark.parametrize(
    ("answer", "grade", "error"),
    [
        ((None, 0.0, False), 1.0, "TypeError: step() returned a NoneType for the observation; it must be text"),
        (("fine", 0.0, True), 1.5, "ValueError: outcome() returned 1.5; it must be in [0, 1]"),
        (("fine", 0.0, True), float("nan"), "ValueError: outcome() returned nan; it must be in [0, 1]"),
    ],
)
def test_a_forbidden_return_value_is_the_environments_error(answer, grade, error):
    Odd.answer, Odd.grade = answer, grade
    runner = BranchRunner(lambda: Odd(GAME))
    assert runner.step(runner.start("t")[1], "a").error == error


def test_a_plain_tuple_is_accepted_as_a_result():
    Odd.answer, Odd.grade = ("fine", 0, 1), 1
    runner = BranchRunner(lambda: Odd(GAME))
    branch = runner.step(runner.start("t")[1], "a")
    assert (branch.observations, branch.done, branch.outcome) == (("fine",), True, 1.0)


def test_beams_are_refused_where_the_environment_does_not_fork():
    check_can_fork(TreeGame(GAME, "clone"), "beam @2x2")
    check_can_fork(TreeGame(GAME, "replay"), "beam @2x2")
    with pytest.raises(UserError, match=r'beam @2x2.*fork = "none".*search\.stepwise'):
        check_can_fork(TreeGame(GAME, "none"), "beam @2x2")


def test_an_abandoned_branch_releases_its_environment_to_the_next_task():
    factory = Factory(lambda: TreeGame({"t": {"a": 1.0}, "u": {"a": 1.0}}, "none"))
    runner = BranchRunner(factory)
    _, branch = runner.start("t")
    ended = runner.abandon(branch, "no action")
    assert (ended.done, ended.outcome, ended.error, ended.prompt) == (True, 0.0, "no action", "play t")
    runner.start("u")
    assert runner.errors == 0
    runner.close()
    assert factory.closes == [1, 1]  # the runner's own, and one for both tasks
