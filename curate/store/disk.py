"""Room on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from aesthetic.errors import DiskFull
from aesthetic.files import TRY_AGAIN

RESERVE = 64 << 20
"""Bytes that are left free: room to write the records and logs that say why a run stopped."""


def check_space(root: Path, needed: int = 0) -> None:
    """Raise DiskFull where `needed` bytes would not fit beside the reserve."""
    free = shutil.disk_usage(root).free
    if free < needed + RESERVE:
        raise DiskFull(
            f"{root} has {free / 1e6:,.0f} MB free, and {(needed + RESERVE) / 1e6:,.0f} MB are needed. {TRY_AGAIN}"
        )
