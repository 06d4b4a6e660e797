"""The Hessian's spectrum at a checkpoint: extreme eigenvalues and trace in one unit, the density's starts in others."""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flatlab import files
from flatlab.arguments import FloatArray, JobReport
from flatlab.derivatives.operators import Hessian
from flatlab.errors import UserError, choose
from flatlab.landscape.landscape import Landscape
from flatlab.loading.checkpoint import network
from flatlab.measure.inputs import images
from flatlab.measure.units import UnitFiles
from flatlab.metrics.curvature.density import quadrature
from flatlab.metrics.curvature.eigenvalues import hessian_spectrum
from flatlab.metrics.curvature.resumable import KeptHessian
from flatlab.metrics.curvature.trace import hessian_trace, packed, unpacked
from flatlab.quant.attach import bake
from flatlab.quant.lsq import Activations
from flatlab.results.estimate import Cost
from flatlab.results.spectrum import FLOOR, NUMBERS, STATES, UNVERIFIED, MeasuredSpectrum, SpectralDensity
from flatlab.seeds import seeded
from flatlab.specs.measurements import SpectrumSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Measurement, Run
from flatlab.tensors.flat import select

Operator = Callable[[], Hessian]
HELD = 2**17  # numbers in a batch's inputs: a graph takes some thousand times their memory
LEAST = 32  # images of a batch


def fill(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> None:
    """Measure eigenvalues, trace and density; resumes an earlier call."""
    spec: SpectrumSpec = measurement.spec
    if spec.engine == "pyhessian":
        (found,) = UnitFiles(measurement).units([("pyhessian", partial(_by_pyhessian, run, spec, place, report))])
        theirs = MeasuredSpectrum.by_pyhessian(found[1:], float(found[0]))
        files.save_arrays(measurement.result, *theirs.to_arrays())
        return
    operator = cache(partial(_operator, measurement, run, place, report))
    units = [("extremes", lambda: _extremes(operator(), spec))]
    units += [(f"density-{index}", partial(_rule, operator, spec, index)) for index in range(spec.starts)]
    extremes, *rules = UnitFiles(measurement).units(units)
    _write(measurement, extremes, rules)


def batches_of(run: Run, spec: SpectrumSpec, place: Place) -> list[tuple[Tensor, Tensor]]:
    """Return images and targets (n, 2), class and weight, such that domains have equal weight in the mean loss.

    They are joined across domains, since the graph of a single batch can be kept between products.
    """
    every = images(run, spec, place)
    names = _domains(run, spec, list(every))
    x = [torch.cat([inputs for inputs, _ in every[name]]) for name in names]
    y = [torch.cat([labels for _, labels in every[name]]) for name in names]
    whole = sum(len(labels) for labels in y)
    weights = [torch.full_like(labels, whole / (len(names) * len(labels)), dtype=torch.float32) for labels in y]
    targets = torch.stack([torch.cat(y).float(), torch.cat(weights)], dim=1)
    size = max(LEAST, HELD // x[0][0].numel())
    return list(zip(torch.split(torch.cat(x), size), torch.split(targets, size), strict=True))


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the losses (n,) times their weights."""
    return F.cross_entropy(outputs, targets[:, 0].long(), reduction="none") * targets[:, 1]


def _domains(run: Run, spec: SpectrumSpec, known: list[str]) -> list[str]:
    if spec.domains in ("source", "target"):
        return [name for name in known if (name == run.spec.held_out) == (spec.domains == "target")]
    names = dict.fromkeys(choose("domain", name.strip(), known) for name in spec.domains.split(","))
    return list(names)


def _baked(run: Run, spec: SpectrumSpec, place: Place) -> torch.nn.Module:
    loaded = network(run, spec.checkpoint, place)
    bake(loaded)
    for module in loaded.modules():
        if isinstance(module, Activations) and spec.unrounded:
            module.rounded = False
    return loaded


def _operator(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> Hessian:
    """Return the Hessian, which reports its products."""
    spec: SpectrumSpec = measurement.spec
    around = Landscape(_baked(run, spec, place), batches_of(run, spec, place), weighted, params=spec.params)
    operator = KeptHessian(around, UnitFiles(measurement).units).operator()
    if spec.k > operator.shape[0]:
        raise UserError(f"k must be between 1 and the {operator.shape[0]} parameters, got {spec.k}.")
    if report:
        operator.watch = lambda made: report(made, max(made, spec.foreseen), {"products": made})
    return operator


def _extremes(operator: Hessian, spec: SpectrumSpec) -> FloatArray:
    """Return eigenvalues and trace as one vector; the trace is deflated by the eigenvectors."""
    found = hessian_spectrum(operator, k=spec.k, which=spec.which, tol=spec.tol, seed=spec.seed, vectors=True)
    trace = hessian_trace(operator, rel_error=spec.rel_error, budget=spec.trace_budget, seed=spec.seed, deflate=found)
    facts = (found.cost.hvps, trace.cost.hvps, operator.shape[0], trace.stopped != "budget")
    reached = found.converged_each * (1.0 if found.verified else UNVERIFIED)
    return packed(trace, *facts, *found.eigenvalues, *found.residuals, *reached)


def _rule(operator: Operator, spec: SpectrumSpec, index: int) -> FloatArray:
    return np.stack(quadrature(operator(), spec.seed, index, steps=spec.steps))


def _write(measurement: Measurement, extremes: FloatArray, rules: list[FloatArray]) -> None:
    """Write the assembled measurement, readable without torch."""
    spec: SpectrumSpec = measurement.spec
    found, (searched, traced, num_params, reached) = extremes[4:], extremes[:4].astype(int).tolist()
    values, residuals, converged = found[: 3 * spec.k].reshape(3, spec.k)
    trace = unpacked(
        found[3 * spec.k :],
        basis=spec.k,
        rel_error=spec.rel_error,
        stopped="accuracy" if reached else "budget",
        seed=spec.seed,
        num_params=num_params,
        cost=Cost(hvps=traced),
    )
    floor = FLOOR * float(np.abs(values).max())
    density = SpectralDensity.of_rules(rules, seed=spec.seed, num_params=num_params, floor=floor)
    numbers = (trace.trace, trace.effective_rank, density.negative_weight, density.negative_share)
    whole = MeasuredSpectrum(
        eigenvalues=values,
        residuals=residuals,
        states=tuple(STATES[code] for code in converged.tolist()),
        numbers=dict(zip(NUMBERS, numbers, strict=True)),
        stopped=trace.stopped,
        vectors=trace.vectors,
        density=density,
        products=searched + traced + density.cost.hvps,
    )
    files.save_arrays(measurement.result, *whole.to_arrays())


def _by_pyhessian(run: Run, spec: SpectrumSpec, place: Place, report: JobReport | None) -> FloatArray:
    """Return the trace and the top eigenvalues by PyHessian itself (Yao et al. 2020), with its own defaults."""
    import pyhessian

    model, batches = _baked(run, spec, place), batches_of(run, spec, place)
    wanted = select(model, spec.params)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    cuda = batches[0][0].is_cuda

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        return weighted(outputs, targets).mean()

    data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
    with seeded("pyhessian", spec.seed):  # it draws from the global generator
        oracle = pyhessian.hessian(model, criterion, cuda=cuda, **data)
        values, _ = oracle.eigenvalues(top_n=spec.k)
        if report:
            report(1, 2, {"eigenvalue": float(values[0])})
        return np.array([float(np.mean(oracle.trace())), *values])
