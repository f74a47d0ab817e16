"""Environment and policy to trajectories: many episodes in flight, each a function of its seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jaxprm import files
from jaxprm.environments import Environment
from jaxprm.policies.protocol import Policy, State
from jaxprm.progress import bar


@dataclass
class Episode:
    """One trajectory in the making. `number` names it among its task's and picks its draws."""

    task: str
    number: int
    environment: Environment
    messages: list[dict]
    rewards: list[float] = field(default_factory=list)
    tokens: int = 0
    cut: int = 0
    observation: str = ""
    error: str | None = None
    done: bool = False


def rollouts(
    make_environment: Callable[[], Environment],
    policy: Policy,
    jobs: Iterable[tuple[str, int]],
    *,
    temperature: float,
    in_flight: int,
) -> Iterator[Episode]:
    """Finished episodes for (task, number) jobs, in the order in which they end.

    An environment that raises ends its episode with `error` set. Every environment is closed, also on errors.
    """
    jobs, idle, active = iter(jobs), [], []
    made: list[Environment] = []
    try:
        while True:
            while len(active) < in_flight and (job := next(jobs, None)) is not None:
                if not idle:
                    made.append(make_environment())
                    idle.append(made[-1])
                active.append(_start(idle.pop(), *job))
            if not active:
                return
            waiting = [episode for episode in active if not episode.done]
            states = [State(episode.task, episode.messages, episode.number) for episode in waiting]
            for episode, (action,) in zip(waiting, policy.propose(states, 1, temperature), strict=True):
                episode.tokens += action.tokens
                episode.cut += action.stop == "length"
                _act(episode, action.text)
            for episode in [episode for episode in active if episode.done]:
                idle.append(episode.environment)
                yield episode
            active = [episode for episode in active if not episode.done]
    finally:
        for environment in made:
            environment.close()


def _start(environment: Environment, task: str, number: int) -> Episode:
    try:
        messages = [{"role": "user", "content": environment.reset(task)}]
        return Episode(task, number, environment, messages)
    except Exception as error:
        # A user's environment may raise anything; the episode is reported as failed, never lost.
        return Episode(task, number, environment, [], error=f"{type(error).__name__}: {error}", done=True)


def _act(episode: Episode, text: str) -> None:
    episode.messages = [*episode.messages, {"role": "assistant", "content": text}]
    try:
        result = episode.environment.step(text)
    except Exception as error:
        episode.error, episode.done = f"{type(error).__name__}: {error}", True
        return
    episode.rewards.append(result.reward)
    episode.observation, episode.done = result.observation, result.done
    if not result.done:
        episode.messages = [*episode.messages, {"role": "user", "content": result.observation}]


def trajectory(episode: Episode, *, split: str, environment: str, temperature: float, seed: int) -> dict:
    """A finished episode as a line of the trajectory format."""
    described = getattr(episode.environment, "describe", None)
    meta = {"final_observation": episode.observation, "tokens": episode.tokens, "actions_cut": episode.cut}
    if described is not None:
        meta |= described(episode.task)
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
    outcome = float(episode.environment.outcome())
    ended = "done" if len(episode.rewards) < episode.environment.max_rounds or outcome > 0 else "max_rounds"
    return line | {"outcome": outcome, "success": outcome > 0.5, "ended": ended}


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

    Killed and called again it goes on: what was finished is in OUTPUT.partial, what was in flight is sampled again,
    the same, because a draw depends on nothing but seed, task, conversation and number.
    """
    if output.exists():
        return output
    partial = output.with_name(output.name + ".partial")
    done = {line["id"]: line for line in files.whole_lines(partial)}
    wanted = [(task, number) for task in tasks for number in range(count)]
    missing = [job for job in wanted if f"{job[0]}#{job[1]}" not in done]
    with bar(label, len(wanted), initial=len(wanted) - len(missing), unit="episode") as progress:
        with files.appending(partial) as append:
            succeeded = sum(line.get("success", False) for line in done.values())
            for episode in rollouts(make_environment, policy, missing, temperature=temperature, in_flight=in_flight):
                line = trajectory(episode, split=split, environment=environment, temperature=temperature, seed=seed)
                append([line])
                done[line["id"]] = line
                succeeded += line.get("success", False)
                progress.set_postfix(success=f"{succeeded / len(done):.1%}", refresh=False)
                progress.update()
    ordered = [done[f"{task}#{number}"] for task, number in wanted]
    files.write_atomic(output, "".join(files.line(one) for one in ordered))
    partial.unlink(missing_ok=True)
    return output
