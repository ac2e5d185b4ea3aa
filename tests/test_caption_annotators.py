"""language, caption-stats and caption-repeats against captions whose truth is known."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_near import plan_near, write_near

from curate.annotators.base import ImageBatch
from curate.annotators.registry import load_annotator, make_annotators
from curate.annotators.stage import annotate_table
from curate.duplicates.captions import normalised, normalised_caption
from curate.layout import Data
from tests.conftest import ROOT

CAPTIONS = {
    "en": ["A brown dog runs along the beach at sunset", "Two children playing football in the park"],
    "de": ["Ein brauner Hund läuft am Strand entlang", "Rote Lederschuhe mit hohem Absatz"],
    "fr": ["Un chien brun court sur la plage au coucher du soleil", "Chaussures en cuir rouge à talons hauts"],
    "es": ["Dos niños juegan al fútbol en el parque", "Viejo puente de madera sobre un río tranquilo"],
    "it": ["Un cane marrone corre sulla spiaggia al tramonto", "Una tazza di caffè su un tavolo bianco"],
    "pt": ["Duas crianças jogam futebol no parque", "Uma xícara de café sobre uma mesa branca"],
    "nl": ["Een bruine hond rent over het strand bij zonsondergang", "Rode leren schoenen met hoge hakken"],
    "pl": ["Brązowy pies biegnie po plaży o zachodzie słońca", "Stary drewniany most nad spokojną rzeką"],
    "sv": ["Två barn spelar fotboll i parken", "En kopp kaffe på ett vitt bord"],
    "tr": ["Parkta futbol oynayan iki çocuk", "Beyaz masanın üzerinde bir fincan kahve"],
    "ru": ["Двое детей играют в футбол в парке", "Старый деревянный мост через тихую реку"],
    "ar": ["كلب بني يركض على الشاطئ عند الغروب", "جسر خشبي قديم فوق نهر هادئ"],
    "hi": ["पार्क में फुटबॉल खेलते दो बच्चे", "शांत नदी पर पुराना लकड़ी का पुल"],
    "zh": ["一只棕色的狗在夕阳下的海滩上奔跑", "静静的河上的旧木桥"],
    "ja": ["公園でサッカーをする二人の子供", "白いテーブルの上のコーヒーカップ"],
    "ko": ["공원에서 축구하는 두 아이", "하얀 탁자 위의 커피 한 잔"],
    "th": ["สุนัขสีน้ำตาลวิ่งบนชายหาดตอนพระอาทิตย์ตก", "กาแฟหนึ่งถ้วยบนโต๊ะสีขาว"],
}


def values(name: str, captions: list[str | None]) -> dict[str, list[Any]]:
    """An annotator's columns of captions; those of one batch and of batches of one are the same."""
    annotator = load_annotator(name, threads=1)

    def ask(some: list[str | None]) -> dict[str, list[Any]]:
        rows = pa.table({"key": [str(n) for n in range(len(some))], "caption": pa.array(some, pa.string())})
        answer = annotator.annotate(ImageBatch(rows=rows))
        assert {n: value.type for n, value in answer.items()} == {n: c.type for n, c in annotator.columns.items()}
        return {column: value.to_pylist() for column, value in answer.items()}

    found, alone = ask(captions), [ask([caption]) for caption in captions]
    assert found == {column: [one[column][0] for one in alone] for column in found}
    return found


def test_languages_are_told_apart() -> None:
    truth = [language for language, captions in CAPTIONS.items() for _ in captions]
    found = values("language", [caption for captions in CAPTIONS.values() for caption in captions])
    right = sum(one == other for one, other in zip(found[""], truth, strict=True))
    assert right >= len(truth) - 1
    assert min(score for code, score in zip(found[""], found["score"], strict=True) if code != "und") >= 0.5
    assert (
        values("language", ["A brown hen.", "A rabbit.", "Boom!!!", "T-shirt"])[""] == ["und"] * 4
    )  # too short to say
    shouted = values("language", [c.upper() for language in ("en", "de", "ru") for c in CAPTIONS[language]])
    assert shouted[""] == ["en", "en", "de", "de", "ru", "ru"]
    assert values("language", ["a dog\r\non a\tbeach at sunset", "a dog on a beach at sunset"])[""] == ["en", "en"]


def test_what_has_no_language() -> None:
    unclear = ["12345", "🙂🙂🙂", "ab", "狗", "IMG_1234", "\0", "x" * 100_000]
    found = values("language", [None, "", "  ", *unclear])
    assert found[""] == [None] * 3 + ["und"] * len(unclear)
    assert found["score"][:3] == [None] * 3 and found["score"][3:7] == [0] * 4 and max(found["score"][3:]) < 0.5


def test_language_asks_no_network_and_writes_nothing(tmp_path: Path) -> None:
    code = """
import sys
def watch(event, args):
    if event.startswith("socket.connect") or event in ("socket.getaddrinfo", "os.mkdir"):
        sys.exit(f"{event} {args}")
    if event == "open" and not str(args[0]).endswith(".pyc") and isinstance(args[1], str) and args[1][:1] in "wax":
        sys.exit(f"writes {args}")
from curate.annotators.registry import load_annotator
import pyarrow as pa
from curate.annotators.base import ImageBatch
sys.addaudithook(watch)
annotator = load_annotator("language")
rows = pa.table({"key": ["a"], "caption": ["A brown dog runs along the beach at sunset"]})
print(annotator.annotate(ImageBatch(rows=rows))[""].to_pylist())
"""
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, timeout=100)
    assert done.stdout == "['en']\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_words_of_every_script() -> None:
    truth = {  # by hand; of scripts without blanks as dictionaries cut them, where a third more or less will do
        "A brown dog, runs - along the beach!": 7,
        "Rote Lederschuhe (2 Paar) | 49,90 €": 5,
        "पार्क में फुटबॉल खेलते दो बच्चे": 6,
        "공원에서 축구하는 두 아이": 4,
    }
    assert values("caption-stats", list(truth))["words"] == list(truth.values())
    cut = {
        "一只棕色的狗在夕阳下的海滩上奔跑": 11,
        "两个孩子在公园里踢足球": 7,
        "公園でサッカーをする二人の子供": 8,
        "白いテーブルの上のコーヒーカップ": 6,
        "เด็กสองคนเล่นฟุตบอลในสวนสาธารณะ": 7,
        "สะพานไม้เก่าข้ามแม่น้ำที่เงียบสงบ": 7,
        "iPhone 11 手机壳": 4,
    }
    for words, expected in zip(values("caption-stats", list(cut))["words"], cut.values(), strict=True):
        assert 0.65 * expected <= words <= 1.35 * expected
    letters = values("caption-stats", [c for captions in CAPTIONS.values() for c in captions])["letters"]
    assert set(letters) == {1.0}  # marks of Hindi and Thai are letters too
    assert values("caption-stats", ["ab 12", "1 2 3", "a!"])["letters"] == [0.5, 0, 0.5]


def test_lengths_and_missing_captions() -> None:
    found = values("caption-stats", [" a dog ", "...", None, "", " \n"])
    assert found["characters"] == [5, 3, None, None, None] and found["words"] == [2, 0, None, None, None]
    assert found["repetition"] == [0, 0, None, None, None] and found["filename"] == [False, False, None, None, None]


def test_repetition() -> None:
    truth = {
        "a dog on a table in a room": 0,
        "buy shoes buy shoes buy shoes": 1,
        "Sale sale sale": 1,
        "Red Shoes | red shoes, blue hat": 4 / 6,
        "dog": 0,
        "手机壳手机壳手机壳": 1,
        "一只棕色的狗在夕阳下的海滩上奔跑": 0,
        "black leather " + "shoes " * 6: 6 / 8,
    }
    assert values("caption-stats", list(truth))["repetition"] == pytest.approx(list(truth.values()))


FILENAMES = [
    "IMG_1234.jpg", "IMG_1234", "img 1234", "DSC00123", "DSCN0042.JPG", "P1010012", "image001", "image (3)", "photo-2",
    "Screenshot 2019-08-24 at 10.22.33", "WhatsApp Image 2020-01-05 at 18.22.01", "Old Bridge Baraga.jpg", "20190824",
    "nike-air-presto-gpx", "Folded_paper_set", "d41d8cd98f00b204e9800998ecf8427e", "products/x-ab-1.png", "untitled-1",
    "123e4567-e89b-12d3-a456-426614174000", "IMG-20180101-WA0001", "64a39d.webp", "2014_Toro_Reelmaster_3100-D",
]  # fmt: skip
NO_FILENAMES = [
    "A dog on a beach", "T-shirt", "dog", "Throw Pillow", "Image of a dog", "Photo 3 of 12: a dog", "Boeing 747", "狗",
    "Page 3 girls", "rock-climbing", "http://a.com/b-c-d", "U.S.A.", "Figure 2: results of the study", "Coca-Cola",
    "C++", "Two dogs (2019)", "Portrait, 1984", "a.b", "well-known snow-covered mountain-top house", "Défaut", "?",
    "decade faded",
]  # fmt: skip


def test_names_of_files() -> None:
    assert [
        c for c, yes in zip(FILENAMES, values("caption-stats", FILENAMES)["filename"], strict=True) if not yes
    ] == []
    assert [
        c for c, yes in zip(NO_FILENAMES, values("caption-stats", NO_FILENAMES)["filename"], strict=True) if yes
    ] == []


def test_what_belongs_to_a_page() -> None:
    with_it = {
        "url": ["Bag http://a.org/b", "see www.example.org", "Buy Scarf at johnlewis.com"],
        "markup": ["<b>Dog</b>", "Tom &amp; Jerry", "Men&#39;s hoody", "a<br />b"],
        "boilerplate": [
            "Beach at sunset — Stock Photo", "Royalty Free Stock Images", "Image not available", "No image available",
            "Click here to enlarge image", "Dress, free shipping", "Buy Reiss Jumper Online", "Photo coming soon",
            "Placeholder", "Share on Facebook", "Sign in to continue", "Log in",
            "Best 25 cakes ideas on Pinterest", "Image result for oak",
            "海 ストック写真", "School supply — Stockfoto", "iStockphoto 1234", "Getty Images",
            "photo via Shutterstock",
        ],
    }  # fmt: skip
    plain = [
        "A dog on a beach", "Tom & Jerry", "3 < 4 and 5 > 2", "a.com", "stock market on Friday", "clicking noise",
        "a man who shares his bread", "no images of war", "loading dock", "a trail sign in the woods",
        "a log in the river", "She reads more than he", "buying fish",
    ]  # fmt: skip
    for name, captions in with_it.items():
        assert [c for c, yes in zip(captions, values("caption-stats", captions)[name], strict=True) if not yes] == []
        assert [c for c, yes in zip(plain, values("caption-stats", plain)[name], strict=True) if yes] == []


def test_long_and_hostile_captions_take_no_time() -> None:
    pieces = ["-a", "a", "buy ", "<a", "a-", "!", "_", "&a", "click ", "1", "view ", "狗", "img 1", ". ", "\0", "a_"]
    for piece in pieces:
        before = time.process_time()
        for text in (piece * (40_000 // len(piece)) + "x", (piece * 255)[:254]):
            values("caption-stats", [text])
            normalised(text)
        assert time.process_time() - before < 2, piece


def repeats(data: Data) -> list[list[int | None]]:
    """The column of each shard."""

    def no_encoder() -> Any:
        raise AssertionError("captions need no encoder")

    annotate_table(data, "repeats", make_annotators({"repeats": "caption-repeats"}), encoder=no_encoder)
    shards = [s.shard for s in data.plan.shards if data.fetched_record(s.shard).exists()]
    return [pq.read_table(data.annotations("repeats", shard))["repeats"].to_pylist() for shard in shards]


def test_repeats_are_counted_over_all_shards(tmp_path: Path) -> None:
    data = plan_near(tmp_path / "x", 12, 6)
    first: list[str | None] = ["Image 1 of 12.", "Photo", "a dog on a beach", None, "...", "狗"]
    write_near(data, 0, 6, captions=first)
    assert repeats(data) == [[1, 1, 1, None, None, 1]]
    write_near(data, 1, 6, captions=["image 2 of 12", "image 33 of 12!", "PHOTO", "another dog", "", "狗"])
    assert repeats(data) == [[3, 2, 1, None, None, 2], [3, 3, 2, 1, None, 2]]  # what was there is counted anew


def test_repeats_are_those_of_a_plain_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["Dog", "cat", "photo", "1", "22", "-", "狗", ""]
    captions = [" ".join(rng.choice(words, rng.integers(0, 4))) for _ in range(3000)]
    data = plan_near(tmp_path / "x", 3000, 1000)
    for shard in range(3):
        write_near(data, shard, 1000, captions=captions[1000 * shard : 1000 * shard + 1000])
    keys = [normalised(caption) for caption in captions]
    assert [n for shard in repeats(data) for n in shard] == [keys.count(key) if key else None for key in keys]


def test_the_comparison_of_captions_is_that_of_near_duplicates() -> None:
    assert normalised(" Image 1 of 12. ") == normalised("IMAGE—2 of 345") == "image 0 of 0" and normalised("...") == ""
    assert normalised_caption("Image 1 of 12") == "image 0 of 0"
    assert normalised_caption("photo 3") is None and normalised_caption(None) is None
