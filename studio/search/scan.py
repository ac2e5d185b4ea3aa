"""All vectors of a file compared with one query, where they lie: faiss reads a mapped file, and nothing is copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


class MappedIndex:
    """A faiss index of the flat kind, whose codes are an array, mapped or not, that lies elsewhere.

    rows: (n, bytes of a code).    index: empty before; what it was trained for is known already.
    """

    def __init__(self, rows: npt.NDArray[Any], index: Any) -> None:
        import faiss

        self.rows, self._index = np.ascontiguousarray(rows), index  # a file with other strides is read
        codes = self.rows.view(np.uint8)
        assert codes.shape[1] == index.code_size, (codes.shape, index.code_size)
        view = index.codes  # a MaybeOwnedVector, of which Python can make none: a pointer, and how far it reaches
        view.is_owned = False
        view.view_data = view.c_ptr = faiss.swig_ptr(codes)
        view.view_size = view.c_size = codes.size
        index.ntotal, index.is_trained = len(codes), True

    def best(self, query: Scores, count: int, among: Mask | None = None, parameters: Any = None) -> tuple[Rows, Scores]:
        """The `count` rows with the largest product with a query (d,), and these; fewer where there are fewer.

        among: (n,) which rows are looked at; None: all.    parameters: of the index's own kind, where not the usual.
        """
        rows, scores = self.best_of_each(query[None], count, among, parameters)
        found = rows[0] >= 0
        return rows[0][found], scores[0][found]

    def best_of_each(
        self, queries: Scores, count: int, among: Mask | None = None, parameters: Any = None
    ) -> tuple[Rows, Scores]:
        """The same of several queries (q, d): (q, count) each, with -1 and -inf where there are fewer."""
        import faiss

        count = min(count, self._index.ntotal)
        if not count or (among is not None and not among.any()):
            return np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0), np.float32)
        parameters = faiss.SearchParameters() if parameters is None else parameters
        if among is not None:
            bits = np.packbits(among, bitorder="little")
            parameters.sel = faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg, arg-type]  # its Python takes arrays
        scores, rows = self._index.search(queries, count, params=parameters)
        return rows, np.where(rows < 0, -np.inf, scores).astype(np.float32)


def exact_index(vectors: npt.NDArray[np.float16]) -> MappedIndex:
    """The rows of (n, d) float16 vectors as they are, by inner product.

    It takes 4 ms of CPU to compare 100,000 vectors of 512 numbers; numpy, which has to make float32 of them first, 65.
    """
    import faiss

    kind = faiss.ScalarQuantizer.QT_fp16
    return MappedIndex(vectors, faiss.IndexScalarQuantizer(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT))
