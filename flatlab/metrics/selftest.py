"""`flatlab selftest`: each estimator against closed forms, on this machine, its devices and dtypes.

The draws are fixed by their seeds, so that a check either always passes on a machine or shows a fault there. Sampled
numbers are allowed four and a half standard errors of their own, deterministic ones the rounding of their dtype.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatlab.derivatives.operators import Hessian
from flatlab.derivatives.outer import GGN
from flatlab.metrics import closed_forms
from flatlab.metrics.closed_forms import Golden
from flatlab.metrics.curvature.density import spectral_density
from flatlab.metrics.curvature.eigenvalues import hessian_spectrum
from flatlab.metrics.curvature.trace import hessian_trace
from flatlab.metrics.flatness.compare import compare_flatness
from flatlab.metrics.flatness.perturbations import draw_direction
from flatlab.metrics.flatness.sphere import sphere_flatness
from flatlab.metrics.scale_audit import scale_audit
from flatlab.metrics.surfaces.connectivity import connect
from flatlab.metrics.surfaces.directions import given_directions
from flatlab.metrics.surfaces.planes import line, plane
from flatlab.results.estimate import Estimate

SIGMAS = 4.5  # exceeded by one in 150,000 normal errors
REPEATS, LEVEL, FEWEST = 60, 0.9, 45  # of 60 intervals 54 should cover; fewer than 45 have a probability of 0.001
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-4}


@dataclass(frozen=True)
class Check:
    """One check: its name, the expected value, the computed value, and the allowed difference."""

    name: str
    expected: float
    got: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether it is near enough; NaN is not."""
        return abs(self.got - self.expected) <= self.bound


@dataclass(frozen=True)
class Fault(Check):
    """A check that ended in an exception."""

    reason: str = ""


Where = dict[str, Any]
Group = Callable[[Where], Iterable[Check]]


def places() -> list[Where]:
    """Return the available devices, with their dtypes."""
    found: list[Where] = [{"device": "cpu", "dtype": dtype} for dtype in (torch.float64, torch.float32)]
    if torch.cuda.is_available():
        found += [{"device": "cuda", "dtype": dtype} for dtype in (torch.float64, torch.float32)]
    return found


def selftest() -> Iterator[Check]:
    """Yield the checks as they are made, each named by its device and dtype."""
    for where in places():
        label = f"{where['device']} {str(where['dtype']).removeprefix('torch.')}"
        for group in GROUPS:
            yield from _guarded(group, where, label)


def _guarded(group: Group, where: Where, label: str) -> Iterator[Check]:
    try:
        for check in group(where):
            yield type(check)(**{**vars(check), "name": f"{label}: {check.name}"})
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        yield Fault(f"{label}: {group.__name__.strip('_')}", float("nan"), float("nan"), 0.0, reason)


def _values(where: Where) -> Iterator[Check]:
    """Loss, gradient and product with a vector, over batches of uneven sizes."""
    for name, problem in _problems(where).items():
        landscape, w = problem.landscape, problem.landscape.point.double().cpu()
        yield _near(
            f"{name}, loss",
            problem.value(w[None]),
            torch.tensor([landscape.evaluate().loss], dtype=torch.float64),
            where,
        )
        free = w[None].clone().requires_grad_()
        (slope,) = torch.autograd.grad(problem.value(free).sum(), free)
        yield _near(f"{name}, gradient", slope[0], landscape.gradient(), where)
        v = draw_direction(landscape, 5, 0)
        exact = problem.hessian @ v.double().cpu()
        yield _near(f"{name}, Hessian times a vector", exact, landscape.hvp(v), where)
        yield _near(f"{name}, Hessian operator", exact, Hessian(landscape) @ v, where)
    softmax = closed_forms.softmax_regression(where)
    v = draw_direction(softmax.landscape, 5, 1)  # of a linear model the Gauss-Newton matrix is the Hessian
    yield _near("softmax, GGN times a vector", softmax.hessian @ v.double().cpu(), GGN(softmax.landscape) @ v, where)


def _spectra(where: Where) -> Iterator[Check]:
    """Eigenvalues, trace and density."""
    for name, problem in _problems(where).items():
        landscape, exact = problem.landscape, problem.eigenvalues
        tops = hessian_spectrum(landscape, k=2, tol=1e-6).eigenvalues
        yield _near(f"{name}, top eigenvalues", exact.flip(0)[:2], torch.from_numpy(tops.copy()), where)
        lowest = hessian_spectrum(landscape, k=1, which="SA", tol=1e-4).eigenvalues
        yield Check(f"{name}, lowest eigenvalue", float(exact[0]), float(lowest[0]), 1e-3 * float(exact.abs().max()))
        for deflate in (0, 4):
            found = hessian_trace(landscape, deflate=deflate, budget=200)
            how = "Hutchinson" if deflate == 0 else "deflated"
            yield _sampled(f"{name}, trace ({how})", problem.trace, found.trace)
            yield _sampled(f"{name}, trace of the square ({how})", float(exact.square().sum()), found.square)
        density = spectral_density(landscape, num_vectors=20, steps=20)
        for power in (0, 1, 2):
            moment = float((exact**power).mean())
            yield _sampled(f"{name}, density, moment {power}", moment, density.moment(power), moment)


def _spheres(where: Where) -> Iterator[Check]:
    """Flatness on spheres, in blocks and crossed; a difference of two models; filter normalisation."""
    problem, radius = closed_forms.quadratic(where), 0.5
    exact = radius**2 * problem.trace / (2 * problem.landscape.num_params)
    found = sphere_flatness(problem.landscape, [radius], num_samples=400)
    yield _sampled("quadratic, F on a sphere", exact, found.estimates[0])
    gaussian = closed_forms.linear_gaussian(where)
    exact = 4.0 * gaussian.trace / (2 * gaussian.landscape.num_params)
    found = sphere_flatness(gaussian.landscape, [2.0], num_samples=2000)
    yield _sampled("linear-Gaussian, F on a sphere", exact, found.estimates[0])
    twice = closed_forms.quadratic(where, tuple(2 * value for value in closed_forms.SPECTRUM))
    difference = compare_flatness(twice.landscape, problem.landscape, [radius], num_samples=400)
    exact = radius**2 * problem.trace / (2 * problem.landscape.num_params)
    yield _sampled("two quadratics, paired difference of F", exact, difference.estimates[0])
    filters = sphere_flatness(gaussian.landscape, [0.3], num_samples=2000, normalisation="filter")
    length = float(gaussian.landscape.norm)
    exact = 0.3**2 * length**2 * gaussian.trace / (2 * gaussian.landscape.num_params)
    yield _sampled("linear-Gaussian, filter-normalised F", exact, filters.estimates[0])


def _surfaces(where: Where) -> Iterator[Check]:
    """Every point of a line, a plane, a refined plane, and a straight path between two checkpoints."""
    for name, problem in _problems(where).items():
        landscape, w = problem.landscape, problem.landscape.point.double().cpu()
        vectors = torch.stack([draw_direction(landscape, 9, k) for k in range(2)])
        axes = given_directions(landscape, list(vectors))
        for refine in (None, 1e-3):
            found = plane(landscape, axes, grid=(np.linspace(-1, 2, 17), np.linspace(-2, 1, 17)), refine=refine)
            spots = np.stack(np.meshgrid(found.x, found.y, indexing="ij"), -1)[found.measured]
            exact = problem.value(w + torch.from_numpy(spots) @ vectors.double().cpu())
            computed = torch.from_numpy(found.of()[found.measured])
            yield _near(f"{name}, plane{' (refined)' if refine else ''}", exact, computed, where)
        along = line(landscape, axes, grid=[-1.0, 0.0, 0.7])
        steps = torch.from_numpy(along.places)[None, :, None] * vectors.double().cpu()[:, None]
        exact = problem.value((w + steps).reshape(-1, len(w)))
        yield _near(f"{name}, line", exact, torch.from_numpy(along.of().reshape(-1)), where)
    problem = closed_forms.deep_linear(where)
    other = problem.landscape.around(_moved(problem.landscape))
    path = connect(problem.landscape, other, grid=9)
    ends = torch.stack([each.point.double().cpu() for each in (problem.landscape, other)])
    exact = problem.value(ends[0] + torch.from_numpy(path.places)[:, None] * (ends[1] - ends[0]))
    yield _near("deep linear, path between two checkpoints", exact, torch.from_numpy(path.losses[:, 0]), where)


def _moved(landscape: Any) -> torch.nn.Module:
    import copy

    moved = copy.deepcopy(landscape.model)
    with torch.no_grad():
        for index, parameter in enumerate(moved.parameters()):
            parameter.add_(1.0 if index else -1.0)
    return moved  # type: ignore[no-any-return]


def _invariance(where: Where) -> Iterator[Check]:
    """Rescaled layers: the function and adaptive flatness do not change."""
    found = scale_audit(closed_forms.deep_linear(where).landscape, num_samples=4)
    rounding = ROUNDING[where["dtype"]]
    yield Check("deep linear, outputs after rescaling, change", 0.0, float(found.deviation.max()), rounding)
    adaptive = found.measures.index("sphere, by parameter (adaptive)")
    yield Check("deep linear, adaptive F, after / before", 1.0, float(found.ratio[:, adaptive].max()), 1e3 * rounding)


def _randomness(where: Where) -> Iterator[Check]:
    """Directions are Gaussian, equal seeds give equal draws, and different seeds different ones."""
    wide = closed_forms.quadratic(where, tuple(1.0 + k / 500 for k in range(500))).landscape
    directions = torch.stack([draw_direction(wide, 0, k) for k in range(20)]).double().cpu()
    count = directions.numel()
    entries = directions.flatten() * wide.num_params**0.5
    yield Check("directions, mean of the entries", 0.0, float(entries.mean()), SIGMAS / count**0.5)
    yield Check(
        "directions, fourth moment (3 is Gaussian)", 3.0, float(entries.pow(4).mean()), SIGMAS * (96 / count) ** 0.5
    )
    cosines = (directions @ directions.T)[torch.triu_indices(20, 20, 1).unbind()]
    yield Check("directions, largest cosine of two", 0.0, float(cosines.abs().max()), SIGMAS / wide.num_params**0.5)
    landscape = closed_forms.quadratic(where).landscape
    draws: dict[str, Callable[[int], Any]] = {
        "sphere": lambda seed: sphere_flatness(landscape, [1.0], num_samples=2, seed=seed).value,
        "trace": lambda seed: hessian_trace(landscape, deflate=0, budget=32, seed=seed).vectors[:, :3],
        "density": lambda seed: spectral_density(landscape, num_vectors=1, steps=4, seed=seed).nodes[0],
        "surface": lambda seed: line(closed_forms.softmax_regression(where).landscape, grid=3, seed=seed).values,
    }
    for name, draw in draws.items():
        first, again, other = draw(0), draw(0), draw(1)
        yield Check(f"{name}, one seed twice, difference", 0.0, float(np.abs(first - again).max()), 0.0)
        yield Check(f"{name}, two seeds differ", 1.0, float(not np.array_equal(first, other)), 0.0)


def _coverage(where: Where) -> Iterator[Check]:
    """The number of intervals that contain the true value."""
    problem = closed_forms.quadratic(where)
    exact, bound = problem.trace / (2 * problem.landscape.num_params), LEVEL * REPEATS - FEWEST
    hits = traced = 0
    for seed in range(REPEATS):
        found = sphere_flatness(problem.landscape, [1.0], num_samples=40, seed=seed).interval(LEVEL)
        hits += bool(found[0][0] <= exact <= found[1][0])
        trace = hessian_trace(problem.landscape, deflate=4, budget=60, seed=seed).trace
        traced += abs(trace.value - problem.trace) <= trace.half_width(LEVEL)
    yield Check(f"sphere, {LEVEL:.0%} intervals that contain F", LEVEL * REPEATS, hits, bound)
    yield Check(f"trace, {LEVEL:.0%} intervals that contain it", LEVEL * REPEATS, traced, bound)


GROUPS: tuple[Group, ...] = (_values, _spectra, _spheres, _surfaces, _invariance, _randomness, _coverage)


def _problems(where: Where) -> dict[str, Golden]:
    return {
        "quadratic": closed_forms.quadratic(where),
        "softmax": closed_forms.softmax_regression(where),
        "linear-Gaussian": closed_forms.linear_gaussian(where),
        "deep linear": closed_forms.deep_linear(where),
    }


def _near(name: str, expected: Tensor, got: Tensor, where: Where) -> Check:
    """Compare vectors by the entry that differs most; the bound is a share of the largest entry."""
    exact, computed = expected.detach().double().cpu(), got.detach().double().cpu()
    off = torch.nan_to_num((exact - computed).abs(), nan=torch.inf)
    worst = int(off.argmax())
    bound = ROUNDING[where["dtype"]] * max(float(exact.abs().max()), 1.0)
    return Check(name, float(exact[worst]), float(computed[worst]), bound)


def _sampled(name: str, expected: float, found: Estimate, scale: float | None = None) -> Check:
    """Compare a sampled number; the bound is `SIGMAS` of its standard errors, and rounding."""
    size = abs(expected if scale is None else scale)
    return Check(name, expected, found.value, SIGMAS * float(found.stderr) + 1e-4 * size)
