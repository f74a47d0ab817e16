"""The comparison of outcomes and step labels on TextCraft: the planner's labels, and what is computed from promises."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.labels import MODELS, TEXTCRAFT, judge, lines_of, step_labels
from data_pipeline.trajectory import Message, Trajectory
from jaxprm import environments
from jaxprm.environments.textcraft.planner import plan
from jaxprm.evaluation.labels import Labels
from jaxprm.evaluation.scored import ScoredTrajectory


def play(environment, task: str, actions) -> Trajectory:
    """The episode of these actions; None is the planner's."""
    messages = [Message(role="user", content=environment.reset(task))]
    for action in actions:
        episode = environment.episode
        text = plan(episode.goal, environment.inventory, episode.recipes).message if action is None else action
        messages.append(Message(role="assistant", content=text))
        result = environment.step(text)
        if result.done:
            break
        messages.append(Message(role="user", content=result.observation))
    return Trajectory(id="x", task=task, messages=messages)


def test_an_action_is_labelled_by_whether_it_shortens_the_plan():
    environment = environments.create("textcraft", TEXTCRAFT)
    tasks = environment.tasks("train")
    task = tasks[len(tasks) // 2]  # by depth: the last ones need more than twelve rounds
    expert = play(environment, task, [None] * 12)
    labels = step_labels(environment, expert)
    assert environment.outcome() == 1 and labels == [1.0] * len(labels) and len(labels) > 2
    # Looking costs a turn and changes nothing; after it the plan is as long as before.
    idle = play(environment, task, ["Thought: hm.\nAction: inventory", None, "Action: get 1 nothing", None])
    assert step_labels(environment, idle) == [0.0, 1.0, 0.0, 1.0]
    changed = Trajectory(
        id="x",
        task=task,
        messages=[*idle.messages[:2], Message(role="user", content="something else"), *idle.messages[3:]],
    )
    with pytest.raises(ValueError, match="another observation after message 1"):
        step_labels(environment, changed)


def test_models_are_judged_on_labels_and_outcomes_with_differences():
    """Two tasks, two seeds: `labels` ranks every step by its label, `outcomes` by its outcome, `both` is constant."""
    rows = []
    for task in ("a", "b"):
        for outcome, values in ((1.0, [1.0, 0.0]), (0.0, [1.0, 0.0])):
            labels = np.array(values)
            promises = {"outcomes": np.full(2, outcome), "labels": labels, "both": np.zeros(2)}
            rows.append(
                ScoredTrajectory(
                    task=task,
                    group=None,
                    outcome=outcome,
                    rewards=None,
                    failed=False,
                    labels=Labels(labels, first_error=False),
                    promises=tuple(promises[label] for label in MODELS for _ in range(2)),
                )
            )
    report = judge(rows, 2, samples=50)
    means = {label: {key: r["mean"] for key, r in numbers.items()} for label, numbers in report["models"].items()}
    assert means["labels"]["labels auroc"] == 1 and means["labels"]["outcomes auroc"] == 0.5
    assert means["outcomes"]["outcomes auroc_within_task"] == 1 and means["outcomes"]["labels auroc"] == 0.5
    assert means["both"]["labels auroc"] == 0.5
    paired = {(pair["a"], pair["b"], pair["metric"]): pair["mean"] for pair in report["paired"]}
    assert paired["labels", "outcomes", "labels auroc"] == 0.5
    assert (report["tasks"], report["steps"], report["right"], report["success"]) == (2, 8, 0.5, 0.5)
    trained = {"trajectories": 1, "tasks": 1, "steps": 2, "right": 0.5, "success": 1.0}
    assert "labels    labels auroc               100.0 [100.0, 100.0]" in lines_of(report | {"trained_on": trained})
