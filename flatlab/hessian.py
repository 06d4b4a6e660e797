"""`flatlab hessian`: curvature at trained runs, by flatlab's engine and, beside it, PyHessian's."""

from typing import Annotated

import typer

from flatlab.errands import measured, tell_written
from flatlab.options import Choices
from flatlab.words import Runs

SHOWN = {"run": "", "split": "", "engine": "", "number": "", "index": "", "value": ".4g", "low": ".4g", "high": ".4g"}
SHOWN |= {"converged": ""}
CITE = "PyHessian's numbers have no interval: its trace stops when the running mean moves little, which luck does too."


def hessian(
    chosen: Choices,
    runs: Runs,
    k: Annotated[int, typer.Option("-k", help="How many eigenvalues.")] = 10,
    which: Annotated[str, typer.Option(help="LA the largest, SA the most negative, BE from both ends.")] = "LA",
    tol: Annotated[float, typer.Option(help="Residual over eigenvalue at which one is found.")] = 1e-3,
    rel_error: Annotated[float, typer.Option(help="Standard error / trace at which its sampling stops.")] = 0.02,
    trace_budget: Annotated[int, typer.Option(help="Products for the trace at most.")] = 500,
    starts: Annotated[int, typer.Option(help="Random starts of the density.")] = 5,
    lanczos_steps: Annotated[int, typer.Option(help="Products from each start.")] = 60,
    split: Annotated[
        list[str] | None,
        typer.Option(
            help="source (the seen domains), target (the unseen one), or domains by name, commas between: they weigh "
            "alike. Can be given several times (source)."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="flatlab, or pyhessian: PyHessian itself, for those who must cite it, beside ours.")
    ] = "flatlab",
    checkpoint: Annotated[str, typer.Option(help="selected (by source validation) or last.")] = "selected",
    params: Annotated[str | None, typer.Option(help="Only parameters that match, as 'features.0*' (all).")] = None,
    images: Annotated[int | None, typer.Option(help="At most so many images of each domain (all).")] = None,
    start_seed: Annotated[int, typer.Option(help="Of all random starts.")] = 0,
) -> None:  # the options of a measurement are its own, hence so many
    """Measure the Hessian around trained runs: top eigenvalues within bounds, trace with interval, density."""
    from flatlab import checks, reproduce, spectra

    store, found = chosen.runs(), chosen.found(runs)
    checks.domains(split or (), *reproduce.place_of(found, chosen.place()))
    fields = {"k": k, "which": which, "tol": tol, "rel_error": rel_error, "trace_budget": trace_budget}
    fields |= {"starts": starts, "steps": lanczos_steps, "checkpoint": checkpoint, "params": params}
    probes = spectra.probes_of(split or ["source"], engine, images=images, seed=start_seed, **fields)
    if not measured(chosen, found, probes):
        return
    wanted = [(run.name, run.spec, probe) for run in found for probe in probes]
    table = spectra.numbers(store, wanted).rename(columns={"method": "run", "panel": "split"})
    written = spectra.chart(store, wanted, chosen.out)
    shown = table if chosen.json else table[list(SHOWN)]
    chosen.answer(shown, "Hessian of the mean loss (nats per squared unit of the parameters)", SHOWN)
    tell_written(written, [CITE] if engine != "flatlab" else [])
