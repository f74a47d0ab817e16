"""The search stage of a run: one pool a task shared by all methods, its scores, and every guided search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jaxprm import files
from jaxprm.collect import collect
from jaxprm.progress import bar
from jaxprm.scoring.models import load_scorer
from jaxprm.search.controls import RandomScorer
from jaxprm.search.methods import guided_search
from jaxprm.stages import identity

SCORED_AT_ONCE = 256


def search(state) -> None:
    """Fills WORKDIR/search. Every file is whole or absent; a stage of its own guards each."""
    settings, folder = state.experiment.search, state.work / "search"
    tasks = state.tasks(settings.split, settings.tasks)
    _sample(state, tasks, "pool", count=settings.pool, temperature=settings.temperature)
    _sample(state, tasks, "greedy", count=1, temperature=0.0)
    sizes = [*settings.beams, *((1, actions) for actions in settings.stepwise)]
    for seed in state.experiment.reward_seeds:
        _searches(state, tasks, sizes, "random", seed, {"random_seed": seed}, RandomScorer(seed))
    for model, seed in state.trained():
        inputs = {"reward_model": identity(state.train_inputs(model, seed))}
        scorer = None
        values = {
            "pool": state.work / "search/pool.jsonl",
            "validation": state.work / "trajectories/validation.jsonl",
        }
        for name, source in values.items():
            label = f"values-{name}-{model.label}-{seed}"
            output = folder / f"{label}.jsonl"
            upstream = state.search_inputs if name == "pool" else state.collect_inputs
            with state.work.stage(label, inputs | {"trajectories": identity(upstream)}, [output]) as needed:
                if needed:
                    scorer = scorer or _scorer(state, model, seed)
                    _score_file(scorer, source, output, f"score {name} {model.label}/{seed}")
        pending = list(_pending(state, sizes, model.label, seed))
        if pending:
            _searches(state, tasks, sizes, model.label, seed, inputs, scorer or _scorer(state, model, seed))


def _scorer(state, model, seed: int):
    settings = state.experiment.policy
    directory = state.model_directory(model.label, seed) / "model"
    return load_scorer(directory, rows=settings.in_flight // 2, max_tokens=settings.max_tokens + settings.max_action_tokens)


def _sample(state, tasks: list[str], name: str, *, count: int, temperature: float) -> None:
    output = state.work / f"search/{name}.jsonl"
    with state.work.stage(f"search-{name}", state.search_inputs, [output]) as needed:
        if needed:
            collect(
                state.make_environment,
                state.policy,
                tasks,
                output,
                count=count,
                temperature=temperature,
                in_flight=state.experiment.policy.in_flight,
                split=state.experiment.search.split,
                environment=state.experiment.environment.name,
                seed=state.experiment.seed,
                label=f"sample {name}",
            )


def search_name(width: int, actions: int, label: str, seed: int) -> str:
    """The file of a guided search, without its ending."""
    kind = f"beam-{width}x{actions}" if width > 1 else f"stepwise-{actions}"
    return f"{kind}-{label}-{seed}"


def _pending(state, sizes, label: str, seed: int) -> Iterator[Path]:
    for width, actions in sizes:
        if not (path := state.work / f"search/{search_name(width, actions, label, seed)}.jsonl").exists():
            yield path


def _searches(state, tasks, sizes, label: str, seed: int, inputs: dict, scorer) -> None:
    for width, actions in sizes:
        name = search_name(width, actions, label, seed)
        output = state.work / f"search/{name}.jsonl"
        with state.work.stage(f"search-{name}", state.search_inputs | inputs, [output]) as needed:
            if not needed:
                continue
            guided_search(
                state.make_environment,
                state.policy,
                scorer,
                tasks,
                output,
                settings=state.experiment.search,
                width=width,
                actions=actions,
                label=f"{name.rsplit('-', 2)[0]} {label}/{seed}",
                about={"method": label, "beam": f"{width}x{actions}", "seed": seed},
            )


def _score_file(scorer, source: Path, output: Path, label: str) -> None:
    """Promise of every step of a trajectory file: {"id", "values"} a line, equal conversations scored once."""
    lines = [line for line in files.read_lines(source) if line.get("ended") != "error"]
    written = []
    known: dict[str, list[float]] = {}
    with bar(label, len(lines), unit="trajectory") as progress:
        for start in range(0, len(lines), SCORED_AT_ONCE):
            chunk = lines[start : start + SCORED_AT_ONCE]
            keys = [files.line(line["messages"]) for line in chunk]
            new = list(dict.fromkeys(key for key in keys if key not in known))
            first = {key: line for key, line in zip(reversed(keys), reversed(chunk), strict=True)}
            scored = scorer.score([first[key]["messages"] for key in new], rows=[first[key]["id"] for key in new])
            known |= {key: values.tolist() for key, values in zip(new, scored, strict=True)}
            written += [{"id": line["id"], "values": known[key]} for line, key in zip(chunk, keys, strict=True)]
            progress.update(len(chunk))
    files.write_atomic(output, "".join(map(files.line, written)))
