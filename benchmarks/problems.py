"""Problems whose flatness is known: in closed form, or from 100,000 directions in float64 on all the images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, vmap

from flatlab import Landscape
from flatlab.seeds import derive, generator
from flatlab.tensors.flat import split_like

RISES = (0.01, 0.1, 0.5, 2.0)  # nats, that the radii are chosen for
DIRECTIONS = 100_000
CHUNK = 500  # directions evaluated together


@dataclass(frozen=True)
class Truth:
    """What is known at each radius."""

    radii: np.ndarray
    value: np.ndarray  # (R,) F of the first model
    stderr: np.ndarray  # (R,) of the reference; zero for a closed form
    difference: np.ndarray  # (R,) first less second
    difference_stderr: np.ndarray


@dataclass(frozen=True)
class Problem:
    """Two models of one architecture on the same images, and what is true of them."""

    words: str
    landscapes: tuple[Landscape, Landscape]
    truth: Callable[[], Truth]


class Quadratics(nn.Module):
    """Loss of image i: 1/2 sum_p h_ip (w_p - c_ip)^2; an input is (h_i of either model, c_i)."""

    def __init__(self, size: int, which: int) -> None:
        super().__init__()
        self.which = which
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        curvatures, centre = inputs
        return 0.5 * (curvatures[:, self.which] * (self.w - centre) ** 2).sum(1)


def quadratics(sizes: tuple[int, int] = (96, 160)) -> Problem:
    """Pareto spectra (index 1.1: hardly a mean), images whose curvature is Pareto too, two strata of unequal size."""
    draw, dim = np.random.default_rng(derive("quadratics")), 60
    spectrum = 1 + draw.pareto(1.1, size=dim)
    traces, data = [], {}
    for name, size in zip("ab", sizes, strict=True):
        scale, centre = 0.2 + draw.pareto(2.2, size=(size, 1)), 0.03 * draw.normal(size=(size, dim))
        first = spectrum * scale * draw.gamma(2.0, size=(size, dim))
        second = 0.9 * first * draw.gamma(4.0, 0.25, size=(1, dim))
        traces.append([h.sum(1).mean() for h in (first, second)])
        both = torch.stack([torch.tensor(first), torch.tensor(second)], dim=1)
        data[name] = [((both, torch.tensor(centre)), torch.zeros(size))]
    models = [Landscape(Quadratics(dim, which).eval(), data, lambda outputs, _: outputs) for which in (0, 1)]
    per_square = np.mean(traces, axis=0) / (2 * dim)  # F / gamma^2
    radii = np.sqrt(np.array(RISES) / per_square[0])
    none = np.zeros(len(RISES))
    truth = Truth(radii, radii**2 * per_square[0], none, radii**2 * (per_square[0] - per_square[1]), none)
    return Problem("quadratics, Pareto spectra, closed form", (models[0], models[1]), lambda: truth)


def images(count: int) -> tuple[Tensor, Tensor]:
    """Return real handwritten digits, pooled to 4 x 4 numbers in float64."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=generator("benchmarks", "digits"))[:count]
    pixels = torch.tensor(data.images)[order][:, None] / 16.0
    return (F.avg_pool2d(pixels, 2).flatten(1) - 0.3) / 0.3, torch.tensor(data.target)[order]


def fitted(model: nn.Module, data: tuple[Tensor, Tensor], steps: int) -> nn.Module:
    """Bring a model near a minimum of its regularised loss, by full-batch L-BFGS."""
    inputs, targets = data
    model = model.double()
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        loss = F.cross_entropy(model(inputs), targets) + 2e-3 * decay
        loss.backward()
        return loss

    optimiser.step(closure)
    return model.eval()


def softmax_regression() -> Problem:
    """170 parameters, 256 digits; the second model stopped early."""
    data = images(256)
    models = [fitted(_seeded(lambda: nn.Linear(16, 10)), data, steps) for steps in (200, 12)]
    return _trained("softmax regression", models, {"all": data})


def network() -> Problem:
    """A ReLU network of 442 parameters, 192 digits in three strata of unequal size; the second has another seed."""
    inputs, targets = images(192)
    models = [
        fitted(
            _seeded(lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)), seed),
            (inputs, targets),
            300,
        )
        for seed in (0, 1)
    ]
    cuts = {"a": slice(0, 32), "b": slice(32, 90), "c": slice(90, 192)}
    return _trained("a network", models, {name: (inputs[s], targets[s]) for name, s in cuts.items()})


PROBLEMS = {
    "quadratics": quadratics,
    "many images": partial(quadratics, (1536, 2560)),  # so many that sampling stops short of a round
    "softmax": softmax_regression,
    "network": network,
}


def _seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _trained(words: str, models: list[nn.Module], data: dict[str, tuple[Tensor, Tensor]]) -> Problem:
    sides = [Landscape(model, {name: [pair] for name, pair in data.items()}, F.cross_entropy) for model in models]
    size = sides[0].num_params
    return Problem(
        f"{words}, {size} parameters, reference of {DIRECTIONS:,} directions",
        (sides[0], sides[1]),
        partial(_reference, models, data, size),
    )


def _reference(models: list[nn.Module], data: dict[str, tuple[Tensor, Tensor]], size: int) -> Truth:
    """Walk many directions at once, by code that shares nothing with the engine's loop but the definition."""
    losses = [_many(model, data) for model in models]
    draws = generator("benchmarks", "reference")
    radii = np.array([_radius(losses[0], size, rise) for rise in RISES])
    rises = np.zeros((2, DIRECTIONS, len(radii)))
    for start in range(0, DIRECTIONS, CHUNK):
        rays = F.normalize(torch.randn(CHUNK, size, generator=draws, dtype=torch.float64))
        for k, loss in enumerate(losses):
            base = loss(torch.zeros(1, size, dtype=torch.float64))
            for r, radius in enumerate(radii):
                rises[k, start : start + CHUNK, r] = (loss(radius * rays) - base).numpy()
    paired = rises[0] - rises[1]
    errors = [each.std(axis=0, ddof=1) / np.sqrt(DIRECTIONS) for each in (rises[0], paired)]
    return Truth(radii, rises[0].mean(axis=0), errors[0], paired.mean(axis=0), errors[1])


def _many(model: nn.Module, data: dict[str, tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    """Return the loss at w + each row of a matrix (K, P): the mean over the strata's means."""
    named = dict(model.named_parameters())
    weights = [p.detach() for p in named.values()]

    def one(offset: Tensor) -> Tensor:
        moved = {n: w + o for n, w, o in zip(named, weights, split_like(offset, weights), strict=True)}
        means = [F.cross_entropy(functional_call(model, moved, x), y) for x, y in data.values()]
        return torch.stack(means).mean()

    many = vmap(one)

    def quiet(offsets: Tensor) -> Tensor:
        with torch.no_grad():
            return many(offsets)

    return quiet


def _radius(loss: Callable[[Tensor], Tensor], size: int, rise: float) -> float:
    """Return the radius of this rise, by bisection on some directions."""
    rays = torch.randn(CHUNK, size, generator=generator("benchmarks", "radius"), dtype=torch.float64)
    rays = F.normalize(rays)
    base = loss(torch.zeros(1, size, dtype=torch.float64))
    low, high = 1e-3, 1e3
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if (loss(middle * rays) - base).mean() < rise else (low, middle)
    return round(low, 4)
