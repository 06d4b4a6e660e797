"""The commands that measure runs: flatness, Hessian, landscape, audit, noise, stability."""

from typing import Annotated, Any

import typer

from flatlab.cli import run_jobs
from flatlab.cli.choices import Choices
from flatlab.cli.options import Runs
from flatlab.cli.run_jobs import measured, show_written
from flatlab.errors import choose

Checkpoint = Annotated[str, typer.Option(help="selected (by source validation) or last.")]
Images = Annotated[int | None, typer.Option(help="At most so many images of each domain (all).")]
Params = Annotated[str | None, typer.Option(help="Only parameters that match, as 'features.0*' (all).")]
Axes = Annotated[
    str,
    typer.Option(
        help="random (filter-normalised), hessian (its two top eigenvectors), runs: the plane through three "
        "runs, or the principal one of more, in their order, around the last; trajectory: the principal one of "
        "a run's own checkpoints (`train --keep-every`); or line: straight from one run to another."
    ),
]
Recompute = Annotated[
    int | None,
    typer.Option(
        help="Recompute BatchNorm's statistics at each place, from this number of images of each source domain."
    ),
]
Every = Annotated[int | None, typer.Option(help="Steps between a trajectory's checkpoints (as they were kept).")]
AXES = ("random", "hessian", "runs", "trajectory", "line")
AUDITED = {"measure": "", "before": ".4g", "ratio, by layer": ".4g", "ratio, by channel": ".4g", "invariant": ""}


def landscape(
    chosen: Choices,
    runs: Runs,
    axes: Axes = "random",
    grid: Annotated[int, typer.Option(help="Places along each axis; 33 or 49 refine best.")] = 33,
    extent: Annotated[
        float, typer.Option(help="Half the length of each axis (checkpoints that span a plane set it).")
    ] = 1,
    refine: Annotated[
        float, typer.Option(help="Share of the height that interpolation may be off by; 0 is the whole grid.")
    ] = 0.05,
    triangle: Annotated[bool, typer.Option(help="Measure the trace in three ways, too.")] = True,
    rel_error: Annotated[float, typer.Option(help="Standard error that rise and trace are measured to.")] = 0.05,
    recompute: Recompute = None,
    every: Every = None,
    checkpoint: Checkpoint = "selected",
    params: Params = None,
    images: Images = None,
    direction_seed: Annotated[int, typer.Option(help="Of the directions; of the halves of the images.")] = 0,
) -> None:  # the options of a measurement are its own, hence so many
    """Draw the loss on a plane through trained runs, and hold three ways to the Hessian's trace against each other.

    With --axes line: the loss from one run straight to another, and the height of the barrier between them.
    """
    from flatlab.report import surface
    from flatlab.specs.measurements import ConnectionSpec, SurfaceSpec, TraceCheckSpec

    found = chosen.found(runs)
    shared: dict[str, Any] = {"checkpoint": choose("checkpoint", checkpoint, ("selected", "last"))}
    shared |= {"params": params, "images": images, "seed": direction_seed}
    kind = choose("pair of axes", axes, AXES)
    if kind == "line":
        chosen.refuse(("extent", "refine", "triangle", "rel_error"), "with --axes line")
    elif kind != "random" and kind != "hessian":
        chosen.refuse(("extent",), f"with --axes {kind}, whose runs set it")
    if not triangle:
        chosen.refuse(("rel_error",), "with --no-triangle")
    centres, through = surface.centres(found, kind)
    steps = surface.steps_between(found, kind, every)
    if kind == "line":
        _line(chosen, found, ConnectionSpec.make(to=through[0], grid=grid, recompute=recompute, **shared))
        return
    spanned: dict[str, Any] = {"axes": kind, "through": through, "every": steps, "recompute": recompute}
    plane = SurfaceSpec.make(**spanned, grid=grid, extent=extent, refine=refine or None, **shared)
    triangles = [TraceCheckSpec.make(rel_error=rel_error, **shared)] if triangle else []
    _planes(chosen, centres, [plane, *triangles])


def _planes(chosen: Choices, centres: list[Any], measurements: list[Any]) -> None:
    """Measure and draw planes, and the triangle where it is among the measurements."""
    from flatlab.report import diagnostics, surface

    if not run_jobs.measured(chosen, centres, measurements):
        return
    sentences = surface.remarks(centres, measurements[0])
    written = surface.draw_surfaces(centres, measurements[0], out=chosen.out)
    for measurement in measurements[1:]:
        table, told, pictures = diagnostics.triangles(centres, measurement, out=chosen.out)
        sentences, written = [*sentences, *told], [*written, *pictures]
        chosen.answer(table, "The trace of the Hessian, three times (nats), 95 % intervals", diagnostics.CORNERS)
    run_jobs.show_written(written, sentences)


def _line(chosen: Choices, found: list[Any], measurement: Any) -> None:
    """Measure, tabulate and draw the straight line between two runs."""
    from flatlab.report import surface

    if not run_jobs.measured(chosen, found[:1], [measurement]):
        return
    table, sentences, written = surface.draw_line((found[0], found[1]), measurement, out=chosen.out)
    chosen.answer(table, "Barrier (nats), 95 % intervals over images", surface.BARRIERS)
    run_jobs.show_written(written, sentences)


def audit(
    chosen: Choices,
    runs: Runs,
    most: Annotated[float, typer.Option(help="Largest factor of a layer or channel.")] = 4.0,
    samples: Annotated[int, typer.Option(help="Directions of each sphere, on all images.")] = 20,
    checkpoint: Checkpoint = "selected",
    images: Images = None,
    direction_seed: Annotated[int, typer.Option(help="Of factors and directions.")] = 0,
) -> None:
    """Rescale layers by factors that the function does not feel, and rank the measures of flatness by how they move."""
    from flatlab.report import diagnostics
    from flatlab.specs.measurements import ScaleAuditSpec

    found, kept = chosen.found(runs), choose("checkpoint", checkpoint, ("selected", "last"))
    measurement = ScaleAuditSpec.make(
        most=most, num_samples=samples, checkpoint=kept, images=images, seed=direction_seed
    )
    if not run_jobs.measured(chosen, found, [measurement]):
        return
    table, sentences, written = diagnostics.audits(found, measurement, out=chosen.out)
    shown = table if chosen.json else table[["run", *AUDITED]]
    chosen.answer(shown, "Measures of flatness after rescalings that change nothing, the most invariant first", AUDITED)
    run_jobs.show_written(written, sentences)


def replay(
    chosen: Choices,
    runs: Runs,
) -> None:
    """Apply the rules of SWA, SMA and SWAD to the checkpoints that `train --keep-every` kept, and draw the valley."""
    from flatlab import reproduce
    from flatlab.cli import display
    from flatlab.report import replay as report_replay
    from flatlab.specs import methods, settings
    from flatlab.train.replay import replay as replayed

    found = chosen.found(runs)
    for run in found:
        run.kept_each()
    place, dataset = reproduce.place_of(found, chosen.place())
    suiting = settings.for_data(settings.setting(chosen.given["setting"]), dataset)
    done = []
    for run in found:
        rules = methods.averages(suiting.replace(steps=run.spec.steps))
        with display.counter(f"{run.name}: averaging checkpoints") as report:
            done.append(replayed(run, rules, place, report=report))
    table, sentences, written = report_replay.chart(found, done, out=chosen.out)
    shown = table if chosen.json else table[list(report_replay.SHOWN)]
    chosen.answer(shown, f"Averages of kept checkpoints, as in setting {suiting.name}", report_replay.SHOWN)
    run_jobs.show_written(written, sentences)


def selftest(chosen: Choices) -> None:
    """Check each estimator against closed forms, on each device and dtype of this machine; exit with 1 if one fails."""
    from flatlab.files import strict_json
    from flatlab.metrics.selftest import Fault
    from flatlab.metrics.selftest import selftest as checks

    made, failed = [], 0
    for check in checks():
        made.append({**vars(check), "passed": check.passed})
        failed += not check.passed
        if not chosen.json:
            mark = "ok " if check.passed else "BAD"
            numbers = f"expected {check.expected:.6g}, got {check.got:.6g}, within {check.bound:.2g}"
            typer.echo(f"{mark} {check.name}: {check.reason if isinstance(check, Fault) else numbers}")
    if chosen.json:
        typer.echo(strict_json(made))
    else:
        typer.echo(f"{failed} of {len(made)} checks failed." if failed else f"All {len(made)} checks passed.")
    if failed:
        raise typer.Exit(1)


SHOWN = {"run": "", "domains": "", "engine": "", "number": "", "index": "", "value": ".4g", "low": ".4g", "high": ".4g"}
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
            help="source (domains), target (the held-out domain), or domains by name, commas between: they weigh "
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
    from flatlab import reproduce
    from flatlab.cli import checks
    from flatlab.report import spectrum

    store, found = chosen.runs(), chosen.found(runs)
    checks.domains(split or (), *reproduce.place_of(found, chosen.place()))
    fields = {"k": k, "which": which, "tol": tol, "rel_error": rel_error, "trace_budget": trace_budget}
    fields |= {"starts": starts, "steps": lanczos_steps, "checkpoint": checkpoint, "params": params}
    measurements = spectrum.measurements_of(split or ["source"], engine, images=images, seed=start_seed, **fields)
    if not measured(chosen, found, measurements):
        return
    wanted = [(run.name, run.spec, measurement) for run in found for measurement in measurements]
    table = spectrum.numbers(store, wanted).rename(columns={"method": "run", "panel": "domains"})
    written = spectrum.chart(store, wanted, chosen.out)
    shown = table if chosen.json else table[list(SHOWN)]
    chosen.answer(shown, "Hessian of the mean loss (nats per squared unit of the parameters)", SHOWN)
    show_written(written, [CITE] if engine != "flatlab" else [])


def noise(
    chosen: Choices,
    runs: Runs,
    radius: Annotated[bool, typer.Option("--radius", help="What 8 to 2 bits do to the loss, of any run.")] = False,
    layers: Annotated[
        str | None, typer.Option(help="Only weights that match, as 'features.0*' (some are drawn, all are rounded).")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="selected (by source validation) or last.")] = "selected",
    samples: Annotated[int | None, typer.Option(help="Random directions a bit width (100), with --radius.")] = None,
    images: Annotated[int | None, typer.Option(help="At most so many of each domain (all), with --radius.")] = None,
) -> None:
    """Is quantization noise uniform and symmetric (QT-DoG Figs. 2, 8), is it a typical direction (--radius)?"""
    from flatlab.cli import checks
    from flatlab.report import quantization_noise, rounding

    store, room = chosen.runs(), rounding if radius else quantization_noise
    found = chosen.found(runs)
    measurement = room.measurement_of(found, layers=layers, checkpoint=checkpoint, samples=samples, images=images)
    if not radius:
        checks.layers(found, layers, measurement.checkpoint)
    if not measured(chosen, found, [measurement]):
        return
    table, written = room.chart(store, found, measurement, layers=layers, out=chosen.out)
    chosen.answer(table if chosen.json else table[list(room.SHOWN)], room.TITLE, room.SHOWN)
    show_written(written)
