"""The page to rate in a real browser: keys, what is saved, and what is not lost."""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from curate.layout import Data
from tests.small_data import make_data, write_column
from tests.small_serve import ServedData, serving_data
from tests.test_serve_page import browser as browser  # a fixture

pytestmark = pytest.mark.long

Open = Callable[..., Any]
AWAY = ("ERR_CONNECTION", "status of 404", "status of 422", "status of 503")


@pytest.fixture
def data(real_data: Data, tmp_path: Path) -> Data:
    """A data folder of one's own: 36 images, with vectors."""
    return Data(shutil.copytree(str(real_data), tmp_path / "data"))


@pytest.fixture
def served(data: Data) -> Iterator[ServedData]:
    with serving_data(data) as served:
        yield served


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a browser of its own each time; what its console complains of fails the test."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def open_page(url: str, width: int = 1600, height: int = 900, **more: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **more)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.goto(f"{url}/rate")
        page.wait_for_selector("body[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [w for w in wrong if not any(words in w for words in AWAY)]


def start(page: Any, rater: str = "Ada", kind: str = "scores", name: str = "taste", **more: str) -> Any:
    """Fill in the form as a person does, and wait for the first image."""
    page.fill("#rater", rater)
    card = page.locator(f"#sets input[value={name}]")
    if card.count():
        card.check(force=True)
    else:
        if page.locator("#sets").is_visible():
            page.locator("#sets input").last.check(force=True)
        page.locator(f"#kinds input[value={kind}]").check(force=True)
        page.fill("#name", name)
        if concept := more.get("concept"):
            page.fill("#concept", concept)
    page.click("#start")
    return shown(page)


def shown(page: Any) -> tuple[str, ...]:
    """The keys of the image or images on the stage, once they are there."""
    page.wait_for_selector("#images:has(.photo):not(:has(.photo:not(.seen)))")
    return tuple(page.evaluate("[...document.querySelectorAll('.photo')].map((f) => f.dataset.key)"))


def press(page: Any, key: str) -> tuple[str, ...]:
    """Press a key at the image that is shown; what that was."""
    keys = shown(page)
    page.keyboard.press(key)
    return keys


def all_saved(page: Any) -> None:
    page.wait_for_selector("#status[data-waiting='0']")


def ratings(data: Data, name: str = "taste") -> list[dict[str, str]]:
    with Path(data.ratings(name)).open(newline="") as f:
        return list(csv.DictReader(f))


def scores(data: Data, rater: str = "Ada") -> dict[str, float]:
    return {row["image"]: float(row["score"]) for row in ratings(data) if row["rater"] == rater}


def test_thirty_images_by_keys_alone_with_undo_and_skip(opened: Open, served: ServedData, data: Data) -> None:
    page = opened(served.url)
    page.keyboard.type("Ada")  # the name has the focus; all else is chosen already
    page.keyboard.press("Enter")
    given: dict[str, float] = {}
    skipped = press(page, "s")
    for i in range(29):
        (key,) = press(page, str(1 + i % 7))
        assert key not in given and key != skipped[0]
        given[key] = 1 + i % 7
    before = page.evaluate("performance.now()")
    now = shown(page)
    page.keyboard.press("u")  # the last one again, and the one before it
    page.keyboard.press("Backspace")
    again = list(given)[-2:]
    assert shown(page) == (again[0],)
    given[press(page, "7")[0]] = 7
    assert shown(page) == (again[1],)
    given[press(page, "1")[0]] = 1
    assert shown(page) == now and page.evaluate("performance.now()") > before
    given[press(page, "4")[0]] = 4
    all_saved(page)
    assert len(given) == 30 and scores(data) == given
    page.keyboard.press("Escape")
    page.locator("#sets .card", has_text="30 ratings by Ada").wait_for()


def test_a_key_shows_the_next_image_at_once(opened: Open, served: ServedData) -> None:
    page = opened(served.url)
    start(page)
    page.wait_for_timeout(1500)  # the next ones are loaded
    page.evaluate(
        """() => {
            window.took = [];
            document.addEventListener("keydown", () => {
                const from = performance.now();
                requestAnimationFrame(() => requestAnimationFrame(() => window.took.push(performance.now() - from)));
            }, { capture: true });
        }"""
    )
    for key in "34":
        before = shown(page)
        page.keyboard.press(key)
        assert page.evaluate("document.querySelector('.photo.seen')?.dataset.key ?? ''") not in ("", before[0])
        page.wait_for_timeout(300)
    assert min(page.evaluate("window.took")) < 50  # milliseconds, on a machine that others use too


def test_a_reload_in_the_middle_asks_nothing_twice_and_loses_nothing(
    opened: Open, served: ServedData, data: Data
) -> None:
    page = opened(served.url)
    start(page)
    given: dict[str, float] = {}
    for part in range(3):
        for _ in range(5):
            (key,) = press(page, str(1 + part))
            assert key not in given
            given[key] = 1 + part
        all_saved(page)
        page.reload()
        shown(page)
    assert scores(data) == given
    assert shown(page)[0] not in given
    page.keyboard.press("u")  # of before the reload: the server knows the last one
    last = list(given)[-1]
    page.wait_for_selector(f".photo.seen[data-key='{last}']")
    press(page, "7")
    all_saved(page)
    assert scores(data) == given | {last: 7}


def test_answers_wait_for_a_server_that_is_away(opened: Open, data: Data) -> None:
    given: dict[str, float] = {}
    with serving_data(data) as served:
        url = served.url
        page = opened(url)
        start(page)
        given[press(page, "2")[0]] = 2
        all_saved(page)
        page.wait_for_timeout(1000)  # the next images are loaded
    for _ in range(3):
        given[press(page, "6")[0]] = 6
    page.locator("#trouble", has_text="sent again").wait_for()
    assert "3 not saved" in page.locator("#status").inner_text()
    asked: list[str] = []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    page.close(run_before_unload=True)
    page.wait_for_timeout(300)
    assert asked == ["beforeunload"] and not page.is_closed()
    assert len(scores(data)) == 1
    with serving_data(data, port=int(url.rpartition(":")[2])):
        all_saved(page)
        assert scores(data) == given
        assert page.locator("#trouble").is_hidden()
        shown(page)


def test_two_people_and_one_twice(opened: Open, served: ServedData, data: Data) -> None:
    ada, ben = opened(served.url), opened(served.url)
    start(ada, "Ada")
    ben.reload()
    ben.wait_for_selector("body[data-ready]")
    start(ben, "Ben")
    other = opened(served.url)
    start(other, "Ada")
    for i in range(8):
        for page in (ada, ben, other):
            press(page, str(1 + i % 7))
    for page in (ada, ben, other):
        all_saved(page)
    rated = [(row["image"], row["rater"]) for row in ratings(data)]
    assert len(rated) == len(set(rated))
    assert sum(rater == "Ben" for _, rater in rated) == 8 and sum(rater == "Ada" for _, rater in rated) >= 8
    ben.keyboard.press("Escape")
    ben.locator("#sets .card", has_text="by 2 people").wait_for()


def test_pairs_with_ties(opened: Open, served: ServedData, data: Data) -> None:
    page = opened(served.url)
    keys = [start(page, kind="pairs", name="which")]
    assert len(keys[0]) == 2
    press(page, "ArrowLeft")
    keys.append(press(page, "ArrowDown"))
    keys.append(shown(page))
    page.locator(".photo").nth(1).click()
    keys.append(press(page, "t"))
    all_saved(page)
    assert [(r["image_a"], r["image_b"]) for r in ratings(data, "which")] == keys
    assert [r["choice"] for r in ratings(data, "which")] == ["a", "tie", "b", "tie"]
    page.keyboard.press("u")
    assert shown(page) == keys[-1]
    all_saved(page)
    assert len(ratings(data, "which")) == 3


def test_yes_and_no(opened: Open, served: ServedData, data: Data) -> None:
    page = opened(served.url)
    start(page, kind="labels", name="boats", concept="a <b>boat</b>")
    assert page.locator("#question").inner_text() == "Does it show “a <b>boat</b>”?"  # text, not markup
    keys = [press(page, key)[0] for key in ("y", "n", "ArrowRight", "ArrowLeft")]
    all_saved(page)
    assert [(r["image"], r["label"]) for r in ratings(data, "boats")] == list(zip(keys, ["yes", "no"] * 2, strict=True))


def test_images_around_a_cut_and_out_of_a_selection(opened: Open, served: ServedData, data: Data) -> None:
    with served.client() as client:
        deadline = time.monotonic() + 30
        while (about := client.get("/api/data").json())["index"]["state"] != "ready":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (selection,) = about["selections"]
        order = client.post("/api/selections", json={"rules": [r | {"on": True} for r in selection["rules"]]}).json()
        query = {"selection": order["id"], "show": "kept", "sort": "aesthetic"}
        rows = client.get("/api/rows", params=query).json()["rows"]
    values = {row["key"]: row["value"] for row in rows}
    cut = sorted(values.values())[len(values) // 2]
    page = opened(served.url)
    page.locator("input[value=around]").check(force=True)
    page.select_option("#column", "aesthetic")
    page.fill("#value", str(cut))
    page.select_option("#selection", selection["name"])
    (first,) = start(page)
    assert values[first] in sorted(values.values(), key=lambda value: abs(value - cut))[:4]
    keys = {press(page, "3")[0] for _ in values}
    page.locator("#images", has_text="You have seen all").wait_for()
    assert keys == set(values)
    page.reload()
    page.locator("#images", has_text="You have seen all").wait_for()
    all_saved(page)
    assert scores(data) == dict.fromkeys(values, 3.0)


def test_what_is_unsafe_is_blurred_until_it_is_asked_for(opened: Open, tmp_path: Path) -> None:
    folder = Data(make_data(tmp_path / "data"))
    write_column(folder.root, "nsfw", pa.float32(), lambda number: 0.9, unsafe=True)
    with serving_data(folder) as served:
        page = opened(served.url)
        start(page)
        page.locator("figcaption", has_text="Blurred").wait_for()
        page.keyboard.press("r")
        page.wait_for_selector(".photo.seen img[src*='reveal=true']")
        assert page.locator("figcaption").count() == 0
        press(page, "3")
        page.locator("figcaption", has_text="Blurred").wait_for()  # the next one is, again
        all_saved(page)


@pytest.mark.parametrize("width", [390, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_narrow_and_wide_windows(
    opened: Open, served: ServedData, tmp_path: Path, width: int, scheme: str
) -> None:
    page = opened(served.url, width=width, height=844, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    unnamed = page.locator("input:visible, textarea:visible, select:visible").evaluate_all(
        "all => all.filter((e) => !e.labels.length).map((e) => e.id || e.name)"
    )
    assert unnamed == []
    start(page)
    for shows_panel in (True, False):
        page.evaluate(
            "(on) => document.querySelector('#panel-button').ariaPressed === String(on) || "
            "document.querySelector('#panel-button').click()",
            shows_panel,
        )
        page.locator("#panel").wait_for(state="visible" if shows_panel else "hidden")
        page.screenshot(path=tmp_path / "page.png")
        for name in ("#images", "#answers", "#undo", "#skip", "#leave", "#panel-button", "#status"):
            box = page.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, name
            assert box["y"] >= 0 and box["y"] + box["height"] <= 844, name
        for button in page.locator("#answers button").all():
            assert button.bounding_box()["width"] >= 40
    room = page.locator("#images").bounding_box()
    assert room["height"] > 0.7 * 844 and room["width"] >= 0.95 * width


def test_the_head_learns_beside_the_images_and_becomes_a_column(opened: Open, data: Data) -> None:
    with serving_data(data) as served:
        page = opened(served.url)
        start(page)
        few = page.locator("#panel p").last
        assert "more" in few.inner_text()
        for _ in range(35):
            press(page, str(1 + int(shown(page)[0]) % 7))
        all_saved(page)
        page.wait_for_selector("#panel[data-state='ready'][data-ratings='35']", timeout=60_000)
        assert page.locator("#panel svg").get_attribute("aria-label").startswith("Agreement with you: ")
        page.keyboard.press("h")
        assert page.locator("#panel").is_hidden()
        page.keyboard.press("h")
        page.click("text=Use it on all images")
        command = page.locator("#use pre").first.inner_text()
        assert command.splitlines()[0].startswith("tastemaker fit ") and "--scale 1 7" in command
        page.click("text=Score all images")
        page.locator("#use .button", has_text="See all images").wait_for(timeout=180_000)
    assert "taste" in data.annotated()
