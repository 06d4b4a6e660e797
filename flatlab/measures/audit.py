"""A scale audit of a checkpoint: its table, and what was rescaled or refused."""

from collections.abc import Callable
from dataclasses import asdict

from flatlab import files
from flatlab.checkpoints import landscape
from flatlab.metrics.audit import scale_audit
from flatlab.probespecs import AuditSpec
from flatlab.runs import Probe, Run
from flatlab.shelf import Shelf
from flatlab.specs import Place

Report = Callable[[int, int, dict[str, float]], None]


def fill(probe: Probe, run: Run, place: Place, report: Report | None) -> None:
    """Measure what the probe asks for; its units, of spheres and of curvature, are kept."""
    spec: AuditSpec = probe.spec
    keep = Shelf(probe).units
    found = scale_audit(
        landscape(run, spec, place), most=spec.most, num_samples=spec.num_samples, seed=spec.seed, keep=keep
    )
    facts = {"rows": found.to_frame().to_dict("records"), "pairs": [asdict(each) for each in found.pairs]}
    facts |= {"refusals": [asdict(each) for each in found.refusals], "hvps": found.cost.hvps}
    files.save_arrays(probe.result, {"deviation": found.deviation}, facts)
