"""The notebook, as committed or with other settings: like papermill, in a cell after the one tagged `parameters`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).parents[2]
PATH = ROOT / "notebooks" / "agentprm_colab_tpu.ipynb"


def load() -> nbformat.NotebookNode:
    return nbformat.read(PATH, as_version=4)


def cell(name: str) -> str:
    """The source of the cell with this id."""
    return next(candidate.source for candidate in load().cells if candidate.id == name)


def with_settings(notebook: nbformat.NotebookNode, **settings: Any) -> nbformat.NotebookNode:
    """All cells, and one more that sets these names again."""
    changed = copy.deepcopy(notebook)
    (position,) = [index for index, cell in enumerate(changed.cells) if "parameters" in cell.metadata.get("tags", ())]
    lines = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    injected = nbformat.v4.new_code_cell(lines, metadata={"tags": ["injected-parameters"]})
    changed.cells.insert(position + 1, injected)
    return changed
