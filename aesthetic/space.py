"""Which embedding space a vector belongs to: a fingerprint of encoder, weights and preprocessing, and a refusal.

A head means something only on the vectors of the space it was fitted in, and a wrong space gives plausible numbers.
So every file of vectors and every head carries what sixteen fixed images look like in its space. Two spaces are the
same where dimension and norm agree and every one of those probes points the same way in both.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.resources
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aesthetic.errors import UserError
from aesthetic.files import write_atomic
from aesthetic.untrusted import read_json_file

MIN_COSINE = 0.9995
"""How far the same probe may turn between two spaces that are the same. Devices and libraries round fp32 to within
1e-5; swapped channels, another activation, resize or checkpoint turn at least one probe much further."""

_FORMAT = "space/1"


class SpaceError(UserError):
    """A space that is not one: a file that cannot be read, probes of another shape than announced."""


class SpaceMismatch(SpaceError):
    """Vectors of one space are about to be read as those of another; the message names what differs."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Space:
    """An embedding space. Whether two are the same is for `require_same` to say, not for `==`.

    encoder: its canonical name, such as "bundled" or "open_clip:ViT-L-14-quickgelu/openai".
    dim: numbers in a vector.      norm: what was done to a vector before it is stored; "l2" gives it unit length.
    probes: (16, dim) float32, the vectors of the probe images; None where the space is only declared (a published
        head, whose encoder was not at hand when it was imported).
    details: what else is worth knowing (digests of weights, activation, preprocessing, precision, image settings);
        JSON values. Shown where spaces differ, never what decides.
    """

    encoder: str
    dim: int
    norm: str = "l2"
    probes: np.ndarray | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise SpaceError(f"{self.encoder}: a space of {self.dim} dimensions")
        try:  # as a file would give them back, so that saved and fresh ones compare
            object.__setattr__(self, "details", json.loads(json.dumps(self.details)))
        except (TypeError, ValueError, RecursionError) as e:
            raise SpaceError(f"{self.encoder}: details that JSON cannot hold: {e}") from e
        if self.probes is None:
            return
        probes = np.ascontiguousarray(self.probes, dtype=np.float32)
        if probes.ndim != 2 or probes.shape[1] != self.dim or not len(probes):
            raise SpaceError(f"{self.encoder}: probes of shape {probes.shape}, not (16, {self.dim})")
        if not np.isfinite(probes).all():
            raise SpaceError(f"{self.encoder}: a probe vector holds NaN or infinity")
        probes.flags.writeable = False
        object.__setattr__(self, "probes", probes)

    @property
    def fingerprint(self) -> str:
        """A short name, 12 hex digits: of the probes rounded to thousandths, or of what is declared.

        Equal names mean equal spaces; devices round differently, so different names need not mean different spaces.
        """
        if self.probes is None:
            what = json.dumps([self.encoder, self.dim, self.norm]).encode()
        else:
            what = np.rint(self.probes * 1000).astype("<i4").tobytes()
        return hashlib.sha256(what).hexdigest()[:12]

    def save(self, path: Path) -> None:
        """Write the space as JSON. The file appears whole or not at all; the same space gives the same bytes."""
        probes = None
        if self.probes is not None:
            data = base64.b64encode(self.probes.astype("<f4").tobytes()).decode()
            probes = {"shape": list(self.probes.shape), "float32": data}
        value = {
            "format": _FORMAT,
            "encoder": self.encoder,
            "dim": self.dim,
            "norm": self.norm,
            "fingerprint": self.fingerprint,
            "details": self.details,
            "probes": probes,
        }
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomic(Path(path), text.encode())

    @classmethod
    def load(cls, path: Path) -> Space:
        """Read what `save` wrote. Raises SpaceError, naming the file, where it holds something else."""
        try:
            value = read_json_file(path)
        except UserError as e:
            raise SpaceError(f"{e}: it should be the description of a space") from e
        try:
            if value["format"] != _FORMAT:
                raise SpaceError(f"{path}: format {value['format']!r}; this version reads {_FORMAT!r}")
            probes = None
            if value["probes"] is not None:
                data = base64.b64decode(value["probes"]["float32"], validate=True)
                probes = np.frombuffer(data, "<f4").reshape(value["probes"]["shape"])
            return cls(
                encoder=str(value["encoder"]),
                dim=int(value["dim"]),
                norm=str(value["norm"]),
                probes=probes,
                details=dict(value["details"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
            raise SpaceError(f"{path} is not the description of a space: {e!r}") from e


def require_same(ours: Space, theirs: Space, what: str = "the head") -> None:
    """Raise SpaceMismatch unless two spaces are the same; return quietly where they are.

    `what` is the thing that belongs to `ours` (a head, a folder of vectors), for the message; `theirs` is the space
    that it meets. Where either side is only declared, the encoders' names must agree instead of the probes.
    """
    differ = []
    if ours.dim != theirs.dim:
        differ.append(f"dimension {ours.dim} against {theirs.dim}")
    if ours.norm != theirs.norm:
        differ.append(f"norm {ours.norm} against {theirs.norm}")
    if ours.probes is None or theirs.probes is None:
        if ours.encoder != theirs.encoder:
            differ.append("the encoder")
    elif len(ours.probes) != len(theirs.probes):
        differ.append(f"{len(ours.probes)} probes against {len(theirs.probes)}")
    elif ours.dim == theirs.dim:
        cosines = probe_cosines(ours.probes, theirs.probes)
        worst = int(np.argmin(cosines))
        if not cosines[worst] >= MIN_COSINE:
            names = probe_names()
            name = names[worst] if len(names) == len(cosines) else str(worst)
            below = int((~(cosines >= MIN_COSINE)).sum())
            differ.append(
                f"{below} of {len(cosines)} probe images, most of all {name}: cosine {cosines[worst]:.4f}, "
                f"{MIN_COSINE} needed"
            )
    if not differ:
        return
    recorded = [
        f"{key} {ours.details[key]!r} against {theirs.details[key]!r}"
        for key in sorted(ours.details.keys() & theirs.details.keys())
        if ours.details[key] != theirs.details[key]
    ]
    raise SpaceMismatch(
        f"{what} belongs to the space of {ours.encoder} ({ours.fingerprint}), "
        f"and what it meets is of {theirs.encoder} ({theirs.fingerprint}). "
        f"They differ in: {'; '.join(differ)}." + (f" Recorded differences: {'; '.join(recorded)}." if recorded else "")
    )


def probe_cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The cosine of each probe in two matrices of shape (n, dim): (n,) float64."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(1), lengths, out=np.full(len(a), np.nan), where=lengths > 0)


def probe_names() -> list[str]:
    """The file names of the probe images, in order."""
    folder = importlib.resources.files("aesthetic") / "probes"
    return sorted(f.name for f in folder.iterdir() if f.name.endswith((".png", ".jpg")))


def probe_files() -> list[bytes]:
    """The sixteen probe images as files' bytes: drawn by a procedure (examples/draw_probes.py), kept as bytes.

    They hold what goes wrong quietly: sizes below and above an encoder's input, extreme aspects, fine lines, saturated
    and dark colours, an EXIF orientation, transparency, one channel.
    """
    folder = importlib.resources.files("aesthetic") / "probes"
    return [(folder / name).read_bytes() for name in probe_names()]


def measure(encode: Callable[[list[bytes]], np.ndarray], encoder: str, details: dict[str, Any] | None = None) -> Space:
    """The space of an encoder, from its vectors for the probe images.

    `encode` takes image files' bytes through the whole path (decoding included, in fp32) and gives (16, dim) vectors
    of unit length. Raises SpaceError where it does not.
    """
    files = probe_files()
    probes = np.asarray(encode(files), dtype=np.float32)
    if probes.ndim != 2 or len(probes) != len(files):
        raise SpaceError(f"{encoder} gave vectors of shape {probes.shape} for {len(files)} probe images")
    if not np.allclose(np.linalg.norm(probes, axis=1), 1.0, atol=1e-3):
        raise SpaceError(f"{encoder} gave vectors that are not of unit length")
    return Space(encoder=encoder, dim=probes.shape[1], norm="l2", probes=probes, details=details or {})
