"""Sampler = schedule x solver x guidance x loop. Knows no model: a velocity is any `velocity(x, t)`.

schedule = schedules.make(50, shift=3.0)                          # sigmas, float64 numpy
solver   = solvers.unipc(schedule)                                # a table of coefficients, init and advance
velocity = classifier_free(Partial(network, params), text, negative, scale=5.0)
latents  = denoise(velocity, solver, solver.init(noise)).x        # noise, latents float32 [B,T,H,W,C]
"""

from typing import TYPE_CHECKING

from jvdiff.lazy import attach

if TYPE_CHECKING:
    from jvdiff.diffusion import guidance, samplers, sampling, schedules, solvers, variance_preserving
    from jvdiff.diffusion.guidance import classifier_free
    from jvdiff.diffusion.sampling import denoise, denoise_scan
    from jvdiff.diffusion.schedules import Schedule, from_scheduler_config
    from jvdiff.diffusion.solvers import SOLVERS, Solver, add_noise, ddpm, euler, euler_tokens, renoise, unipc
    from jvdiff.diffusion.variance_preserving import alphas_cumprod, clean_and_noise, diffuse, v_prediction

__all__ = [
    "SOLVERS",
    "Schedule",
    "Solver",
    "add_noise",
    "alphas_cumprod",
    "classifier_free",
    "clean_and_noise",
    "ddpm",
    "denoise",
    "denoise_scan",
    "diffuse",
    "euler",
    "euler_tokens",
    "from_scheduler_config",
    "guidance",
    "renoise",
    "samplers",
    "sampling",
    "schedules",
    "solvers",
    "unipc",
    "v_prediction",
    "variance_preserving",
]

# Schedules come first: a page of help reads them, without JAX.
__getattr__ = attach(__name__, __all__, ("schedules", "guidance", "sampling", "solvers", "variance_preserving"))
