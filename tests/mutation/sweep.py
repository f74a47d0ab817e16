"""Runs the verbs on thousands of broken files and counts what became of them.

python -m tests.mutation.sweep [--seed N] [--count N] [--all] [KIND ...]
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from tests.mutation import mutations as mutate
from tests.mutation.kinds import Kind
from tests.mutation.outcomes import Counts, run

# Seconds for the healthy file, whose verbs compile programs.
COMPILING = 300


def chosen(kind: Kind, content: bytes, count: int, seed: int) -> Iterator[mutate.Mutation]:
    """`count` mutations: those of the whole file first, then random ones."""
    rng = random.Random(f"{kind.name} {seed}")
    count = round(count * kind.share)
    fixed = mutate.fixed_bytes(content)
    yield from fixed[:count]
    for _ in range(count - len(fixed)):
        yield rng.choice(kind.mutators)(content, rng)


def write(path: Path, content: bytes) -> None:
    # A new file: the old one may be mapped into memory.
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(content)
    os.replace(beside, path)


def sweep(kind: Kind, directory: Path, inputs: Iterable[mutate.Mutation], only: Collection[str] = ()) -> Counts:
    """Runs the verbs of the kind, or only some, on the inputs: one verb on each, in turn."""
    counts, path = Counts(), kind.path(directory)
    original = path.read_bytes()
    verbs = [(name, verb) for name, verb in kind.verbs.items() if not only or name in only]
    baselines = {name: run(verb, directory, COMPILING) for name, verb in verbs}
    for name, result in baselines.items():
        assert result.output is not None, f"{kind.name}, {name}: the healthy file fails: {result}"
    names = kind.names or (path.name,)
    for index, (label, content) in enumerate(inputs):
        write(path, content)
        name, verb = verbs[index % len(verbs)]
        result = run(verb, directory)
        where = f"{kind.name}, {name}: {label}"
        counts.add(where, result, baselines[name].output, lambda c=content: kind.reason(original, c), names)
    write(path, original)
    return counts


def main() -> int:
    from tests.mutation import kinds

    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--all", action="store_true", help="every JSON mutation, instead of random ones")
    parser.add_argument("--show", type=int, default=10)
    parser.add_argument("kinds", nargs="*")
    options = parser.parse_args()
    failed = 0
    for kind in kinds.KINDS:
        if options.kinds and kind.name not in options.kinds:
            continue
        with tempfile.TemporaryDirectory() as folder:
            kind.make(Path(folder))
            content = kind.path(Path(folder)).read_bytes()
            inputs = mutate.all_json(content) if options.all else chosen(kind, content, options.count, options.seed)
            began = time.monotonic()
            counts = sweep(kind, Path(folder), inputs)
            print(f"{kind.name}: {counts} ({time.monotonic() - began:.0f} s) {dict(counts.reasons)}", flush=True)
        seen = set()
        for fault in counts.faults:
            last = fault.rpartition(" at ")[2][:60] if "tracebacks" in fault else fault[:60]
            if last not in seen and len(seen) < options.show:
                seen.add(last)
                print("   ", fault, flush=True)
        failed += len(counts.faults)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
