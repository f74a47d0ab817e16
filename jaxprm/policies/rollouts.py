"""Environment and policy to trajectories: many episodes in flight, each a function of its seed alone."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from jaxprm import files
from jaxprm.environments import Environment, protocol
from jaxprm.errors import UserError
from jaxprm.policies.protocol import Policy, State
from jaxprm.progress import bar

# What an episode's error begins with where the policy failed.
OF_POLICY = "policy: "


@dataclass
class Rollout:
    """One trajectory in the making. `number` names it among its task's and picks its draws.

    `broken`: it was the environment that failed.
    """

    task: str
    number: int
    environment: Environment
    messages: list[dict]
    about: dict = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)
    tokens: int = 0
    cut: int = 0
    observation: str = ""
    outcome: float | None = None
    error: str | None = None
    broken: bool = False
    done: bool = False


def rollouts(
    make_environment: Callable[[], Environment],
    policy: Policy,
    jobs: Iterable[tuple[str, int]],
    *,
    temperature: float,
    in_flight: int,
) -> Iterator[Rollout]:
    """Finished episodes for (task, number) jobs, in the order in which they end.

    An environment that raises ends its episode with `error` set and is not used again; one that goes on past its
    max_rounds is cut there. Every environment is closed, also on errors. An action that the policy failed to give ends
    its episode with `error` set, too.
    """
    jobs, active = iter(jobs), []
    with closing(protocol.Pool(make_environment)) as environments:
        while True:
            starting = list(itertools.islice(jobs, in_flight - len(active)))
            active += environments.map(lambda job: _start(environments.acquire(), *job), starting)
            if not active:
                return
            if waiting := [episode for episode in active if not episode.done]:
                states = [State(episode.task, episode.messages, episode.number) for episode in waiting]
                acting = []
                for episode, (action,) in zip(waiting, policy.propose(states, 1, temperature), strict=True):
                    episode.tokens += action.tokens
                    episode.cut += action.stop == "length"
                    if action.stop == "error":
                        episode.error, episode.done = f"{OF_POLICY}{action.error}", True
                    else:
                        acting.append((episode, action.text))
                environments.map(lambda one: _act(*one), acting)
            for episode in [episode for episode in active if episode.done]:
                if episode.broken:
                    environments.discard(episode.environment)
                else:
                    environments.release(episode.environment)
                yield episode
            active = [episode for episode in active if not episode.done]


@contextmanager
def _errors_end(episode: Rollout) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # A user's environment may raise anything; the episode is reported as failed, never lost.
        episode.error, episode.broken, episode.done = f"{type(error).__name__}: {error}", True, True


def _start(environment: Environment, task: str, number: int) -> Rollout:
    # The format wants a message: an episode without a prompt has an empty one.
    episode = Rollout(task, number, environment, [{"role": "user", "content": ""}])
    with _errors_end(episode):
        episode.messages = [{"role": "user", "content": protocol.reset(environment, task)}]
        if hasattr(environment, "describe"):
            episode.about = files.plain(environment.describe(task))
    return episode


def _act(episode: Rollout, text: str) -> None:
    episode.messages = [*episode.messages, {"role": "assistant", "content": text}]
    with _errors_end(episode):
        result = protocol.step(episode.environment, text)
        episode.rewards.append(result.reward)
        episode.observation = result.observation
        if result.done or len(episode.rewards) >= episode.environment.max_rounds:
            episode.outcome, episode.done = protocol.outcome(episode.environment), True
            if hasattr(episode.environment, "answer"):
                episode.about = episode.about | {"answer": protocol.answer(episode.environment)}
        else:
            episode.messages = [*episode.messages, {"role": "user", "content": result.observation}]


def trajectory(episode: Rollout, *, split: str, environment: str, temperature: float, seed: int) -> dict:
    """A finished episode as a line of the trajectory format."""
    meta = episode.about | {
        "final_observation": episode.observation,
        "tokens": episode.tokens,
        "actions_cut": episode.cut,
    }
    line = {
        "id": f"{episode.task}#{episode.number}",
        "environment": environment,
        "task": episode.task,
        "split": split,
        "messages": episode.messages,
        "policy": {"name": "policy", "temperature": temperature, "seed": seed},
        "meta": meta,
    }
    if episode.error is not None:
        return line | {"ended": "error", "meta": meta | {"error": episode.error}}
    ended = "done" if len(episode.rewards) < episode.environment.max_rounds or episode.outcome > 0 else "max_rounds"
    return line | {"outcome": episode.outcome, "success": episode.outcome > 0.5, "ended": ended}


def collect(
    make_environment: Callable[[], Environment],
    policy: Policy,
    tasks: Iterable[str],
    output: Path,
    *,
    count: int,
    temperature: float,
    in_flight: int,
    split: str,
    environment: str,
    seed: int,
    label: str = "collect",
) -> Path:
    """`count` trajectories for every task, as JSON Lines sorted by task and number.

    Killed and called again it resumes: finished episodes are in OUTPUT.partial. Those in flight are sampled again, with
    the same result, because a draw depends only on seed, task, conversation and number. Raises UserError when a task
    is given twice, when every episode ended in an error, or when another process is writing the same output.
    """
    resumable = files.ResumableLines(output)
    if resumable.is_finished():
        return output
    tasks = list(tasks)
    if len(set(tasks)) < len(tasks):
        twice = next(task for task, times in Counter(tasks).items() if times > 1)
        raise UserError(f"{label}: task {twice} is given twice; the tasks of a split must differ")
    wanted = [(task, number) for task in tasks for number in range(count)]
    with resumable:
        done = {line["id"]: line for line in resumable.read()}
        missing = [job for job in wanted if f"{job[0]}#{job[1]}" not in done]
        episodes = rollouts(make_environment, policy, missing, temperature=temperature, in_flight=in_flight)
        with (
            bar(label, len(wanted), initial=len(wanted) - len(missing), unit="episode") as progress,
            closing(episodes),
        ):
            succeeded = sum(line.get("success", False) for line in done.values())
            errors = sum(line["ended"] == "error" for line in done.values())
            for episode in episodes:
                line = trajectory(episode, split=split, environment=environment, temperature=temperature, seed=seed)
                resumable.append([line])
                done[line["id"]] = line
                succeeded += line.get("success", False)
                errors += line["ended"] == "error"
                shown = {"success": f"{succeeded / len(done):.1%}"} | ({"errors": errors} if errors else {})
                progress.set_postfix(shown, refresh=False)
                progress.update()
        ordered = [done[f"{task}#{number}"] for task, number in wanted]
        if ordered and all(line["ended"] == "error" for line in ordered):
            # Not kept: once the cause is fixed, the same command has to sample them again.
            resumable.discard()
            first = ordered[0]["meta"]["error"]
            cause = "policy" if first.startswith(OF_POLICY) else f"environment {environment}"
            raise UserError(
                f"{label}: all {len(ordered)} episodes ended in an error, the first: {first}; fix the {cause}"
            )
        resumable.finish(ordered)
    return output
