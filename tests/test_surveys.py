"""`flatlab landscape` and `flatlab audit` on trained runs: what they print and write, resuming, and mistakes."""

import json

import numpy as np
import pandas as pd
import pytest
import stores
from commandline import TINY, Answer, call

from flatlab.checkpoints import landscape
from flatlab.measure import measure
from flatlab.metrics.grids import Surface, parts
from flatlab.metrics.surfaces import plane
from flatlab.probespecs import AuditSpec, SurfaceSpec, TriangleSpec, parse_probe
from flatlab.runs import RunStore
from flatlab.surroundings import of_panel, surface

IMAGES = ("--images", 6)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with three runs of one architecture, one of them quantized."""
    root = tmp_path_factory.mktemp("surveys") / "runs"
    for method in ("ERM", "SAM", "QT-DoG"):
        assert call("train", *TINY, "--method", method, "--store", root) == 0
    return root


@pytest.fixture
def flatlab(capsys, store, tmp_path):
    def ask(command: str, *given: object) -> Answer:
        capsys.readouterr()
        code = call(command, *given, "--store", store, "--out", tmp_path)
        return Answer(code, *capsys.readouterr())

    return ask


def digests(store):
    return {run.spec.label: run.spec.digest for run in RunStore(store).runs()}


def test_a_surface_is_measured_drawn_and_kept(flatlab, store, tmp_path):
    erm = digests(store)["erm"]
    words = (erm, *IMAGES, "--grid", 5, "--refine", 0, "--no-triangle")
    assert flatlab("landscape", *words).code == 0
    found = Surface.load(tmp_path / f"landscape-{erm[:6]}.npz")
    run = RunStore(store).find(erm)
    around = landscape(run, SurfaceSpec(images=6), stores.PLACE)
    again = plane(around, grid=5)
    assert np.array_equal(found.values, again.values) and found.strata == ("rot0", "rot15", "rot30", "rot45")
    assert of_panel(found, "target", "rot0") == pytest.approx(again.of("loss", "rot0"))
    assert of_panel(found, "source", "rot0") == pytest.approx(again.of("loss", ["rot15", "rot30", "rot45"]))
    assert (tmp_path / "landscape.png").stat().st_size > 5000
    (probe,) = (each for each in run.probes() if each.spec.metric == "surface")
    first = probe.result.read_bytes()
    (probe.path / "done").unlink()
    probe.result.unlink()
    units = sorted(path.name for path in probe.path.glob("unit-*"))
    assert len(units) == 1 and flatlab("landscape", *words).code == 0
    assert probe.result.read_bytes() == first


def test_the_triangle_is_told_with_its_verdict(flatlab, store, tmp_path):
    erm = digests(store)["erm"]
    answer = flatlab("landscape", erm, *IMAGES, "--grid", 3, "--rel-error", 0.5)
    assert answer.code == 0 and "Trace of the Hessian" in answer.err and "quadratic picture" in answer.err
    assert (tmp_path / "triangle.pdf").exists()
    rows = json.loads(flatlab("landscape", erm, *IMAGES, "--grid", 3, "--rel-error", 0.5, "--json").out.splitlines()[0])
    assert [row["way"] for row in rows] == ["sphere", "trace", "density"]
    assert all(row["low"] < row["trace"] < row["high"] for row in rows)


def test_runs_span_a_plane(flatlab, store, tmp_path):
    named = list(digests(store).values())
    answer = flatlab("landscape", *named, "--axes", "runs", "--grid", 3, *IMAGES, "--no-triangle")
    assert answer.code == 0 and "BatchNorm's statistics" in answer.err
    found = Surface.load(tmp_path / f"landscape-{named[0][:6]}.npz")
    assert len(found.marks) == 3 and not found.marks[0].any() and found.distances == pytest.approx(0, abs=1e-4)
    assert [name.split()[1] for name in found.mark_labels] == [digest[:6] for digest in named]


def test_an_audit_is_told_and_drawn(flatlab, store, tmp_path):
    found = digests(store)
    answer = flatlab("audit", found["erm"], *IMAGES, "--samples", 3)
    assert answer.code == 0 and "sphere, raw" in answer.out and "rescaled" in answer.err
    assert (tmp_path / "audit.png").stat().st_size > 5000
    table = pd.DataFrame(
        json.loads(flatlab("audit", found["lsq"], *IMAGES, "--samples", 3, "--json").out.splitlines()[0])
    )
    assert table["measure"].iloc[0] == "sphere, by parameter (adaptive)" and table["invariant"].iloc[0]
    assert not table.set_index("measure").loc["sphere, raw", "invariant"]


def test_plans_are_priced_and_nothing_is_begun(flatlab, store):
    erm = digests(store)["erm"]
    before = sorted(path.name for path in store.rglob("probes/*"))
    for command in ("landscape", "audit"):
        answer = flatlab(command, erm, "--images", 7, "--dry-run")
        assert answer.code == 0 and "jobs" in answer.out
    assert sorted(path.name for path in store.rglob("probes/*")) == before


def test_specs_are_read_back_and_surfaces_too(store):
    for spec in (SurfaceSpec(grid=5), TriangleSpec(), AuditSpec(most=2.0)):
        assert parse_probe(spec.canonical()) == spec and spec.passes(stores.SIZES) > 0
    run = RunStore(store).find(digests(store)["sam"])
    spec = SurfaceSpec(images=4, grid=9, refine=0.2)
    stores.refuses(lambda: surface(run, spec), "not measured yet")
    measure(run, spec, stores.PLACE)
    found = surface(run, spec)
    assert np.array_equal(Surface.whole(*parts(found)).values, found.values) and found.measured.sum() <= 81


def test_mistakes_are_one_sentence(flatlab, store):
    erm = digests(store)["erm"]
    for words, told in [
        (("landscape", erm, "--grid", 1), "grid"),
        (("landscape", erm, "--axes", "sideways"), "Did you mean"),
        (("landscape", erm, "--axes", "runs"), "three runs or more"),
        (("landscape", erm, "--extent", -1), "extent"),
        (("audit", erm, "--most", 1), "most"),
        (("audit", "ffff"), "ffff"),
    ]:
        answer = flatlab(*words)
        assert answer.code == 2 and "Traceback" not in answer.err
        assert told in answer.err or "sideways" in answer.err
