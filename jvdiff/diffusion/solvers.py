"""Solvers of the flow-matching ODE dx/dsigma = v(x, sigma), from sigma near 1 (noise) to 0 (data).

A solver is a table of coefficients, worked out once in float64 numpy, and two pure functions: `init` makes a state
from noise, `advance` takes it one step with one row of the table. The logarithm of the last sigma, which is infinite,
therefore never meets a traced value. States are NamedTuples of float32 arrays shaped like x [B,...], whatever the
network's dtype, and of what draws noise, if anything does; a state and the number of steps done are all that resuming
needs. `renoise`, for networks distilled into few steps, and `ddpm` draw noise: they do not solve the ODE, but have the
same shape.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.diffusion.schedules import Schedule
from jvdiff.errors import UsageError
from jvdiff.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Solver:
    """One solver on one schedule of N steps.

    sigmas: float64 [N+1], the noise levels of the schedule
    timesteps: float32 [N], what the network gets
    table: float32 [N,K], the coefficients of each step
    init: (x, noise) -> state; x [B,...] is copied, so that the caller's array survives the donation of the state.
        noise: a random key for each clip, so that a clip does not depend on its neighbours (a typed key array [B], or
        its key data uint32 [B,2]), or arrays float32 [N-1,B,...] to be drawn in their place. Solvers of the ODE draw
        nothing and take None.
    advance: (state, v, row) -> state; v [B,...] float32 is the velocity at (state.x, timesteps[i]), row is table[i]
    """

    sigmas: np.ndarray
    timesteps: np.ndarray
    table: np.ndarray
    init: Callable[..., Any]
    advance: Callable[[Any, Array, Array], Any]

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, state: Any, i: Any, velocity: Array) -> Any:
        """The state after step i (may be traced), given the velocity at (state.x, timesteps[i])."""
        return self.advance(state, velocity.astype(jnp.float32), jnp.asarray(self.table)[i])


class EulerState(NamedTuple):
    x: Array  # float32 [B,...], the latents at the current sigma


class UniPCState(NamedTuple):
    x: Array  # float32 [B,...], the latents at the current sigma, as predicted
    corrected: Array  # the latents one step earlier, as corrected
    clean_1: Array  # the network's estimate of clean latents one step earlier
    clean_2: Array  # and two steps earlier


class NoisyState(NamedTuple):
    x: Array  # float32 [B,...], the latents at the current sigma; after the last step the clean ones
    noise: Array  # key data uint32 [B,2] that the noise of all steps is drawn from, or the noise itself [N-1,B,...]


def euler(schedule: Schedule) -> Solver:
    """Explicit Euler, x + (sigma_next - sigma) v: order 1, one network evaluation a step."""
    table = np.diff(schedule.sigmas)[:, None]
    return _solver(schedule, table, _euler_init, _euler_advance)


def unipc(schedule: Schedule) -> Solver:
    """UniPC of order 2, variant B(h) = exp(h) - 1 ("bh2"), predicting clean latents (arXiv:2302.04867).

    Steps, orders and corrections are those of diffusers' UniPCMultistepScheduler with lower_order_final: the
    predictor has order 1 in the first and last step and 2 between; from step 1 on, the latents are corrected with
    the velocity just computed, in the order of the previous step's predictor. One network evaluation a step.
    """
    sigma = schedule.sigmas
    alpha = 1 - sigma
    steps = len(schedule)
    lam = np.log(alpha[:-1]) - np.log(sigma[:-1])  # half log-SNR; infinite at the last sigma, which no formula needs
    order = [1 if i in (0, steps - 1) else 2 for i in range(steps)]
    table = np.zeros((steps, 9))  # sigma | corrected x = 5 weights | predicted x = 3 weights
    for i in range(steps):
        correct = 1.0, 0.0, 0.0, 0.0, 0.0  # of x, corrected, clean_0, clean_1, clean_2
        if i > 0:  # from sigma[i-1] to sigma[i] once more, now knowing the estimate at sigma[i]
            h = lam[i] - lam[i - 1]
            r, rho_old, rho = 1.0, 0.0, 0.5
            if order[i - 1] == 2:
                r = (lam[i - 2] - lam[i - 1]) / h
                phi_1 = np.expm1(-h)
                phi_2 = phi_1 / -h - 1
                phi_3 = phi_2 / -h - 0.5
                rho_old, rho = np.linalg.solve([[1, 1], [r, 1]], [phi_2 / phi_1, 2 * phi_3 / phi_1])
            ratio = sigma[i] / sigma[i - 1]
            gain = alpha[i] - alpha[i - 1] * ratio  # alpha (1 - exp(-h)), without the logarithms
            slope = rho_old / r
            correct = 0.0, ratio, gain * rho, gain * (1 - rho - slope), gain * slope
        slope = 0.5 * (lam[i + 1] - lam[i]) / (lam[i - 1] - lam[i]) if order[i] == 2 else 0.0
        ratio = sigma[i + 1] / sigma[i]
        gain = alpha[i + 1] - alpha[i] * ratio
        predict = ratio, gain * (1 - slope), gain * slope  # of the corrected x, clean_0, clean_1
        table[i] = sigma[i], *correct, *predict
    return _solver(schedule, table, _unipc_init, _unipc_advance)


def renoise(schedule: Schedule) -> Solver:
    """Self-forcing (arXiv:2506.08009): estimate the clean latents, and noise them anew to the *next* step's sigma.

    x0 = x - sigma v; then, but for the last step, x = (1 - sigma_next) x0 + sigma_next * noise. N network evaluations
    and N - 1 draws. The first step takes x to be at its sigma, as pure noise is at sigma 1.
    For a clip with key k, step i adds the noise normal(fold_in(k, i + 1)), float32 at the clip's (global) shape: a step
    can be replayed, and the noise is the same in any batch and on any number of devices.
    """
    steps = np.arange(1, len(schedule) + 1)
    table = np.stack([schedule.sigmas[:-1], schedule.sigmas[1:], steps], axis=1)  # [steps,3]
    return _solver(schedule, table, _noisy_init, _renoise_advance)


def ddpm(schedule: Schedule) -> Solver:
    """DDPM's ancestral step (arXiv:2006.11239, posterior variance beta-tilde) over any number of timesteps.

    One part of the noise that the network sees in x stays, another is replaced by new noise. The coordinates are those
    of flow matching (`variance_preserving`), so it takes the same velocity as the others. Keys and draws as in
    `renoise`.
    """
    sigma = schedule.sigmas
    length = np.hypot(1 - sigma, sigma)
    signal, spread = (1 - sigma) / length, sigma / length  # sqrt(abar), sqrt(1 - abar)
    ratio = (signal[:-1] / signal[1:]) ** 2  # alpha of the step
    kept = np.sqrt(ratio) * spread[1:] ** 2 / spread[:-1]
    fresh = spread[1:] * np.sqrt(1 - ratio) / spread[:-1]
    steps = np.arange(1, len(schedule) + 1)
    table = np.stack([sigma[:-1], 1 - sigma[1:], length[1:] * kept, length[1:] * fresh, steps], axis=1)  # [steps,5]
    return _solver(schedule, table, _noisy_init, _ddpm_advance)


def add_noise(clean: Array, sigma: Any, key: Array) -> Array:
    """(1 - sigma) clean + sigma * noise, float32 [B,...]; noise float32 at the (global) shape of `clean`, from `key`.

    sigma: a number, or an array that has clean's rank and broadcasts; that of a timestep is timestep / 1000.
    """
    return (1 - sigma) * clean.astype(jnp.float32) + sigma * jax.random.normal(key, clean.shape, jnp.float32)


def _solver(schedule, table, init, advance) -> Solver:
    timesteps, table = schedule.timesteps.astype(np.float32), table.astype(np.float32)
    return Solver(schedule.sigmas, timesteps, table, init, advance)


def _euler_init(x: Array, noise: Any = None) -> EulerState:
    return EulerState(_copy(x))


def _euler_advance(state: EulerState, v: Array, row: Array) -> EulerState:
    return EulerState(state.x + row[0] * v)


def _unipc_init(x: Array, noise: Any = None) -> UniPCState:
    # Separate buffers: each of them is donated.
    return UniPCState(_copy(x), *(jnp.zeros(x.shape, jnp.float32) for _ in range(3)))


def _unipc_advance(state: UniPCState, v: Array, row: Array) -> UniPCState:
    x, corrected, clean_1, clean_2 = state
    clean_0 = x - row[0] * v
    corrected = row[1] * x + row[2] * corrected + row[3] * clean_0 + row[4] * clean_1 + row[5] * clean_2
    x = row[6] * corrected + row[7] * clean_0 + row[8] * clean_1
    return UniPCState(x, corrected, clean_0, clean_1)


def _noisy_init(x: Array, noise: Any) -> NoisyState:
    typed = jnp.issubdtype(noise.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(noise) if typed else jnp.asarray(noise)
    keys = data.dtype == jnp.uint32
    if data.shape != (len(x), 2) if keys else data.shape[1:] != x.shape:
        raise UsageError(
            f"the solver's noise is {data.dtype}{list(data.shape)}; expected a random key for each of {len(x)} clips, "
            f"or float32 [steps-1,{','.join(map(str, x.shape))}]."
        )
    return NoisyState(_copy(x), jnp.array(data, dtype=jnp.uint32 if keys else jnp.float32, copy=True))


def _drawn(noise: Array, step: Array, shape: tuple[int, ...]) -> Array:
    """The noise float32 [B,...] that step number `step` (counted from 1) adds, drawn clip by clip, or given."""
    step = step.astype(jnp.int32)
    if noise.dtype != jnp.uint32:
        return noise[step - 1]  # [N-1,B,...] -> [B,...]

    def draw(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.wrap_key_data(key), step), shape[1:], jnp.float32)

    return jax.vmap(draw)(noise)  # [B,2] -> [B,...]


def _renoise_advance(state: NoisyState, v: Array, row: Array) -> NoisyState:
    clean = state.x - row[0] * v

    def noised() -> Array:
        return (1 - row[1]) * clean + row[1] * _drawn(state.noise, row[2], clean.shape)

    return NoisyState(jax.lax.cond(row[1] > 0, noised, lambda: clean), state.noise)


def _ddpm_advance(state: NoisyState, v: Array, row: Array) -> NoisyState:
    clean, noise = state.x - row[0] * v, state.x + (1 - row[0]) * v
    mean = row[1] * clean + row[2] * noise

    def fresh() -> Array:
        return row[3] * _drawn(state.noise, row[4], mean.shape)

    return NoisyState(mean + jax.lax.cond(row[3] > 0, fresh, lambda: jnp.zeros_like(mean)), state.noise)


def _copy(x: Array) -> Array:
    return jnp.array(x, dtype=jnp.float32, copy=True)


SOLVERS = {"euler": euler, "unipc": unipc}
