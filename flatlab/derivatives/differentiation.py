"""Two methods for a product with a second derivative, and the choice between them by timing."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flatlab.derivatives.autograd import Apply
from flatlab.errors import reason
from flatlab.tensors.flat import flatten

AGREE = 1e-2  # the two methods differ by rounding, 1e-6 to 1e-3 in float32; a wrong formula differs by far more


@dataclass(frozen=True)
class Choice:
    """The method of products.

    Attributes:
        reason: of the choice, for the user.
        build, kept, forward: seconds to build a graph, for a product with it, and for one by forward mode; infinite if
            a method fails.
        failure: why both methods fail; empty if one works.
    """

    reason: str
    build: float
    kept: float
    forward: float
    failure: str

    def method(self, width: int) -> str:
        """Return the faster method for a block of vectors, which share a graph, but not a forward pass."""
        return "forward" if width * self.forward < self.build + width * self.kept else "reverse"


@contextmanager
def dual_numbers(tensors: Mapping[str, Tensor], tangents: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors as dual numbers with these tangents."""
    _load()
    with forward_ad.dual_level():
        yield {
            name: forward_ad.make_dual(tensor, tangent)  # type: ignore[no-untyped-call]
            for (name, tensor), tangent in zip(tensors.items(), tangents, strict=True)
        }


def tangent_of(dual: Tensor) -> Tensor | None:
    """Return the tangent of a dual number; None if it is zero."""
    return forward_ad.unpack_dual(dual).tangent  # type: ignore[no-any-return, no-untyped-call]


@cache
def _load() -> None:
    """Make a first dual number: torch then compiles decompositions with torch.jit.script, and issues a warning."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Trial:
    """A method tried on one batch: seconds to build its graph and for a product, or why it fails."""

    name: str
    build: float = float("inf")
    each: float = float("inf")
    product: Tensor | None = None
    graph: Apply | None = None
    failure: str = ""


def measure(
    build: Callable[[], Apply], forward: Apply, views: Sequence[Tensor], *, method: str, single: bool
) -> tuple[Choice, Apply | None]:
    """Try what `method` allows on one batch.

    With a `single` batch the graph is kept and nothing is faster, so forward mode is tried only if backwards fails.
    Forward mode is always compared with backwards, even if it is requested: some of torch's formulas are wrong.

    Returns:
        the choice, and the graph if one was built.
    """
    rounds = 1 if single else 2  # the first one is slower
    reverse = ahead = Trial("", failure="not asked for")
    with suppress(*([torch.OutOfMemoryError] if method == "forward" else [])):
        reverse = _try("reverse", build, views, rounds)
    if method == "forward" or (method == "auto" and not (single and reverse.product is not None)):
        ahead = _try("forward", lambda: forward, views, rounds)
    if reverse.product is not None and ahead.product is not None:
        off = float((reverse.product - ahead.product).norm() / reverse.product.norm().clamp_min(1e-30))
        ahead = ahead if off < AGREE else Trial("forward", failure=f"its product is another one, by {off:.1e}")
    if method == "forward":
        reverse = Trial("", failure="not asked for")
    tried = [trial for trial in (reverse, ahead) if trial.name]
    choice = Choice(_reason(tried, method, single), reverse.build, reverse.each, ahead.each, _failure(tried))
    return choice, reverse.graph


def _try(name: str, build: Callable[[], Apply], views: Sequence[Tensor], rounds: int) -> Trial:
    times: list[tuple[float, float]] = []
    try:
        for _ in range(rounds):
            start = _now(views)
            graph = build()
            built = _now(views)
            product = flatten(graph(views))
            times.append((built - start, _now(views) - built))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the derivative of an operator is not implemented
        return Trial(name, failure=reason(error))
    return Trial(name, min(t[0] for t in times), min(t[1] for t in times), product, graph)


def _now(views: Sequence[Tensor]) -> float:
    if views[0].is_cuda:
        torch.cuda.synchronize(views[0].device)
    return time.perf_counter()


def _failure(tried: Sequence[Trial]) -> str:
    return "" if any(t.product is not None for t in tried) else "; ".join(f"{t.name}: {t.failure}" for t in tried)


def _reason(tried: Sequence[Trial], method: str, single: bool) -> str:
    closed = [f"{trial.name} mode fails: {trial.failure}" for trial in tried if trial.failure]
    if closed:
        return "; ".join(closed)
    if method != "auto":
        return "as asked"
    if single:
        return "one batch: its graph is kept between the products"
    seconds = [f"{trial.name} {1e3 * (trial.build + trial.each):.3g} ms" for trial in tried]
    return f"measured on one batch: {', '.join(seconds)}"
