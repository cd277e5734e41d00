"""Writes schedules.json beside this file: sigmas, timesteps and sampled latents of the reference programs.

    python tests/goldens/make_schedules.py          needs torch and diffusers (`pip install -e .[parity]`)

The "diffusers" grids are diffusers' own, float32 as it keeps them. The "training" grids follow set_timesteps of
FlowUniPCMultistepScheduler in the official Wan 2.2 repository (commit 00b69de4), whose highest sigma is the float32
value of 1 - 1/1000. Latents: diffusers' step() on the grid given, in float64, on the field of `field` below.
"""

import json
import pathlib

import diffusers
import numpy as np
import torch

SEED = 0
SHAPE = (2, 3)
GRIDS = [("diffusers", "unipc"), ("diffusers", "euler"), ("training", "unipc")]
SETTINGS = [(1, 5.0), (2, 3.0), (3, 8.0), (4, 3.0), (7, 1.0), (40, 12.0)]


def scheduler(solver, shift):
    if solver == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def field(x, t):
    return np.sin(2 * x) + x * (t / 1000) - 0.3


def official_grid(steps, shift):
    sigmas = np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1]
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return np.append(sigmas, 0), (sigmas * 1000).astype(np.int64)


def sample(solver, steps, shift, sigmas, timesteps, x):
    if solver == "euler":  # diffusers' step() would fall back to float32
        for t, dt in zip(timesteps, np.diff(sigmas), strict=True):
            x = x + dt * field(x, t)
        return x
    reference = scheduler(solver, shift)
    reference.set_timesteps(steps)
    reference.set_begin_index(0)
    reference.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    x = torch.tensor(x)
    for t in timesteps:
        x = reference.step(torch.tensor(field(x.numpy(), t)), t, x, return_dict=False)[0]
    return x.numpy()


def main():
    noise = np.random.default_rng(SEED).normal(size=SHAPE).round(3)
    cases = []
    for grid, solver in GRIDS:
        for steps, shift in SETTINGS:
            if grid == "training":
                sigmas, timesteps = official_grid(steps, shift)
            else:
                reference = scheduler(solver, shift)
                reference.set_timesteps(steps)
                sigmas, timesteps = reference.sigmas.double().numpy(), reference.timesteps.numpy()
            if grid == "diffusers" and solver == "unipc":  # in float32 this one's log(1 - sigma) is off by 0.013
                sigmas[0] = 1 - 1e-6
            latents = sample(solver, steps, shift, sigmas, timesteps.astype(np.float64), noise)
            case = {"grid": grid, "solver": solver, "steps": steps, "shift": shift}
            arrays = {"sigmas": sigmas, "timesteps": timesteps, "latents": latents}
            cases.append(case | {k: np.round(v.astype(np.float64), 9).tolist() for k, v in arrays.items()})
    record = {
        "made_by": "tests/goldens/make_schedules.py",
        "versions": {"diffusers": diffusers.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "seed": SEED,
        "noise": noise.tolist(),
    }
    lines = ",\n".join(json.dumps(case) for case in cases)
    text = json.dumps(record, indent=1)[:-2] + ',\n "cases": [\n' + lines + "\n ]\n}\n"
    (pathlib.Path(__file__).parent / "schedules.json").write_text(text)


if __name__ == "__main__":
    main()
