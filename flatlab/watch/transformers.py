"""A monitor as a callback of the Trainer of `transformers` (extra `transformers`)."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flatlab.watch.monitor import Monitor


class FlatnessCallback(TrainerCallback):  # type: ignore[misc]  # untyped here
    """Calls a monitor after each step of the optimizer.

    Args:
        monitor: the monitor; its `landscape` is called with the Trainer's model.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        **named: Any,
    ) -> None:
        """Measure in the first process, if the step is due."""
        if model is not None and state.is_world_process_zero:
            self.monitor(model, state.global_step)
