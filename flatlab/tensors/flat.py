"""The parameters of a model that vary, and their flat vector."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from flatlab.errors import UserError

PIECE = 2**17  # entries that are computed with in float64 at a time
WRAPPED = re.compile(r"^((module|_orig_mod)\.)+")


def select(model: nn.Module, pattern: str | Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, in the order of the model, tied ones once.

    Args:
        model: any module.
        pattern: shell patterns over parameter names, such as ``"layer4.*"``; a tied parameter matches by any of
            its names. ``None`` selects all.

    Raises:
        UserError: if nothing requires a gradient, or a pattern matches nothing.
    """
    named = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    if not named:
        raise UserError(
            f"{type(model).__name__} has no parameter that requires a gradient, but a landscape needs one:"
            " call .requires_grad_(True) on what should vary."
        )
    if lazy := next((name for name, p in named if isinstance(p, UninitializedParameter)), ""):
        raise UserError(f"{lazy!r} has no shape yet: run one batch through the model before its landscape is opened.")
    patterns = ["*"] if pattern is None else [pattern] if isinstance(pattern, str) else list(pattern)
    for each in patterns:
        if not any(_matches(name, each) for name, _ in named):
            raise UserError(f"No trainable parameter matches {each!r}; available: {_some([n for n, _ in named])}.")
    chosen: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in named:
        if any(_matches(name, each) for each in patterns):
            chosen.setdefault(id(parameter), (name, parameter))
    if not chosen:
        raise UserError("An empty list of patterns selects no parameter: name one, or pass None for all.")
    return dict(chosen.values())


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Return a copy of the tensors as one vector (P,), each in its logical (row-major) order.

    The order does not depend on strides: a model has the same vector in ``channels_last`` and contiguous format.
    Sparse gradients (of embeddings) become dense.
    """
    return torch.cat([tensor.detach().to_dense().reshape(-1) for tensor in tensors])


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor of 16-bit floats in float32, others unchanged."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor


def split_like(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a vector (P,) with the shapes of these tensors."""
    pieces = torch.split_with_sizes(vector, [tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def length(vector: Tensor) -> Tensor:
    """Return the Euclidean length of a tensor in float64, piece by piece: at once it would take two more copies."""
    pieces = torch.split(vector.detach().reshape(-1), PIECE)
    found: Tensor = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in pieces]).norm()
    return found


def row_lengths(matrix: Tensor) -> Tensor:
    """Return the lengths (n,) of the rows of a matrix in float64, a few rows at a time."""
    rows = torch.split(matrix, max(1, PIECE // max(1, matrix.shape[1])))
    return torch.cat([torch.linalg.vector_norm(few, dim=1, dtype=torch.float64) for few in rows])


def sizes_of(tensors: Sequence[Tensor]) -> list[float]:
    """Return the root mean square of each tensor; that of all tensors if it is zero, or 1 if all are.

    Steps in these units have the same relative size in layers of small and of large weights.
    """
    counts = [tensor.numel() for tensor in tensors]
    sizes = [float(length(t)) / n**0.5 if n else 0.0 for t, n in zip(tensors, counts, strict=True)]
    whole = sum(count * size**2 for count, size in zip(counts, sizes, strict=True)) / max(sum(counts), 1)
    return [size or whole**0.5 or 1.0 for size in sizes]


def scales_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return for each entry (P,) the size of its tensor, as `sizes_of` returns it."""
    sizes = zip(tensors, sizes_of(tensors), strict=True)
    return torch.cat([torch.full_like(tensor, size).reshape(-1) for tensor, size in sizes]).detach()


def refuse_overlap(found: Tensor, written: Tensor) -> None:
    """Refuse parameters whose values differ from those written to them."""
    if not torch.equal(found, written):
        raise UserError(
            "Two parameters share memory without being one parameter, so they cannot vary freely:"
            " tie them as one nn.Parameter."
        )


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a name, with or without the prefixes of torch.compile and data parallelism."""
    return fnmatchcase(name, pattern) or fnmatchcase(WRAPPED.sub("", name), pattern)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
