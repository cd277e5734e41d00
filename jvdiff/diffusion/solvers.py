"""Solvers of the flow-matching ODE dx/dsigma = v(x, sigma), from sigma near 1 (noise) to 0 (data).

A solver is a table of coefficients, worked out once in float64 numpy, and two pure functions: `init` makes a state
from noise, `advance` takes it one step with one row of the table. The logarithm of the last sigma, which is infinite,
therefore never meets a traced value. States are NamedTuples of float32 arrays shaped like x [B,...], whatever the
network's dtype, and of what draws noise, if anything does; a state and the number of steps done are all that resuming
needs. `renoise`, for networks distilled into few steps, and `ddpm` draw noise: they do not solve the ODE, but have the
same shape.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvdiff.diffusion.schedules import Schedule
from jvdiff.errors import UsageError
from jvdiff.runtime import draws
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


class UniPC3State(NamedTuple):
    x: Array  # as in UniPCState
    corrected: Array
    clean_1: Array
    clean_2: Array
    clean_3: Array  # the estimate three steps earlier


class NoisyState(NamedTuple):
    x: Array  # float32 [B,...], the latents at the current sigma; after the last step the clean ones
    noise: Array  # key data uint32 [B,2] that the noise of all steps is drawn from, or the noise itself [N-1,B,...]


def euler(schedule: Schedule) -> Solver:
    """Explicit Euler, x + (sigma_next - sigma) v: order 1, one network evaluation a step."""
    table = np.diff(schedule.sigmas)[:, None]
    return _solver(schedule, table, _euler_init, _euler_advance)


def unipc(schedule: Schedule, order: int = 2) -> Solver:
    """UniPC of order 1 to 3, variant B(h) = exp(h) - 1 ("bh2"), predicting clean latents (arXiv:2302.04867).

    Steps, orders and corrections are those of diffusers' UniPCMultistepScheduler with lower_order_final: the order of
    the predictor rises from 1 in the first step to `order`, and falls to 1 in the last; from step 1 on, the latents are
    corrected with the velocity just computed, in the order of the previous step's predictor. One network evaluation a
    step.
    """
    sigma = schedule.sigmas
    alpha = 1 - sigma
    steps, kept = len(schedule), max(order, 2)  # estimates that the state keeps
    lam = np.log(alpha[:-1]) - np.log(sigma[:-1])  # half log-SNR; infinite at the last sigma, which no formula needs
    orders = [min(order, steps - i, i + 1) for i in range(steps)]
    table = np.zeros((steps, 5 + 2 * kept))  # sigma | corrected x = 3 + kept weights | predicted x = 1 + kept weights
    for i in range(steps):
        correct = [1.0] + [0.0] * (2 + kept)  # of x, corrected, clean_0, clean_1, clean_2 ..
        if i > 0:  # from sigma[i-1] to sigma[i] once more, now knowing the estimate at sigma[i]
            slopes, rho = _unipc_correction(lam[: i + 1], orders[i - 1])
            ratio = sigma[i] / sigma[i - 1]
            gain = alpha[i] - alpha[i - 1] * ratio  # alpha (1 - exp(-h)), without the logarithms
            weights = [rho, 1 - rho - sum(slopes), *slopes, *[0.0] * (kept - 1 - len(slopes))]
            correct = [0.0, ratio, *(gain * weight for weight in weights)]
        slopes = _unipc_prediction(lam[: i + 2], orders[i])
        ratio = sigma[i + 1] / sigma[i]
        gain = alpha[i + 1] - alpha[i] * ratio
        weights = [1 - sum(slopes), *slopes, *[0.0] * (kept - 1 - len(slopes))]
        table[i] = sigma[i], *correct, ratio, *(gain * weight for weight in weights)  # of corrected x, clean_0 ..
    init = _unipc_init if kept == 2 else _unipc_3_init
    return _solver(schedule, table, init, _unipc_advance)


def _unipc_prediction(lam: np.ndarray, order: int) -> list[float]:
    """The weights of the differences to earlier estimates in the predictor from the last but one of `lam` to the
    last."""
    if order == 1:
        return []
    r, b = _unipc_equations(lam, order)
    rho = [0.5] if order == 2 else np.linalg.solve([r[:-1] ** k for k in range(order - 1)], b[:-1])
    return list(rho / r[:-1])


def _unipc_correction(lam: np.ndarray, order: int) -> tuple[list[float], float]:
    """As `_unipc_prediction` for the corrector, and the weight of the estimate at the last of `lam`."""
    if order == 1:
        return [], 0.5
    r, b = _unipc_equations(lam, order)
    *rho, last = np.linalg.solve([r**k for k in range(order)], b)
    return list(rho / r[:-1]), last


def _unipc_equations(lam: np.ndarray, order: int) -> tuple[np.ndarray, list[float]]:
    """Where the estimates are, in steps from the last but one of `lam` to the last, the latest last; and what the
    weights must give: phi_(k+1) k! / phi_1 of k = 1 .. order."""
    h = lam[-1] - lam[-2]
    r = np.array([*((lam[-2 - k] - lam[-2]) / h for k in range(1, order)), 1.0])
    phi_1 = np.expm1(-h)
    phi, b = phi_1 / -h - 1, []
    for k in range(1, order + 1):
        b.append(math.factorial(k) * phi / phi_1)
        phi = phi / -h - 1 / math.factorial(k + 1)
    return r, b


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


def euler_tokens(schedule: Schedule, x: Array, v: Array, timestep: Array, noise: Array | None = None) -> Array:
    """One step of Euler's in which each token has a timestep of its own (diffusers' `per_token_timesteps`).

    A token at sigma = timestep / 1000 goes to the highest level of the schedule below it, by more than 1e-6; one at 0
    stays. diffusers adds (sigma - sigma_next) times what it is given, hence wants -v here.

    Args:
        x, v: float32 [B,L,...], latents and velocity.
        timestep: float32 [B,L], in 0..1000.
        noise: float32 [B,L,...], standard normal: then the clean estimate is noised anew, as in `renoise`.
    """
    sigma = timestep / 1000
    levels = jnp.asarray(schedule.sigmas, jnp.float32)[:, None, None]  # [N+1,1,1]
    below = jnp.max(jnp.where(levels < sigma[None] - 1e-6, levels, 0.0), axis=0)  # [B,L]
    sigma, below = (jnp.expand_dims(each, range(2, x.ndim)) for each in (sigma, below))
    if noise is None:
        return x + (below - sigma) * v
    return (1 - below) * (x - sigma * v) + below * noise


def add_noise(clean: Array, sigma: Any, key: Array) -> Array:
    """(1 - sigma) clean + sigma * noise, float32 [B,...]; noise float32 at the (global) shape of `clean`, from `key`.

    sigma: a number, or an array that has clean's rank and broadcasts; that of a timestep is timestep / 1000.
    """
    return (1 - sigma) * clean.astype(jnp.float32) + sigma * draws.normal(key, clean.shape)


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


def _unipc_3_init(x: Array, noise: Any = None) -> UniPC3State:
    return UniPC3State(*_unipc_init(x), jnp.zeros(x.shape, jnp.float32))


def _unipc_advance(state: Any, v: Array, row: Array) -> Any:
    x, corrected, *clean = state
    clean = [x - row[0] * v, *clean]

    def weighted(first: int, *terms: Array) -> Array:
        return functools.reduce(operator.add, (row[first + i] * term for i, term in enumerate(terms)))

    corrected = weighted(1, x, corrected, *clean)
    x = weighted(3 + len(clean), corrected, *clean[:-1])
    return type(state)(x, corrected, *clean[:-1])


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
        return draws.normal(jax.random.fold_in(draws.key_of(key), step), shape[1:])

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
