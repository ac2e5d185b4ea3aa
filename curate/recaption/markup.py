"""What models write around a caption: control characters, thinking, tokens, wrappers, the prompt, Markdown.

Each function takes one thing away, and notes its name in `changes` where there was any.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from typing import Any

_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\uffff]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_THINKING = "think|thinking|thought|thoughts|reasoning|reflection|scratchpad"
_WRAPPERS = "answer|caption|description|output|response|result|final_answer|final"
_TOKEN = (
    r"<\|[^|<>\n]{1,40}\|>|</?(?:s|pad|unk|eos|bos|sep|cls|mask|image|img|im_patch|im_start|im_end|row|od|ocr|grounding|"
    r"image_soft_token|start_of_turn|end_of_turn|end_of_utterance|fake_token_around_image|start_of_image|end_of_image|"
    r"box|ref|quad|point|poly|loc_\d+|0x[0-9A-F]{2}|extra_id_\d+|unused\d+)>|"
    r"\[/?INST\]|\[(?:SEP|CLS|PAD|UNK|EOS|BOS|IMG)\]|<</?SYS>>"
)
_TOKENS = re.compile(_TOKEN)
_TOKENS_AROUND = re.compile(rf"\A(?:\s*(?:{_TOKEN}))+|(?:(?:{_TOKEN})\s*)+\Z")
_HTML = re.compile(r"</?(?:p|b|i|em|strong|br|span|div|u|ul|ol|li|h[1-6])\s*/?>", re.IGNORECASE)
_TABLE_ROW = re.compile(r"^\s*\|.*\|\s*$", re.MULTILINE)
_SPEAKER = re.compile(r"\A\W{0,4}(?:assistant|gpt|model)\W{0,3}(?::|\n)\s*", re.IGNORECASE)
_INSTRUCTION = re.compile(
    r"(?:describe|write|caption|generate|provide|give|create|tell|summari[sz]e|list|what|please|explain|you)\b",
    re.IGNORECASE,
)


def settle_characters(text: str, changes: list[str]) -> str:
    """A text in composed characters (NFC), without control characters, marks of direction, and halves of characters
    that were cut off; lines end with \\n."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ").replace("\u2028", "\n")
    kept = _SURROGATES.sub("", _INVISIBLE.sub("", text))
    if kept != text:
        changes.append("characters")
    return unicodedata.normalize("NFC", kept)


def without_thinking(text: str, changes: list[str]) -> tuple[str, bool]:
    """A text without what a thinking model thought, and whether it came to the end of that."""
    found = re.sub(r"◁(/?think)▷", r"<\1>", text)
    found = re.sub(rf"<({_THINKING})>.*?</\1>", "", found, flags=re.DOTALL | re.IGNORECASE)
    found = re.sub(rf"\A.*</(?:{_THINKING})>", "", found, flags=re.DOTALL | re.IGNORECASE)  # the template opened it
    opened = re.search(rf"<(?:{_THINKING})>", found, flags=re.IGNORECASE)
    if opened:
        found = found[: opened.start()]
    if found != text:
        changes.append("thinking")
    return found, opened is None


def plain_text(text: str, prompt: str, changes: list[str]) -> tuple[str, str | None]:
    """A text without what stands around it, and without Markdown; and the outcome where no prose is to be had."""
    text = without_wrappers(without_tokens(text.strip(), changes), changes)
    text, problem = _from_json(text, prompt, changes)
    text = without_echo(text, prompt, changes)
    if problem is None and _TOKENS.search(text):
        problem = "leaked"
    if problem is None and len(_TABLE_ROW.findall(text)) >= 2:
        problem = "markup"
    return without_markdown(text, changes), problem


def without_tokens(text: str, changes: list[str]) -> str:
    """A text without a template's tokens at its beginning and its end."""
    found = _TOKENS_AROUND.sub("", text).strip()
    if found != text:
        changes.append("tokens")
    return found


def without_wrappers(text: str, changes: list[str]) -> str:
    """A text out of <answer>...</answer> and the like, out of a code block, and without tags and entities of HTML."""
    found = re.sub(rf"\A<({_WRAPPERS})>(.*?)(?:</\1>\s*)?\Z", r"\2", text, flags=re.DOTALL | re.IGNORECASE)
    found = re.sub(r"\A```(?:\w{1,12}\n)?\s*(.*?)\s*(?:```)?\Z", r"\1", found, flags=re.DOTALL)
    found = html.unescape(_HTML.sub(" ", found)).strip()
    if found != text:
        changes.append("wrapper")
    return found


def _from_json(text: str, prompt: str, changes: list[str]) -> tuple[str, str | None]:
    """The caption in JSON that holds one; as it stands where the prompt wants JSON."""
    if text[:1] not in ("{", "[") or re.search(r"\bjson\b", prompt, re.IGNORECASE):
        return text, None
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text, "markup" if re.match(r'[{\[]\s*["{]', text) else None
    while isinstance(value, (dict, list)) and len(value) == 1:
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    if isinstance(value, dict):
        named = [v for k, v in value.items() if re.search("caption|description|answer", k, re.IGNORECASE)]
        value = named[0] if len(named) == 1 else value
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = ", ".join(value)
    if not isinstance(value, str):
        return text, "markup"
    changes.append("wrapper")
    return value.strip(), None


def without_echo(text: str, prompt: str, changes: list[str]) -> str:
    """A text that does not begin with the prompt or a speaker's name. A prompt that is the beginning of a caption, such
    as BLIP's "a photograph of", is no echo."""
    wanted = " ".join(prompt.split())
    flat = " ".join(re.sub(r"\A\W{0,4}(?:user|human)\W{0,3}(?::|\n)\s*", "", text, flags=re.IGNORECASE).split())
    found = text
    if (wanted[-1:] in tuple(".?!:") or _INSTRUCTION.match(wanted)) and flat.casefold().startswith(wanted.casefold()):
        found = flat[len(wanted) :].strip(" :-")
    found = _SPEAKER.sub("", found)
    if found != text:
        changes.append("echo")
    return found


def without_markdown(text: str, changes: list[str]) -> str:
    """A text without Markdown's emphasis, headings, rules, links, quotations and marks of code; lists are left."""
    found = re.sub(r"!?\[([^\]\n]+)\]\((?:https?:|/|#|mailto:)[^)\s]*\)", r"\1", text)
    found = re.sub(r"^ {0,3}(?:[-*_] ?){3,}$", "", found, flags=re.MULTILINE)
    found = re.sub(r"^ {0,3}#{1,6} +(.*?) *#*$", lambda m: _as_label(m[1]), found, flags=re.MULTILINE)
    found = re.sub(r"^ {0,3}\*\*([^*\n]+)\*\*$", lambda m: _as_label(m[1]), found, flags=re.MULTILINE)
    found = re.sub(r"^ {0,3}> ?", "", found, flags=re.MULTILINE)
    found = re.sub(r"^ *```.*$", "", found, flags=re.MULTILINE)
    found = re.sub(r"`([^`\n]+)`", r"\1", found)
    found = re.sub(r"\*\*\*?(?=\S)([^\n]*?\S)\*\*\*?", r"\1", found)
    found = re.sub(r"(?<!\w)__(?=\S)([^\n]*?\S)__(?!\w)", r"\1", found)
    found = re.sub(r"(?<![\w*])\*(?=[^\s*])([^*\n]*?[^\s*])\*(?![\w*])", r"\1", found)
    found = re.sub(r"(?<!\w)_(?=[^\s_])([^_\n]*?[^\s_])_(?!\w)", r"\1", found)
    found = found.replace("**", "")  # what a cut left open
    if found != text:
        changes.append("markdown")
    return found


def _as_label(text: str) -> str:
    """A heading as prose: it ends with a colon, unless it is a sentence."""
    text = text.strip("*_ ")
    return text if text[-1:] in tuple(".:!?") else f"{text}:"
