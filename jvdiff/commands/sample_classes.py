"""Sampling of class-conditional models by the command line: `jvdiff.sample`, given a config of the task latent_video.

    python -m jvdiff.sample --config configs/latent_video_small.py --config.class_label=7

The config is that of the training; its fields FIELDS are for sampling alone. Files as `jvdiff.sample` describes them.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jvdiff.commands import command_line
from jvdiff.commands.command_line import say
from jvdiff.errors import Interrupted, UsageError
from jvdiff.runtime import progress
from jvdiff.runtime.files import claim
from jvdiff.runtime.interrupts import interrupts

TASK = "latent_video"  # of a training config
FIELDS = ("checkpoint", "class_label", "output", "save_arrays")


def run(config: ConfigDict) -> list[Path]:
    """Makes a video of each class that `config.class_label` names, one after another, and returns their paths.

    Raises:
      UsageError: no class is named, or one that is not there; settings that cannot be.
    """
    import jax
    import numpy as np

    from jvdiff.commands import one_video
    from jvdiff.pipeline import class_conditional
    from jvdiff.pipeline.settings import check_seed

    if (given := config.class_label) is None:
        raise UsageError("no class; give --config.class_label=NUMBER, a name, or a tuple of them.")
    labels = tuple(given) if isinstance(given, tuple | list) else (given,)
    output = command_line.writable(config.output, "output")
    command_line.compile_cache(config.get("compile_cache"))  # type: ignore[arg-type]
    seconds: dict[str, float] = {}
    path = config.checkpoint or str(Path(config.folder) / "repository")
    with interrupts() as asked_to_stop:
        with progress.phase(f"loading {path}", seconds, "load"):
            model = class_conditional.load(path, config.precision)
        numbers = [class_conditional.label(model.classes, each) for each in labels]
        settings = model.settings(**{name: config[name] for name in class_conditional.FIELDS})
        command_line.say_device(model.configs.transformer.hidden_size, None)
        first, no_mp4, paths = check_seed(config.seed), one_video.video_writer(settings), []
        for i, number in enumerate(numbers):
            seed, name = (first + i) % 2**32, model.classes[number]
            say(f"class: {number} {name}   seed: {seed}")

            with (
                claim(output, f"class{number}_seed{seed}") as base,
                command_line.device_memory("sampling", "Try fewer frames or a smaller picture."),
            ):
                began = time.monotonic()
                with progress.bar("denoise", settings.steps) as shown:

                    def after_step(done: int, state: Any, shown: Any = shown) -> bool:
                        shown(done)
                        return asked_to_stop()

                    made = class_conditional.generate(
                        model, [number], seed=seed, callback=after_step, **dataclasses.asdict(settings)
                    )
                if asked_to_stop():
                    raise Interrupted(f"stopped while making class {number}; run the same command again.")
                record = dataclasses.asdict(settings) | {
                    "class_label": number,
                    "class_name": name,
                    "seed": seed,
                    "precision": model.precision.name,
                    "checkpoint": model.path,
                    "checkpoint_digest": model.digest,
                    "device": {"backend": jax.default_backend(), "kind": jax.devices()[0].device_kind},
                    "versions": one_video.versions(),
                    "seconds": {**seconds, "sample": round(time.monotonic() - began, 3)},
                }
                latents = np.asarray(made.latents[0])
                paths.append(one_video.write_files(base, made.video[0], latents, record, config.save_arrays, no_mp4))
    return paths
