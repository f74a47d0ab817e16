"""Turn a matplotlib figure into SVG that follows the page's theme and its Content-Security-Policy.

The figure is drawn in placeholder colours, one per role, which become `var(--role)`. Inline style attributes and style
elements become presentation attributes, since the policy allows only the page's own stylesheet.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from jaxprm.report.labels import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
FONTS = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
# Matplotlib accepts no CSS variables, so each role is drawn in a colour that no figure uses otherwise.
PLACEHOLDERS = {role: f"#fe00{index:02x}" for index, role in enumerate(COLOURS)}
ROLE_OF = {colour: role for role, colour in PLACEHOLDERS.items()}


def themed_colour(role: str) -> str:
    """The colour that stands for a role in a figure that follows the theme of the page."""
    return PLACEHOLDERS[role]


def light_colour(role: str) -> str:
    """The colour of a role in a bitmap, which has no theme."""
    return COLOURS[role][0]


def inline_svg(figure: Figure, prefix: str, label: str, titles: dict[str, list[str]]) -> str:
    """SVG to be embedded in an HTML page.

    prefix: keeps ids unique on the page. label: the image's description for screen readers. titles: `titles[gid][k]` is
    the tooltip of the k-th marker of the artist with that gid.
    """
    root = _themed(figure, prefix, titles)
    # Without a size, the drawing fills its panel and keeps the proportions of its viewBox.
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    for element in root.iter():
        # An HTML parser gives <svg> and what is in it their namespace by itself.
        element.tag = element.tag.removeprefix(f"{{{SVG}}}")
    return ElementTree.tostring(root, encoding="unicode")


def standalone_svg(figure: Figure, label: str) -> str:
    """SVG for a separate file: light, or dark where the reader prefers it."""
    root = _themed(figure, "f", {})
    root.set("role", "img")
    root.set("aria-label", label)
    style = ElementTree.Element(f"{{{SVG}}}style")
    light, dark = (" ".join(f"--{role}: {pair[i]};" for role, pair in COLOURS.items()) for i in (0, 1))
    style.text = f"svg {{ {light} font-family: {FONTS}; }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}"
    paper = ElementTree.Element(f"{{{SVG}}}rect", {"width": "100%", "height": "100%", "fill": "var(--paper)"})
    root.insert(0, paper)
    root.insert(0, style)
    # Otherwise every tag would be written with a prefix, as in ns0:svg.
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _themed(figure: Figure, prefix: str, titles: dict[str, list[str]]) -> ElementTree.Element:
    import matplotlib

    buffer = io.StringIO()
    # Text stays text, to be searched and read aloud. A fixed salt and no date make the same figure the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _remove(root, f"{{{SVG}}}metadata")
    _remove(root, f"{{{SVG}}}style")
    # Matplotlib's style element sets this for every shape.
    root.set("stroke-linejoin", "round")
    for element in root.iter():
        _title_markers(element, titles.get(element.get("id", ""), []))
    # Matplotlib gives most groups an id. Those that nothing refers to are dropped, the others are prefixed below, since
    # several drawings share a page.
    used = set(
        re.findall(r"#([\w.-]+)", " ".join(value for element in root.iter() for value in element.attrib.values()))
    )
    for element in root.iter():
        _plain_attributes(element, prefix, used)
    return root


def _remove(root: ElementTree.Element, tag: str) -> None:
    for parent in root.iter():
        for child in [child for child in parent if child.tag == tag]:
            parent.remove(child)


def _title_markers(group: ElementTree.Element, texts: list[str]) -> None:
    for use, text in zip(group.iter(f"{{{SVG}}}use"), texts, strict=False):
        ElementTree.SubElement(use, f"{{{SVG}}}title").text = text


def _plain_attributes(element: ElementTree.Element, prefix: str, used: set[str]) -> None:
    for declaration in element.attrib.pop("style", "").split(";"):
        name, colon, value = declaration.partition(":")
        # The font is that of the page, or of the style element of a separate file.
        if colon and name.strip() != "font-family":
            element.set(name.strip(), value.strip().removesuffix("px"))
    if (link := element.attrib.pop(f"{{{XLINK}}}href", None)) is not None:
        element.set("href", link)
    if element.get("id") and element.get("id") not in used:
        del element.attrib["id"]
    for name, value in list(element.attrib.items()):
        if value in ROLE_OF:
            element.set(name, f"var(--{ROLE_OF[value]})")
        elif name == "id":
            element.set(name, f"{prefix}-{value}")
        elif name == "href" or value.startswith("url(#"):
            element.set(name, value.replace("#", f"#{prefix}-", 1))
