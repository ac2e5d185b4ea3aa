"""Heads: vectors -> scores."""

from __future__ import annotations

import pyarrow as pa

from aesthetic.catalog import load_head
from aesthetic.space import Space, SpaceMismatch, require_same
from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec, ImageBatch, Resources
from curate.store.mirror import here
from curate.store.objects import is_url


def head_here(name: str) -> str:
    """A head's name or folder as `load_head` takes it: of a head at a URL, the folder of its copy here."""
    return str(here(name)) if is_url(name) else name


class HeadAnnotator(Annotator):
    """The scores of a head (aesthetic.heads), by its name, folder or URL."""

    name = "head"
    reads = "vectors"

    class Options(AnnotatorOptions):
        """head: a shipped or imported head's name, or a folder, on a disk or an object store."""

        head: str

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.head = load_head(head_here(options.head))
        unsafe = self.head.task == "nsfw"
        meaning = f"{self.head.task}, by the head {self.head.name}"
        self.columns = {"score": ColumnSpec(meaning=meaning, scale=self.head.scale, unsafe=unsafe)}
        self.facts = {"head": self.head.name, "task": self.head.task, "space": self.head.space.fingerprint}

    @property
    def digest(self) -> str:
        """The head's own, of its weights and what it is recorded with."""
        return self.head.digest

    def check(self, space: Space | str) -> None:
        """SpaceMismatch where the head reads vectors of another one."""
        if isinstance(space, Space):
            require_same(self.head.space, space, f"the head {self.head.name}")
        elif self.head.space.encoder != space:
            raise SpaceMismatch(
                f"the head {self.options.head} reads vectors of {self.head.space.encoder}, "
                f"but embed.encoder is {space}. A head works in its own space only."
            )

    def load(self, resources: Resources) -> None:
        """SpaceMismatch as in `check`."""
        assert resources.space is not None, "a head runs where there are vectors"
        self.check(resources.space)

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """The head's scores, float32."""
        assert batch.vectors is not None
        return {"score": pa.array(self.head(batch.vectors), pa.float32())}
