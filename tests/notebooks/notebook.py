"""The notebook as a file, and with other settings: as papermill does, by a cell after the one tagged `parameters`."""

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
    """The source of the cell of that id."""
    return next(one.source for one in load().cells if one.id == name)


def with_settings(notebook: nbformat.NotebookNode, **settings: Any) -> nbformat.NotebookNode:
    """The same cells, all of them, and one more that sets these names anew."""
    changed = copy.deepcopy(notebook)
    (at,) = [index for index, one in enumerate(changed.cells) if "parameters" in one.metadata.get("tags", ())]
    lines = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    injected = nbformat.v4.new_code_cell(lines, metadata={"tags": ["injected-parameters"]})
    changed.cells.insert(at + 1, injected)
    return changed
