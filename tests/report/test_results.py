"""Files of the wrong form are one clear line; sizes sort by their numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxprm.errors import UserError
from jaxprm.report import build_report
from jaxprm.report.results import size_key


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "results.json"),
        ('{"policy": {"sampled": {"mean": NaN}}}', "results.json"),
        ('{"policy": {"sampled": {"mean": "0.5"}}}', "policy"),
        ('{"methods": {"pvm": {"beam": {"4x4": {"mean": "0.5"}}}}}', "methods.pvm.beam"),
    ],
)
def test_unreadable_results_are_one_clear_line(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        build_report(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_tree_with_a_lost_parent_is_refused(leave: Callable[..., Path], trees: list[dict[str, Any]]) -> None:
    trees[1]["nodes"][5]["parent"] = 9999
    with pytest.raises(UserError, match=r"tree 1 .*parent 9999"):
        build_report(leave({}, trees))


def test_sizes_sort_by_number() -> None:
    assert sorted(["16", "8", "128", "1"], key=size_key) == ["1", "8", "16", "128"]
    assert sorted(["8x8", "12x4", "2x2", "deep"], key=size_key) == ["2x2", "8x8", "12x4", "deep"]
