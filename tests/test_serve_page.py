"""The page in a real browser: Chromium, without a window, driven by Playwright."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.small_serve import Served, serving, small_sampler
from train.generate.files import read_facts

pytestmark = pytest.mark.long

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `test`)")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    with serving(small_sampler(folder / "debug"), folder / "samples") as served:
        yield served


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """The page, open; whatever its console complains of fails the test."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    open_page(page, served)
    page.locator("#steps").fill("2")
    yield page
    context.close()
    for job in served.service.queue.jobs():  # a test that fails leaves none to the next
        served.service.queue.cancel(job)
    asked_for = ("status of 422", "status of 503")  # by tests
    assert not [w for w in wrong if not any(code in w for code in asked_for)]


def open_page(page: Any, served: Served) -> None:
    page.goto(served.url)
    page.wait_for_selector("body[data-ready]")


def newest(served: Served) -> dict[str, Any]:
    return read_facts(max(served.service.out.glob("*.png")))


def draw(page: Any, words: str) -> None:
    """Ask by the keyboard, and wait until it is generated and shown."""
    page.fill("#prompt", words)
    page.keyboard.press("Control+Enter")
    page.locator("#caption", has_text=words).wait_for()
    page.locator("#queue li").first.wait_for(state="detached")


def right_of(page: Any, name: str) -> float:
    box = page.locator(name).bounding_box()
    return float(box["x"] + box["width"])


def drop(page: Any, size: tuple[int, int], colour: str) -> None:
    """An image file is dropped onto the page."""
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    text = base64.b64encode(data.getvalue()).decode()
    transfer = page.evaluate_handle(
        """(text) => {
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            return transfer;
        }""",
        text,
    )
    page.dispatch_event("#well", "drop", {"dataTransfer": transfer})
    page.locator("#begin").wait_for()


def test_words_become_an_image_by_the_keyboard_alone(page: Any, served: Served) -> None:
    draw(page, "<b>a red disc</b>")
    assert page.locator("#caption").inner_text() == "<b>a red disc</b>"  # text, not markup
    assert newest(served)["prompt"] == "<b>a red disc</b>" and newest(served)["steps"] == 2
    page.locator("#shown.small").wait_for()  # it is loaded
    assert page.evaluate("document.querySelector('#shown').naturalWidth") == 16
    assert page.locator("#history li").count() == len(list(served.service.out.glob("*.png")))
    with page.expect_download() as download:
        page.click("#download")
    assert read_facts(download.value.path())["prompt"] == "<b>a red disc</b>"


def test_settings_of_an_earlier_image_draw_it_again(page: Any, served: Served) -> None:
    draw(page, "one of many")
    first = max(served.service.out.glob("*.png"))
    draw(page, "another")
    page.locator("#history button").nth(1).click()
    page.click("#reuse")
    assert page.locator("#prompt").input_value() == "one of many"
    before = page.locator("#history li").count()
    page.click("#draw")
    page.locator("#history li").nth(before).wait_for()
    page.locator("#queue li").first.wait_for(state="detached")
    again = max(served.service.out.glob("*.png"))
    assert again != first and Image.open(again).tobytes() == Image.open(first).tobytes()


def test_a_dropped_image_is_begun_with_and_painted_in(page: Any, served: Served) -> None:
    drop(page, (48, 48), "#2040e0")
    draw(page, "changed a little")
    facts = newest(served)
    assert facts["image"] and not facts["mask"] and facts["strength"] == 0.8
    page.click("#paint")
    box = page.locator("#mask").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    side = min(box["width"], box["height"])
    page.locator("#brush-size").fill("0.3")
    page.mouse.move(middle[0] - 0.3 * side, middle[1] + 0.3 * side)
    page.mouse.down()
    page.mouse.move(middle[0] + 0.3 * side, middle[1] + 0.3 * side, steps=5)
    page.mouse.up()
    page.click("#invert")
    page.click("#undo")
    page.click("#painted")
    draw(page, "painted in")
    facts = newest(served)
    assert facts["image"] and facts["mask"] and facts["strength"] == 1
    image = Image.open(max(served.service.out.glob("*.png")))
    assert image.getpixel((8, 2)) == (0x20, 0x40, 0xE0)  # not painted: as it was
    assert image.getpixel((8, 13)) != (0x20, 0x40, 0xE0)
    page.click("#remove")
    draw(page, "from nothing")
    assert newest(served)["image"] is None


def test_a_result_is_enlarged_and_used_as_input(page: Any, served: Served) -> None:
    draw(page, "small")
    page.click("#enlarge")
    page.locator("#details", has_text="enlarged 2×").wait_for()
    assert Image.open(max(served.service.out.glob("*.png"))).size == (32, 32)
    page.locator("#history button").nth(1).click()
    page.click("#again")
    page.locator("#begin").wait_for()
    draw(page, "begun with the small one")
    assert newest(served)["image"]


def test_the_queue_is_shown_cancelled_and_found_again_after_a_reload(page: Any, served: Served) -> None:
    page.locator("#steps").fill("150")
    page.locator("#number").fill("16")
    for words in ("the long one", "the next", "the last"):
        page.fill("#prompt", words)
        page.click("#draw")
        page.locator("#queue b", has_text=words).wait_for()
    assert page.locator("#progress").is_visible()
    page.locator("#queue li", has_text="next").nth(0).wait_for()
    page.get_by_label("Cancel the next").click()
    page.locator("#queue b", has_text="the next").wait_for(state="detached")
    page.fill("#prompt", "words that stay")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.locator("#prompt").input_value() == "words that stay"
    assert page.locator("#steps").input_value() == "150"
    page.locator("#queue b", has_text="the last").wait_for()
    page.get_by_label("Cancel the last").click()
    page.get_by_label("Cancel the long one").click()
    page.locator("#queue li").first.wait_for(state="detached")
    assert {job.state for job in served.service.queue.jobs()} <= {"done", "cancelled"}


def test_a_drawing_that_the_stream_tells_of_first_is_listed_once(page: Any) -> None:
    def slowly(route: Any) -> None:
        response = route.fetch()
        page.wait_for_timeout(500)  # meanwhile the stream tells of it
        route.fulfill(response=response)

    page.locator("#steps").fill("150")
    page.locator("#number").fill("16")
    page.fill("#prompt", "the first")
    page.click("#draw")
    page.locator("#queue b", has_text="the first").wait_for()
    page.route("**/api/jobs", slowly)
    page.fill("#prompt", "the second")
    with page.expect_response("**/api/jobs"):
        page.click("#draw")
    page.locator("#draw:enabled").wait_for()
    words = page.evaluate("[...document.querySelectorAll('#queue b')].map((b) => b.textContent)")
    assert sorted(words) == ["the first", "the second"]
    page.get_by_label("Cancel the second").click()
    page.get_by_label("Cancel the first").click()
    page.locator("#queue li").first.wait_for(state="detached")


def test_a_drawing_that_is_over_before_the_stream_begins_is_shown(page: Any) -> None:
    """As with a quick model behind a slow line."""

    def late(route: Any) -> None:
        page.wait_for_timeout(1500)
        route.continue_()

    page.route("**/api/events", late)
    draw(page, "as quick as that")


def test_errors_are_said_beside_the_button(page: Any) -> None:
    for name in ("width", "height"):
        page.locator(f"#{name}").fill("4096")
    page.fill("#prompt", "too large")
    with page.expect_response(lambda r: r.url.endswith("/api/jobs") and r.status == 422):
        page.keyboard.press("Control+Enter")
    page.locator("#error", has_text="pixels").wait_for()


def test_what_is_flagged_is_said_with_its_score(page: Any, served: Served) -> None:
    """A file whose facts say so: no image that the detector flags is kept in this repository."""
    from train.generate.files import png, save_numbered

    facts = {**newest(served), "prompt": "flagged one"}
    facts["nsfw"] = {"score": 0.93, "threshold": 0.2, "flagged": True, "blurred": True}
    save_numbered(png(Image.new("RGB", (16, 16), "grey"), facts), served.service.out)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert "0.93" in page.locator("#flag").inner_text() and "blurred" in page.locator("#flag").inner_text()
    assert page.locator("#history em").first.inner_text() == "flagged"


def test_no_words_are_asked_about_before_anything_is_sent(page: Any, served: Served) -> None:
    before = len(served.service.queue.jobs())
    page.fill("#prompt", "  ")
    page.click("#draw")
    page.locator("#asks", has_text="what should be in the image").wait_for()
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert len(served.service.queue.jobs()) == before
    page.fill("#prompt", "a fox")
    assert page.locator("#asks").is_hidden()
    page.fill("#prompt", "")
    page.click("#draw")
    page.click("#draw")  # it was asked, and this is the answer
    page.locator("#caption", has_text="(no prompt)").wait_for()


@pytest.mark.parametrize("size", [(360, 640), (412, 915)])
def test_on_a_phone_the_brush_is_whole_and_a_drawing_is_seen_to_begin(
    page: Any, served: Served, size: tuple[int, int]
) -> None:
    page.set_viewport_size({"width": size[0], "height": size[1]})
    drop(page, (64, 48), "#2040e0")
    page.click("#paint")
    for name in ("#mask", "#brush-size", "#undo", "#invert", "#clear", "#painted"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= size[0], name
        assert box["y"] >= 0 and box["y"] + box["height"] <= size[1], name
        for share in (0.02, 0.5, 0.98):  # nothing lies over it
            at = [box["x"] + share * box["width"], box["y"] + box["height"] / 2]
            assert page.evaluate("([x, y]) => document.elementFromPoint(x, y).id", at) == name[1:], name
    page.click("#mask")
    page.click("#painted")
    page.locator("#paint", has_text="Change what is painted").wait_for()
    for name in ("#paint", "#remove"):
        assert right_of(page, name) <= right_of(page, "#well"), name
    page.locator("#steps").fill("150")
    page.locator("#number").fill("16")
    page.fill("#prompt", "a long one")
    page.click("#draw")
    page.locator("#queue b", has_text="a long one").wait_for()
    page.locator("#progress").wait_for()
    page.wait_for_timeout(600)  # it scrolls
    for name in ("#queue li", "#progress"):  # asked in one go: rows are made anew at each step
        box = page.evaluate("(name) => document.querySelector(name).getBoundingClientRect().toJSON()", name)
        assert box["top"] >= 0 and box["bottom"] <= size[1], name
    page.get_by_label("Cancel a long one").click()
    page.locator("#queue li").first.wait_for(state="detached")
    page.click("#remove")


def test_what_an_enlargement_takes_is_said(page: Any, served: Served) -> None:
    from train.generate.files import png, save_numbered

    draw(page, "the last one")
    facts = {**newest(served), "prompt": "large for this model", "steps": 20}
    save_numbered(png(Image.new("RGB", (160, 160), "grey"), facts), served.service.out)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.click("#enlarge")
    page.locator("#queue .hint", has_text="1,521 tiles of 16 x 16 pixels, about").wait_for()
    page.get_by_label("Cancel large for this model").click()
    page.locator("#queue li").first.wait_for(state="detached")


def test_a_lost_folder_is_said_and_found_again(page: Any, served: Served) -> None:
    draw(page, "kept")
    away = served.service.out.with_name("away")
    served.service.out.rename(away)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.locator("#notice", has_text="moved or removed").wait_for()
    away.rename(served.service.out)
    page.locator("#history li").first.wait_for(timeout=15_000)
    assert page.locator("#notice").is_hidden()


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_narrow_and_wide_windows(page: Any, served: Served, tmp_path: Path, width: int, scheme: str) -> None:
    draw(page, "a red disc")
    drop(page, (32, 16), "#e08020")
    page.set_viewport_size({"width": width, "height": 844})
    page.emulate_media(color_scheme=scheme)
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("#draw", "#shown", "#steps", "#history", "#enlarge"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, name
    unnamed = page.locator("input:visible, textarea:visible, select:visible").evaluate_all(
        "all => all.filter((e) => !e.labels.length).map((e) => e.id)"
    )
    assert unnamed == []


def test_what_a_family_can_not_do_is_not_offered(browser: Any, tmp_path: Path) -> None:
    from tests.small_pipelines import save_pipeline
    from train.generate.sampler import Sampler

    shows = {"chroma": ["leave-out"], "flux": ["well", "again", "enlarge"]}
    for family, ids in shows.items():
        with serving(Sampler(save_pipeline(family, tmp_path / family)), tmp_path / f"{family}-out") as served:
            page = browser.new_page()
            open_page(page, served)
            draw(page, "a red disc")
            for id in ("well", "again", "enlarge", "leave-out"):
                assert page.locator(f"#{id}").is_visible() == (id in ids), (family, id)
            facts = newest(served)
            assert (facts["scheduler"], facts["steps"]) == (
                "FlowMatchEulerDiscreteScheduler",
                served.service.model().defaults.steps,
            )
            if family == "chroma":
                data = base64.b64encode(max(served.service.out.glob("*.png")).read_bytes()).decode()
                with served.client() as client:
                    answer = client.post("/api/jobs", json={"prompt": "a", "image": data})
                assert answer.status_code == 422 and "has no image-to-image" in answer.text
            page.close()
            assert not served.faults
