"""`flatlab landscape` and `flatlab audit` on trained runs: what they print and write, resuming, and mistakes."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import stores
import torch
from commandline import TINY, Answer, call, documented

from flatlab.loading.checkpoint import network
from flatlab.measure.inputs import landscape, training_images
from flatlab.measure.runner import measure
from flatlab.metrics.surfaces.connectivity import connect
from flatlab.metrics.surfaces.planes import plane
from flatlab.report.surface import barrier_sentence, centres, of_panel
from flatlab.results.surface import Surface
from flatlab.saving import load
from flatlab.specs.measurements import ConnectionSpec, ScaleAuditSpec, SurfaceSpec, TraceCheckSpec, parse_measurement
from flatlab.store.runs import RunStore
from flatlab.tensors.flat import flatten

IMAGES = ("--images", 6)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with three runs of one architecture, one of them quantized, one with checkpoints along its training."""
    root = tmp_path_factory.mktemp("surveys") / "runs"
    for method in ("ERM", "SAM", "QT-DoG"):
        kept = ("--keep-every", 2) if method == "ERM" else ()
        assert call("train", *TINY, "--method", method, *kept, "--store", root) == 0
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


@pytest.mark.slow
def test_a_surface_is_measured_drawn_and_kept(flatlab, store, tmp_path):
    erm = digests(store)["erm"]
    words = (erm, *IMAGES, "--grid", 5, "--refine", 0, "--no-triangle")
    assert flatlab("landscape", *words).code == 0
    found = load(tmp_path / f"landscape-{erm[:6]}.npz")
    run = RunStore(store).find(erm)
    around = landscape(run, SurfaceSpec(images=6), stores.PLACE)
    again = plane(around, grid=5)
    assert np.array_equal(found.values, again.values) and found.strata == ("rot0", "rot15", "rot30", "rot45")
    assert of_panel(found, "target", "rot0") == pytest.approx(again.of("loss", "rot0"))
    assert of_panel(found, "source", "rot0") == pytest.approx(again.of("loss", ["rot15", "rot30", "rot45"]))
    assert (tmp_path / "landscape.png").stat().st_size > 5000
    (measurement,) = (each for each in run.measurements() if each.spec.metric == "surface")
    first = measurement.result.read_bytes()
    (measurement.path / "done").unlink()
    measurement.result.unlink()
    units = sorted(path.name for path in measurement.path.glob("unit-*"))
    assert len(units) == 1 and flatlab("landscape", *words).code == 0
    assert measurement.result.read_bytes() == first


@pytest.mark.slow
def test_the_trace_check_is_printed_with_its_verdict(flatlab, store, tmp_path):
    erm = digests(store)["erm"]
    answer = flatlab("landscape", erm, *IMAGES, "--grid", 3, "--rel-error", 0.5)
    assert answer.code == 0 and "Trace of the Hessian" in answer.err and "quadratic approximation" in answer.err
    assert (tmp_path / "triangle.pdf").exists()
    words = ("landscape", erm, *IMAGES, "--grid", 3, "--rel-error", 0.5, "--json")
    rows = documented("landscape", flatlab(*words).out)
    assert [row["way"] for row in rows] == ["sphere", "trace", "density"]
    assert all(row["low"] < row["trace"] < row["high"] for row in rows)


def test_runs_span_a_plane(flatlab, store, tmp_path):
    named = list(digests(store).values())
    answer = flatlab("landscape", *named, "--axes", "runs", "--grid", 3, *IMAGES, "--no-triangle", "--json")
    written = documented("landscape --no-triangle", answer.out)["written"]
    assert str(tmp_path / f"landscape-{named[0][:6]}.npz") in written
    assert answer.code == 0 and "BatchNorm's statistics" in answer.err
    found = load(tmp_path / f"landscape-{named[0][:6]}.npz")
    assert len(found.marks) == 3 and not found.marks[0].any() and found.distances == pytest.approx(0, abs=1e-4)
    assert [name.split()[1] for name in found.mark_labels] == [digest[:6] for digest in named]


def test_a_line_between_two_runs_is_measured_printed_and_drawn(flatlab, store, tmp_path):
    names = digests(store)
    ends = [RunStore(store).find(names[label]) for label in ("erm", "lsq")]
    words = (*(run.spec.digest for run in ends), "--axes", "line", "--grid", 5, *IMAGES)
    answer = flatlab("landscape", *words)
    assert answer.code == 0 and "Held-out domain: the line is" in answer.err and "interpolated" in answer.err
    frame = pd.read_csv(tmp_path / "connection.csv")
    panels = documented("landscape --axes line", flatlab("landscape", *words, "--json").out)
    rows = {row["panel"]: row for row in panels}
    measurement = ConnectionSpec(to=names["lsq"], images=6)
    for panel, domains in {"source": ["rot15", "rot30", "rot45"], "target": ["rot0"]}.items():
        first, second = (landscape(run, measurement, stores.PLACE, of=domains) for run in ends)
        again = connect(first, second, grid=5)
        found = load(tmp_path / f"connection-{names['erm'][:6]}-{names['lsq'][:6]}-{panel}.npz")
        assert np.array_equal(found.bootstrap, again.bootstrap) and found.strata == tuple(domains)
        assert rows[panel]["barrier"] == pytest.approx(again.barrier, abs=1e-12)
        assert rows[panel]["low"] < rows[panel]["barrier"] < rows[panel]["high"]
        mine = frame[frame["panel"] == panel]
        assert mine["loss"].iloc[[0, -1]].tolist() == pytest.approx([first.base_loss.mean(), second.base_loss.mean()])
        assert mine["distance"].iloc[-1] == pytest.approx(float((first.point - second.point).norm()), rel=1e-5)
    assert (tmp_path / "connection.png").stat().st_size > 5000


def test_the_sentence_on_a_barrier_follows_its_interval(store):
    names = digests(store)
    run = RunStore(store).find(names["erm"])
    measurement = ConnectionSpec(to=names["sam"], images=4, grid=3)
    measure(run, measurement, stores.PLACE)
    found = run.result(measurement).panels["target"]
    for shift, verdict in [
        (9.0, "there is a barrier between"),
        (-9.0, "no barrier: the line lies below"),
        (np.nan, "not finite"),
    ]:
        moved = replace(found, excess=found.excess + shift, bootstrap=found.bootstrap + shift)
        assert verdict in barrier_sentence(moved)
    around_zero = replace(found, excess=found.excess - found.barrier, bootstrap=np.linspace(-1, 1, 99))
    assert "no barrier is established on these images" in barrier_sentence(around_zero)


def refreshed(run, count, **which):
    """The loss of a run on some domains, BatchNorm's statistics from its training images; by a loop of its own."""
    loaded = network(run, "selected", stores.PLACE).train()
    for each in loaded.modules():
        if isinstance(each, torch.nn.BatchNorm2d):
            each.reset_running_stats()
            each.momentum = None
    for x, _ in training_images(run, count, stores.PLACE):
        with torch.no_grad():
            loaded(x)
    around = landscape(run, SurfaceSpec(images=6), stores.PLACE, **which)
    return around.base_loss, around.around(loaded.eval()).base_loss


def test_statistics_are_recomputed_along_lines_and_on_planes(flatlab, store, tmp_path):
    names = digests(store)
    run, most = RunStore(store).find(names["erm"]), ("--recompute", 20, *IMAGES)
    answer = flatlab("landscape", names["erm"], names["sam"], "--axes", "line", "--grid", 3, *most)
    assert answer.code == 0 and "recomputed at each place, from up to 20" in answer.err
    found = load(tmp_path / f"connection-{names['erm'][:6]}-{names['sam'][:6]}-target.npz")
    (own,), (expected,) = refreshed(run, 20, of=["rot0"])  # 60 images are one batch
    assert found.statistics == "recomputed" and found.losses[0, 0] == pytest.approx(expected, rel=1e-5)
    assert abs(own - expected) > 1e-3
    answer = flatlab("landscape", names["erm"], "--grid", 3, "--refine", 0, "--no-triangle", *most)
    assert answer.code == 0 and "recomputed" in answer.err
    plane_ = load(tmp_path / f"landscape-{names['erm'][:6]}.npz")
    assert plane_.statistics == "recomputed" and plane_.values[1, 1, :, 0] == pytest.approx(
        refreshed(run, 20)[1], rel=1e-5
    )


def test_training_images_are_mixed_across_the_seen_domains(store):
    run = RunStore(store).find(digests(store)["erm"])
    batches = training_images(run, 100, stores.PLACE)
    assert [len(y) for _, y in batches] == [128, 128, 44] and training_images(run, None, stores.PLACE) is None
    means = [float(x.mean()) for x, _ in batches[:2]]
    again = training_images(run, 100, stores.PLACE)
    assert all(torch.equal(x, other) for (x, _), (other, _) in zip(batches, again, strict=True))
    assert means[0] == pytest.approx(means[1], abs=0.1)


def test_a_trajectory_spans_a_plane(flatlab, store, tmp_path):
    erm = digests(store)["erm"]
    words = ("--axes", "trajectory", "--grid", 3, *IMAGES, "--no-triangle", "--checkpoint", "last")
    answer = flatlab("landscape", erm, *words)
    assert answer.code == 0 and "of the variance of 6 checkpoints, each 2 steps" in answer.err
    found = load(tmp_path / f"landscape-{erm[:6]}.npz")
    assert found.mark_labels == tuple(f"step {step}" for step in range(0, 11, 2)) and found.connected
    assert found.marks[-1] == pytest.approx(0, abs=1e-5) and 0.5 < found.explained.sum() < 1
    run = RunStore(store).find(erm)
    around = landscape(run, SurfaceSpec(images=6, checkpoint="last"), stores.PLACE)
    rows = [flatten(network(run, path, stores.PLACE).parameters()) for path in run.kept().values()]
    steps = torch.stack(rows).double() - around.point.double()
    lengths = torch.linalg.vector_norm(steps, dim=1).numpy()
    assert np.hypot(np.linalg.norm(found.marks, axis=1), found.distances) == pytest.approx(lengths, rel=1e-4, abs=1e-5)
    shares = torch.linalg.svdvals(steps - steps.mean(0)).numpy() ** 2
    assert found.explained == pytest.approx(shares[:2] / shares.sum(), rel=1e-4)
    assert "of 3 checkpoints, each 4 steps" in flatlab("landscape", erm, *words, "--every", 4).err


@pytest.mark.slow
def test_an_audit_is_printed_and_drawn(flatlab, store, tmp_path):
    found = digests(store)
    answer = flatlab("audit", found["erm"], *IMAGES, "--samples", 3)
    assert answer.code == 0 and "sphere, raw" in answer.out and "rescaled" in answer.err
    assert (tmp_path / "audit.png").stat().st_size > 5000
    table = pd.DataFrame(documented("audit", flatlab("audit", found["lsq"], *IMAGES, "--samples", 3, "--json").out))
    assert table["measure"].iloc[0] == "sphere, by parameter (adaptive)" and table["invariant"].iloc[0]
    assert not table.set_index("measure").loc["sphere, raw", "invariant"]


def test_plans_are_priced_and_nothing_is_begun(flatlab, store):
    erm = digests(store)["erm"]
    before = sorted(path.name for path in store.rglob("measurements/*"))
    for command in ("landscape", "audit"):
        answer = flatlab(command, erm, "--images", 7, "--dry-run")
        assert answer.code == 0 and "jobs" in answer.out
    line = ConnectionSpec(to=digests(store)["sam"], images=7, grid=3)
    assert line.passes(stores.SIZES) == 3 * 4 * 7
    assert line.replace(recompute=5).passes(stores.SIZES) == 3 * (4 * 7 + 2 * 3 * 5)
    answer = flatlab("landscape", erm, line.to, "--axes", "line", "--grid", 3, "--images", 7, "--dry-run")
    assert answer.code == 0 and "jobs" in answer.out
    assert sorted(path.name for path in store.rglob("measurements/*")) == before


def test_specs_are_read_back_and_surfaces_too(store):
    for spec in (SurfaceSpec(grid=5, recompute=9), ConnectionSpec(to="f"), TraceCheckSpec(), ScaleAuditSpec(most=2.0)):
        assert parse_measurement(spec.canonical()) == spec and spec.passes(stores.SIZES) > 0
    assert not {"every", "recompute"} & set(json.loads(SurfaceSpec().canonical()))  # as before there were these fields
    run = RunStore(store).find(digests(store)["sam"])
    spec = SurfaceSpec(images=4, grid=9, refine=0.2)
    stores.refuses(lambda: run.result(spec), "not measured yet")
    measure(run, spec, stores.PLACE)
    found = run.result(spec)
    assert np.array_equal(Surface.from_arrays(*found.to_arrays()).values, found.values) and found.measured.sum() <= 81


def test_mistakes_are_one_sentence(flatlab, store):
    names = digests(store)
    erm, sam = names["erm"], names["sam"]
    for words, told in [
        (("landscape", erm, "--grid", 1), "grid"),
        (("landscape", erm, "--axes", "sideways"), "did you mean"),
        (("landscape", erm, "--axes", "runs"), "at least three runs"),
        (("landscape", erm, "--extent", -1), "extent"),
        (("landscape", erm, "--axes", "line"), "needs two runs"),
        (("landscape", erm, sam, "--axes", "line", "--grid", 2), "grid"),
        (("landscape", erm, "--recompute", 1), "recompute"),
        (("landscape", erm, "--every", 2), "--axes trajectory"),
        (("landscape", sam, "--axes", "trajectory"), "--keep-every"),
        (("landscape", erm, "--axes", "trajectory", "--every", 3), "--keep-every 3"),
        (("audit", erm, "--most", 1), "most"),
        (("audit", "ffff"), "ffff"),
    ]:
        answer = flatlab(*words)
        assert answer.code == 2 and "Traceback" not in answer.err
        assert told in answer.err or "sideways" in answer.err


@pytest.mark.parametrize("axes", ["line", "runs"])
@pytest.mark.parametrize(("field", "other"), [("held_out", "rot15"), ("model", "resnet18"), ("trial_seed", 1)])
def test_runs_of_other_data_or_architecture_are_refused(store, axes, field, other):
    runs = RunStore(store).runs()
    odd = RunStore(store).run(runs[-1].spec.replace(**{field: other}))
    stores.refuses(lambda: centres([*runs[:2], odd] if axes == "runs" else [runs[0], odd], axes), field, other)
