"""Training: a loop that any task can use, and the tasks. A task is data, not a class to inherit from."""

from jvdiff.training.flow_matching import text_to_video_task
from jvdiff.training.latent_video import LabelledLatents, latent_video_task, video_vae_task
from jvdiff.training.loop import State, Task, each, fit
from jvdiff.training.reconstruction import vae_task
from jvdiff.training.teacher_forcing import teacher_forcing_task

__all__ = [
    "LabelledLatents",
    "State",
    "Task",
    "each",
    "fit",
    "latent_video_task",
    "teacher_forcing_task",
    "text_to_video_task",
    "vae_task",
    "video_vae_task",
]
