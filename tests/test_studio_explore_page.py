"""The Explore page in a real browser: rules, cuts that are dragged, the grid of images, and what the address keeps."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import duckdb
import pytest

from curate.layout import Data
from tests.small_serve import ServedData, serving_data
from tests.test_serve_page import browser as browser  # a fixture

pytestmark = pytest.mark.long

Open = Callable[..., Any]
RULES = [["large", "original_width >= 100", 1], ["safe", "open_nsfw < 0.9", 1], ["pretty", "aesthetic > 3.6", 1]]
EXPECTED = ("status of 422", "status of 404", "ERR_INTERNET_DISCONNECTED")  # of requests that tests make fail
MANY = 10_000_000


@pytest.fixture(scope="module")
def served(real_data: Data, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedData]:
    """36 images with the columns aesthetic and open_nsfw."""
    data = Data(shutil.copytree(str(real_data), tmp_path_factory.mktemp("explore") / "data"))
    with serving_data(data) as served:
        yield served


@pytest.fixture
def opened(browser: Any, served: ServedData) -> Iterator[Open]:
    """Opens the page with some rules; what its console complains of fails the test."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def open_page(
        rules: Any = RULES, width: int = 1600, height: int = 1000, scheme: str = "light", wait: bool = True, **view: str
    ) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.goto(f"{served.url}/#{urlencode({'rules': json.dumps(rules), 'show': 'kept', **view})}")
        page.wait_for_selector("body[data-ready]")
        if not wait:
            return page
        until(page, "document.querySelector('#funnel-text').textContent !== ''")
        page.wait_for_selector(".tile.is-there, .grid-note:not([hidden])")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [w for w in wrong if not any(words in w for words in EXPECTED)]


def until(page: Any, expression: str, arg: Any = None, seconds: float = 60) -> None:
    """Wait until JavaScript is true. (Playwright's own wait evaluates in the page, where its policy forbids that.)"""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression, arg):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def condition(page: Any, rule: str) -> str:
    return str(page.locator(f".rule[data-name={rule}] .rule-sql").inner_text())


def names(page: Any) -> list[str]:
    return list(page.locator(".rule").evaluate_all("rules => rules.map((rule) => rule.dataset.name)"))


def kept(page: Any) -> int:
    """The number at the funnel, once the server has answered for the rules that are shown."""
    until(
        page,
        """async () => {
            const { state } = await import("/store.js");
            const shown = state.rules.filter((r) => r.on).map((r) => r.name + r.condition).join();
            return state.live && shown === state.live.rules.filter((r) => r.on).map((r) => r.name + r.condition).join();
        }""",
    )
    return int(page.locator("#funnel-text b").inner_text().replace(",", ""))


def kept_by_select(served: ServedData, where: str) -> int:
    """How many images fulfil a condition, by DuckDB over the tables of the folder."""
    root = Path(str(served.folder.data))
    con = duckdb.connect()
    scores = " ".join(
        f"join read_parquet('{folder}/*.parquet') as {folder.name} using (key)"
        for folder in sorted((root / "annotated").iterdir())
    )
    found = con.execute(
        f"select count(*) from read_parquet('{root / 'fetched'}/*.parquet') as fetched {scores} "
        f"where status = 'success' and {where}"
    ).fetchone()
    assert found is not None
    return int(found[0])


def outline(page: Any, column: str, which: str) -> str:
    return str(page.locator(f"[data-column={column}] path.{which}").get_attribute("d"))


def see(page: Any, column: str) -> None:
    """Scroll to a column, and wait for its histogram of kept rows."""
    page.locator(f"[data-column={column}]").scroll_into_view_if_needed()
    page.wait_for_selector(f"[data-column={column}] path.kept[d]", state="attached")


def drag(page: Any, cut: Any, by: float) -> None:
    """Drag a cut to the right by so many pixels."""
    box = cut.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] - 10
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + by, y, steps=12)
    page.mouse.up()


def tab_to(page: Any, selector: str) -> None:
    """Press Tab until the focus is there."""
    for _ in range(150):
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab never comes to {selector}")


def test_dragging_a_cut_changes_rule_funnel_histogram_and_images(opened: Open, served: ServedData) -> None:
    page = opened()
    see(page, "aesthetic")
    before = kept(page), outline(page, "aesthetic", "kept"), outline(page, "aesthetic", "all")
    assert before[0] == kept_by_select(served, "original_width >= 100 and open_nsfw < 0.9 and aesthetic > 3.6")
    with page.expect_request(re.compile("/api/rows")):
        drag(page, page.locator(".cut[data-rule=pretty]"), 170)
    now = condition(page, "pretty")
    value = float(now.removeprefix("aesthetic > "))
    assert value > 3.6 and len(now) <= len("aesthetic > 0.00000")  # written in few digits
    expected = kept_by_select(served, f"original_width >= 100 and open_nsfw < 0.9 and aesthetic > {value}")
    assert kept(page) == expected < before[0]
    until(page, "(d) => document.querySelector('[data-column=aesthetic] path.kept').getAttribute('d') !== d", before[1])
    assert outline(page, "aesthetic", "all") == before[2]
    until(page, f"document.querySelector('.tile').ariaSetSize === '{kept(page)}'")
    page.keyboard.press("Control+z")
    until(page, "document.querySelector('.rule[data-name=pretty] .rule-sql').textContent === 'aesthetic > 3.6'")
    assert kept(page) == before[0]
    page.keyboard.press("Control+Shift+Z")
    until(page, "(now) => document.querySelector('.rule[data-name=pretty] .rule-sql').textContent === now", now)


def test_the_keyboard_alone(opened: Open) -> None:
    page = opened()
    see(page, "aesthetic")
    tab_to(page, ".rule[data-name=large] .grip")
    page.keyboard.press("Alt+ArrowDown")
    assert names(page) == ["safe", "large", "pretty"]
    tab_to(page, ".rule[data-name=pretty] input[role=switch]")
    page.keyboard.press("Space")
    assert page.locator(".rule[data-name=pretty]").get_attribute("class") == "rule is-off"
    page.keyboard.press("Space")
    before = kept(page)
    tab_to(page, ".cut[data-rule=pretty]")
    page.keyboard.press("ArrowRight")
    small = float(condition(page, "pretty").split(">")[1])
    page.keyboard.press("Shift+ArrowRight")
    large = float(condition(page, "pretty").split(">")[1])
    assert 3.6 < small < large and large - small == pytest.approx(10 * (small - 3.6), rel=0.35)
    page.keyboard.press("End")
    assert kept(page) < before
    assert page.evaluate("document.activeElement.dataset.rule") == "pretty"
    page.keyboard.press("Home")
    assert kept(page) >= before
    page.keyboard.press("1")
    page.keyboard.press("g")
    page.wait_for_selector(".tile[aria-setsize='36']")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    until(page, "+document.querySelector('.tile[aria-selected=true]').ariaPosInSet > 2")
    page.keyboard.press("End")
    page.wait_for_selector(".tile[aria-selected=true][aria-posinset='36']")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog[open]", state="detached")
    page.keyboard.press("?")
    page.wait_for_selector("#keys[open]")


def test_rules_are_edited_moved_made_and_removed(opened: Open, served: ServedData) -> None:
    page = opened()
    page.locator(".rule[data-name=safe] .rule-sql").click()
    page.fill(".rule-form textarea", "open_nsfww < 0.5")
    with page.expect_response("**/api/selections") as answered:
        page.keyboard.press("Enter")
    said = answered.value.json()
    page.wait_for_selector(".rule-form .error:not([hidden])")
    shown = page.locator(".rule-form .error").inner_text()
    assert said["error"] in shown and "open_nsfw" in shown  # the command line's own words
    assert condition(page, "pretty") == "aesthetic > 3.6" and kept(page) > 0  # all is as it was
    page.fill(".rule-form textarea", "")
    page.keyboard.type("open_n")
    page.keyboard.press("Tab")  # takes the suggestion
    page.keyboard.type(" < 0.5")
    page.fill(".rule-form input", "decent")
    page.keyboard.press("Enter")
    page.wait_for_selector(".rule[data-name=decent]")
    assert names(page) == ["large", "decent", "pretty"] and condition(page, "decent") == "open_nsfw < 0.5"
    page.keyboard.press("Enter")  # the focus is on its condition again
    page.fill(".rule-form textarea", "nonsense")
    page.keyboard.press("Escape")
    assert condition(page, "decent") == "open_nsfw < 0.5"
    grip, target = page.locator(".rule[data-name=pretty] .grip"), page.locator(".rule[data-name=large]")
    grip.hover()
    page.mouse.down()
    box = target.bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 4, steps=8)
    page.mouse.up()
    assert names(page) == ["pretty", "large", "decent"]
    page.locator(".rule[data-name=large] button[aria-label^=Remove]").click()
    assert names(page) == ["pretty", "decent"]
    page.click("#add-rule")
    page.keyboard.type("small")
    page.fill(".rule-form textarea", "original_width < 240")
    page.keyboard.press("Enter")
    page.wait_for_selector(".rule[data-name=small]")
    where = "aesthetic > 3.6 and open_nsfw < 0.5 and original_width < 240"
    assert kept(page) == kept_by_select(served, where)
    see(page, "bytes")
    plot = page.locator("[data-column=bytes] .plot").bounding_box()
    page.mouse.click(plot["x"] + 0.6 * plot["width"], plot["y"] + 40)
    page.locator("[data-column=bytes] .offer button", has_text="≤").click()
    made = condition(page, "bytes")
    assert kept(page) == kept_by_select(served, f"{where} and {made}")


def look_at_the_cut(page: Any) -> None:
    """What stands above the divider is below the cut, what stands under it is above; both are in sight."""
    cut = float(condition(page, "pretty").split(">")[1])
    until(page, "(cut) => Math.abs(document.querySelector('.divider b').textContent.split('>')[1] - cut) < 0.01", cut)
    sides = page.locator(".divider span").all_inner_texts()
    rejected, keeps = (int(re.sub(r"\D", "", side)) for side in sides)
    assert "rejected" in sides[0] and "kept" in sides[1] and keeps == kept(page)
    page.wait_for_selector(f".tile[aria-setsize='{rejected + keeps}']")
    page.wait_for_timeout(200)  # they are drawn in the next frame
    band = page.locator(".divider").bounding_box()["y"]
    tiles = page.locator(".tile").evaluate_all(
        "tiles => tiles.map((tile) => [tile.getBoundingClientRect().top, "
        "parseFloat(tile.querySelector('.tile-value').textContent)])"
    )
    assert {top > band for top, _ in tiles} == {True, False}, tiles
    assert all((value > cut - 0.01) if top > band else (value < cut + 0.01) for top, value in tiles)


def test_around_a_cut_both_sides_are_seen_and_the_cut_stays_in_the_middle(opened: Open) -> None:
    page = opened(rules=[*RULES[:2], ["pretty", "aesthetic > 4.1", 1]], width=1200, height=700)
    see(page, "aesthetic")
    page.locator(".rule[data-name=pretty] .count").first.click()
    until(page, "document.querySelector('#show [aria-pressed=true]').dataset.show === 'rejected'")
    page.keyboard.press("4")
    page.wait_for_selector(".divider")
    assert page.locator("#of-rule").input_value() == "pretty" and page.locator("#sort").input_value() == "aesthetic"
    look_at_the_cut(page)
    drag(page, page.locator(".cut[data-rule=pretty]"), 30)
    look_at_the_cut(page)
    link = page.locator("#rate").get_attribute("href")  # what is here can be rated
    assert link.startswith("/rate#how=around&column=aesthetic&value=")
    page.locator("#grid .grid").evaluate("node => { node.scrollTop = 0; }")
    page.wait_for_timeout(500)
    page.locator(
        ".column"
    ).last.scroll_into_view_if_needed()  # its histogram is fetched; the images stay where they are
    page.wait_for_timeout(1000)
    assert page.locator("#grid .grid").evaluate("node => node.scrollTop") == 0
    page.locator(".rule[data-name=pretty] input[role=switch]").click()  # no rule, no cut
    until(page, "document.querySelector('#show [aria-pressed=true]').dataset.show === 'kept'")
    until(page, "document.querySelector('#rate').hidden")


def test_a_broken_link_is_said_and_images_are_shown(opened: Open) -> None:
    page = opened(rules=[["wrong", "no_such_column > 1", 1], ["fine", "aesthetic > 3.6", 1]], wait=False)
    page.locator(".rule[data-name=wrong] .error", has_text="no_such_column").wait_for()
    page.locator(".rule[data-name=wrong] input[role=switch]").click()
    page.wait_for_selector(".tile.is-there")
    page.evaluate("location.hash = location.hash + '&sort=another'")
    page.locator("#notice", has_text="another").wait_for()
    until(page, "document.querySelector('#sort').value === 'key'")
    page.wait_for_selector(".tile.is-there")


def test_the_address_keeps_rules_and_view(opened: Open) -> None:
    page = opened()
    page.locator(".rule[data-name=pretty] input[role=switch]").click()
    page.click("#show [data-show=all]")
    page.select_option("#sort", "aesthetic")
    page.click("#direction")
    until(page, "location.hash.includes('descending=true')")
    page.wait_for_timeout(200)
    until(page, "!document.querySelector('#grid .grid').hasAttribute('aria-busy')")
    first = page.wait_for_selector(".tile.is-there[aria-posinset='1']").get_attribute("title")
    link = page.url
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.url == link
    assert page.locator("#sort").input_value() == "aesthetic"
    assert page.locator(".rule[data-name=pretty]").get_attribute("class") == "rule is-off"
    until(page, "(first) => document.querySelector('.tile[aria-posinset=\"1\"]')?.title === first", first)
    for _ in range(4):
        page.go_back()
    until(page, "document.querySelector('#show [aria-pressed=true]').dataset.show === 'kept'")
    assert page.locator(".rule[data-name=pretty]").get_attribute("class") == "rule"
    page.go_forward()
    page.wait_for_selector(".rule[data-name=pretty].is-off")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1600])
def test_nothing_overflows_and_the_panel_opens(opened: Open, width: int, scheme: str) -> None:
    page = opened(width=width, height=844, scheme=scheme, show="around", rule="pretty", sort="aesthetic")
    page.wait_for_selector(".divider")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in (".bar", "#funnel", ".place", ".divider", "#grid"):
        for box in page.locator(selector).evaluate_all("all => all.map((e) => e.getBoundingClientRect().right)"):
            assert box <= width, selector
    assert page.locator("#grid").bounding_box()["height"] > 400  # the images are the largest thing
    if width == 390:
        assert not page.locator("#panel").is_visible()
        page.click("#open-panel")
        see(page, "aesthetic")
        panel = page.locator("#panel")
        assert panel.evaluate("panel => panel.scrollWidth <= panel.clientWidth")
        drag(page, page.locator(".cut[data-rule=pretty]"), 30)
        assert condition(page, "pretty") != "aesthetic > 3.6"
        page.keyboard.press("Escape")
        assert not panel.is_visible()


def test_a_server_that_is_away_is_said_and_found_again(opened: Open) -> None:
    page = opened()
    before = kept(page)
    page.context.set_offline(True)
    page.locator(".rule[data-name=large] input[role=switch]").click()
    page.locator("#notice", has_text="can’t be reached").wait_for()
    page.context.set_offline(False)
    page.locator("#notice").wait_for(state="hidden")
    assert kept(page) >= before


def test_data_that_changed_is_said_and_shown_when_asked_for(browser: Any, real_data: Data, tmp_path: Path) -> None:
    data = Data(shutil.copytree(str(real_data), tmp_path / "data"))
    with serving_data(data) as served:
        page = browser.new_context(viewport={"width": 1600, "height": 1000}).new_page()
        page.goto(served.url)
        page.wait_for_selector(".tile.is-there")
        see(page, "open_nsfw")
        shutil.rmtree(tmp_path / "data" / "annotated" / "open_nsfw")
        until(
            page,
            "() => { window.dispatchEvent(new Event('focus')); return !!document.querySelector('#notice button'); }",
        )
        assert page.locator("[data-column=open_nsfw]").count() == 1  # not under one's hands
        page.click("#notice button")
        page.wait_for_selector("[data-column=open_nsfw]", state="detached")
        page.wait_for_selector(".tile.is-there")
        assert not page.locator("#notice").is_visible()
        page.context.close()


@pytest.mark.parametrize(
    ("condition", "cut", "found"),
    [
        ("aesthetic > 5", ("aesthetic", ">", 5), "aesthetic > X"),
        ("a < 0.1 or a is null", ("a", "<", 0.1), "a < X or a is null"),
        ("a between -1 and 3 and b > 3", ("a", "<=", 3), "a between -1 and X and b > 3"),
        ("a between -1 and 3", ("a", ">=", -1), "a between X and 3"),
        ("not (a < 4)", ("a", ">=", 4), "not (a < X)"),
        ('3 <= source."W"', ("source.W", ">=", 3), 'X <= source."W"'),
        ("a > 3 and a < 3", ("a", ">", 3), "a > X and a < 3"),
        ("c <> 'a > 3' and a > 3 -- a > 3", ("a", ">", 3), "c <> 'a > 3' and a > X -- a > 3"),
        ("a > 3 and a > 3", ("a", ">", 3), None),  # which of them?
        ("a > 3 * 2", ("a", ">", 3), None),
        ("a + b > 3", ("b", ">", 3), None),
        ("a > 3 and 'unfinished", ("a", ">", 3), None),
    ],
)
def test_the_constant_of_a_cut_is_found_or_left_alone(
    opened: Open, condition: str, cut: tuple[str, str, float], found: str | None
) -> None:
    page = opened(rules=[], wait=False)
    column, sign, value = cut
    answer = page.evaluate(
        """async ([condition, cut]) => {
            const { findCut, replaceAt } = await import("/sql.js");
            const where = findCut(condition, cut);
            return where && replaceAt(condition, where, "X");
        }""",
        [condition, {"column": column, "sign": sign, "value": value}],
    )
    assert answer == found


def test_of_ten_million_images_only_what_is_seen_is_asked_for(opened: Open, served: ServedData) -> None:
    with served.client() as client:
        keys = [row["key"] for row in client.get("/api/rows?limit=36").json()["rows"]]
    page = opened(rules=[], show="all")
    asked: list[tuple[int, int]] = []
    thumbnails: list[str] = []

    def answer(route: Any) -> None:
        found = re.search(r"offset=(\d+)&limit=(\d+)", route.request.url)
        assert found is not None
        offset, limit = int(found[1]), int(found[2])
        asked.append((offset, limit))
        rows = [
            {
                "key": keys[i % 36],
                "width": 96,
                "height": 64,
                "caption": f"image {i}",
                "value": i,
                "verdict": None,
                "blurred": False,
            }
            for i in range(offset, min(offset + limit, MANY))
        ]
        route.fulfill(json={"total": MANY, "offset": offset, "rows": rows})

    page.route("**/api/rows?*", answer)
    page.on("request", lambda r: thumbnails.append(r.url) if "/api/thumbnails/" in r.url else None)
    page.select_option("#sort", "aesthetic")
    page.wait_for_selector(f".tile[aria-setsize='{MANY}']")
    assert sum(limit for _, limit in asked) <= 400
    scroller = page.locator("#grid .grid")
    box = scroller.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    for _ in range(10):
        page.mouse.wheel(0, 300)
        page.wait_for_timeout(30)
    page.wait_for_timeout(300)
    place = page.evaluate("import('/store.js').then(({ state }) => state.place)")
    assert 30 < place < 200  # steps of the wheel are steps of pixels, however long the list
    asked.clear()
    scroller.evaluate(
        "node => { for (let i = 1; i <= 50; i++) "
        "setTimeout(() => { node.scrollTop = node.scrollHeight * i / 100; }, 10 * i) }"
    )
    page.wait_for_timeout(1200)
    middle = page.evaluate("import('/store.js').then(({ state }) => state.place)")
    assert abs(middle - MANY / 2) < MANY / 50
    page.wait_for_selector(f".tile.is-there[aria-posinset='{middle + 1}']")
    assert sum(limit for _, limit in asked) <= 2000, asked  # not those that were passed over
    assert page.locator(".tile").count() < 120
    scroller.focus()
    page.keyboard.press("End")
    page.wait_for_selector(f".tile.is-there[aria-posinset='{MANY}']")
    last = page.locator(f".tile[aria-posinset='{MANY}']")
    assert last.get_attribute("title") == f"image {MANY - 1}"
    assert last.bounding_box()["y"] + 100 < box["y"] + box["height"]
    page.keyboard.press("Home")
    page.wait_for_selector(".tile.is-there[aria-posinset='1']")
    page.fill("#place", "1234567")
    page.wait_for_selector(".tile.is-there[aria-posinset='1234568']")
    assert len(thumbnails) < 1000
