"""What the network learns to predict: flow, v or eps, as pure functions of the clean image, the noise and the time.

Time is the number that the network is given: t in [0, 1000), 0 the clean image, 1000 noise alone. Each objective comes
with the diffusers scheduler that samples from a network so trained, and which is saved beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aesthetic.errors import UserError
from train.models.presets import OBJECTIVES

TIMES = 1000
"""Training times of every scheduler here, as in DDPM (Ho et al. 2020) and all Stable Diffusion models."""

GAMMA = 5.0
"""Of min-SNR: the value that Hang et al. 2023 (arXiv 2303.09556) recommend."""


class Noised(NamedTuple):
    """What one training step sees."""

    x_t: Tensor  # (n, c, h, w): the input of the network
    target: Tensor  # (n, c, h, w): what it should say
    weight: Tensor  # (n,): of each sample's mean squared error


def flow(x0: Tensor, noise: Tensor, t: Tensor) -> Noised:
    """Rectified flow: x_t = (1 - s) x0 + s noise with s = t / 1000; the target is the velocity, noise - x0; weight 1.

    Source: Liu et al. 2022 (arXiv 2209.03003), with time as in Esser et al. 2024 (arXiv 2403.03206).

    Args:
        x0: (n, c, h, w), images or latents of about unit variance.
        noise: the same shape, standard normal.
        t: (n,), times in [0, 1000), fractions allowed.
    """
    s = _each(t.to(x0) / TIMES)
    return Noised((1 - s) * x0 + s * noise, noise - x0, torch.ones_like(t, dtype=x0.dtype))


def v(x0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor, gamma: float | None = GAMMA) -> Noised:
    """v-prediction: x_t = sqrt(a) x0 + sqrt(1 - a) noise, the target is sqrt(a) noise - sqrt(1 - a) x0.

    Source: Salimans and Ho 2022 (arXiv 2202.00512), appendix D. With `gamma` the weight is min(snr, gamma) / (snr + 1)
    where snr = a / (1 - a): min-SNR for v; it is 0 where nothing of x0 is left. None: weight 1.

    Args:
        x0, noise: (n, c, h, w).
        t: (n,), whole numbers from 0 to 999.
        alphas_cumprod: (1000,), the scheduler's table; a is its value at t.
    """
    a = alphas_cumprod.to(x0)[t.long()]
    root, other = _each(a.sqrt()), _each((1 - a).sqrt())
    # snr / (snr + 1) = a and 1 / (snr + 1) = 1 - a: nothing is divided by zero
    weight = torch.ones_like(a) if gamma is None else torch.minimum(a, gamma * (1 - a))
    return Noised(root * x0 + other * noise, root * noise - other * x0, weight)


def eps(x0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor, gamma: float | None = GAMMA) -> Noised:
    """Noise prediction, as Stable Diffusion 1: x_t = sqrt(a) x0 + sqrt(1 - a) noise, the target is the noise.

    Source: Ho et al. 2020 (arXiv 2006.11239). With `gamma` the weight is min(snr, gamma) / snr, written so that it is 1
    where snr = a / (1 - a) is 0 (Hang et al. 2023, section 3.4). None: weight 1. Arguments as in `v`.
    """
    a = alphas_cumprod.to(x0)[t.long()]
    weight = torch.ones_like(a) if gamma is None else (gamma * (1 - a) / a.clamp(min=1e-12)).clamp(max=1)
    return Noised(_each(a.sqrt()) * x0 + _each((1 - a).sqrt()) * noise, noise, weight)


def _each(values: Tensor) -> Tensor:
    """(n,) as (n, 1, 1, 1)."""
    return values.reshape(-1, 1, 1, 1)


# -------------------------------------------------------------------------------------------- with their schedulers


@dataclass(frozen=True)
class Objective:
    """One of the three, bound to the noise table of a scheduler."""

    name: str
    noised: Callable[[Tensor, Tensor, Tensor], Noised]
    shift: float = 1.0  # of flow's times towards noise

    def sample_time(self, rng: np.random.Generator) -> float:
        """A random training time.

        flow: logit-normal(0, 1), the best of those that Esser et al. 2024 compare, then shifted as its sampler shifts
        them: s -> shift s / (1 + (shift - 1) s), which adds log(shift) to the logit.
        v and eps: uniform over the whole numbers from 0 to 999.
        """
        if self.name == "flow":
            return float(TIMES / (1 + np.exp(-rng.standard_normal()) / self.shift))
        return float(rng.integers(TIMES))


def training_scheduler(name: str, shift: float = 1.0) -> Any:
    """The diffusers scheduler that samples from a network trained from scratch with this objective.

    `shift`, of flow, spends more times near pure noise. Many pixels of one colour show it through much noise, so that
    only there does a network have to listen to the text (Hoogeboom et al. 2023, arXiv 2301.11093; Esser et al. 2024).

    flow: DPMSolverMultistep with flow sigmas (FlowMatchEulerDiscrete does not work in StableDiffusionPipeline).
    v: DDIM with zero terminal SNR and trailing steps (Lin et al. 2023, arXiv 2305.08891).
    eps: DDIM with Stable Diffusion 1's noise table.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if name == "flow":
        return DPMSolverMultistepScheduler(
            num_train_timesteps=TIMES,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
            steps_offset=1,  # of no effect here; the pipeline complains of another value
        )
    if name not in OBJECTIVES:
        raise UserError(f"there is no objective {name!r}: {', '.join(OBJECTIVES)}")
    table: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    table |= {"num_train_timesteps": TIMES, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1}
    if name == "v":
        return DDIMScheduler(
            **table, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )
    return DDIMScheduler(**table, prediction_type="epsilon")


def flow_scheduler(shift: float = 1.0) -> Any:
    """The diffusers scheduler that samples from a transformer trained by flow, its times shifted as in training."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMES, shift=shift)


def objective_of(scheduler: Any, gamma: float | None = GAMMA) -> Objective:
    """The objective that a pipeline was trained with, told by its scheduler. Raises UserError for another kind."""
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        config = scheduler.config  # shifted by the size of an image, as Flux, is drawing alone, not its training
        return Objective("flow", flow, 1.0 if config.use_dynamic_shifting else float(config.shift))
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "flow_prediction":
        return Objective("flow", flow, float(scheduler.config.get("flow_shift", 1.0)))
    made = {"v_prediction": ("v", v), "epsilon": ("eps", eps)}.get(kind)
    if made is None or scheduler.config.num_train_timesteps != TIMES or not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(
            f"the model's scheduler is {type(scheduler).__name__} for {kind!r} over "
            f"{scheduler.config.num_train_timesteps} times; what can be trained further is "
            f"flow_prediction, v_prediction and epsilon over {TIMES}"
        )
    name, function = made
    return Objective(name, partial(function, alphas_cumprod=scheduler.alphas_cumprod, gamma=gamma))
