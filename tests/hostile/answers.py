"""Answers that do harm, each with the one reason that its row must end with. Filled into the hostile server's PAGES."""

from __future__ import annotations

import gzip
import random
import zlib
from dataclasses import dataclass

import hostile_web
from hostile_web import CHUNKED, Page, bomb, endless, head, pieces, reset, sized, whole

from curate.ledger.schema import Reason

MAX_BYTES = 2_000_000  # of a body, in these tests
OK = None


@dataclass(frozen=True)
class Answer:
    """One page, and the reason: None where its body is good, `HELD` where the deadline ends it."""

    page: Page
    reason: Reason | None


IMAGE = hostile_web.good_image()
PROTOCOL, LARGE, TIMEOUT, CONNECT = Reason.PROTOCOL, Reason.TOO_LARGE, Reason.TIMEOUT, Reason.CONNECT
NOISE = random.Random(5).randbytes(1 << 16)


def deflated(data: bytes, wbits: int) -> bytes:
    squeeze = zlib.compressobj(9, wbits=wbits)
    return squeeze.compress(data) + squeeze.flush()


SIZES = {  # N9
    "endless, chunked": Answer(endless(head(CHUNKED), b"10000\r\n" + bytes(65536) + b"\r\n"), LARGE),
    "endless, no length": Answer(endless(head(), bytes(65536)), LARGE),
    "endless, in small chunks": Answer(endless(head(CHUNKED), (b"400\r\n" + bytes(1024) + b"\r\n") * 64), LARGE),
    "10 GB declared": Answer(pieces(head("Content-Length: 10000000000"), bytes(1000), rest=60), LARGE),
    "one byte more": Answer(sized(MAX_BYTES + 1), LARGE),
    "exactly": Answer(sized(MAX_BYTES), OK),
    "length lies high": Answer(head("Content-Length: 100000") + IMAGE, PROTOCOL),
    "length lies high, by one": Answer(head(f"Content-Length: {len(IMAGE) + 1}") + IMAGE, PROTOCOL),
    "negative length": Answer(head("Content-Length: -1") + IMAGE, PROTOCOL),
    "length with a plus": Answer(head(f"Content-Length: +{len(IMAGE)}") + IMAGE, PROTOCOL),
    "length in hex": Answer(head("Content-Length: 0x10") + IMAGE, PROTOCOL),
    "length of 2^64 + 5": Answer(head(f"Content-Length: {2**64 + 5}") + IMAGE, PROTOCOL),
    "two lengths": Answer(head("Content-Length: 5", "Content-Length: 6") + b"abcdef", PROTOCOL),
    "list of lengths": Answer(head("Content-Length: 5, 6") + b"abcdef", PROTOCOL),
    "length and chunked": Answer(head("Content-Length: 5", CHUNKED) + b"3\r\nabc\r\n0\r\n\r\n", PROTOCOL),
    "chunk cut short": Answer(head(CHUNKED) + b"ff\r\nabc", PROTOCOL),
    "no last chunk": Answer(head(CHUNKED) + b"3\r\nabc\r\n", PROTOCOL),
    "chunk of 2^64": Answer(head(CHUNKED) + b"10000000000000005\r\nabcde\r\n0\r\n\r\n", PROTOCOL),
    "chunk of 2^62": Answer(endless(head(CHUNKED) + b"4000000000000000\r\n", bytes(65536)), LARGE),
    "chunk of words": Answer(head(CHUNKED) + b"zz\r\nabc\r\n0\r\n\r\n", PROTOCOL),
    "negative chunk": Answer(head(CHUNKED) + b"-3\r\nabc\r\n0\r\n\r\n", PROTOCOL),
    "chunk too long for its size": Answer(head(CHUNKED) + b"3\r\nabcdef\r\n0\r\n\r\n", PROTOCOL),
    "chunk extension without end": Answer(endless(head(CHUNKED) + b"3;x=", b"y" * 10_000), TIMEOUT),  # no body comes
    "trailers without end": Answer(endless(head(CHUNKED) + b"3\r\nabc\r\n0\r\n", b"A: b\r\n" * 1000), PROTOCOL),
}

GZIP, DEFLATE = "Content-Encoding: gzip", "Content-Encoding: deflate"
BOMBS = {  # N10: a megabyte that becomes a thousand
    "gzip": Answer(bomb(31, 1000, GZIP), LARGE),
    "gzip, endless": Answer(bomb(31, 0, GZIP), LARGE),
    "gzip, chunked": Answer(
        pieces(head(GZIP, CHUNKED), b"%x\r\n" % len(g := gzip.compress(bytes(9 * MAX_BYTES))) + g, b"\r\n0\r\n\r\n"),
        LARGE,
    ),
    "x-gzip": Answer(bomb(31, 1000, "Content-Encoding: x-gzip"), LARGE),
    "deflate": Answer(bomb(15, 1000, DEFLATE), LARGE),
    "bare deflate": Answer(bomb(-15, 1000, DEFLATE), LARGE),
    "gzip twice": Answer(whole(gzip.compress(gzip.compress(bytes(1 << 24))), "Content-Encoding: gzip, gzip"), PROTOCOL),
    "gzip in two headers": Answer(whole(gzip.compress(gzip.compress(bytes(1 << 20))), GZIP, GZIP), PROTOCOL),
    "br": Answer(whole(b"\x1b" + bytes(1000), "Content-Encoding: br"), PROTOCOL),
    "zstd": Answer(whole(b"\x28\xb5\x2f\xfd" + bytes(1000), "Content-Encoding: zstd"), PROTOCOL),
    "compress": Answer(whole(b"\x1f\x9d" + bytes(1000), "Content-Encoding: compress"), PROTOCOL),
    "unheard of": Answer(whole(IMAGE, "Content-Encoding: " + "x" * 5000), OK),
    "no gzip": Answer(whole(IMAGE, GZIP), PROTOCOL),
    "gzip cut short": Answer(whole(gzip.compress(NOISE)[:-30000], GZIP), PROTOCOL),
    "gzip with a wrong sum": Answer(whole(gzip.compress(IMAGE)[:-8] + bytes(8), GZIP), PROTOCOL),
    "many members": Answer(endless(head(GZIP), gzip.compress(b"x") * 1000), LARGE),
    "gzip as transfer": Answer(endless(head("Transfer-Encoding: gzip"), gzip.compress(bytes(1 << 20))), LARGE),  # as is
}

SLOW = {  # N11: each is held until the deadline
    "silence": pieces(rest=60),
    "head by the byte": pieces(*(bytes([b]) for b in whole(IMAGE)), pause=0.1, rest=60),
    "status line by the byte": endless(b"HTTP/1.1 200 ", b"O", 0.1),
    "a header without end": endless(b"HTTP/1.1 200 OK\r\nA: ", b"b", 0.1),
    "headers without end": endless(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n", 0.1),
    "body by the byte": endless(head("Content-Length: 100000"), b"x", 0.1),
    "body without length": endless(head(), b"x", 0.1),
    "chunks by the byte": endless(head(CHUNKED), b"1\r\nx\r\n", 0.1),
    "chunk size by the byte": endless(head(CHUNKED), b"0", 0.1),
    "chunk extension by the byte": endless(head(CHUNKED) + b"3;", b"x", 0.1),
    "trailers by the byte": endless(head(CHUNKED) + b"3\r\nabc\r\n0\r\n", b"A: b\r\n", 0.1),
    "stall in the middle": pieces(head(f"Content-Length: {len(IMAGE)}") + IMAGE[: len(IMAGE) // 2], rest=60),
    "stall before the last byte": pieces(head(f"Content-Length: {len(IMAGE)}") + IMAGE[:-1], rest=60),
    "interim answers": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.1),
    "a flood of interim answers": endless(b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 20, 0.005),
    "gzip by the byte": endless(head(GZIP) + deflated(b"", 31)[:10], b"\0\0\0\xff\xff", 0.1),
    "a redirect by the byte": endless(head("Location: /good", status="302 Found")[:-2], b"A: b\r\n", 0.1),
}
SLOW_ANSWERS = {name: Answer(page, TIMEOUT) for name, page in SLOW.items()}

BROKEN = {  # N12
    "10,000 headers": Answer(head(*(f"A{i}: {'b' * 100}" for i in range(10_000))) + IMAGE, PROTOCOL),
    "a header of 1 MB": Answer(head("A: " + "b" * 1_000_000) + IMAGE, PROTOCOL),
    "a name of 1 MB": Answer(head("b" * 1_000_000 + ": A") + IMAGE, PROTOCOL),
    "a status of 1 MB": Answer(head(status="200 " + "b" * 1_000_000) + IMAGE, PROTOCOL),
    "headers for ever": Answer(endless(b"HTTP/1.1 200 OK\r\n", b"A: bbbbbbbbb\r\n" * 1000), PROTOCOL),
    "a header for ever": Answer(endless(b"HTTP/1.1 200 OK\r\nA: ", b"b" * 10_000), PROTOCOL),
    "CR in a header": Answer(head("A: b\rLocation: http://127.0.0.1/") + IMAGE, PROTOCOL),
    "NUL in a header": Answer(head("A: b\0c") + IMAGE, PROTOCOL),
    "NUL in a name": Answer(head("A\0: b") + IMAGE, PROTOCOL),
    "blank in a name": Answer(head("Content-Length : 3") + IMAGE, PROTOCOL),
    "no colon": Answer(head("no colon here") + IMAGE, PROTOCOL),
    "no name": Answer(head(": b") + IMAGE, PROTOCOL),
    "bad status line": Answer(b"HELLO\r\n\r\n" + IMAGE, PROTOCOL),
    "status of words": Answer(b"HTTP/1.1 abc OK\r\n\r\n" + IMAGE, PROTOCOL),
    "status 99": Answer(b"HTTP/1.1 99 OK\r\nContent-Length: 0\r\n\r\n", PROTOCOL),
    "status 2000": Answer(b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n", PROTOCOL),
    "HTTP/0.9": Answer(IMAGE, PROTOCOL),
    "HTTP/2 settings": Answer(b"\0\0\x12\x04\0\0\0\0\0" + bytes(18), PROTOCOL),
    "version 9.9": Answer(b"HTTP/9.9 200 OK\r\nContent-Length: 3\r\n\r\nabc", PROTOCOL),
    "a TLS alert": Answer(b"\x15\x03\x03\x00\x02\x02\x28" * 10, PROTOCOL),
    "SSH": Answer(b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(100) + b"\r\n\r\n", PROTOCOL),
    "a request": Answer(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", PROTOCOL),
    "nothing": Answer(b"", CONNECT),
    "only blank lines": Answer(b"\r\n" * 50_000, CONNECT),
    "head cut short": Answer(b"HTTP/1.1 200 OK\r\nContent-Le", PROTOCOL),
    "a reset": Answer(reset, CONNECT),
    "204 with a body": Answer(whole(IMAGE, status="204 No Content"), PROTOCOL),
    "205 with a body": Answer(whole(IMAGE, status="205 Reset Content"), PROTOCOL),
    "206 unasked": Answer(whole(IMAGE, "Content-Range: bytes 0-9/99", status="206 Partial"), PROTOCOL),
    "304 unasked": Answer(head("ETag: x", status="304 Not Modified"), PROTOCOL),
    "101 unasked": Answer(head("Upgrade: websocket", "Connection: Upgrade", status="101 Switching") + b"abc", PROTOCOL),
    "two answers": Answer(whole(IMAGE) + whole(b"another"), OK),
}

REDIRECTS = {  # N7
    "itself": Answer(
        head("Location: /redirect/itself", "Content-Length: 0", status="302 F"), Reason.TOO_MANY_REDIRECTS
    ),
    "in a circle": Answer(head("Location: /redirect/back", status="301 F"), Reason.TOO_MANY_REDIRECTS),
    "back": Answer(head("Location: /redirect/in-a-circle", status="308 F"), Reason.TOO_MANY_REDIRECTS),
    "absolute, in a circle": Answer(head("Location: ?again", status="307 F"), Reason.TOO_MANY_REDIRECTS),
    **{
        f"{status} to nowhere": Answer(whole(b"", status=f"{status} X"), PROTOCOL)
        for status in (300, 301, 302, 303, 304, 305, 306, 307, 308)
    },
    "to an empty place": Answer(head("Location: ", status="302 F"), PROTOCOL),
    "to blanks": Answer(head("Location:      ", status="302 F"), PROTOCOL),
    "to a fragment": Answer(head("Location: #x", status="302 F"), Reason.TOO_MANY_REDIRECTS),
    "to port 0": Answer(head("Location: http://a.test:0/", status="302 F"), Reason.BAD_URL),
    "to 10 kB": Answer(head("Location: /" + "a" * 10_000, status="302 F"), Reason.BAD_URL),
    "to odd bytes": Answer(head("Location: http://\xff\xfe/", status="302 F"), Reason.BAD_URL),
    "two ways": Answer(head("Location: /good", "Location: file:///etc/passwd", status="302 F"), OK),
    "relative": Answer(head("Location: ../good", status="302 F"), OK),
    "with a body that never ends": Answer(endless(head("Location: /good", status="302 F"), bytes(65536)), OK),
}

GROUPS = {"size": SIZES, "bomb": BOMBS, "slow": SLOW_ANSWERS, "broken": BROKEN, "redirect": REDIRECTS}
ANSWERS = {f"{group}/{name}": answer for group, answers in GROUPS.items() for name, answer in answers.items()}


def path_of(name: str) -> str:
    """Where an answer is served."""
    return "/" + name.replace(" ", "-").replace("^", "")


hostile_web.PAGES.update({path_of(name): answer.page for name, answer in ANSWERS.items()})

# Of these, as many at once as a worker has places; the cap is the default's.
AT_ONCE = {
    "large bodies": (sized(31_000_000), OK),
    "bodies past the cap": (sized(33_000_000), LARGE),
    "endless bodies": (endless(head(), bytes(1 << 18)), LARGE),
    "bombs": (bomb(31, 1000, GZIP), LARGE),
    "bombs that end below the cap": (pieces(head(GZIP) + gzip.compress(bytes(31_000_000), 6)), OK),
    "headers of 1 MB": (BROKEN["a header of 1 MB"].page, PROTOCOL),
    "headers for ever": (BROKEN["headers for ever"].page, PROTOCOL),
}
hostile_web.PAGES.update({path_of(f"at once/{name}"): page for name, (page, _) in AT_ONCE.items()})
hostile_web.PAGES[path_of("at once/bodies of 4 MB")] = sized(4_000_000)
