"""Training: a loop that any task can use, and the tasks. A task is data, not a class to inherit from."""

from jvdiff.training.flow_matching import text_to_video_task
from jvdiff.training.loop import State, Task, fit
from jvdiff.training.reconstruction import vae_task
from jvdiff.training.teacher_forcing import teacher_forcing_task

__all__ = ["State", "Task", "fit", "teacher_forcing_task", "text_to_video_task", "vae_task"]
