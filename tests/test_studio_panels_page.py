"""The panels of the Explore page in a real browser: one image and why, search, two selections side by side, saving."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aesthetic.files import atomic
from aesthetic.space import Space
from curate.encoders.embed import EmbedConfig
from curate.layout import Data
from curate.ledger.schema import Status
from curate.store.files import read_json
from tests.real_data import IMAGES, make_real_data
from tests.small_near import search as find_near_duplicates
from tests.small_serve import ServedData, serving_data
from tests.test_serve_page import browser as browser  # a fixture
from tests.tiny_clip import add_architectures

pytestmark = pytest.mark.long

Open = Callable[..., Any]
HOSTILE = {
    0: "<img src=x onerror=\"document.title='hit'\">",
    2: "<script>document.title='hit'</script>",
    3: "\u202egpj.exe right to left \u202c\u2066 \u0000x",
    4: "word " * 10_000,
}
"""Number of an image -> its caption."""
UNSAFE = 6
"""Number of the image that is blurred."""
AWAY = ("status of 404", "status of 422", "status of 503", "ERR_CONNECTION")


def number_of(row: dict[str, Any]) -> int:
    """The number that an image had when the list was made."""
    return int(row["WIDTH"]) - 200


def write_unsafe(data: Data) -> None:
    """A column that says of one image that it is unsafe."""
    for shard in data.plan.shards:
        table = pq.read_table(data.table(shard.shard))
        rows = [row for row in table.to_pylist() if row["status"] == Status.SUCCESS.value]
        values = [0.9 if number_of(row) == UNSAFE else 0.1 for row in rows]
        path = data.annotations("nsfw", shard.shard)
        with atomic(path) as f:
            pq.write_table(pa.table({"key": [row["key"] for row in rows], "nsfw": pa.array(values, pa.float32())}), f)
        record = read_json(data.fetched_record(shard.shard))
        inputs = {name: fact["sha256"] for name, fact in record["outputs"].items()}
        facts = {"annotator": "nsfw", "columns": {"nsfw": {"unsafe": True}}}
        data.commit(path.with_suffix(".json"), config="c", inputs=inputs, outputs=[path], facts=facts)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """36 images with vectors, near-duplicates, one unsafe image and captions that would be markup."""
    data = make_real_data(tmp_path_factory.mktemp("panels"), HOSTILE)
    find_near_duplicates(data, cosine=0.9)
    write_unsafe(data)
    return data


@pytest.fixture(scope="module")
def keys(made: Data) -> dict[int, str]:
    """Number of an image -> its key."""
    tables = [pq.read_table(made.table(s.shard)).to_pylist() for s in made.plan.shards]
    rows = [row for table in tables for row in table if row["status"] == Status.SUCCESS.value]
    return {number_of(row): row["key"] for row in rows}


@pytest.fixture
def data(made: Data, tmp_path: Path) -> Data:
    return Data(shutil.copytree(str(made), tmp_path / "data"))


@pytest.fixture
def served(data: Data) -> Iterator[ServedData]:
    with serving_data(data, stored=IMAGES) as served:
        yield served


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens the page in a browser of its own; what its console complains of fails the test."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def open_page(url: str, rest: str = "#show=all", width: int = 1600, height: int = 1000, **more: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **more)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.goto(url + "/" + rest)
        page.wait_for_selector("#grid .tile.is-there", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [w for w in wrong if not any(words in w for words in AWAY)], wrong


def open_image(page: Any, n: int = 0) -> None:
    """Open an image of the grid by the keyboard."""
    page.keyboard.press("g")
    page.keyboard.press("Home")
    for _ in range(n):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    is_shown(page)


def is_shown(page: Any) -> None:
    """Wait until the dialog has the image and all that is known of it."""
    page.wait_for_selector(".why[open] .why-panel:not([aria-busy]) .why-columns")
    page.wait_for_function("() => document.querySelector('.why-main img').naturalWidth > 0")


def key_shown(page: Any) -> str:
    return str(page.locator(".why-head h2").inner_text())


def grid_keys(page: Any, selector: str = "#grid") -> list[str]:
    """Keys of the images that are in sight, in their order."""
    script = """(selector) => [...document.querySelectorAll(selector + ' .tile')]
        .sort((a, b) => a.ariaPosInSet - b.ariaPosInSet)
        .map((tile) => tile.querySelector('img').src.match(/thumbnails\\/(\\d+)/)?.[1]).filter(Boolean)"""
    return list(page.evaluate(script, selector))


def rows_of(served: ServedData, **asked: Any) -> list[str]:
    """Keys of the rows that the server answers."""
    with served.client() as client:
        answer = client.get("/api/rows", params={"limit": 200, **asked}).json()
    return [row["key"] for row in answer["rows"]]


def fits(page: Any, width: int) -> bool:
    """Whether nothing is wider than the window."""
    return bool(page.evaluate("document.scrollingElement.scrollWidth") <= width)


# ------------------------------------------------------------------------------------------------------- one image


def test_why_an_image_by_the_keyboard_alone(served: ServedData, opened: Open) -> None:
    page = opened(served.url)
    order = grid_keys(page)
    open_image(page)
    assert key_shown(page) == order[0]
    assert page.locator(".why-where").inner_text() == "1 of 36"
    for key in order[1:4]:
        page.keyboard.press("ArrowRight")
        page.locator(".why-head h2", has_text=key).wait_for()
    page.keyboard.press("ArrowLeft")
    page.locator(".why-head h2", has_text=order[2]).wait_for()
    is_shown(page)
    with served.client() as client:
        why = client.get(f"/api/why/{order[2]}").json()
    text = page.locator(".why-body").inner_text()
    for column in why["columns"]:
        assert column["name"] in text, column
    link = page.locator(".why-facts a").first
    assert link.get_attribute("href") == why["url"] and link.get_attribute("target") == "_blank"
    assert "noreferrer" in link.get_attribute("rel")
    assert f"image={order[2]}" in page.url
    page.keyboard.press("Escape")
    page.wait_for_selector(".why:not([open])", state="attached")
    assert "image=" not in page.url
    assert page.evaluate("document.activeElement.getAttribute('role')") == "listbox"
    page.keyboard.press("Enter")  # the grid went along
    is_shown(page)
    assert key_shown(page) == order[2]


def test_the_verdict_rule_by_rule(served: ServedData, opened: Open) -> None:
    rules = [("<b>wide</b>", "width > 90", 1), ("fair", "aesthetic > 6.9", 1), ("none", "dup_nearest > 0", 1)]
    page = opened(served.url, f"#show=all&rules={json.dumps(rules)}")
    open_image(page)
    lines = page.locator(".why-verdict li")
    assert lines.count() == 3
    assert lines.first.locator(".name").inner_text() == "<b>wide</b>"
    assert lines.nth(1).locator(".why-mark").get_attribute("aria-label") == "not true"
    assert re.search(r"aesthetic\s+[\d.]+", lines.nth(1).inner_text())
    assert page.locator(".why-verdict > p").inner_text().startswith("Rejected by")
    marks = lines.nth(2).locator(".why-mark").get_attribute("aria-label")
    assert marks in ("no value", "true", "not true")


@pytest.mark.parametrize("number", HOSTILE)
def test_captions_are_text(served: ServedData, opened: Open, keys: dict[int, str], number: int) -> None:
    page = opened(served.url, f"#show=all&image={keys[number]}")
    is_shown(page)
    shown = page.locator(".why-captions .text").inner_text()
    assert HOSTILE[number].replace("\0", "\ufffd")[:20].strip() in shown.replace("\0", "\ufffd") or number == 3
    assert page.locator(".why-captions img, .why-captions script").count() == 0
    assert page.title() != "hit"
    if number == 4:
        assert len(shown) <= 700
        page.locator(".why-captions button").click()
        assert len(page.locator(".why-captions .text").inner_text()) > 15_000
    box = page.locator(".why-panel").bounding_box()
    assert box["x"] + box["width"] <= 1600


def test_a_hundred_per_cent_and_what_is_blurred(served: ServedData, opened: Open, keys: dict[int, str]) -> None:
    page = opened(served.url)
    open_image(page)
    fitted = page.locator(".why-main img").bounding_box()
    page.keyboard.press("z")
    natural = page.evaluate("document.querySelector('.why-main img').naturalWidth")
    assert page.locator(".why-main img").bounding_box()["width"] == natural
    assert page.locator(".why-scale").inner_text() == "100 %"
    page.locator(".why-main img").click()
    assert page.locator(".why-main img").bounding_box() == fitted
    page.goto("about:blank")
    page.goto(f"{served.url}/#show=all&image={keys[UNSAFE]}")
    is_shown(page)
    page.locator(".why-blurred").wait_for()
    assert "reveal" not in page.locator(".why-main img").get_attribute("src")
    page.keyboard.press("r")
    page.wait_for_function("() => document.querySelector('.why-main img').src.includes('reveal=true')")
    assert page.locator(".why-blurred").count() == 0


def test_an_image_larger_than_the_window_is_moved(served: ServedData, opened: Open) -> None:
    page = opened(served.url, width=1000, height=240)  # images have 96 pixels in height at least
    open_image(page)
    page.set_viewport_size({"width": 1000, "height": 80})
    page.keyboard.press("z")
    top = "() => document.querySelector('.why-stage').scrollTop"
    page.evaluate("document.querySelector('.why-stage').scrollTop = 0")
    page.mouse.move(200, 70)
    page.mouse.down()
    page.mouse.move(200, 60, steps=3)
    page.mouse.up()
    assert page.evaluate(top) == 10
    assert page.locator(".why-scale").inner_text() == "100 %"  # what was dragged was not clicked


def test_a_server_that_is_started_anew(data: Data, opened: Open) -> None:
    with serving_data(data) as served:
        page = opened(served.url)
        open_image(page)
    port = int(served.url.rsplit(":", 1)[1])
    with serving_data(data, port=port):
        page.keyboard.press("ArrowRight")
        is_shown(page)
        page.locator(".why-where", has_text="2 of 36").wait_for()
        page.keyboard.press("f")
        is_ordered(page)


def test_near_duplicates_side_by_side(served: ServedData, opened: Open, keys: dict[int, str], made: Data) -> None:
    groups = pa.concat_tables([pq.read_table(made.annotations("dup", s.shard)) for s in made.plan.shards]).to_pylist()
    one = next(row for row in groups if row["dup"] is not None)
    members = {row["key"] for row in groups if row["dup"] == one["dup"]}
    page = opened(served.url, f"#show=all&image={one['key']}")
    is_shown(page)
    cards = page.locator(".why-similar .why-cards").first.locator(".thumb")
    cards.first.wait_for()
    assert {cards.nth(i).get_attribute("data-key") for i in range(cards.count())} == members
    assert page.locator(".why-similar", has_text="keeper").count() == 1
    other = page.locator(".why-similar .thumb:not(:disabled)").first
    key = other.get_attribute("data-key")
    other.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.why-other img').naturalWidth > 0")
    assert page.locator(".why-other").is_visible() and key in page.locator(".why-other .why-label").inner_text()
    left, right = (page.locator(f".why-{side} img").bounding_box() for side in ("main", "other"))
    assert left["x"] + left["width"] <= right["x"]
    page.locator(".why-other button", has_text="Open").click()
    page.locator(".why-head h2", has_text=key).wait_for()
    page.keyboard.press("Backspace")
    page.locator(".why-head h2", has_text=one["key"]).wait_for()


def test_deny_and_undo(served: ServedData, data: Data, opened: Open) -> None:
    page = opened(served.url)
    open_image(page)
    page.keyboard.press("d")
    page.locator(".why-question").wait_for()
    page.keyboard.press("Escape")  # leaves the question alone
    assert not page.locator(".why-question").is_visible() and page.locator(".why[open]").count() == 1
    page.keyboard.press("d")
    page.keyboard.press("Enter")
    page.locator(".why-question", has_text="Written to").wait_for()
    assert "tastemaker" in page.locator(".why-question code").inner_text()
    page.locator(".why-denied", has_text="Denied").wait_for()
    with served.client() as client:
        assert client.get("/api/deny").json()["count"] == 1
        page.keyboard.press("Enter")  # Undo has the focus
        page.locator(".why-denied p").wait_for(state="detached")
        assert client.get("/api/deny").json()["count"] == 0


def test_a_link_to_an_image(served: ServedData, opened: Open, keys: dict[int, str]) -> None:
    page = opened(served.url, f"#show=all&image={keys[10]}")
    is_shown(page)
    assert key_shown(page) == keys[10]
    page.keyboard.press("Escape")
    open_image(page, 2)
    page.go_back()
    page.wait_for_selector(".why:not([open])", state="attached")
    page.go_forward()
    is_shown(page)


# ---------------------------------------------------------------------------------------------------------- search


def drop(page: Any, content: bytes) -> None:
    """Drop an image file onto the page."""
    transfer = page.evaluate_handle(
        """(text) => {
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped.jpg", { type: "image/jpeg" }));
            return transfer;
        }""",
        base64.b64encode(content).decode(),
    )
    page.dispatch_event("#grid", "drop", {"dataTransfer": transfer})


def is_ordered(page: Any) -> None:
    page.wait_for_function("() => location.hash.includes('sort=search')")
    page.locator(".search-says", has_text="By likeness").wait_for()
    page.wait_for_selector("#grid .grid:not([aria-busy])")


def test_similar_images_and_back(served: ServedData, opened: Open) -> None:
    page = opened(served.url, "#show=all&sort=aesthetic")
    before = grid_keys(page)
    open_image(page, 3)
    page.keyboard.press("f")
    is_ordered(page)
    assert page.locator(".search-token").count() == 1
    page.wait_for_function(f"() => document.querySelector('#grid .tile img').src.includes('{before[3]}')")
    assert grid_keys(page)[0] == before[3]  # nothing is more like it than itself
    assert page.evaluate("document.activeElement.className") == "search-words"
    page.reload()
    is_ordered(page)
    assert grid_keys(page)[0] == before[3]
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    page.wait_for_function("() => !location.hash.includes('search')")
    assert page.locator(".search-token").count() == 0


def test_a_dropped_image_finds_itself(served: ServedData, opened: Open, keys: dict[int, str]) -> None:
    page = opened(served.url)
    with served.client() as client:
        content = client.get(f"/api/data/images/{keys[12]}").content
    drop(page, content)
    is_ordered(page)
    page.wait_for_function(f"() => document.querySelector('#grid .tile img').src.includes('{keys[12]}')")
    assert page.locator(".search-token").inner_text().startswith("dropped.jpg")
    page.locator(".search-token button").click()
    page.wait_for_function("() => !location.hash.includes('search')")


def test_words_and_without_others(served: ServedData, opened: Open) -> None:
    page = opened(served.url)
    page.keyboard.press("/")
    page.keyboard.type("a flower")
    page.keyboard.press("Enter")
    is_ordered(page)
    with served.client() as client:
        found = client.post("/api/search", json={"words": "a flower"}).json()
        unlike = client.post("/api/search", json={"words": "a flower", "without": "a temple"}).json()
    first = rows_of(served, sort=f"search:{found['id']}")
    assert grid_keys(page) == first[: len(grid_keys(page))]
    page.locator(".search-more").click()
    page.keyboard.type("a temple")
    page.keyboard.press("Enter")
    page.wait_for_function("() => location.hash.includes('temple')")
    is_ordered(page)
    assert grid_keys(page)[:8] == rows_of(served, sort=f"search:{unlike['id']}")[:8]


def test_words_that_cannot_be_read(data: Data, tmp_path: Path, opened: Open, keys: dict[int, str]) -> None:
    add_architectures(tmp_path)
    dataclasses.replace(Space.load(data.space), encoder="open_clip:toy/sha256-0123456789ab").save(data.space)
    with serving_data(data, embed=EmbedConfig(encoder=f"open_clip:toy/{tmp_path / 'gone.pt'}")) as served:
        with served.client() as client:
            deadline = time.monotonic() + 60
            while client.get("/api/data").json()["search"]["words"]:  # until the weights were looked for
                assert time.monotonic() < deadline
                time.sleep(0.1)
        page = opened(served.url)
        page.keyboard.press("/")
        page.keyboard.type("a red boat")
        page.keyboard.press("Enter")
        page.locator(".search-says.error", has_text="gone.pt").wait_for()
        page.fill(".search-words", keys[8])  # the number of an image is no word
        page.keyboard.press("Enter")
        is_ordered(page)
        assert grid_keys(page)[0] == keys[8]


# --------------------------------------------------------------------------------------------------------- compare


def test_what_comes_and_goes(served: ServedData, opened: Open) -> None:
    page = opened(served.url, '#show=all&rules=[["fair","aesthetic > 4.3",1]]')
    page.locator("#compare > button").click()
    page.locator(".compare-menu > button").click()
    page.locator(".compare-part.both").wait_for()
    page.evaluate(
        "import('/store.js').then((s) => s.setRules([{ name: 'fair', condition: 'aesthetic < 4.5', on: true }]))"
    )
    page.wait_for_function("() => document.querySelector('.compare-part.only b')?.textContent !== '0'")
    with served.client() as client:
        ids = [
            client.post("/api/selections", json={"rules": [{"name": "fair", "condition": c, "on": True}]}).json()["id"]
            for c in ("aesthetic < 4.5", "aesthetic > 4.3")
        ]
        counts = client.post("/api/compare", json={"a": ids[0], "b": ids[1]}).json()
    page.wait_for_function(f"() => document.querySelector('.compare-part.only b').textContent === '{counts['only_a']}'")
    for side, name in (("other", "only_b"), ("both", "both"), ("only", "only_a")):
        assert page.locator(f".compare-part.{side} b").inner_text() == str(counts[name])
    for side in ("other", "only"):
        page.wait_for_selector(f".compare-pane.{side} .tile.is-there")
        wanted = rows_of(served, selection=ids[0], other=ids[1], show=side)
        seen = grid_keys(page, f".compare-pane.{side}")
        assert seen == wanted[: len(seen)] and seen
    page.locator(".compare-pane.only .tile").first.click()
    is_shown(page)
    page.keyboard.press("Escape")
    page.locator(".compare-part.both").click()
    page.wait_for_selector(".compare-pane.both .tile.is-there")
    page.reload()  # the address has it
    page.locator(".compare-part.both b").wait_for()
    page.get_by_label("Stop comparing").click()
    page.wait_for_selector("#grid .tile.is-there")


# ------------------------------------------------------------------------------------------------------------ save


def save_panel(page: Any) -> Any:
    page.locator(".save-open").click()
    page.locator(".save-way code").first.wait_for()
    return page.locator(".save")


def test_save_pack_and_sheet(served: ServedData, data: Data, opened: Open) -> None:
    page = opened(served.url, '#show=kept&rules=[["fair","aesthetic > 4.3",1],["off","false",0]]')
    panel = save_panel(page)
    page.fill("#save-name", "taste")
    page.wait_for_function("() => document.querySelector('.save-way code').textContent.includes('--name taste')")
    command = panel.locator(".save-way code").first.inner_text()
    assert command.startswith("tastemaker select ") and "aesthetic > 4.3" in command
    panel.locator(".save-recipe summary").click()
    assert "aesthetic > 4.3" in panel.locator(".save-yaml").inner_text()
    panel.get_by_role("button", name="Save", exact=True).click()
    panel.locator(".job.done").wait_for(timeout=60_000)
    assert panel.locator(".job code").first.inner_text() == command
    kept = pq.read_table(data.verdicts("taste"), columns=["verdict"]).column(0).to_pylist().count("kept")
    with served.client() as client:
        live = client.post(
            "/api/selections", json={"rules": [{"name": "fair", "condition": "aesthetic > 4.3", "on": True}]}
        ).json()
        assert kept == live["kept"] > 0
    panel.locator("p", has_text="saved just so already").wait_for()
    panel.get_by_role("button", name="Draw", exact=True).click()
    page.wait_for_function("() => document.querySelectorAll('.job.done').length === 2", timeout=120_000)
    page.wait_for_function("() => document.querySelector('.job img')?.naturalWidth > 0")
    assert data.sheet("taste").exists()
    panel.get_by_role("button", name="Pack", exact=True).click()
    page.wait_for_function("() => document.querySelectorAll('.job.done').length === 3", timeout=120_000)
    assert "taste" in data.packs()
    page.reload()
    save_panel(page).locator(".job.done").nth(2).wait_for()


def test_what_waits_is_cancelled(served: ServedData, opened: Open) -> None:
    page = opened(served.url)
    with served.client() as client:
        for name in ("one", "two", "three"):
            client.post("/api/commands", json={"action": "select", "name": name, "rules": []})
        panel = save_panel(page)
        job = panel.locator(".job", has_text="--name three")
        job.get_by_role("button", name="Cancel").click()
        job.locator(".job-state", has_text="Cancelled").wait_for()
        page.wait_for_function("() => document.querySelectorAll('.job.done').length === 2", timeout=60_000)
        assert {s["name"] for s in client.get("/api/data").json()["selections"]} == {"bundled", "one", "two"}


def test_a_wrong_rule_is_not_saved(served: ServedData, opened: Open) -> None:
    page = opened(served.url, '#show=all&rules=[["fair","aesthetic > 4.3",1]]')
    page.evaluate("import('/store.js').then((s) => s.setRules([{ name: 'fair', condition: 'no_such > 1', on: true }]))")
    page.locator(".save-open").click()
    page.locator(".save .error", has_text="no_such").wait_for()
    assert page.locator(".save-way button").first.is_disabled()


def test_read_only_shows_commands_and_runs_none(data: Data, opened: Open) -> None:
    with serving_data(data, read_only=True) as served:
        page = opened(served.url, '#show=all&rules=[["fair","aesthetic > 4.3",1]]')
        page.get_by_role("button", name="Recipe", exact=True).click()
        page.locator(".save .command code", has_text="tastemaker select").wait_for()
        assert "aesthetic > 4.3" in page.locator(".save-yaml").inner_text()
        assert page.locator(".save-way").count() == 0
        page.keyboard.press("Escape")
        open_image(page)
        assert page.locator(".why-actions", has_text="Deny").count() == 0
        page.keyboard.press("d")
        assert not page.locator(".why-question").is_visible()


# ------------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(served: ServedData, opened: Open, scheme: str) -> None:
    page = opened(served.url, width=390, height=844, color_scheme=scheme, has_touch=True)
    page.locator("#grid .tile").first.click()
    is_shown(page)
    image, panel = (page.locator(name).bounding_box() for name in (".why-frame", ".why-panel"))
    assert panel["y"] >= image["y"] + image["height"] - 1 and fits(page, 390)
    assert page.evaluate("document.querySelector('.why').scrollWidth") <= 390
    page.locator(".why-close").click()
    page.locator(".save-open").click()
    page.locator(".save-way code").first.wait_for()
    box = page.locator(".save").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and fits(page, 390)
    page.keyboard.press("Escape")
    page.locator("#compare > button").click()
    page.locator(".compare-menu > button").click()
    page.locator(".compare-part.both b").wait_for()
    assert fits(page, 390)


def test_a_pasted_image_and_the_order_it_had(served: ServedData, opened: Open) -> None:
    page = opened(served.url, "#show=all&sort=aesthetic&descending=true")
    page.evaluate(
        """async () => {
            const canvas = Object.assign(document.createElement("canvas"), { width: 64, height: 64 });
            canvas.getContext("2d").fillRect(0, 0, 40, 64);
            const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
            const transfer = new DataTransfer();
            transfer.items.add(new File([blob], "pasted.png", { type: "image/png" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer }));
        }"""
    )
    is_ordered(page)
    page.get_by_label("Clear the search").click()
    page.wait_for_function(
        "() => location.hash.includes('sort=aesthetic') && location.hash.includes('descending=true')"
    )
