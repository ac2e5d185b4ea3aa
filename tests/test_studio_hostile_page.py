"""Captions, columns and rules of strangers in a real browser: they are text on every page, whatever stands in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from curate.layout import Data
from tests.small_data import write_fetched
from tests.small_serve import ServedData, serving_data
from tests.test_serve_page import browser as browser  # a fixture
from tests.test_studio_commands import planned
from tests.test_studio_explore_page import until

pytestmark = pytest.mark.long

MARKUP = (
    "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script><style>*{display:none}</style><b id=bold>"
)
HOSTILE = [
    MARKUP,
    '"></p><svg onload=window.hacked=1>&lt;b&gt;${window.hacked=1}`{{7*7}}',
    "\u202ereversed\u202c \u2066isolated\u2069 \u200f‮",
    "a\0b\x1b[2J\x07\x9b\u2028\u2029\ufeff",
    "long " * 20_000,
    "Z\u0351\u036b\u0343\u036a\u0302" * 500 + "🏳️‍🌈",
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedData]:
    """Three shards, whose captions end with something hostile."""
    data: Data = planned(tmp_path_factory.mktemp("hostile") / "data")
    for shard, salt in enumerate((HOSTILE[0] + HOSTILE[1], HOSTILE[2] + HOSTILE[3], HOSTILE[4] + HOSTILE[5])):
        write_fetched(Path(data.root), shard, salt)
    with serving_data(data) as served:
        served.folder.explorer.wait(60)
        yield served


@pytest.mark.parametrize("width", [390, 1600])
def test_text_of_strangers_is_text(browser: Any, served: ServedData, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    wrong: list[str] = []
    elsewhere: list[str] = []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith((served.url, "data:", "blob:")) else elsewhere.append(r.url))

    rules = [
        [MARKUP, "original_width >= 100", 1],
        ["odd", 'source."od""d" is not null or caption <> \'<b id=bold>\'', 1],
    ]
    for place, words in (
        (0, "onerror"),
        (20, "isolated"),
        (40, "long long"),
    ):  # of each shard one
        key = served.folder.explorer.key(place)
        page.goto("about:blank")
        page.goto(f"{served.url}/#{urlencode({'rules': json.dumps(rules), 'show': 'all', 'image': key})}")
        page.wait_for_selector("dialog.why[open]")
        until(page, "words => document.querySelector('dialog.why').textContent.includes(words)", words)
        check(page)
    page.keyboard.press("Escape")
    page.wait_for_selector(".tile.is-there")
    check(page)
    page.goto(f"{served.url}/rate")
    page.wait_for_load_state("networkidle")
    check(page)
    context.close()
    assert not elsewhere and not [w for w in wrong if "status of 4" not in w], wrong


def check(page: Any) -> None:
    """Nothing of it became an element, ran, or hid the page."""
    assert page.evaluate("window.hacked === undefined && !document.querySelector('#bold, img[src=x], svg[onload]')")
    assert page.evaluate("[...document.scripts].every((script) => script.src)")
    assert page.evaluate("document.querySelector('h1').offsetHeight > 0")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1"), "wider than the window"
