"""What a model answered -> a caption, or the reason why there is none. Pure functions, for served and local models.

What is put right is named in `changes`, what can't be is the `outcome`; docs/recaptioning.md has both as a table.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from dataclasses import dataclass

from curate.recaption.markup import plain_text, settle_characters, without_thinking
from curate.recaption.refusals import is_refusal
from curate.recaption.wording import leaks, tidy, unquoted, words_of

VERSION = 1
"""Part of the columns' digest: raise it when an answer is read differently."""

OUTCOMES = {
    "ok": "a caption",
    "truncated": "a caption that was cut off",
    "copied": "a caption that is the alt text again",
    "refused": "the model declined, or saw no image",
    "empty": "the answer says nothing",
    "looping": "the model repeated itself without end",
    "blocked": "the server's content filter held it back",
    "leaked": "parts of the prompt or of a template, or gaps to fill in",
    "markup": "a table or data in place of prose",
    "language": "another language than the one asked for",
    "error": "no answer",
}
"""What can come of an image -> its meaning. The first three have a caption, `truncated` where there was any text."""

MAX_COMPRESSION = 2.4
"""Length over zlib's length of a text that loops; Whisper's threshold for its own loops (openai/whisper,
`compression_ratio_threshold`). Good captions of the tests stay below 2."""

_BLOCKED = ("content_filter", "safety", "prohibited_content", "blocklist", "recitation", "blocked")
_CUT = ("length", "max_tokens", "max_length")
_FULL_STOP = re.compile(r"""[.!?…。！？।؟۔][)\]"'”’»」』）*]*$""")
_ENGLISH = frozenset(re.findall(r"\w+", "a an and are at by from in is of on that the there this to while with"))
_LONGEST_PHRASE = 30  # words of a phrase whose repetition is looked for
_MOST_CHARACTERS = 20_000  # of an answer that is read; more is no caption


@dataclass(frozen=True)
class Answer:
    """caption: plain prose in one line, or None.    outcome: one of OUTCOMES.    changes: what was put right."""

    caption: str | None
    outcome: str
    changes: tuple[str, ...] = ()


def read_answer(
    text: str | None,
    finish_reason: str | None,
    *,
    prompt: str,
    alt: str | None = None,
    language: str | None = "en",
) -> Answer:
    """What a model's answer to `prompt` is worth.

    finish_reason: as OpenAI's protocol has it: "stop", "length", "content_filter"; None: unknown.    alt: the image's
    own caption, where the model was told it or may have read it.    language: of captions (ISO 639-1); None: any.
    """
    reason = (finish_reason or "").lower()
    if reason.startswith(_BLOCKED):
        return Answer(None, "blocked")
    cut, changes = reason.startswith(_CUT), list[str]()
    text = settle_characters((text or "")[:_MOST_CHARACTERS], changes)
    text, closed = without_thinking(text, changes)
    if not text.strip():
        return Answer(None, "truncated" if cut or not closed else "empty", tuple(changes))

    text, problem = plain_text(text, prompt, changes)
    if is_refusal(text):
        return Answer(None, "refused", tuple(changes))
    if problem is not None:
        return Answer(None, problem, tuple(changes))
    text = tidy(text, changes)
    if says_nothing(text):
        return Answer(None, "truncated" if cut else "empty", tuple(changes))
    if leaks(text, prompt, alt):
        return Answer(None, "leaked", tuple(changes))
    if loops(text):
        return Answer(None, "looping", tuple(changes))
    if language is not None and is_other_language(text, language):
        return Answer(None, "language", tuple(changes))
    if cut or (not reason and ends_open(text)):
        return Answer(text, "truncated", tuple(changes))
    return Answer(text, "copied" if is_copy(text, alt) else "ok", tuple(changes))


def says_nothing(text: str) -> bool:
    """Whether a text has no word, or only one that stands for none: "image", "N/A", "unanswerable"."""
    words = words_of(text)
    nothing = {"image", "picture", "photo", "caption", "description", "none", "null", "na", "unknown", "unanswerable"}
    phrases = {"n a", "no caption", "no description", "no answer", "not available", "not applicable", "the image"}
    return not any(c.isalpha() for c in text) or " ".join(words) in nothing | phrases


def loops(text: str) -> bool:
    """Whether a text repeats itself as models do that find no end.

    One character 20 times, one word 6 times, two words 4 times, or a phrase of three and more 3 times on end; a
    sentence or line of 4 words and more 3 times anywhere; or a text of 200 bytes and more that zlib makes
    MAX_COMPRESSION times shorter. What stands in short quotation marks may repeat: signs do.
    """
    bare = unquoted(text, longest=120)
    if re.search(r"(\S)\1{19}", bare) or re.search(r"([^\W\d_]{2,40}?)\1{5}", bare):  # scripts without blanks, too
        return True
    words = words_of(bare)
    for size in range(1, min(_LONGEST_PHRASE, len(words) // 3) + 1):
        needed = {1: 6, 2: 4}.get(size, 3)
        same = 0  # words on end that equal the one `size` before
        for one, other in zip(words, words[size:], strict=False):
            same = same + 1 if one == other else 0
            if same >= size * (needed - 1):
                return True
    sentences = Counter(s.strip().casefold() for s in re.split(r"[.!?。！？\n]+", bare))
    if any(count >= 3 and len(s.split()) >= 4 for s, count in sentences.items()):
        return True
    raw = bare.encode()
    return len(raw) >= 200 and len(raw) > MAX_COMPRESSION * len(zlib.compress(raw))


def ends_open(text: str) -> bool:
    """Whether a text of several sentences ends without a full stop: then it was cut off. A single sentence may."""
    return not _FULL_STOP.search(text) and re.search(r"[a-z]{4}[)\"”]?[.!?] +[A-Z]", text) is not None


def is_copy(text: str, alt: str | None) -> bool:
    """Whether a caption is the alt text again: 6 words and more of it on end, which make up 80% of the caption."""
    said, words = words_of(alt or ""), words_of(text)
    return longest_run(words, said) >= max(6, 0.8 * len(words))


def longest_run(one: list[str], other: list[str]) -> int:
    """The number of words of the longest run that two texts have in common."""
    best, before = 0, [0] * (len(other) + 1)
    for word in one:
        now = [0] * (len(other) + 1)
        for place, candidate in enumerate(other, 1):
            if word == candidate:
                now[place] = before[place - 1] + 1
                best = max(best, now[place])
        before = now
    return best


def is_other_language(text: str, language: str) -> bool:
    """Whether a text is surely of another language than the wanted one: fastText's lid.176 gives four others 0.8 and
    more, and the wanted one less than 0.1.

    What stands in quotation marks does not count. The language of fewer than 5 words and 20 letters, or 6 characters
    of a script without blanks, is chance. English with a foreign name, "a plate of spaghetti alla puttanesca", is
    Italian to the model; so a text with enough of English's small words is English.
    """
    from curate.annotators.language import likeliest

    bare = " ".join(unquoted(text).split())
    words = words_of(bare)
    if (len(words) < 5 or sum(c.isalpha() for c in bare) < 20) and sum(ord(c) > 0x2E80 for c in bare) < 6:
        return False
    if language == "en":
        counted = set(words) if len(words) < 12 else words
        if sum(word in _ENGLISH for word in counted) >= (0.2 if len(words) < 12 else 0.12) * len(words):
            return False
    found = likeliest(bare, 5)
    wanted = found.pop(language, 0.0)
    return wanted < 0.1 and sum(found.values()) >= 0.8
