"""Names, colours, markers and number formats: one style per method, in every figure and table.

Colours follow Okabe and Ito, so that the common kinds of colour blindness keep them apart; a marker and a dash
pattern say the same again. Each role has a light and a dark value and reaches the page as the CSS variable `--<role>`.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

from jaxprm.search.methods import SEARCHES

# Narrow, and no line breaks at it.
THIN_SPACE = "\u202f"
# As wide as a plus, which a hyphen is not.
MINUS = "\u2212"
BAND = f"95{THIN_SPACE}% bootstrap interval over tasks and seeds"
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class MethodStyle(NamedTuple):
    """The name of a method and how its line is drawn.

    role: the colour, a key of COLOURS. marker: matplotlib's name of it, empty for none. dash: lengths on and off in
    points, empty for a solid line.
    """

    name: str
    role: str
    marker: str = ""
    dash: tuple[float, ...] = ()


COLOURS: dict[str, tuple[str, str]] = {
    "paper": ("#fbfbf9", "#121518"),
    "surface": ("#ffffff", "#1a1e22"),
    "sunken": ("#f1f1ed", "#0c0f11"),
    "ink": ("#15191d", "#e9eae7"),
    "muted": ("#565d66", "#a3abb4"),
    "rule": ("#dddeda", "#30363c"),
    "grid": ("#e8e8e4", "#262b30"),
    "agentprm": ("#0a66ad", "#5cb0ee"),
    "ablation": ("#2f93c9", "#a5d8f5"),
    "pvm": ("#c2500a", "#f39a5f"),
    "orm": ("#04795b", "#3fc9a0"),
    "random": ("#6d747c", "#99a1a9"),
    "oracle": ("#9a4580", "#dd9cc5"),
    "extra1": ("#7a5c00", "#e3c14e"),
    "extra2": ("#5b4bb0", "#b3a8f0"),
    "extra3": ("#a3213d", "#f28fa2"),
    "good": ("#04795b", "#3fc9a0"),
    "bad": ("#a63d00", "#f39a5f"),
}

METHOD_STYLES = {
    "agentprm": MethodStyle("AgentPRM", "agentprm", "o"),
    "agentprm_no_progress": MethodStyle("AgentPRM without progress loss", "ablation", "D", (5, 2)),
    "pvm": MethodStyle("PVM", "pvm", "s", (7, 2, 1.5, 2)),
    "orm": MethodStyle("ORM", "orm", "^", (3, 1.5)),
    "mc": MethodStyle("Monte Carlo", "extra1", "P", (4, 1.5, 1, 1.5)),
    "progress_advantage": MethodStyle("Progress Advantage", "extra2", "h", (6, 1.5, 1, 1.5)),
    "random": MethodStyle("Random scores", "random", "X", (1.5, 2)),
    "oracle": MethodStyle("Oracle", "oracle", "v", (9, 3)),
    "policy": MethodStyle("Plain policy", "ink"),
    "greedy": MethodStyle("Greedy policy", "ink", "", (1.5, 2.5)),
}
ALIASES = {"sampled": "policy", "plain": "policy", "policy_sampled": "policy", "policy_greedy": "greedy"}
EXTRA_MARKERS = ("P", "h", "*")
METRICS = {
    "loss": "Training loss",
    "value_loss": "Value loss",
    "progress_loss": "Progress loss",
    "validation_loss": "Validation loss",
    "explained_variance": "Explained variance",
    "auroc": "AUROC",
    "auroc_within_task": "AUROC within a task",
}


def method_style(label: str) -> MethodStyle:
    """The style of a method or baseline; an unknown label keeps its name and gets one of the spare colours."""
    label = ALIASES.get(label, label)
    if label in METHOD_STYLES:
        return METHOD_STYLES[label]
    # A hash of the label: the same method has the same style in every run, whichever others are measured.
    # crc32 and not hash(), which differs from process to process.
    marker, colour = divmod(zlib.crc32(label.encode()) % 9, 3)
    return MethodStyle(label, f"extra{colour + 1}", EXTRA_MARKERS[marker], (4, 1.5, 1, 1.5))


def method_name(label: str) -> str:
    return method_style(label).name


# Ways to choose among whole trajectories; searches of actions bring their own words (jaxprm/search/methods.py).
_BEST_OF_N = {"best_of_n": "best of {}", "prefix_best_of_n": "best of {} prefixes"}


def search_name(at: str, custom: Mapping[str, str] = MappingProxyType({})) -> str:
    """A search in words: "beam/4x4" -> "beam 4×4", "best_of_n 16" -> "best of 16", anything else unchanged.

    custom: words for searches from outside the package, by kind, with "{}" for the size.
    """
    kind, size = split_search(at, custom)
    # A beam that keeps one path is best-of-K at every step.
    if kind == "beam" and size.startswith("1x"):
        kind, size = "stepwise", size[2:]
    words = {**_BEST_OF_N, **{kind: method.label for kind, method in SEARCHES.items()}, **custom}
    return words[kind].format(size_name(size)) if kind else at


def size_name(size: str) -> str:
    """A beam as people write it: "4x4" -> "4×4"."""
    return size.replace("x", "×")


def split_search(at: str, custom: Collection[str] = ()) -> tuple[str, str]:
    """The search and its size in `paired[].at`: "beam/4x4" -> ("beam", "4x4"); ("", at) if written otherwise."""
    words = at.replace("/", " ").replace(":", " ").replace("@", " ").split()
    if len(words) == 1 and "x" in words[0] and words[0].replace("x", "").isdigit():
        return "beam", words[0]
    if len(words) == 2 and (words[0] in _BEST_OF_N or words[0] in SEARCHES or words[0] in custom):
        return words[0], words[1]
    return "", at


def percent(value: float, digits: int = 1) -> str:
    """A fraction as per cent: 0.4125 -> "41.3 %"."""
    return f"{value * 100:.{digits}f}{THIN_SPACE}%".replace("-", MINUS)


def bare_percent(value: float) -> str:
    """A fraction in per cent without the sign, for the bounds of an interval: 0.4125 -> "41.2"."""
    return f"{value * 100:.1f}"


def signed_points(value: float, digits: int = 1) -> str:
    """A difference of fractions in percentage points, always with its sign: 0.171 -> "+17.1"."""
    return f"{value * 100:+.{digits}f}".replace("-", MINUS)


def decimal(value: float) -> str:
    """A plain number with three decimals: -0.2984 -> "−0.298"."""
    return f"{value:.3f}".replace("-", MINUS)


def number(value: float) -> str:
    """A count or a small real number for a table: 12345 -> "12,345", 0.12345 -> "0.123", 3.2e12 -> "3.20×10¹²"."""
    if abs(value) >= 1e7:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits}×10{str(int(exponent)).translate(RAISED)}".replace("-", MINUS)
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", MINUS)
    return f"{value:.3g}".replace("-", MINUS)


def compact(value: float) -> str:
    """A count as a tick label: 20000 -> "20k", 3000000 -> "3M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 71.2 -> "1 min 11 s", 8.4 -> "8.4 s", 7300 -> "2 h 2 min"."""
    # Above 59.95, one decimal would read "60.0 s".
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, full_seconds = divmod(round(seconds), 60)
    return f"{minutes} min {full_seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plural(count: float, unit: str) -> str:
    """(1, "task") -> "1 task"; (120, "task") -> "120 tasks"."""
    return f"{number(count)} {unit}{'' if count == 1 else 's'}"
