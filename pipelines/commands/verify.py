"""`tastemaker verify`: every file of a data folder read again, and compared with the records."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.options import Options, Result, argument, command, option


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    data: str = argument("DATA", "the data folder")
    repair: bool = option(
        "remove the records of damaged shards, so that the same command makes them again", default=False
    )


def run(options: VerifyOptions) -> Result:
    """Find damaged files, and say what repairs them; exit code 1 where there are some."""
    from curate import verify
    from curate.store.ownership import open_data

    data = open_data(options.data)
    checked = 0
    damages: list[verify.Damage] = []
    for found in verify.verify(data):
        checked += 1
        if found is not None:
            damages.append(found)
            print(f"damaged  {found.path}: {found.what}\n         to repair it, {found.repair}")
    print(f"{len(damages):,} of {checked:,} files are damaged" if damages else f"{checked:,} files, none damaged")

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
        print(f"{removed:,} record{'s' if removed != 1 else ''} removed")
    return Result(facts=facts, next="\n      ".join(following), code=1)
