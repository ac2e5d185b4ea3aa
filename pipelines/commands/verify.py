"""`tastemaker verify`: every file of a data folder, or of packed shards, read again and compared with the records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aesthetic.errors import UserError
from pipelines.options import Options, Result, argument, command, option
from pipelines.terminal import counted

if TYPE_CHECKING:
    from curate.verify import Damage


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    data: str = argument("DATA", "the data folder, or a folder of packed shards, copied anywhere")
    repair: bool = option(
        "remove the records of damaged shards, so that the same command makes them again", default=False
    )


def run(options: VerifyOptions) -> Result:
    """Find damaged files, and say what repairs them; exit code 1 where there are some."""
    from curate import verify
    from curate.store.ownership import open_data

    if (packed := _packed_shards(options.data)) is not None:
        return _verify_packed(packed, options.repair)
    data = open_data(options.data)
    checked, damages = _report(verify.verify(data))

    strays = verify.strays(data)
    if strays and not any(d.path == d.record for d in damages):  # else they may be a damaged record's
        print(f"files that no record names: {len(strays):,} ({strays[0]} is one), left by a run that was killed")
    if not any(d.record.parent.name == "plan" for d in damages):
        for stage, shards in verify.unfinished(data).items():
            print(f"shards that are not {stage} yet: {len(shards):,} ({shards[0]:05d} is one)")
    facts = {"checked": checked, "damaged": [str(d.path) for d in damages], "strays": [str(p) for p in strays]}
    if not damages:
        return Result(facts=facts)

    following = [command("verify", data, "--repair")]
    if options.repair:
        following = verify.remedies(data, damages)
        with data.hold():
            verify.repair(data, damages)
        removed = len({d.record for d in damages})
        print(f"{counted(removed, 'record')} removed")
    return Result(facts=facts, next="\n      ".join(following), code=1)


def _report(files: Iterable[Damage | None]) -> tuple[int, list[Damage]]:
    """Print what is damaged as it is found; how many files were read, and which of them are damaged."""
    checked = 0
    damages: list[Damage] = []
    for found in files:
        checked += 1
        if found is not None:
            damages.append(found)
            print(f"damaged  {found.path}: {found.what}\n         to repair it, {found.repair}")
    print(f"{len(damages):,} of {checked:,} files are damaged" if damages else f"{checked:,} files, none damaged")
    return checked, damages


def _packed_shards(place: str) -> Path | None:
    """The folder of packed shards that is meant; None where it is no such folder."""
    from curate.sources.dataset import packed_files
    from curate.store.clients import is_url
    from train.places import bring, local_folder

    folder = local_folder(place)
    if is_url(place):
        bring(folder, "manifest.json")
        if packed_files(folder):
            bring(folder)
    return folder if packed_files(folder) and not (folder / "plan").is_dir() else None


def _verify_packed(folder: Path, repair: bool) -> Result:
    from curate import verify

    if repair:
        raise UserError(f"{folder} is a folder of packed shards: copy what is damaged again, or pack it again")
    checked, damages = _report(verify.verify_packed(folder))
    if missing := verify.missing_shards(folder):
        print(f"shards that are not in this copy, which is used without them: {len(missing):,} ({missing[0]} is one)")
    facts = {"checked": checked, "damaged": [str(d.path) for d in damages], "missing": missing}
    return Result(facts=facts, code=1 if damages else 0)
