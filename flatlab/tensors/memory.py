"""Forward passes within memory: a batch that does not fit is halved, and later ones are cut to that size."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flatlab.errors import count_of
from flatlab.tensors.calls import call
from flatlab.tensors.nested import concatenate, part, tensors
from flatlab.tensors.structures import mapped

LOG = logging.getLogger("flatlab")


class SplitOnOOM:
    """A model whose batches are cut if they do not fit; its samples must be independent of each other.

    Args:
        model: from a nest of inputs to one of outputs, samples along dimension 0 of each tensor. The outputs have no
            graph, even if the forward pass needs one itself (`torch.autograd.grad`).
    """

    def __init__(self, model: Callable[[Any], Any]) -> None:
        self.model = model
        self.fits: int | None = None  # samples at a time; None: no limit
        self.differentiates = False  # whether the model needs a graph in its own forward pass

    def __call__(self, inputs: Any) -> Any:
        """Return the outputs of all samples."""
        leaves = [inputs] if isinstance(inputs, Tensor) else tensors(inputs)  # the walk costs as much as a small layer
        size = len(leaves[0]) if leaves and leaves[0].ndim else 0
        if self.fits and size > (step := self.fits):  # a piece may reduce it further
            return concatenate([self(part(inputs, start, start + step)) for start in range(0, size, step)])
        graph = self.differentiates or torch.is_grad_enabled()
        try:
            with torch.set_grad_enabled(graph):
                return _values(call(self.model, inputs))
        except (RuntimeError, MemoryError) as error:
            alone = not graph and "does not require grad" in str(error)
            if not alone and (size < 2 or not out_of_memory(error)):
                raise
        # Outside of `except`, whose traceback would keep the failed pass's activations alive.
        if alone:
            self.differentiates = True
        else:
            self.fits = size // 2
            LOG.warning("Out of memory: evaluating %s at a time instead of %d.", count_of(self.fits, "image"), size)
        return self(inputs)


def _values(outputs: Any) -> Any:
    """Return outputs without the graph of a model that differentiates in its forward pass."""
    if isinstance(outputs, Tensor):
        return outputs.detach()
    return mapped(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or the host ran out (for the latter torch raises a plain RuntimeError)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
