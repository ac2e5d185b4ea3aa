"""The command line: finds the command, reads its options, runs it, and turns what came of it into an exit code.

Exit codes: 0 done (failed rows are data), 1 an error of ours, no room, or what was printed is lost, 2 bad input or
recipe, or a machine that lacks something, 3 nothing kept, 130 interrupted.
Help, query, select, status and recipe start neither Ray nor torch, so imports here stay light.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import NoReturn

from aesthetic.errors import UserError, nearest
from curate.store.cache import leave
from pipelines.commands import COMMANDS, find
from pipelines.faults import check_limits, ensure_home, explain
from pipelines.options import Result, add_arguments, facts_of, flags_of, from_here, from_parsed
from pipelines.terminal import SafeStream, open_descriptors, safe_streams

EXAMPLES = """\
  tastemaker curate laion.parquet --out data --limit 1000     a list to curated shards
  tastemaker select data --name stricter --set select.rules.beautiful='laion_v2 >= 5.5'
  tastemaker pack data --name stricter                        the chosen images as shards
  tastemaker studio data                                      the same and more in the browser: look, decide, rate
  tastemaker query data "select reason, count(*) from ledger group by all"
  tastemaker train data/shards/stricter --out model           a diffusion model of these
  tastemaker sample model "a red fox in the snow" --n 4       images from it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    with safe_streams() as (out, err):
        try:
            return _exit_code(_run(words), out, err)
        except SystemExit as e:  # argparse: help was shown, or arguments are wrong
            raise SystemExit(_exit_code(e.code if isinstance(e.code, int) else 0, out, err)) from None


def _run(words: list[str]) -> int:
    signals: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    try:
        command = next((word for word in words if not word.startswith("-")), None)
        if command == "score":
            given = shlex.join(word for word in words if word not in ("score", "--head")) or "DATA NAME=HEAD"
            raise UserError(f"`score` is called `annotate` now: tastemaker annotate {given}")
        parser = build_parser(command)
        if command is not None and command not in COMMANDS:
            hint = _did_you_mean(command, COMMANDS)
            parser.error(f"argument COMMAND: invalid choice: {command!r} (choose from {', '.join(COMMANDS)}){hint}")
        flags = ["--help", "--version", *(flags_of(find(command)[0]) if command else ())]
        options = itertools.takewhile(lambda word: word != "--", words)
        for word in options:
            if word.startswith("--") and " " not in word and not any(f.startswith(word.split("=")[0]) for f in flags):
                # before argparse misses the one that was meant
                parser.error(f"unrecognized arguments: {word}{_did_you_mean(word.split('=')[0], flags)}")
        parsed, unknown = parser.parse_known_args(words)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{_did_you_mean(unknown[0], flags)}")
        if parsed.version:
            from importlib.metadata import version

            print(version("tastemaker"))
            return 0
        if parsed.command is None:
            parser.print_help()
            return 2
        kind, run = find(parsed.command)
        options = from_parsed(kind, parsed)
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, interrupt)  # how a batch system asks for an end
        check_limits(parsed.command)
        result: Result = run(options)

        # how every command ends: what it has to say, the paths it wrote, what to type next, JSON where asked for
        if result.text:
            print(result.text)
        if result.paths:
            print("    ".join(f"{name}  {from_here(path)}" for name, path in result.paths.items()))
        if result.look:
            print(f"look: {result.look}")
        if result.next:
            print(f"next: {result.next}")
        if options.json and not result.own_json:
            paths = {name: str(path) for name, path in result.paths.items()}
            print(json.dumps({**result.facts, "options": facts_of(options), "paths": paths}, default=str))
        return result.code
    except (KeyboardInterrupt, Exception) as e:
        if signals or isinstance(e, KeyboardInterrupt):  # DuckDB, for one, makes an error of its own of a signal
            _complain("interrupted; run the same command again to go on")
            return 130
        if "--verbose" in words:
            traceback.print_exc()
        code, text = explain(e)
        _complain(text)
        return code


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = nearest(word, known)
    return f". Did you mean {near}?" if near else ""


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser of every command; only the one that is asked for has its options, and is imported."""
    parser = argparse.ArgumentParser(
        prog="tastemaker",
        description="Curate image-text data by taste: URL lists to scored, filtered webdataset shards.",
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and end")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, help in COMMANDS.items():
        own = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        if name == command:
            add_arguments(own, find(name)[0])
    return parser


def _exit_code(code: int, out: SafeStream, err: SafeStream) -> int:
    """The exit code, once all is written: 1 where work was done and what it printed is lost.

    A reader who has left, as in `tastemaker heads | head -1`, has lost nothing.
    """
    out.flush()
    err.flush()
    if lost := out.output_lost or err.output_lost:
        _complain(f"what was printed could not be written: {lost.strerror}")
        return code or 1
    return code


def _complain(text: str) -> None:
    print(f"tastemaker: {text}", file=sys.stderr)


def script() -> NoReturn:
    """The console script: `main`, and an end that runs no C++ library's destructors.

    On a busy machine about one in a hundred short processes that read parquet in threads is aborted there, by pyarrow
    26's thread pool, when all is written and said; the exit code must be ours.
    """
    open_descriptors()
    ensure_home()
    try:
        code = main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except KeyboardInterrupt:  # before there was anything to interrupt
        code = 130
    leave()
    os._exit(code)


if __name__ == "__main__":
    script()
