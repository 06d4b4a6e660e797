"""Flatness while a network is trained: a monitor for a plain loop; callbacks for Lightning and `transformers`."""

from flatlab.watch.monitor import Monitor
from flatlab.watch.sinks import CSV, Sink, TensorBoard

__all__ = ["CSV", "Monitor", "Sink", "TensorBoard"]
