"""Samplers by the names of diffusers' classes, each with the settings of the model's own."""

from __future__ import annotations

import difflib
import math
from typing import Any

from aesthetic.errors import UserError

SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Those that work in StableDiffusionPipeline and draw all their noise from an image's own generator."""

FLOW = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")
"""Those that draw with models of rectified flow. (DEIS takes their settings too, and leaves noise in the image.)"""

_UNSUPPORTED = {
    "DPMSolverSDEScheduler": "its noise does not come from an image's own seed; "
    "DPMSolverMultistep and EulerAncestralDiscrete are near to it",
    "FlowMatchEulerDiscreteScheduler": "it does not work in StableDiffusionPipeline; "
    "flow models are drawn with DPMSolverMultistep or UniPCMultistep",
}


def scheduler_name(wanted: str | None, config: dict[str, Any]) -> str:
    """The class that draws with a model whose scheduler_config.json this is; `wanted`: with or without "Scheduler".

    Raises UserError for one that there is not, naming those that are near, or that can't do what the model needs.
    """
    own = str(config.get("_class_name", ""))
    if wanted is None:
        return own
    if own not in ("", *SCHEDULERS) and _plain(wanted) != _plain(own):
        raise UserError(f"the model is drawn with its own {own} alone: others can't take its place in its pipeline")
    known = {_plain(name): name for name in SCHEDULERS}
    name = own if _plain(wanted) == _plain(own) else known.get(_plain(wanted))
    if name is None:
        for other, why in _UNSUPPORTED.items():
            if _plain(wanted) == _plain(other):
                raise UserError(f"the scheduler {other} can't be used here: {why}")
        begin = len(_plain(wanted))  # "euler" is near to EulerDiscrete
        near = [n for n in known if difflib.SequenceMatcher(None, _plain(wanted), n[: begin + 1]).ratio() > 0.7]
        near = [known[n] for n in near][:4]
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(SCHEDULERS)}"
        raise UserError(f"there is no scheduler {wanted!r}: {hint}")
    if is_flow(config) and name not in (own, *FLOW):
        raise UserError(
            f"the model predicts flow (velocities), and {name} can't draw with them. Those that can: {', '.join(FLOW)}"
        )
    return name


def new_scheduler(name: str, config: dict[str, Any]) -> Any:
    """A fresh scheduler of this class with the model's settings: its noise table, prediction, flow and spacing."""
    import diffusers

    return getattr(diffusers, name).from_config(config)


def check_steps(name: str, config: dict[str, Any], steps: int) -> None:
    """Raise UserError where a scheduler can't do so many, or so few: PNDM needs four, LCM has fifty at most.

    What is known without diffusers; `train.generate.request.check_scheduler` asks it.
    """
    most = config.get("original_inference_steps", 50)
    times = config.get("num_train_timesteps", 1000)
    if name == "PNDMScheduler" and steps < 4 and not config.get("skip_prk_steps"):
        raise UserError(f"{name} can't draw in {steps} steps: it needs four. Give another number, or another scheduler")
    if name in ("LCMScheduler", "TCDScheduler") and steps > most:
        raise UserError(
            f"{name} can't draw in {steps} steps: {most} at most. Give another number, or another scheduler"
        )
    if steps > times:
        raise UserError(f"{name} can't draw in {steps} steps: the model was trained with {times}. Give another number")


def is_flow(config: dict[str, Any]) -> bool:
    """Whether a model whose scheduler_config.json this is predicts velocities of rectified flow."""
    own = str(config.get("_class_name", ""))
    return config.get("prediction_type") == "flow_prediction" or own.startswith("FlowMatch")


def share_of_steps(strength: float, config: dict[str, Any]) -> float:
    """The strength at which a flow model whose times are shifted towards noise adds as much noise as one without shift
    at this strength; other models: this strength.

    With a shift k the share u of the steps begins at noise k u / (1 + (k - 1) u), as in Esser et al. 2024 (arXiv
    2403.03206, equation 23); this is its inverse.
    """
    if not is_flow(config):
        return strength
    if config.get("use_dynamic_shifting"):  # by size; this at the largest, most often its own
        shift = math.exp(float(config.get("max_shift", 1.15)))
    else:
        shift = float(config.get("flow_shift") or config.get("shift") or 1.0)
    return round(strength / (shift - strength * (shift - 1)), 4)


def _plain(name: str) -> str:
    return name.lower().removesuffix("scheduler").replace("_", "").replace("-", "").replace(" ", "")
