"""Objectives say what diffusers' schedulers say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aesthetic.errors import UserError
from train.objective import eps, flow, objective_of, training_scheduler, v

X0 = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0, 1, 50, 250, 500, 750, 998, 999])


@pytest.mark.parametrize("name", ["v", "eps"])
def test_v_and_eps_are_those_of_diffusers(name: str) -> None:
    from diffusers import DDPMScheduler

    ours = training_scheduler(name)
    theirs = DDPMScheduler.from_config(ours.config)
    x_t, target, weight = objective_of(ours, gamma=None).noised(X0, NOISE, T.float())
    assert torch.allclose(x_t, theirs.add_noise(X0, NOISE, T), atol=1e-6)
    wanted = NOISE if name == "eps" else theirs.get_velocity(X0, NOISE, T)
    assert torch.allclose(target, wanted, atol=1e-6)
    assert torch.equal(weight, torch.ones(8))


def test_min_snr_is_its_formula_and_survives_zero_snr() -> None:
    from diffusers.training_utils import compute_snr

    for name, function, over in (("eps", eps, 0.0), ("v", v, 1.0)):
        scheduler = training_scheduler(name)
        weight = function(X0, NOISE, T, scheduler.alphas_cumprod, gamma=5.0).weight
        snr = compute_snr(scheduler, T)
        wanted = snr.clamp(max=5.0) / (snr + over)
        assert torch.allclose(weight[:-1], wanted[:-1], rtol=1e-4)
        assert torch.isfinite(weight).all()
    assert float(v(X0, NOISE, T, training_scheduler("v").alphas_cumprod).weight[-1]) == pytest.approx(0, abs=1e-6)
    assert float(eps(X0, NOISE, T, training_scheduler("v").alphas_cumprod).weight[-1]) == 1  # 0 / 0 is 1 there


@pytest.mark.parametrize(("name", "shift"), [("flow", 1.0), ("flow", 3.0), ("v", 1.0), ("eps", 1.0)])
def test_a_perfect_network_is_sampled_to_the_clean_image(name: str, shift: float) -> None:
    """With the true target at every step the saved scheduler must land on x0: flow in particular."""
    scheduler = training_scheduler(name, shift)
    objective = objective_of(scheduler)
    scheduler.set_timesteps(20)
    x = NOISE * scheduler.init_noise_sigma
    table = scheduler.alphas_cumprod
    for i, t in enumerate(scheduler.timesteps):
        if name == "flow":
            s = float(scheduler.sigmas[i])
            said = (x - X0) / s
        else:
            a = table[t]
            noise = (x - a.sqrt() * X0) / (1 - a).sqrt()
            said = noise if name == "eps" else objective.noised(X0, noise, torch.full((8,), float(t))).target
        x = scheduler.step(said, t, x).prev_sample
    assert float((x - X0).abs().max()) < 0.02


def test_image_to_image_begins_where_flow_says() -> None:
    scheduler = training_scheduler("flow")
    scheduler.set_timesteps(20)
    t = scheduler.timesteps[[3, 10, 15]]
    theirs = scheduler.add_noise(X0[:3], NOISE[:3], t)
    assert torch.allclose(flow(X0[:3], NOISE[:3], t.float()).x_t, theirs, atol=5e-3)  # it cuts times to whole numbers


def test_times_are_drawn_as_told() -> None:
    rng = np.random.default_rng(0)
    flow_times, other = objective_of(training_scheduler("flow")), objective_of(training_scheduler("v"))
    flows = np.array([flow_times.sample_time(rng) for _ in range(4000)])
    assert flows.min() > 0 and flows.max() < 1000
    logit = np.log(flows / (1000 - flows))
    assert abs(logit.mean()) < 0.05 and abs(logit.std() - 1) < 0.05
    far = objective_of(training_scheduler("flow", shift=3.0))
    shifted = np.array([far.sample_time(rng) for _ in range(4000)])
    assert abs(np.log(shifted / (1000 - shifted)).mean() - np.log(3)) < 0.05
    steps = np.array([other.sample_time(rng) for _ in range(4000)])
    assert (steps == steps.astype(int)).all() and steps.min() < 5 and steps.max() > 994 and abs(steps.mean() - 500) < 20


def test_what_cannot_be_trained_is_refused_by_name() -> None:
    from diffusers import DDIMScheduler

    with pytest.raises(UserError, match="DDIMScheduler for 'sample'"):
        objective_of(DDIMScheduler(prediction_type="sample"))
    with pytest.raises(UserError, match="no objective 'flows'"):
        training_scheduler("flows")
