"""Samplers by the names of diffusers' classes, each with the settings of the model's own."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from curate.store import UserError

SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Those that work in StableDiffusionPipeline and draw all their noise from a picture's own generator."""

_OTHERS = {
    "DPMSolverSDEScheduler": "its noise does not come from a picture's own seed; "
    "DPMSolverMultistep and EulerAncestralDiscrete are near to it",
    "FlowMatchEulerDiscreteScheduler": "it does not work in StableDiffusionPipeline; "
    "flow models are drawn with DPMSolverMultistep, UniPCMultistep, ...",
}


def scheduler_name(asked: str | None, config: dict[str, Any]) -> str:
    """The class that draws with a model whose scheduler_config.json this is; `asked`: with or without "Scheduler".

    Raises UserError for one that there is not, naming those that are near, or that can't do what the model needs.
    """
    own = str(config.get("_class_name"))
    if asked is None:
        return own
    known = {_plain(name): name for name in SCHEDULERS}
    name = own if _plain(asked) == _plain(own) else known.get(_plain(asked))
    if name is None:
        for other, why in _OTHERS.items():
            if _plain(asked) == _plain(other):
                raise UserError(f"the scheduler {other} can't be used here: {why}")
        near = difflib.get_close_matches(_plain(asked), known, n=3, cutoff=0.5) or list(known)
        raise UserError(
            f"there is no scheduler {asked!r}: {'did you mean ' if len(near) < len(known) else 'there are '}"
            f"{', '.join(known[n] for n in near)}?"
        )
    if is_flow(config) and name != own and not _takes_flow(name):
        able = ", ".join(n for n in SCHEDULERS if _takes_flow(n))
        raise UserError(
            f"the model predicts flow (velocities), and {name} knows nothing of them. Those that do: {able}"
        )
    return name


def new_scheduler(name: str, config: dict[str, Any]) -> Any:
    """A fresh scheduler of this class with the model's settings: its noise table, prediction, flow and spacing."""
    import diffusers

    return getattr(diffusers, name).from_config(config)


def is_flow(config: dict[str, Any]) -> bool:
    """Whether a model whose scheduler_config.json this is predicts velocities of rectified flow."""
    return config.get("prediction_type") == "flow_prediction"


def _takes_flow(name: str) -> bool:
    import diffusers

    return "use_flow_sigmas" in inspect.signature(getattr(diffusers, name).__init__).parameters


def _plain(name: str) -> str:
    return name.lower().removesuffix("scheduler").replace("_", "").replace("-", "").replace(" ", "")
