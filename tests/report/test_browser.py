"""The page in a real Chromium, from file://: quiet, offline, readable, and usable with mouse or keyboard alone."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from jaxprm.report import build_report
from jaxprm.report.labels import COLOURS

pytestmark = pytest.mark.slow

Trees = list[dict[str, Any]]
HOSTILE = "</script><img src=x onerror=\"window.harm=1\">\nAction: <b onclick='window.harm=1'>get 1 log</b>"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


class Browser:
    """A thin layer over Selenium: what the tests below do with a page."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver

        programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
        assert all(programs.values()), f"missing: {programs}; run tests/install_browser.sh"
        options = webdriver.ChromeOptions()
        options.binary_location = programs["chromium"]
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(programs["chromedriver"]))
        self.resize(1280, 900)

    def open(self, page: Path, fragment: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get(f"{page.as_uri()}{fragment}")

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme: str) -> None:
        # Without motion, so that nothing is still scrolling when it is clicked.
        wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str) -> None:
        """Until the script returns true: for what the page does after an event."""
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 20).until(lambda _: self.run(script), f"never true: {script}")

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            ActionChains(self.driver).send_keys(getattr(Keys, key)).perform()

    def click(self, selector: str) -> None:
        element = self.driver.find_element("css selector", selector)
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        element.click()

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def choose(self, selector: str, words: str) -> None:
        from selenium.webdriver.support.select import Select

        select = Select(self.driver.find_element("css selector", selector))
        select.select_by_visible_text(next(o.text for o in select.options if words in o.text))

    @property
    def selected(self) -> int:
        """The node that has the focus of the tree."""
        return int(self.run("return document.querySelector('.card[aria-selected=true]').dataset.node"))

    @property
    def background(self) -> str:
        return self.run("return getComputedStyle(document.body).backgroundColor")

    def screenshot(self, path: Path) -> None:
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        options = {"captureBeyondViewport": True, "clip": clip}
        path.write_bytes(base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    chromium.prefer("light")
    chromium.resize(1280, 900)
    yield chromium
    assert chromium.driver.get_log("browser") == []


@pytest.fixture(scope="module")
def built(full_run: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trees]:
    """A page of two tasks under three methods, with one hostile action, and its trees."""
    workdir = full_run(tmp_path_factory.mktemp("run"))
    file = workdir / "search" / "trees.json"
    trees = [tree for tree in json.loads(file.read_text()) if tree["beam"] == "4x4"][:6]
    trees[0]["nodes"][0]["action"] = HOSTILE
    file.write_text(json.dumps(trees))
    return build_report(workdir), trees


@pytest.fixture
def trees(built: tuple[Path, Trees]) -> Trees:
    return built[1]


@pytest.fixture
def page(browser: Browser, built: tuple[Path, Trees]) -> Path:
    """The page, opened on the end of the first search (AgentPRM, 4x4) without a stored theme."""
    file, trees = built
    browser.open(file)
    browser.run("localStorage.clear()")
    browser.open(file, address(trees[0], trees[0]["best"]))
    return file


def address(tree: dict[str, Any], node: int) -> str:
    parts = [tree["task"], tree["method"], tree["beam"], str(tree["seed"]), str(node)]
    return "#/" + "/".join(quote(part, safe="") for part in parts)


def path_to(tree: dict[str, Any], node: int) -> list[int]:
    """Ids from the first round to this node."""
    parents = {each["id"]: each["parent"] for each in tree["nodes"]}
    path = [node]
    while parents[path[0]]:
        path.insert(0, parents[path[0]])
    return path


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


def test_it_opens_from_a_file_without_loading_anything_else(browser: Browser, page: Path) -> None:
    assert browser.run("return performance.getEntriesByType('resource').map(each => each.name)") == []
    assert "the policy solves" in browser.text("h1")
    drawn = browser.run(
        "return [...document.querySelectorAll('svg[role=img]')].map(e => e.getBoundingClientRect().width)"
    )
    assert len(drawn) >= 9 and all(width > 250 for width in drawn)


def test_every_candidate_has_a_card_with_its_numbers(browser: Browser, page: Path, trees: Trees) -> None:
    cards = browser.run(
        "return [...document.querySelectorAll('.card')].map(e => [Number(e.dataset.node), e.innerText])"
    )
    shown = dict(cards)
    assert set(shown) == {0, *(node["id"] for node in trees[0]["nodes"])}
    returned = path_to(trees[0], trees[0]["best"])
    for node in trees[0]["nodes"]:
        text = shown[node["id"]].replace("−", "-")
        assert f"{node['promise']:.2f}" in text
        assert ("✓ kept" in text) == node["kept"] and ("✕" in text) == (not node["kept"])
        assert ("★ returned" in text) == (node["id"] in returned)
        assert (f"×{node['count']}" in text) == (node["count"] > 1)
    links = browser.run("return document.querySelectorAll('#links path').length")
    assert links == len(trees[0]["nodes"])


def test_clicking_shows_the_full_text_as_text(browser: Browser, page: Path, trees: Trees) -> None:
    node = trees[0]["nodes"][0]
    browser.click(f".card[data-node='{node['id']}']")
    assert HOSTILE in browser.run("return [...document.querySelectorAll('#detail pre')].map(e => e.textContent)")
    assert browser.run("return [window.harm ?? null, document.images.length]") == [None, 0]
    kept = next(each for each in trees[0]["nodes"] if each["kept"] and each["round"] == 3)
    browser.click(f".card[data-node='{kept['id']}']")
    assert kept["action"] in browser.text("#detail") and kept["observation"] in browser.text("#detail")
    browser.click("#detail summary")
    assert trees[0]["prompt"] in browser.text("#detail details")
    dropped = next(each for each in trees[0]["nodes"] if not each["kept"])
    browser.click(f".card[data-node='{dropped['id']}']")
    assert "never executed" in browser.text("#detail")


def test_arrow_keys_walk_the_tree(browser: Browser, page: Path, trees: Trees) -> None:
    path = path_to(trees[0], trees[0]["best"])
    browser.run("document.querySelector('.card[tabindex=\"0\"]').focus()")
    assert browser.selected == path[-1]
    browser.press("ARROW_LEFT")
    assert browser.selected == path[-2]
    browser.press("HOME")
    assert browser.selected == 0
    browser.press("ARROW_LEFT")
    assert browser.selected == 0
    browser.press("ARROW_RIGHT", "ARROW_RIGHT")
    assert browser.selected == path[1]
    browser.press("ARROW_DOWN")
    sibling = browser.selected
    parents = {node["id"]: node["parent"] for node in trees[0]["nodes"]}
    assert sibling != path[1] and parents[sibling] == path[0]
    browser.press("ARROW_UP")
    assert browser.selected == path[1]
    browser.press("END")
    assert browser.selected == path[-1]
    assert browser.run("return document.activeElement.dataset.node") == str(path[-1])
    assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("ENTER")
    assert browser.run("return document.activeElement.id") == "detail"
    browser.press("ESCAPE")
    assert browser.run("return document.activeElement.dataset.node") == str(path[-1])


def test_the_focused_card_is_in_view(browser: Browser, page: Path) -> None:
    browser.run("document.querySelector('.card[tabindex=\"0\"]').focus()")
    browser.press("HOME")
    for _ in range(6):
        browser.press("ARROW_RIGHT")
        card, tree = browser.run(
            "return [document.activeElement, document.getElementById('tree')]"
            ".map(e => e.getBoundingClientRect()).map(r => [r.left, r.top, -r.right, -r.bottom])"
        )
        assert all(edge >= bound for edge, bound in zip(card, tree, strict=True))


def test_the_address_leads_back_to_the_action(browser: Browser, page: Path, trees: Trees) -> None:
    tree = next(each for each in trees if each["task"] == "textcraft/18" and each["method"] == "pvm")
    node = tree["nodes"][7]["id"]
    browser.open(page, address(tree, node))
    assert browser.selected == node
    assert tree["goal"] in browser.run("return document.getElementById('task').selectedOptions[0].textContent")
    assert browser.run("return document.querySelector('#methods input:checked').value") == "pvm"
    browser.run("document.querySelector('.card[tabindex=\"0\"]').focus()")
    browser.press("ARROW_LEFT")
    assert browser.run("return location.hash") == address(tree, browser.selected)
    for broken in ("#/nothing/here", "#/%E0%A4%A", "#/"):
        browser.open(page, broken)
        assert browser.run("return document.querySelectorAll('.card[aria-selected=true]').length") == 1


def test_controls_change_task_method_and_dropped(browser: Browser, page: Path, trees: Trees) -> None:
    browser.click("#methods label:nth-of-type(3)")
    assert "Random scores" in browser.text("#summary")
    browser.choose("#task", trees[3]["goal"])
    assert "Random scores" in browser.text("#summary")
    assert browser.run("return location.hash").startswith(f"#/{quote(trees[3]['task'], safe='')}/random/")
    browser.click("#previous")
    assert trees[0]["goal"] in browser.text(".card[data-node='0']")
    every = browser.run("return document.querySelectorAll('.card').length")
    browser.click("#dropped")
    kept = [node for node in trees[2]["nodes"] if node["kept"]]
    assert browser.run("return document.querySelectorAll('.card').length") == len(kept) + 1 < every


def test_the_tree_speaks_to_assistive_software(browser: Browser, page: Path, trees: Trees) -> None:
    node = next(each for each in trees[0]["nodes"] if each["kept"] and each["round"] == 2)
    attributes = (
        "return Object.fromEntries([...document.querySelector(arguments[0]).attributes].map(a => [a.name, a.value]))"
    )
    spoken = browser.run(attributes, f".card[data-node='{node['id']}']")
    assert spoken["role"] == "treeitem" and spoken["aria-level"] == "3"
    assert f"promise {node['promise']:.2f}" in spoken["aria-label"] and "kept" in spoken["aria-label"]
    assert browser.run("return document.querySelectorAll('.card[tabindex=\"0\"]').length") == 1
    assert browser.run("return document.getElementById('tree').getAttribute('role')") == "tree"


def test_dark_follows_the_system_and_the_button_overrides_it(browser: Browser, page: Path) -> None:
    light, dark = (rgb(colour) for colour in COLOURS["paper"])
    assert browser.background == light
    browser.prefer("dark")
    assert browser.background == dark
    browser.wait("return document.getElementById('theme').getAttribute('aria-pressed') === 'true'")
    line = "return getComputedStyle(document.querySelector('svg[role=img] [stroke=\"var(--agentprm)\"]')).stroke"
    assert browser.run(line) == rgb(COLOURS["agentprm"][1])
    browser.click("#theme")
    assert browser.background == light and browser.run(line) == rgb(COLOURS["agentprm"][0])
    browser.open(page)
    assert browser.background == light
    browser.click("#theme")
    assert browser.background == dark


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_sticks_out_of_the_window(width: int, browser: Browser, page: Path) -> None:
    browser.resize(width, 844)
    browser.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    content, window = browser.run("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert content == window <= width


@pytest.mark.parametrize("width", [390, 1280])
def test_screenshots_are_kept_to_look_at(width: int, browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.resize(width, 844)
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.screenshot(tmp_path / f"{width}-{scheme}.png")
        assert (tmp_path / f"{width}-{scheme}.png").stat().st_size > 50_000


def test_the_keyboard_reaches_every_control_and_shows_where_it_is(browser: Browser, page: Path) -> None:
    browser.open(page)
    reached = set()
    for _ in range(60):
        browser.press("TAB")
        control, outline = browser.run(
            "const e = document.activeElement, mark = e.closest('.choice') ? e.nextElementSibling : e;"
            "return [e.id || e.name || e.classList[0] || e.tagName, getComputedStyle(mark).outlineStyle]"
        )
        assert outline == "solid", control
        reached.add(control)
        if control == "card":
            break
    assert {"skip", "theme", "task", "previous", "next", "method", "dropped", "card"} <= reached


def test_a_script_that_got_in_would_not_run(chromium: Browser, leave: Callable[..., Path]) -> None:
    chromium.open(build_report(leave({})))
    chromium.run(
        "const s = document.createElement('script'); s.textContent = 'window.harm = 1'; document.body.append(s);"
        "const i = document.createElement('img'); i.src = 'https://example.invalid/x.png'; document.body.append(i);"
    )
    assert chromium.run("return window.harm ?? null") is None
    refused = [entry["message"] for entry in chromium.driver.get_log("browser")]
    assert len([text for text in refused if "Content Security Policy" in text]) >= 2
