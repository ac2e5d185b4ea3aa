"""Zero-shot heads: a quality put into words, scored by which side of it an image's vector lies on. Fitted to nothing.

>>> head = prompt_head(encoder.encode_texts, encoder.space(), ["a sharp photo"], ["a blurry photo"], name="sharp")
>>> head(encoder.encode_images([image]))     # (1,) float32, 0 to 1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from aesthetic.heads import Head, HeadError
from aesthetic.space import Space

_LEAST = 1e-3  # length of a difference or a mean of unit vectors below which rounding decides its direction

_LIMITS = [
    "Fitted to no rating and measured on none: look at what it puts first and last before you use it.",
    "0.5 is where both sides are equally near. Scores are no probabilities that anybody measured: rules of the form "
    "top(COLUMN, 0.1) suit them better than thresholds.",
]
_BUNDLED_LIMIT = (
    "The bundled encoder is not CLIP: of an image it knows the ten most probable ImageNet classes by name, and no "
    "style, place or quality. So words for things work, and words such as beautiful or sharp do not; cosines with "
    "texts are at most 0.71."
)


def prompt_head(
    encode_texts: Callable[[Sequence[str]], npt.NDArray[np.float32]] | None,
    space: Space,
    wanted: Sequence[str],
    against: Sequence[str],
    *,
    name: str,
    task: str = "prompts",
    logit_scale: float | None = None,
) -> Head:
    """A head that says how much nearer an image is to the `wanted` prompts than to those `against` them: 0 to 1.

        score = sigmoid(logit_scale * (cos(x, t+) - cos(x, t-)))

    where t+ and t- are the normalised means of each side's normalised vectors. It is the softmax over two opposite
    prompts of CLIP-IQA (Wang, Chan and Loy 2023, arXiv 2207.12396; without their change to the encoder, which leaves
    out positions), with several prompts a side averaged as CLIP's authors do (Radford et al. 2021, arXiv 2103.00020).
    As x has unit length, the score is an affine map and a sigmoid.

    encode_texts: texts -> (n, dim) vectors in the space of the images; None for an encoder that has no texts.
    logit_scale: by default 100, at which CLIP's training caps the factor of its cosines; for `bundled` 20, the one
        that its text model was trained with (at 100, one image in ten can come out as exactly 1).

    Raises HeadError where the space has no texts, where a side is empty or a prompt is, and where both sides say the
    same.
    """
    if encode_texts is None:
        raise HeadError(f"{name}: {space.encoder} has no text encoder; prompts need a space of both, such as CLIP's")
    if space.norm != "l2":
        raise HeadError(f"{name}: cosines need unit vectors; those of {space.encoder} have the norm {space.norm}")
    if logit_scale is None:
        logit_scale = 20.0 if space.encoder == "bundled" else 100.0
    if not (math.isfinite(logit_scale) and logit_scale > 0):
        raise HeadError(f"{name}: the logit scale is {logit_scale}; it must be a positive number")
    sides = {"wanted": wanted, "against": against}
    for side, prompts in sides.items():
        if isinstance(prompts, str) or not prompts:
            raise HeadError(f"{name}: {side} is a list of at least one prompt, not {prompts!r}")
        if not all(prompt.strip() for prompt in prompts):
            raise HeadError(f"{name}: a prompt of {side} is empty; its vector would mean nothing")
    if set(sides["wanted"]) == set(sides["against"]):
        raise HeadError(f"{name}: the wanted prompts and those against them are the same")

    ends = {}  # of each side, the normalised mean of the prompts' normalised vectors: (dim,)
    for side, prompts in sides.items():
        vectors = np.asarray(encode_texts(list(prompts)), np.float64)
        if vectors.shape != (len(prompts), space.dim):
            raise HeadError(
                f"{name}: {len(prompts)} prompts gave vectors of shape {vectors.shape}; {space.encoder} has "
                f"{space.dim} numbers a vector"
            )
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (np.isfinite(lengths).all() and (lengths > 0).all()):
            raise HeadError(f"{name}: the vector of a prompt is zero or not finite")
        mean = (vectors / lengths).mean(0)
        length = float(np.linalg.norm(mean))
        if not length > _LEAST:
            raise HeadError(f"{name}: to {space.encoder}, the prompts {list(prompts)} cancel each other out")
        ends[side] = mean / length
    difference = ends["wanted"] - ends["against"]
    if not np.linalg.norm(difference) > _LEAST:
        raise HeadError(f"{name}: to {space.encoder}, both sides say the same: {[*wanted, *against]}")
    weight = (logit_scale * difference[None, :]).astype(np.float32)
    return Head(
        name=name,
        task=task,
        space=space,
        scale=(0.0, 1.0),
        layers=((weight, np.zeros(1, np.float32)),),
        link="sigmoid",
        card={
            "about": "Zero-shot: how much nearer an image lies to the wanted prompts than to those against them.",
            "data": {side: "; ".join(f"“{p}”" for p in prompts) for side, prompts in sides.items()},
            "source": f"CLIP-IQA's form: sigmoid({logit_scale:g} (cos(x, t+) - cos(x, t-))), t+ and t- the normalised "
            "means of each side's normalised vectors (Wang, Chan and Loy 2023, arXiv 2207.12396)",
            "limits": [*_LIMITS, *([_BUNDLED_LIMIT] if space.encoder == "bundled" else [])],
        },
    )
