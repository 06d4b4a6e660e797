"""The commands that measure runs: flatness, noise, hessian, landscape, audit, stability."""

from typing import Annotated, Any

import typer

from flatlab.cli import checks
from flatlab.cli.choices import Choices, takes
from flatlab.cli.errors import Commands
from flatlab.cli.options import NAMED, RUNNING, WHERE, Rule, Runs, asked
from flatlab.cli.parse import parse_radii
from flatlab.cli.run_jobs import measured, show_written
from flatlab.errors import UserError, choose
from flatlab.specs.base import LARGEST_INT
from flatlab.specs.measurement import MeasurementSpec
from flatlab.specs.measurements import (
    RoundingSpec,
    ScaleAuditSpec,
    SpectrumSpec,
    SphereSpec,
    SurfaceSpec,
    TraceCheckSpec,
)

commands = Commands()
AUDITED = {"measure": "", "before": ".4g", "ratio, by layer": ".4g", "ratio, by channel": ".4g", "invariant": ""}
SHOWN = {"run": "", "domains": "", "engine": "", "number": "", "index": "", "value": ".4g", "low": ".4g", "high": ".4g"}
SHOWN |= {"converged": ""}
CITE = "PyHessian gives no interval: its trace stops once the running mean changes little, which can happen by chance."
SPHERE = asked(
    SphereSpec,
    *("rel_error", "abs_error", "budget", "block_size", "normalisation", "space", "checkpoint", "params", "images"),
    "corruption",
    samples="num_samples",
    direction_seed="seed",
)
SPECTRUM = asked(
    SpectrumSpec,
    *("k", "which", "tol", "rel_error", "trace_budget", "starts", "engine", "checkpoint", "params", "images"),
    *("corruption", "unrounded"),
    lanczos_steps="steps",
    start_seed="seed",
)
PLANE = asked(
    SurfaceSpec,
    *("grid", "extent", "refine", "recompute", "every", "checkpoint", "params", "images", "corruption"),
    direction_seed="seed",
) | asked(TraceCheckSpec, "rel_error")
AUDIT = asked(
    ScaleAuditSpec, "most", "checkpoint", "images", "corruption", samples="num_samples", direction_seed="seed"
)
ROUNDING = asked(RoundingSpec, "checkpoint", "images", "corruption", samples="num_samples")


@commands.command(epilog="Example: `flatlab flatness ERM QT-DoG --held-out rot45 --radii 0:3:0.5 --domains target`")
@takes(*NAMED, *WHERE, *RUNNING, "out", asks=SPHERE)
def flatness(
    chosen: Choices,
    runs: Runs,
    fields: dict[str, Any],
    radii: Annotated[
        str | None,
        typer.Option(
            help="Radii: start:stop:step (stop included), a comma-separated list, or auto (for each run, where F is "
            "0.01 to 2 nats; with --space codes, where 1/48 to all of the weights move, also if not given). If not "
            "given: where the loss of the first run rises by 0.02 to 1 nat; for the paper's network 0:60:5."
        ),
    ] = None,
    domains: Annotated[str, typer.Option(help="source (trained on) or target (held out).")] = "source",
) -> None:
    """Measure how fast the loss rises around trained runs: F on spheres (QT-DoG Eq. 5), with intervals."""
    from flatlab import reproduce
    from flatlab.report.panels import TITLES
    from flatlab.report.sphere import SHOWN, chart, remarks
    from flatlab.specs.rises import ByRise
    from flatlab.specs.settings import QUICK, papers_radii

    store, panel = chosen.runs(), choose("domains", domains, TITLES)
    if fields["num_samples"] is not None:
        chosen.refuse(("rel_error", "abs_error", "budget", "block_size"), "with --samples")
    found = chosen.found(runs)
    reproduce.place_of(found, chosen.place())
    first = found[0].spec
    on_grid = fields["space"] == "codes"
    if on_grid:
        chosen.refuse(("normalisation",), "with --space codes, where moves are of one code")
    usual = "auto" if on_grid else papers_radii(first) if fields["normalisation"] == "none" else None
    risen = ByRise(rises=(*QUICK.rises, QUICK.beyond), references=(first.digest,))
    measurement = SphereSpec.make(radii=parse_radii(radii) if radii is not None else usual or risen, **fields)
    checks.space(found, measurement.space)
    if not measured(chosen, found, [measurement]):
        return
    table, written = chart(store, found, measurement, panel=panel, out=chosen.out)
    shown = table if chosen.json else table[list(SHOWN)]
    domain = f"{TITLES[panel]}{measurement.under}"
    chosen.answer(shown, f"Flatness, {domain} (nats), 95 % intervals over directions", SHOWN)
    show_written(written, remarks(found, measurement, panel=panel))


@commands.command(epilog="Examples: `flatlab noise 3f2a`, `flatlab noise 3f2a 77c1 --radius --samples 50`")
@takes(*NAMED, *WHERE, *RUNNING, "out", asks=ROUNDING)
def noise(
    chosen: Choices,
    runs: Runs,
    fields: dict[str, Any],
    radius: Annotated[
        bool, typer.Option("--radius", help="Compare rounding to 8 to 2 bits with random perturbations of its norm.")
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Pattern of layer names, such as 'features.0*': of the layers that are drawn, or with --radius of the "
            "weights that are rounded; all if not given."
        ),
    ] = None,
) -> None:
    """Test quantization noise for uniformity and symmetry (QT-DoG Figs. 2, 8), or how rounding raises the loss."""
    from flatlab.report import quantization_noise, rounding
    from flatlab.specs.measurements import QuantizationNoiseSpec

    store, found = chosen.runs(), chosen.found(runs)
    module: Any = rounding if radius else quantization_noise
    measurement: MeasurementSpec
    if radius:
        measurement = RoundingSpec.make(**fields, params=layers)
    else:
        chosen.refuse(("samples", "images", "corruption"), "without --radius, since no image is evaluated")
        for run in found:
            QuantizationNoiseSpec.check(run.spec)
        measurement = QuantizationNoiseSpec.make(checkpoint=fields["checkpoint"])
        checks.layers(found, layers, measurement.checkpoint)
    if not measured(chosen, found, [measurement]):
        return
    table, written = module.chart(store, found, measurement, layers=layers, out=chosen.out)
    chosen.answer(
        table if chosen.json else table[list(module.SHOWN)], f"{module.TITLE}{measurement.under}", module.SHOWN
    )
    show_written(written)


@commands.command(epilog="Example: `flatlab hessian 3f2a --domains source --domains target -k 5 --images 200`")
@takes(*NAMED, *WHERE, *RUNNING, "out", asks=SPECTRUM)
def hessian(
    chosen: Choices,
    runs: Runs,
    fields: dict[str, Any],
    domains: Annotated[
        list[str] | None,
        typer.Option(
            help="source (trained on; the default), target (held out), or names separated by commas, of equal weight. "
            "Repeatable."
        ),
    ] = None,
) -> None:
    """Measure the Hessian of trained runs: top eigenvalues with bounds, trace with interval, spectral density."""
    from flatlab import reproduce
    from flatlab.report import spectrum

    store, found = chosen.runs(), chosen.found(runs)
    checks.domains(domains or (), *reproduce.place_of(found, chosen.place()))
    rounding = [run for run in found if getattr(run.spec.quantizer, "activations", "none") != "none"]
    if not rounding:
        chosen.refuse(("unrounded",), "for runs that do not round the inputs of layers")
    elif not fields["unrounded"]:
        raise UserError(
            f"{rounding[0].name} rounds the inputs of its layers, and so has no curvature; add --unrounded."
        )
    engines = dict.fromkeys(("flatlab", fields.pop("engine")))
    groups = domains or ["source"]
    measurements = [SpectrumSpec.make(domains=each, engine=name, **fields) for each in groups for name in engines]
    if not measured(chosen, found, measurements):
        return
    wanted = [(run.name, run.spec, measurement) for run in found for measurement in measurements]
    table = spectrum.numbers(store, wanted).rename(columns={"method": "run", "panel": "domains"})
    written = spectrum.chart(store, wanted, chosen.out)
    shown = table if chosen.json else table[list(SHOWN)]
    chosen.answer(shown, "Hessian of the mean loss (nats per squared unit of the parameters)", SHOWN)
    show_written(written, [CITE] if "pyhessian" in engines else [])


_AXES = SurfaceSpec.model_fields["axes"]
AXES = (*Rule.of(_AXES).choices, "line")


@commands.command(
    epilog="Examples: `flatlab landscape 3f2a --grid 25 --images 200`, `flatlab landscape 3f2a 77c1 --axes line`"
)
@takes(*NAMED, *WHERE, *RUNNING, "out", asks=PLANE)
def landscape(
    chosen: Choices,
    runs: Runs,
    fields: dict[str, Any],
    axes: Annotated[
        str, typer.Option(help=f"{_AXES.description}; line: the straight line from one run to another.")
    ] = "random",
    triangle: Annotated[bool, typer.Option(help="Also compare three estimates of the Hessian trace.")] = True,
) -> None:
    """Draw the loss on a plane through trained runs, and compare three estimates of the Hessian trace.

    With --axes line: draw the loss on the line between two runs, and measure the height of its barrier.
    """
    from flatlab.report import surface
    from flatlab.specs.measurements import ConnectionSpec

    found = chosen.found(runs)
    shared = {name: fields.pop(name) for name in ("checkpoint", "params", "images", "corruption", "seed")}
    kind, rel_error = choose("axes", axes, AXES), fields.pop("rel_error")
    if kind == "line":
        chosen.refuse(("extent", "refine", "triangle", "rel_error"), "with --axes line")
    elif kind != "random" and kind != "hessian":
        chosen.refuse(("extent",), f"with --axes {kind}, where the runs set it")
    if not triangle:
        chosen.refuse(("rel_error",), "with --no-triangle")
    centres, through = surface.centres(found, kind)
    every = surface.steps_between(found, kind, fields.pop("every"))
    if kind == "line":
        line = {name: fields[name] for name in ("grid", "recompute")}
        _line(chosen, found, ConnectionSpec.make(to=through[0], **line, **shared))
        return
    plane = SurfaceSpec.make(axes=kind, through=through, every=every, **fields, **shared)
    triangles = [TraceCheckSpec.make(rel_error=rel_error, **shared)] if triangle else []
    _planes(chosen, centres, [plane, *triangles])


def _planes(chosen: Choices, centres: list[Any], measurements: list[Any]) -> None:
    """Measure and draw planes, and compare the traces if that is among the measurements."""
    from flatlab.report import diagnostics, surface

    if not measured(chosen, centres, measurements):
        return
    sentences = surface.remarks(centres, measurements[0])
    written = surface.draw_surfaces(centres, measurements[0], out=chosen.out)
    for measurement in measurements[1:]:
        table, remarks, pictures = diagnostics.triangles(centres, measurement, out=chosen.out)
        sentences, written = [*sentences, *remarks], [*written, *pictures]
        chosen.answer(table, "Three estimates of the Hessian trace (nats), 95 % intervals", diagnostics.CORNERS)
    if chosen.json and len(measurements) == 1:
        chosen.answer_facts({"written": list(map(str, written))}, "")
    show_written(written, sentences)


def _line(chosen: Choices, found: list[Any], measurement: Any) -> None:
    """Measure, tabulate and draw the straight line between two runs."""
    from flatlab.report import surface

    if not measured(chosen, found[:1], [measurement]):
        return
    table, sentences, written = surface.draw_line((found[0], found[1]), measurement, out=chosen.out)
    chosen.answer(table, "Barrier (nats), 95 % intervals over images", surface.BARRIERS)
    show_written(written, sentences)


@commands.command(epilog="Example: `flatlab audit 3f2a --images 200`")
@takes(*NAMED, *WHERE, *RUNNING, "out", asks=AUDIT)
def audit(chosen: Choices, runs: Runs, fields: dict[str, Any]) -> None:
    """Rescale layers without changing the function, and rank flatness measures by how much they change."""
    from flatlab.report import diagnostics

    found, measurement = chosen.found(runs), ScaleAuditSpec.make(**fields)
    if not measured(chosen, found, [measurement]):
        return
    table, sentences, written = diagnostics.audits(found, measurement, out=chosen.out)
    shown = table if chosen.json else table[["run", *AUDITED]]
    chosen.answer(shown, "Flatness measures after rescalings that leave the function unchanged, by invariance", AUDITED)
    show_written(written, sentences)


@commands.command(epilog="Example: `flatlab stability 3f2a 77c1 --since 120`")
@takes(*NAMED, "store", "out", "json", "debug")
def stability(
    chosen: Choices,
    runs: Runs,
    valley: Annotated[
        bool, typer.Option("--valley", help="Apply SWAD's rule to the logs and draw its valley.")
    ] = False,
    since: Annotated[
        int | None,
        typer.Option(min=0, max=LARGEST_INT, help="First step included; the runs' latest switch if not given."),
    ] = None,
) -> None:
    """Report the variability of held-out accuracy, its correlation with validation accuracy, and selection regret."""
    from flatlab.report.stability import SHOWN, chart, switch_of
    from flatlab.report.valleys import sentence

    if valley:
        from flatlab.train.replay import valley as valley_of

    store, found = chosen.runs(), chosen.found(runs)
    first = switch_of([run.spec for run in found]) if since is None else since
    valleys = [valley_of(run) for run in found] if valley else ()
    table, written = chart(store, found, since=first, out=chosen.out, valleys=valleys)
    chosen.answer(table, f"Stability of the accuracy on the held-out domain from step {first} on (percent)", SHOWN)
    show_written(written, [f"{run.name}: {sentence(each)}" for run, each in zip(found, valleys, strict=False)])
