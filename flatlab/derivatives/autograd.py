"""Second derivatives by autograd; refused if they would be those of another function."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import ParametrizationList

from flatlab.errors import UserError
from flatlab.seeds import generator
from flatlab.tensors.calls import call
from flatlab.tensors.precision import float32_in_full

Apply = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""A batch's part of a product, from and to tensors with the shapes of the parameters."""

STEP = 1e-5  # of each weight's size: hundreds of roundings of float32, and a thousandth of a step of 8-bit weights
STUCK = 0.5  # share of the entries that should change and do not, above which a function is piecewise constant


class OnceDifferentiableError(RuntimeError):
    """A path through the graph ends at a function that autograd cannot differentiate twice."""


class Whole(nn.Module):
    """A model and its loss as one module, so that a loss that reads the model's parameters reads those of the call.

    Args:
        model: whose parameters are named ``model.*`` here.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, inputs: Any, total: Callable[[Any], Tensor]) -> Tensor:
        """Return the sum of the losses of a batch."""
        return total(call(self.model, inputs))


def total_at(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Any, total: Callable[[Any], Tensor]) -> Tensor:
    """Return the sum of the losses of a batch, with these tensors as parameters and buffers of the model."""
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    value: Tensor = functional_call(Whole(model), named, (inputs, total))
    return value


def pullback(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> Apply:
    """Return the function from views to the derivative of <values, views> by the tensors; the graph is kept.

    Raises:
        OnceDifferentiableError: if a path from the values ends in a function without second derivative.
    """
    alive = [i for i, value in enumerate(values) if value.requires_grad]
    _refuse_dead_ends([values[i].grad_fn for i in alive])

    def apply(views: Sequence[Tensor]) -> Sequence[Tensor]:
        if not alive:  # nothing depends on the tensors: a loss without curvature
            return [torch.zeros_like(tensor) for tensor in tensors]
        ends, weights = [values[i] for i in alive], [views[i] for i in alive]
        return torch.autograd.grad(ends, tensors, weights, retain_graph=True, materialize_grads=True)

    return apply


@contextmanager
def one_path() -> Iterator[None]:
    """Compute values as derivatives are computed: without the fused path of torch's own Transformer layers.

    torch uses that path only without a graph, and it is another function: it sets padded positions to zero. Products
    of float32 are computed in float32, so that a loss is as smooth as its dtype promises.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with float32_in_full():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Keep graphs, and use the attention kernels that have a second derivative: the fused ones have none."""
    with torch.enable_grad(), one_path(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def second_order() -> Iterator[None]:
    """Differentiate twice, with the kernels that have a second derivative.

    Raises:
        UserError: if a path has no second derivative.
    """
    try:
        with twice_differentiable():
            yield
    except OnceDifferentiableError as error:
        raise UserError(f"The model cannot be differentiated twice, so it has no Hessian: {error}") from error


def nodes_behind(ends: Sequence[Any]) -> set[Any]:
    """Return all nodes of the graph that are reachable from these nodes, themselves included."""
    waiting, seen = list(ends), set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen


def refuse_rounding(model: nn.Module, moved: Collection[Tensor]) -> None:
    """Refuse curvature by weights that are rounded, or through rounded activations (straight-through)."""
    if sentence := rounding(model, moved):
        raise UserError(sentence)


def rounding(model: nn.Module, moved: Collection[Tensor]) -> str:
    """Return which weights, or activations, are rounded, as a sentence; empty if none are.

    The loss is piecewise constant in them, and its derivatives are zero almost everywhere; autograd's are those of the
    function without rounding. Each parametrized weight that varies is therefore tested with a small step.
    """
    ours = {id(tensor) for tensor in moved}
    for name, layer in model.named_modules():
        if getattr(layer, "straight_through", False):
            return (
                f"{name!r} rounds activations: autograd differentiates straight through that, so the curvature is not"
                " that of the loss; measure a network that quantizes its weights only, such as"
                " flatlab.plain_network(model, activations=False) if another library quantized it."
            )
        if any(kind.__name__ == "FakeQuantizeBase" for kind in type(layer).__mro__):  # of torch.ao, which is not loaded
            return (
                f"{name!r} rounds what it is given: autograd differentiates straight through that, so the curvature is"
                " not that of the loss; measure flatlab.plain_network(model, activations=False), whose weights are the"
                " rounded ones."
            )
        moves = isinstance(layer, ParametrizationList) and any(id(p) in ours for p in layer.parameters())
        if moves and is_staircase(layer):
            return (
                f"{name.replace('parametrizations.', '')!r} is rounded ({type(layer[-1]).__name__}): autograd"
                f" differentiates straight through that, so its curvature is not that of the loss: {_way_out(layer)},"
                " or hold that weight still with requires_grad_(False)."
            )
    return ""


def _way_out(layer: ParametrizationList) -> str:
    """Return how to make a parametrized weight a plain one: ours by `bake`, others by torch's own function."""
    ours = type(layer[0]).__module__.startswith("flatlab.")
    return "bake(model) first" if ours else "torch.nn.utils.parametrize.remove_parametrizations(layer, name) first"


def is_staircase(layer: ParametrizationList) -> bool:
    """Return whether a parametrization has a gradient, but does not change when its originals change slightly.

    Each entry is moved up or down at random, since a common factor would not change a scale-invariant function.
    """
    names = ["original"] if layer.is_tensor else [f"original{index}" for index in range(layer.ntensors)]
    originals: list[Tensor] = [getattr(layer, name) for name in names]
    if not all(original.is_floating_point() for original in originals):
        return False
    rng = generator("derivatives", "staircase")
    with torch.enable_grad():
        here = [original.detach().clone().requires_grad_() for original in originals]
        value = _through(layer, here)
        weights = torch.randn(value.shape, generator=rng).to(value)
        slopes = torch.autograd.grad((value * weights).sum(), here, materialize_grads=True)
    signs = [2 * torch.randint(2, tensor.shape, generator=rng).to(tensor) - 1 for tensor in here]
    with torch.no_grad():
        moved = _through(layer, [tensor * (1 + STEP * sign) for tensor, sign in zip(here, signs, strict=True)])
    still = moved == value
    claims = [(s != 0) & (w != 0) for s, w in zip(slopes, here, strict=True) if w.shape == value.shape]
    return any(bool(claim.any()) and float(still[claim].double().mean()) > STUCK for claim in claims)


def _through(layer: ParametrizationList, originals: Sequence[Tensor]) -> Tensor:
    tensor: Tensor = layer[0](*originals)
    for step in list(layer)[1:]:
        tensor = step(tensor)
    return tensor


def _refuse_dead_ends(ends: Sequence[Any]) -> None:
    """Raise if a path ends in a function that is marked as differentiable once.

    torch raises only if it follows that path; for the derivative by the parameters it prunes the path, and the
    curvature behind it is zero without an error.
    """
    if any(node.name() == "torch::autograd::Error" for node in nodes_behind(ends)):
        raise OnceDifferentiableError("a function in it is marked with @once_differentiable")
