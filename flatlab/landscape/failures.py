"""Errors of a user's model or loss function, as sentences that name what they were called with."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from flatlab.errors import UserError, count_of, reason
from flatlab.landscape.checks import Total
from flatlab.tensors.calls import unknown
from flatlab.tensors.memory import SplitOnOOM, out_of_memory
from flatlab.tensors.nested import Batch, tensors


def check_loss(loss: Any) -> None:
    """Refuse a loss that is no function, such as a name, None, or the class of a loss."""
    if callable(loss) and not isinstance(loss, type):
        return
    got = f"the class {loss.__name__}: create an instance" if isinstance(loss, type) else f"{loss!r}"
    raise UserError(
        f"The loss must be a function of (outputs, targets), such as torch.nn.functional.cross_entropy, got {got}."
    )


@contextmanager
def model_explained(model: Callable[..., Any], inputs: Any, size: int) -> Iterator[None]:
    """Turn an error of a model into a sentence; a lack of memory passes.

    Args:
        model: the model, or one that splits batches.
        inputs: of the batch on which it is called.
        size: its number of samples.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        called = model.model if isinstance(model, SplitOnOOM) else model
        raise UserError(_of_model(called, inputs, size, error)) from error


def loss_explained(total: Total) -> Total:
    """Return the sum of the losses such that an error of the loss function is a sentence; a lack of memory passes."""

    def explained(outputs: Any, batch: Batch) -> Tensor:
        try:
            return total(outputs, batch)
        except Exception as error:
            if isinstance(error, UserError) or out_of_memory(error):
                raise
            raise UserError(_of_loss(outputs, batch, error)) from error

    return explained


def _of_model(model: Callable[..., Any], inputs: Any, size: int, error: Exception) -> str:
    samples = count_of(size, "sample")
    odd = unknown(model, inputs) if isinstance(inputs, Mapping) else []
    if isinstance(error, TypeError) and (odd or isinstance(inputs, tuple | list)):
        foreign = f" (got other keys or lacks some: {', '.join(odd)})" if odd else ""
        return (
            f"The model is called with one argument, a {type(inputs).__name__}, and fails ({error}): pass a dictionary"
            f" whose keys are arguments of its forward{foreign}."
        )
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):  # by BatchNorm
        return (
            f"The model fails on {samples} alone ({error}): if samples mix in the model, use statistics that do"
            " not depend on the batch (BatchNorm with track_running_stats=True)."
        )
    weights = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
    beside = "" if weights is None else f", and its first parameter is {_described(weights)}"
    return (
        f"The model fails on a batch of {samples} ({reason(error).rstrip('.')}): its forward must take the inputs,"
        f" which are {_described(inputs)}{beside}; {_way_out(inputs, weights)}."
    )


def _way_out(inputs: Any, weights: Tensor | None) -> str:
    """Return how to make a model take its inputs, by whether these differ from its weights in dtype or device."""
    real = {(leaf.dtype, leaf.device) for leaf in tensors(inputs) if leaf.is_floating_point()}
    if weights is None or (real and real != {(weights.dtype, weights.device)}):
        return "convert the inputs, or the model by model.to(dtype)"
    return "any number of samples of this shape must do, since batches are cut and joined"


def _of_loss(outputs: Any, batch: Batch, error: Exception) -> str:
    way_out = "convert the targets, or pass a function that does"
    if not isinstance(outputs, Tensor):
        way_out = (
            "pass a function that picks a tensor, such as lambda outputs, targets: cross_entropy(outputs.logits,"
            " targets), or flatlab.loss_of(model), if the model computes its own loss from labels"
        )
    return (
        f"The loss fails on a batch of {count_of(batch.size, 'sample')} ({reason(error).rstrip('.')}): it is called as"
        f" loss(outputs, targets), here with outputs that are {_described(outputs)} and targets that are"
        f" {_described(batch.targets)}; {way_out}."
    )


def _described(nest: Any) -> str:
    """Return the dtypes and shapes of a nest of tensors."""
    inside = ", ".join(f"{leaf.dtype} {tuple(leaf.shape)}" for leaf in tensors(nest))
    return inside if isinstance(nest, Tensor) else f"a {type(nest).__name__} of {inside or 'no tensors'}"
