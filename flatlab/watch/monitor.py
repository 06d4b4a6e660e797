"""Flatness during training: measured at regular steps, within a share of the training time."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from flatlab.arguments import finite, whole
from flatlab.errors import UserError, choose
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.curvature.eigenvalues import hessian_spectrum
from flatlab.metrics.curvature.trace import hessian_trace
from flatlab.metrics.flatness.pilot import radii_at_rises
from flatlab.seeds import undisturbed
from flatlab.watch.sinks import Sink

if TYPE_CHECKING:
    import pandas as pd

LOG = logging.getLogger("flatlab")
NUMBERS = ("radius", "eigenvalue", "trace")
NAN = float("nan")
TOL, REL_ERROR = 0.01, 0.1  # of the eigenvalue's residual; of the trace's standard error


class Monitor:
    """Measures the landscape of a model during training: call ``monitor(model, step)`` after each step of a loop.

    A measurement contains the mean ``loss`` (nats), the L2 ``norm`` of the weights, and the requested `numbers`: the
    ``radius`` (absolute L2) at which the mean loss rises by `rise` nats, along the same directions each time (a larger
    one is flatter); the largest ``eigenvalue`` of the Hessian with its bounds; its ``trace`` with a 95 % interval. The
    model is measured in eval mode. Its weights, modes and gradients, and the states of all global random generators,
    are restored: a training gives the same bytes with and without a monitor.

    Args:
        landscape: returns the landscape of the model with its current weights, on the same data at each call.
        every: steps between two measurements.
        share: largest fraction of the training time that measurements may take. The first one is made at the first due
            step, since its cost is not known before. A later one is made at a due step if the time spent, plus that of
            the most expensive measurement so far, is within the share.
        rise: rise of the loss (nats) that defines the radius.
        numbers: which of "radius", "eigenvalue" and "trace" are measured; only "radius" is for quantized weights.
        sinks: receive every measurement, by ``sink.log(values, step)``.

    Attributes:
        rows: the measurements, with their steps.
        remarks: sentences on numbers that could not be measured and are NaN, for example where the loss is not finite;
            the training continues. An error at the first measurement is raised. The first due step that is skipped is
            a remark, and a warning of the logger ``flatlab``, too.
        skipped: due steps that were not measured, since the share did not allow it.
        spent: seconds of all measurements.
    """

    def __init__(
        self,
        landscape: Callable[[nn.Module], Landscape],
        *,
        every: int = 100,
        share: float = 0.05,
        rise: float = 0.1,
        numbers: Sequence[str] = NUMBERS,
        sinks: Sequence[Sink] = (),
    ) -> None:
        if not callable(landscape):
            raise UserError(
                f"landscape must be a function from the model to its Landscape, got {type(landscape).__name__}: write"
                " lambda model: Landscape(model, data, loss)."
            )
        self.landscape, self.sinks = landscape, tuple(sinks)
        self.every, self.rise = whole("every", every), finite("rise", rise, above=0)
        self.share = finite("share", share, above=0)
        self.numbers = tuple(choose("number", each, NUMBERS) for each in numbers)
        self.rows: list[dict[str, float]] = []
        self.remarks: list[str] = []
        self.skipped: list[int] = []
        self.spent = self._dearest = 0.0
        self._start: float | None = None
        self._last: int | None = None

    @property
    def trained(self) -> float:
        """Seconds since the first call, without those of the measurements."""
        return 0.0 if self._start is None else time.perf_counter() - self._start - self.spent

    def __call__(self, model: nn.Module, step: int) -> dict[str, float] | None:
        """Measure if the step is due and the share allows it.

        Args:
            model: the model after the step.
            step: number of steps of the training so far.

        Returns:
            The measurement by name, or None.
        """
        self._start = time.perf_counter() if self._start is None else self._start
        if step % self.every or step == self._last:
            return None
        if not self._affordable():
            self._skip(step)
            return None
        self._last, start = step, time.perf_counter()
        with _undisturbed(model):
            values = self._measure(model, step)
        seconds = time.perf_counter() - start
        self.spent += seconds
        self._dearest = max(self._dearest, seconds)
        row = {**values, "seconds": seconds}
        self.rows.append({"step": step, **row})
        for sink in self.sinks:
            sink.log(dict(row), step=step)
        return row

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table, one row for each measurement."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def _affordable(self) -> bool:
        return not self.rows or self.spent + self._dearest <= self.share * self.trained

    def _skip(self, step: int) -> None:
        if not self.skipped:
            self.remarks.append(
                f"step {step}: skipped, and so may later ones be (Monitor.skipped): with one more measurement of"
                f" {self._dearest:.2g} s, measuring would take more than the share {self.share:g} of the training time;"
                " choose a larger share, or a larger every."
            )
            LOG.warning("Flatness, %s", self.remarks[-1])
        if step not in self.skipped[-1:]:
            self.skipped.append(step)

    def _measure(self, model: nn.Module, step: int) -> dict[str, float]:
        values = dict.fromkeys(("loss", "norm", *(name for each in self.numbers for name in _names(each))), NAN)
        try:
            landscape = self.landscape(model)
            if not isinstance(landscape, Landscape):
                raise UserError(f"landscape must return a Landscape, got {type(landscape).__name__}.")
        except UserError as error:  # at first a mistake in the arguments, later a state of the training
            if not self.rows:
                raise
            self.remarks.append(f"step {step}: {error}")
            return values
        values |= {"loss": float(landscape.base_loss.mean()), "norm": landscape.norm}
        for name in self.numbers:
            values |= self._number(name, landscape, step)
        return values

    def _number(self, name: str, landscape: Landscape, step: int) -> dict[str, float]:
        """Return a number with its interval; if it is not defined, add a remark and return nothing."""
        try:
            if name == "radius":
                return {name: float(radii_at_rises(landscape, [self.rise]).radii[0])}
            if name == "eigenvalue":
                top = hessian_spectrum(landscape, k=1, tol=TOL)
                return _ends(name, float(top.value[0]), *(float(end[0]) for end in top.interval()))
            trace = hessian_trace(landscape, rel_error=REL_ERROR).trace
            return _ends(name, trace.value, *trace.interval())
        except UserError as error:
            if name != "radius" and not self.rows:
                raise
            self.remarks.append(f"step {step}: {error}")
            return {}


def _ends(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return dict(zip(_names(name), (value, low, high), strict=True))


def _names(number: str) -> tuple[str, ...]:
    return (number,) if number == "radius" else (number, f"{number}_low", f"{number}_high")


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode while the block runs; then restore each module's mode and all global generators."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {each.device for each in model.parameters()} - {torch.device("cpu")}
    with undisturbed(*devices), torch.enable_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
