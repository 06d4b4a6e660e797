"""A monitor as a callback of Lightning (extra `lightning`)."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from flatlab.watch.monitor import Monitor


class FlatnessCallback(Callback):  # type: ignore[misc]  # untyped here
    """Calls a monitor after each step of the optimizer, and logs its numbers to the trainer's loggers.

    Args:
        monitor: the monitor; its `landscape` is called with the LightningModule.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *given: Any, **named: Any) -> None:
        """Measure in the first process, if the step is due."""
        if not trainer.is_global_zero or not (step := trainer.global_step):
            return
        values = self.monitor(pl_module, step)
        for logger in trainer.loggers if values else ():
            logger.log_metrics({f"flatness/{name}": each for name, each in (values or {}).items()}, step)
