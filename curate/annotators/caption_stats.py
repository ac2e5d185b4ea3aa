"""caption-stats: how long a caption is, how it repeats itself, and what of it is not about the image."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from typing import Any

import pyarrow as pa

from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec, ImageBatch
from curate.store.files import digest

VERSION = 1
"""Of the rules below: changed with whatever changes values."""

_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_SOUTH_EAST = "\u0e01-\u0e3a\u0e40-\u0eff\u1000-\u109f\u1780-\u17d3"
_UNSPACED = (re.compile(f"[{_HAN}{_KANA}]"), 2), (re.compile(f"[{_SOUTH_EAST}]"), 5)
"""Scripts without blanks between words, and how many of their characters make a word: Chinese and Japanese have 1.5 to
1.9, of which 2 is the cautious number; Thai, Lao, Burmese and Khmer 4 to 5, vowel signs counted."""

_PUNCTUATION = string.punctuation + "“”„‘’«»…—–·•。、，！？（）「」【】"

_FILE = re.compile(
    r"""\S.*\.(jpe?g|jpe|png|gif|webp|bmp|tiff?|svg|avif|heic|psd|raw|cr2|nef)$ # sunset 12.JPG
    | (img|dscn?|dscf|dsc|pict|p|mvi|pano|gopr|dji|sam|imag|cimg|hpim|kimg|wp|vid|scan|image|photo|pic|picture|foto|bild
      |screen[ ]?shot|unnamed|untitled|download|default|whatsapp[ ]image|thumb(nail)?|capture|file|frame|slide|page|fig)
      [-_ .]*[(]?\d[-_ .\d():]*(at[ ][\d:. ]+)?([ap]m)?([-_ ]?(wa\d+|small|large|copy|scaled))?$ # IMG_1234, image (3)
    | [0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$ # a UUID
    | (?=\S*\d)[0-9a-f]{12,}$ # a hash
    | [-_.\d]*\d{4}[-_.\d]*$ # 20190824_0714
    | (?=\S*\w\S*_\S*\w)[^\s/:@]+$ # one piece with an underscore: Folded_paper_set
    | [^\s/:@_]*?[^\W_]+(-+[^\s/:@_-]+){2,}-?$ # or two hyphens: nike-air-presto
    """,
    re.I | re.X,
)
_LONGEST_NAME = 255
"""Characters of a file's name, at most."""

_URL = re.compile(r"https?:/|\bwww\.\w|\b[a-z0-9-]{2,63}\.(?:com|net|org|co\.uk)\b", re.I)
_MARKUP = re.compile(r"</?[a-z][^<>]*>|&(?:[a-z]{2,8}|#\d+|#x[0-9a-f]+);", re.I)
_BOILERPLATE = re.compile(
    r"""\b(no|missing)[ ](image|photo|picture)([ ](available|found|yet))?\W*$
    | \b(image|photo|picture)s?[ ]((is|are)[ ])?(currently[ ])?(not[ ](available|found)|unavailable|missing)
    | \b(image|photo|picture)s?[ ]coming[ ]soon
    | \bplace[ ]?holder\b | \bimage[ ]result[ ]for\b | \bopens[ ]in[ ](a[ ])?new[ ](window|tab)\b
    | \bclick[ ](here|to|on|for|image|photo|picture|through)\b | \btap[ ](here|to)\b | \bclick\b.{0,30}\benlarge
    | \b(enlarge|view)[ ](the[ ])?(larger|full|bigger|image|photo|picture)\b | \bskip[ ]to[ ](content|main)\b
    | \bshare[ ](this[ ])?(on|via)[ ](facebook|twitter|pinterest|e?mail)\b
    | \bshare[ ]this[ ](image|photo|page|post|pin)\b | \b(tweet|pin)[ ]it\b | \bon[ ]pinterest\b
    | \bread[ ]more\b | \bsubscribe[ ](to|now|here)\b
    | \bloading\.\.\.
    | \b(sign|log)[ ](in|up)[ ](to|for|with|now|here)\b | ^\W*(sign|log)[ ](in|up)\W*$
    | \badd[ ]to[ ](cart|basket|bag|wish[ ]?list)\b
    | \bfree[ ](shipping|delivery|download)\b | \bbuy\b.{0,200}\bonline\b
    | \broyalty[- ]free\b | \bstock[- ](photo|image|vector|illustration|picture|footage|clip)\w* | \blizenzfrei
    | \bstock(foto|bild|vektor|photo|vector)\w* | \bfoto[ ]de[ ]stock\b | \blibre[ ]de[ ]droits\b | стоковое[ ]фото
    | ストック写真 | \b(shutterstock|istock([ ]?photo)?|getty[ ]?images|alamy|dreamstime|depositphotos)\b
    | \b(123rf|fotolia|bigstock)\b
    """,
    re.I | re.X,
)


class CaptionStats(Annotator):
    """Words, characters, share of letters and repetition of a caption, and whether it is a file's name or has parts
    that belong to a page.

    words: pieces between blanks that have a letter or digit; two characters of Chinese and Japanese count as one, and
    five of Thai, Lao, Burmese and Khmer.    letters: share of the characters that are no blanks; marks on letters are
    letters.    repetition: share of the words that stand in a pair of words which the caption has twice, after the
    duplicate n-grams of Gopher's rules (Rae et al. 2021, arXiv 2112.11446, table A1; there for documents and n from 5).
    filename: IMG_1234, a hash, name-of-a-product-2, x.jpg.    url: an address.    markup: HTML.    boilerplate: "stock
    photo", "click to enlarge", "no image available", "free shipping" and the like, most of them in English.
    Null where there is no caption, or a blank one.
    """

    name = "caption-stats"
    reads = "captions"

    def __init__(self, options: AnnotatorOptions) -> None:
        super().__init__(options)
        yes = pa.bool_()
        self.columns = {
            "words": ColumnSpec(type=pa.int32(), unit="words", meaning="words; of scripts without blanks an estimate"),
            "characters": ColumnSpec(type=pa.int32(), unit="characters", meaning="characters, blanks between included"),
            "letters": ColumnSpec(scale=(0, 1), meaning="letters among the characters that are no blanks"),
            "repetition": ColumnSpec(scale=(0, 1), meaning="share of the words in pairs of words that it has twice"),
            "filename": ColumnSpec(type=yes, meaning="whether the caption looks like the name of a file"),
            "url": ColumnSpec(type=yes, meaning="whether there is an address of the web in it"),
            "markup": ColumnSpec(type=yes, meaning="whether there is HTML in it"),
            "boilerplate": ColumnSpec(type=yes, meaning="whether a phrase in it belongs to a page or shop"),
        }

    @property
    def digest(self) -> str:
        """Of the rules."""
        return digest([self.name, VERSION])

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """The values of each caption."""
        found = [caption_stats(caption) for caption in batch.rows["caption"].to_pylist()]
        return {name: pa.array([f.get(name) for f in found], spec.type) for name, spec in self.columns.items()}


def caption_stats(caption: str | None) -> dict[str, Any]:
    """The values of one caption, by column; empty where there is none, or a blank one."""
    text = (caption or "").strip()
    if not text:
        return {}
    pieces, shown = _pieces(text), [c for c in text if not c.isspace()]
    words = sum(len(found) / size for found, size in pieces)
    repeated = sum(repeated_tokens(found, 2 * size) / size for found, size in pieces)
    return {
        "words": sum(math.ceil(len(found) / size) for found, size in pieces),
        "characters": len(text),
        "letters": sum(c.isalpha() or unicodedata.category(c)[0] == "M" for c in shown) / len(shown),
        "repetition": repeated / words if words else 0.0,
        "filename": len(text) <= _LONGEST_NAME and bool(_FILE.match(text)),
        "url": bool(_URL.search(text)),
        "markup": bool(_MARKUP.search(text)),
        "boilerplate": bool(_BOILERPLATE.search(text)),
    }


def _pieces(text: str) -> list[tuple[list[str], int]]:
    """What words are counted from, and how many of them make one: pieces between blanks, then the characters of each
    kind of script without blanks."""
    unspaced = []
    for script, size in _UNSPACED:
        found = script.findall(text)
        unspaced.append((found, size))
        text = script.sub(" ", text) if found else text
    spaced = [piece.strip(_PUNCTUATION) for piece in text.casefold().split() if any(map(str.isalnum, piece))]
    return [(spaced, 1), *unspaced]


def repeated_tokens(tokens: list[str], n: int) -> int:
    """How many of the tokens stand in a run of n of them which is there more than once."""
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    counts = Counter(runs)
    return len({at for i, run in enumerate(runs) if counts[run] > 1 for at in range(i, i + n)})
