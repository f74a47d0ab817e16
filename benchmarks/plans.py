"""Compiles the plans of docs/plan.md one after another and writes their table; finished plans are not compiled again.

    python -m benchmarks.plans --output runs/plans            # compile those that are missing
    python -m benchmarks.plans --output runs/plans --rows     # only write the table of the finished ones

Needs libtpu. Each plan is compiled in a separate process; its JSON file is named after its options.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

GIB = 1 << 30
HEAD = (
    "| model | slice | mesh | rows x tokens | remat | GiB a device: arguments + temporaries = total of limit | fits | "
    "T FLOPs a step | a step at least, binds | expected tokens/s/chip | scorer, GiB | compiled in |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


class Plan(NamedTuple):
    """A row of the table: options of `plan`; bfloat16, and splash attention where `auto` selects it."""

    model: str
    topology: str
    mesh: str
    rows: int
    length: int = 4096
    remat: str = "full"
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        parts = (self.model, self.topology, self.mesh, f"{self.rows}x{self.length}", self.remat, self.optimizer)
        return "_".join(parts).replace(":", "-").replace(",", "-").replace("=", "")

    def command(self, output: Path) -> list[str]:
        overrides = {"dtype": "bfloat16", "remat": self.remat, "optimizer": self.optimizer}
        return [
            sys.executable,
            "-m",
            "jaxprm",
            "plan",
            "configs/forkme.py",
            *(f"reward_models.0.{field}={value}" for field, value in overrides.items()),
            "--model",
            self.model,
            "--topology",
            self.topology,
            "--mesh",
            self.mesh,
            "--batch",
            str(self.rows),
            "--length",
            str(self.length),
            "--json",
            str(output),
        ]


PLANS = (
    Plan("qwen2.5-0.5b", "v5e:1x1", "data=1", 4),
    Plan("qwen2.5-0.5b", "v5e:2x4", "fsdp=8", 16),
    Plan("qwen2.5-3b", "v5e:4x4", "fsdp=16", 16),
    Plan("qwen2.5-7b", "v6e:2x4", "fsdp=8", 8),
    Plan("qwen2.5-7b", "v5p:2x2x2", "fsdp=8", 16),
    Plan("qwen2.5-7b", "v5e:4x4", "fsdp=16", 16),
    Plan("llama-3.1-8b", "v6e:4x4", "fsdp=16", 32),
    Plan("qwen2.5-0.5b", "v5e:2x4", "fsdp=8", 8, length=8192),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles the plans of docs/plan.md and writes their table.")
    parser.add_argument("--output", type=Path, required=True, help="a folder: one JSON file a plan, and rows.md")
    parser.add_argument("--rows", action="store_true", help="compile nothing")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for plan in () if options.rows else PLANS:
        path = options.output / f"{plan.name}.json"
        if path.is_file():
            continue
        print(" ".join(plan.command(path)[1:]), flush=True)
        done = subprocess.run(plan.command(path.with_suffix(".partial")))
        if done.returncode not in (0, 3):  # 3: it does not fit, which is a row of the table too
            print(f"{plan.name}: status {done.returncode}", file=sys.stderr)
            continue
        path.with_suffix(".partial").rename(path)
        # Compilations take minutes: an interrupted run leaves the table of what is finished.
        _write(options.output)
    _write(options.output)
    print((options.output / "rows.md").read_text())


def _write(output: Path) -> None:
    """Writes the table of the finished plans, in the order of PLANS."""
    paths = [(plan, output / f"{plan.name}.json") for plan in PLANS]
    rows = [row(plan, json.loads(path.read_text())) for plan, path in paths if path.is_file()]
    (output / "rows.md").write_text("\n".join([HEAD, *rows]) + "\n")


def row(plan: Plan, report: dict) -> str:
    """A line of the table from the JSON of a plan."""
    sizes, estimate, scorer = report["bytes_per_device"], report["estimate"], report["scorer"]

    def gib(size: int | None) -> str:
        return "?" if size is None else f"{size / GIB:.2f}"

    bound = expected = "-"
    if estimate["step_seconds"] is not None:
        bound = f"{estimate['bound_seconds']:.3g} s, {estimate['binds']}"
        expected = f"{estimate['tokens_per_second_per_chip']:,.0f}"
    free = report["free_bytes_per_device"]
    fits = f"yes, {gib(free)} free" if report["fits"] else f"no, {gib(-free)} too much"
    cells = (
        plan.model,
        plan.topology,
        plan.mesh,
        f"{plan.rows} x {plan.length}",
        plan.remat,
        f"{gib(sizes['arguments'])} + {gib(sizes['temporaries'])} = {gib(sizes['total'])} of {gib(sizes['limit'])}",
        fits,
        f"{report['flops_per_step'] / 1e12:,.0f}",
        bound,
        expected,
        ("" if scorer["fits"] else "no: ") + gib(scorer["bytes_per_device"]["total"]),
        f"{report['compile_seconds']:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
