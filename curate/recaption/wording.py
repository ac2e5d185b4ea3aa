"""How models word captions: openings, closing remarks, lists, quotation marks; and what must not be in a caption."""

from __future__ import annotations

import re
import unicodedata

_QUOTED = '"[^"\n]{0,%d}"|“[^”\n]{0,%d}”|«[^»\n]{0,%d}»|„[^“”\n]{0,%d}[“”]|「[^」\n]{0,%d}」|『[^』\n]{0,%d}』'
_SINGLE_QUOTED = (  # an apostrophe between letters ends nothing
    r"(?<![\w'])'(?=\S)(?:[^\n']|(?<=\w)'(?=\w)){0,%d}'(?!\w)|"
    r"(?<!\w)‘(?=\S)(?:[^\n’]|(?<=\w)’(?=\w)){0,%d}’(?!\w)"
)
_PAIRS = {'"': '"', "“": "”", "'": "'", "‘": "’", "«": "»", "„": "“", "「": "」", "`": "`"}

_IMAGE = r"(?:image|picture|photo|photograph)"
_THE_IMAGE = rf"(?:the|this) (?:given |provided )?{_IMAGE}"
_CAPTION = r"(?:captions?|descriptions?|alt text|answers?|titles?|prompts?|summary|paragraph|sentence|output|response)"
_KIND = (
    r"(?:(?:image|picture|photo|detailed|short|long|brief|concise|suggested|possible|new|english|final|revised|the|a|"
    r"one|dense|general)[ -]){0,3}"
)
_SHOWS = (
    r"(?:(?:clearly|vividly|simply|mainly|primarily) )?(?:shows|features|depicts|captures|displays|presents|"
    r"portrays|showcases|illustrates|contains|includes|consists of|is of|is (?:showing|showcasing|depicting)|showing|"
    r"depicting)"
)
_HERE = r"here(?:'s|’s| is| are)"
_MEDIUM = r"(?:photo|photograph|image|picture|painting|drawing|illustration)"
_OPENINGS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # talk before a caption
        r"(?:sure|certainly|of course|absolutely|okay|ok|great|yes|no problem|got it|alright)(?: thing)?[!,.:] +(?=\S)",
        r"(?:i'd be happy to|i would be happy to|happy to|i can help)[^.!:\n]{0,80}[.!:] *",
        r"based on (?:the|this) (?:provided |given )?image(?: (?:you )?provided)?, ",
        rf"(?:{_HERE}|below (?:is|are)|the following (?:is|are)) [^:.\n]{{1,60}}?\b{_CAPTION}\b[^:.\n]{{0,80}}:\s*",
        rf"{_HERE} (?:what i see|a few|some|three|five|several)[^:.\n]{{0,80}}:\s*",
        # labels
        rf"{_KIND}{_CAPTION}(?: (?:of|for) (?:the|this) {_IMAGE})?\s*(?:\([^)\n]{{0,30}}\))?\s*[:：]\s*",
        rf"(?:an? |the |one )?(?:\w+ )?(?:caption|description|title) (?:for (?:the|this) {_IMAGE} )?"
        r"(?:(?:could|might|would|can|may) be|is|reads?)\s*[:,]?\s*(?=[\"“'A-Z])",
        r"(?:option|caption|version) \d+[^:\n]{0,40}:\s*",
        # "the image shows"
        rf"{_THE_IMAGE} {_SHOWS}:?\s+(?!that\b|how\b|what\b|when\b|why\b|where\b|both\b)",
        r"(?:the|this) (?:image|picture) is (?=an? )",
        rf"(?:in|on) {_THE_IMAGE},? (?:we|you|one|i) (?:can |could )?(?:clearly )?see +(?!that\b|how\b)",
        rf"(?:in|on) {_THE_IMAGE}(?:,\s*|\s+(?=there (?:is|are)\b))",
        r"(?:we|you|i) (?:can )?see +(?=an?\b|the\b|two\b|three\b|several\b|many\b|some\b)",
        r"(?:this|it|that|here) is an? (?:image|picture) (?:of|showing|depicting|that shows) +",
        rf"(?:this|it|that|here) is (?=an? (?:[\w-]+ ){{0,3}}{_MEDIUM} (?:of|showing)\b)",
        r"an? (?:image|picture) (?:of|showing|depicting|that shows|featuring) +",
    )
)
_OFFERS = (
    r"(?:please )?let me know if|is there anything|would you like (?:me|to)|do you want me to|i hope (?:this|that)|"
    r"hope this helps|feel free to|if you(?:'d like| would like| need| have any| want)"
)
_CLOSINGS = re.compile(rf"(?:\s|^)(?:{_OFFERS})\b[^\n]{{0,200}}[.!?]?(?:\s*[^\w\s.,;:\"')])*\s*\Z", re.IGNORECASE)
_BULLET = re.compile(
    r"^\s*(?:[-*•·‣▪●–—]\s+|\(?\d{1,2}[.)]\s+|(?:option|caption|version) \d+[^:\n]{0,40}:\s*)(?=\S)", re.IGNORECASE
)
_OPTION = re.compile(r"\W*(?:option|caption|version) 1\b", re.IGNORECASE)
_OFFERED = re.compile(
    r"\b(?:captions|options|suggestions|descriptions|versions|alternatives|choices|variations)\b", re.I
)
_ARTEFACT = re.compile(r"\bara+f+(?:e[de]?|ed)\b (?=\w)", re.IGNORECASE)
_PLACEHOLDER = re.compile(
    r"\[(?:insert|your|name|brand|company|product|describe|add|enter|specific|location|date|city|title|caption|person|"
    r"artist|colou?r|object|subject|description|image|placeholder|alt text)\b[^\]\n]{0,60}\]|"
    r"\{\{[^}\n]{1,40}\}\}|\{[a-z_]{3,30}\}|<(?:insert|your)\b[^>\n]{0,60}>|<(?:caption|description|image)>",
    re.IGNORECASE,
)
_ROLE = re.compile(r"(?:^|\n|[.!?] )\W{0,4}(?:assistant|user|human|system) ?: ", re.IGNORECASE)
_LONGEST_ECHO = 8
"""Words on end of the prompt, outside its quotation marks, that an answer may have in common with it, less one."""


def words_of(text: str) -> list[str]:
    """The words of a text, in one case, without punctuation."""
    return re.findall(r"[^\W_]+", re.sub("['’]", "", unicodedata.normalize("NFKC", text).casefold()))


def unquoted(text: str, longest: int = 400) -> str:
    """A text without what stands in quotation marks, up to so many characters: the words of others, as on signs."""
    text = re.sub(_QUOTED.replace("%d", str(longest)), " ", text)
    return re.sub(_SINGLE_QUOTED.replace("%d", str(longest)), " ", text)


def tidy(text: str, changes: list[str]) -> str:
    """Prose in one line: openings, closing remarks, lists and quotation marks around it put right."""
    upper = not text.strip()[:1].islower()
    text = _without_closing(text.strip(), changes)
    text = _without_openings(_as_prose(text, changes), changes)
    found = _ARTEFACT.sub("", text)
    if found != text:
        changes.append("artefact")
    if upper and ("opening" in changes or found != text):
        found = _capitalised(found)
    return " ".join(found.split())


def _without_closing(text: str, changes: list[str]) -> str:
    found = _CLOSINGS.sub("", text).strip()
    if found and found != text:
        changes.append("closing")
        return found
    return text


def _without_openings(text: str, changes: list[str]) -> str:
    """A text that begins with what is to be seen. Nothing is taken away that leaves no two words."""
    for _ in range(6):
        before = text
        for opening in _OPENINGS:
            found = opening.match(text)
            if found and len(words_of(text[found.end() :])) >= 2:
                text = text[found.end() :].strip()
                _note(changes, "opening")
                break
        text = _without_quotes(text, changes)
        if text == before:
            break
    return text


def _without_quotes(text: str, changes: list[str]) -> str:
    """A text out of one pair of quotation marks around the whole of it."""
    close = _PAIRS.get(text[:1])
    if close is None or len(text) < 3:
        return text
    inside, end = text[1:-1], text[-1:]
    if end in ".,!" and text[-2:-1] == close:
        inside, end = text[1:-2] + end, close
    simple = inside if close != "'" else re.sub(r"(?<=\w)'(?=\w)", "", inside)
    if end != close or close in simple or text[0] in simple:
        return text
    _note(changes, "quotes")
    return inside.strip()


def _as_prose(text: str, changes: list[str]) -> str:
    """Lines as one: of several captions that are offered the first, items of a list as sentences or with commas."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    items = [bool(_BULLET.match(line)) for line in lines]
    if sum(items) < 2 and not (items and items[0] and len(lines) == 1):
        return re.sub(r"(?<=[^\W\d])\n+(?=[A-Z][\w ]{0,30}: )", ". ", text)  # labels, a line each
    first = items.index(True)
    offered = any(_OFFERED.search(line) for line in lines[:first]) or _OPTION.match(lines[first])
    bare = [_BULLET.sub("", line) for line in lines]
    if offered:
        _note(changes, "first")
        return bare[first]
    _note(changes, "list")
    short = all(len(line.split()) <= 4 for line, item in zip(bare, items, strict=True) if item)
    parts = [bare[0]]
    for line, item, after_item in zip(bare[1:], items[1:], items, strict=False):
        if item and short:
            parts[-1] = parts[-1].rstrip(" .,;")
            parts[-1] += " " if parts[-1].endswith(":") else ", " if after_item else ": "
            parts[-1] += line
            continue
        parts[-1] += "" if parts[-1][-1:] in tuple(".!?:;,") else "."
        parts.append(line)
    return " ".join(parts)


def _capitalised(text: str) -> str:
    """A text with a capital at its beginning, unless its first word has one within, as iPhone."""
    first = text.split(" ", 1)[0]
    return text if any(c.isupper() for c in first) else text[:1].upper() + text[1:]


def _note(changes: list[str], name: str) -> None:
    if name not in changes:
        changes.append(name)


def leaks(text: str, prompt: str, alt: str | None) -> bool:
    """Whether a text has gaps to fill in, another speaker, or words of the prompt that are neither quoted there nor of
    the alt text."""
    bare = unquoted(text)
    if _PLACEHOLDER.search(bare) or _ROLE.search(bare):
        return True
    asked = unquoted(prompt.replace(alt, " ") if alt else prompt)
    runs = _runs(words_of(asked), _LONGEST_ECHO)
    return not runs.isdisjoint(_runs(words_of(bare), _LONGEST_ECHO))


def _runs(words: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
