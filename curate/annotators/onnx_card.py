"""The card of a model in an ONNX file: how an image is made into its input, and what its outputs mean.

A file of others is checked against it before it is run: no operators but ONNX's own and onnxruntime's, no weights out
of other folders, inputs and outputs of the shapes that the card says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pydantic

from aesthetic.errors import UserError
from aesthetic.untrusted import error_line, first_three, printable, read_json_file
from curate.annotators.labels import middle

if TYPE_CHECKING:
    import onnx
    import onnxruntime

_OURS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"}
"""Domains of operators that onnxruntime has itself."""

_EXAMPLE = (
    '{"input": {"size": 224, "resize": "crop", "resize_to": 256, "mean": [0.485, 0.456, 0.406], '
    '"std": [0.229, 0.224, 0.225]}, "outputs": [{"labels": ["clean", "marked"], "activation": "softmax"}]}'
)

_Three = tuple[float, float, float]
_Positive = Annotated[float, pydantic.Field(gt=0)]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class OnnxInput(_Part):
    """How an image becomes the model's input, a square of `size` pixels.

    resize: squash: both sides to `resize_to`; crop: the short side to it, by torchvision's rounding; pad: the long side
    to `size`, the rest is `fill` on both sides. Of the first two the middle `size` x `size` is taken.
    Then values (0 to 255) are divided by `divide_by`, less `mean`, over `std`, which are in the order of `colours`.
    """

    size: int = pydantic.Field(gt=0, le=4096)
    resize: Literal["squash", "crop", "pad"]
    resize_to: int | None = pydantic.Field(None, gt=0, le=4096)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    fill: int = pydantic.Field(0, ge=0, le=255)
    layout: Literal["nchw", "nhwc"] = "nchw"
    colours: Literal["rgb", "bgr"] = "rgb"
    divide_by: _Positive = 255.0
    mean: _Three = (0.0, 0.0, 0.0)
    std: tuple[_Positive, _Positive, _Positive] = (1.0, 1.0, 1.0)

    @pydantic.model_validator(mode="after")
    def _large_enough(self) -> OnnxInput:
        if self.resize_to is not None and (self.resize == "pad" or self.resize_to < self.size):
            raise ValueError("resize_to is for squash and crop, and at least size")
        return self


class OnnxOutput(_Part):
    """What an output of the model means: `labels` of its numbers, in order, after `activation`. name: the output's;
    needed where the model has several.    range: lowest and highest value, where there is no activation."""

    labels: tuple[str, ...] = pydantic.Field(min_length=1)
    activation: Literal["none", "sigmoid", "softmax"]
    name: str | None = None
    range: tuple[float, float] | None = None

    @property
    def scale(self) -> tuple[float, float] | None:
        """The lowest and highest value, where that is known."""
        return self.range if self.activation == "none" else (0.0, 1.0)

    def values(self, found: Mapping[str, np.ndarray], count: int, file: Path) -> np.ndarray:
        """Its numbers for so many images, (count, labels) float64. UserError where they are not as many."""
        from scipy.special import expit, softmax

        raw = found[self.name or next(iter(found))]
        if raw.size != count * len(self.labels):
            raise UserError(f"{file}: its output has the shape {raw.shape[1:]}, and the card {len(self.labels)} labels")
        raw = raw.reshape(count, -1).astype(np.float64)
        if self.activation == "softmax" and ((raw >= 0) & (abs(raw.sum(axis=1, keepdims=True) - 1) < 1e-3)).all():
            raise UserError(f"{file} gives probabilities as it is: its card must say `activation: none`")
        if self.activation == "none":
            return raw
        return softmax(raw, axis=1) if self.activation == "softmax" else expit(raw)


class OnnxCard(_Part):
    """A model's card. unsafe: labels whose high values say that an image is unsafe to show."""

    input: OnnxInput
    outputs: tuple[OnnxOutput, ...] = pydantic.Field(min_length=1)
    unsafe: tuple[str, ...] = ()
    licence: str | None = None
    source: str | None = None
    sha256: str | None = None

    @pydantic.model_validator(mode="after")
    def _known(self) -> OnnxCard:
        if unknown := {*self.unsafe} - {*self.labels}:
            raise ValueError(f"unsafe: no output has the label {min(unknown)}")
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of all outputs, in order."""
        return tuple(label for output in self.outputs for label in output.labels)

    def output_of(self, label: str) -> OnnxOutput:
        """The output that has a label."""
        return next(output for output in self.outputs if label in output.labels)


def read_card(file: Path) -> OnnxCard:
    """The card that lies beside a model: FILE.json beside FILE.onnx. UserError where it is missing or wrong."""
    path = file.with_suffix(".json")
    if not path.is_file():
        raise UserError(f"{path} is missing, the card that says how {file.name} is used; such as {_EXAMPLE}")
    try:
        return OnnxCard.model_validate(read_json_file(path))
    except pydantic.ValidationError as e:
        wrong = e.errors(include_url=False)[0]
        place, why = ".".join(map(str, wrong["loc"])), wrong["msg"].removeprefix("Value error, ")
        raise UserError(": ".join(part for part in (str(path), place, why) if part)) from None


def prepared(image: np.ndarray, card: OnnxInput) -> np.ndarray:
    """An sRGB image (height, width, 3) uint8 as the model's input: (3, size, size), or (size, size, 3), float32."""
    from PIL import Image

    resample = Image.Resampling[card.interpolation.upper()]
    side = card.resize_to or card.size
    pixels = Image.fromarray(middle(image) if card.resize == "crop" else image)
    if card.resize == "squash":
        pixels = pixels.resize((side, side), resample)
    else:
        end = min(pixels.size) if card.resize == "crop" else max(pixels.size)
        width, height = (max(1, side * length // end) for length in pixels.size)
        pixels = pixels.resize((width, height), resample)
    if card.resize == "pad":
        square = Image.new("RGB", (side, side), (card.fill,) * 3)
        square.paste(pixels, ((side - pixels.width) // 2, (side - pixels.height) // 2))
        pixels = square
    left, top = (round((length - card.size) / 2) for length in pixels.size)
    values = np.asarray(pixels)[top : top + card.size, left : left + card.size].astype(np.float32)
    if card.colours == "bgr":
        values = values[:, :, ::-1]
    mean, std = (np.array(three, np.float32) for three in (card.mean, card.std))
    values = (values / np.float32(card.divide_by) - mean) / std
    return np.ascontiguousarray(values if card.layout == "nhwc" else values.transpose(2, 0, 1))


# ------------------------------------------------------------------------------------------------------ the model file


def check_graph(file: Path) -> list[Path]:
    """The files beside a model that hold weights of it. UserError where it is none, where weights lie elsewhere, and
    where it needs operators that onnxruntime does not have: libraries of others are not loaded."""
    stat = file.stat()
    beside = _check_graph(file, stat.st_size, stat.st_mtime_ns)
    for path in beside:
        if not path.is_file():
            raise UserError(f"{file} keeps weights in {path.name}, which is not beside it")
    return beside


@lru_cache(maxsize=64)
def _check_graph(file: Path, size: int, mtime_ns: int) -> list[Path]:
    import onnx

    try:
        model = onnx.load(str(file), load_external_data=False)
        known = _OURS | {function.domain for function in model.functions}
        graphs = [model.graph, *model.functions]
    except Exception as e:  # whatever bytes that are none make of the parser
        raise UserError(f"{file} is no ONNX model that can be read: {error_line(e)}") from e
    if not model.graph.node:
        raise UserError(f"{file} is no ONNX model: it has no operators")
    beside = set[Path]()
    for part in _parts(graphs):
        if isinstance(part, onnx.NodeProto) and part.domain not in known:
            raise UserError(
                f"{file} needs the operator {printable(part.op_type, 60)} of {printable(part.domain, 60)}, which "
                "onnxruntime does not have: export the model without custom operators"
            )
        if isinstance(part, onnx.TensorProto) and part.data_location == onnx.TensorProto.EXTERNAL:
            location = next((entry.value for entry in part.external_data if entry.key == "location"), "")
            if not location or Path(location).name != location:
                raise UserError(f"{file} keeps weights in {printable(location, 200)}: they must lie beside it")
            beside.add(file.parent / location)
    return sorted(beside)


def _parts(graphs: list[Any]) -> Iterator[onnx.NodeProto | onnx.TensorProto]:
    """The operators and the constants of graphs, and of those within them."""
    left = [*graphs]
    while left:
        graph = left.pop()
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            yield node
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                left += [attribute.g, *attribute.graphs]


def check_session(session: onnxruntime.InferenceSession, card: OnnxCard, file: Path) -> None:
    """UserError where a model's input or outputs are not what its card says."""
    inputs, outputs = session.get_inputs(), [output.name for output in session.get_outputs()]
    if len(inputs) != 1:
        raise UserError(f"{file} has {len(inputs)} inputs ({first_three([i.name for i in inputs])}); one is expected")
    side = card.input.size
    wanted = [1, 3, side, side] if card.input.layout == "nchw" else [1, side, side, 3]
    shape, kind = inputs[0].shape, inputs[0].type
    fits = len(shape) == 4 and all(have == want for have, want in zip(shape, wanted, strict=True) if type(have) is int)
    if not fits or kind != "tensor(float)":
        raise UserError(
            f"{file} takes {kind} of the shape {shape}; by its card ({card.input.layout}, size {side}) it gets "
            f"tensor(float) of {wanted}, one image at a time"
        )
    for output in card.outputs:
        if output.name is None and len(outputs) > 1:
            raise UserError(f"{file} has the outputs {first_three(outputs)}: its card must give a name to each it uses")
        if output.name is not None and output.name not in outputs:
            raise UserError(f"{file} has no output {printable(output.name, 60)}; it has {first_three(outputs)}")
