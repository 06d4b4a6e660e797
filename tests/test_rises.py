"""Radii by rise: found in closed form, common to all runs, planned from an empty store, and resumed."""

import numpy as np
import pytest
import torch
from commandline import call
from stores import ERM, OTHER, PLACE, QT, SIZES, content, copied, forkserver, refuses, run_child, trained, watch
from torch import nn

from flatlab import files, seeds
from flatlab.jobs import plan as jobs_plan
from flatlab.jobs import worker
from flatlab.landscape.landscape import Landscape
from flatlab.measure.runner import measure
from flatlab.metrics.flatness import pilot
from flatlab.metrics.flatness.sampler import Sampler
from flatlab.report import tables
from flatlab.results.sphere import Reach
from flatlab.specs.measurements import GradCAMSpec, SphereSpec, parse_measurement
from flatlab.specs.methods import radii_by_rise
from flatlab.specs.rises import ByRise, ReachSpec
from flatlab.specs.settings import PAPER, QUICK, SMOKE, for_data, setting
from flatlab.store.radii import by_rise
from flatlab.store.runs import RunStore

RISES = (0.02, 0.1, 0.5)
CHOSEN = ByRise(rises=(0.02, 0.1), references=(ERM.digest, OTHER.digest))
PROBE = SphereSpec(radii=CHOSEN, num_samples=4, images=12)
CAM = GradCAMSpec(radii=CHOSEN, images=2, num_samples=1, num_shares=2)


@pytest.fixture(scope="module", autouse=True)
def server():
    forkserver()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two reference runs and a quantized one, trained and not measured."""
    root = tmp_path_factory.mktemp("store")
    return [trained(root, run) for run in (ERM, OTHER, QT)][-1]


def done_all(store, measurements):
    """Do what is missing for some measurements; return the errors."""
    events = []
    worker.work(jobs_plan.missing(store, [ERM, OTHER, QT], measurements, sizes=SIZES), store, PLACE, emit=events.append)
    return [event["error"] for event in events if "error" in event]


# --- the pilot


class Bowl(nn.Module):
    """w' diag(h) w / 2 for each sample, times its own weight."""

    def __init__(self, curvatures):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(curvatures), dtype=torch.float64))
        self.register_buffer("curvatures", curvatures)

    def forward(self, weights):
        return 0.5 * weights * (self.curvatures * self.w**2).sum()


def bowl(curvatures, shift=0.0):
    model = Bowl(curvatures)
    with torch.no_grad():
        model.w.add_(shift)
    weights = torch.ones(512, dtype=torch.float64)
    return Landscape(model.eval(), [(weights, weights)], lambda outputs, targets: outputs)


def test_on_a_quadratic_the_radii_are_those_of_the_closed_form():
    """F = gamma^2 tr(H) / (2 P): exactly where all curvatures are equal, else as far as eight pairs of rays know it."""
    even = bowl(torch.full((50,), 3.0, dtype=torch.float64), shift=0.2)
    found = pilot.reached(Sampler([even], 0, "none"), RISES)
    np.testing.assert_allclose(found, np.sqrt(2 * np.array(RISES) / 3.0), rtol=1e-6)
    drawn = torch.rand(4000, generator=seeds.generator("bowl"), dtype=torch.float64)
    found = pilot.reached(Sampler([bowl(drawn, shift=0.2)], 0, "none"), RISES)
    # u'Hu of a ray has the relative spread sqrt(2 var(h) / P) / mean(h), its radius half of it.
    spread = 0.5 * np.sqrt(2 * drawn.var().item() / 4000) / drawn.mean().item() / np.sqrt(pilot.PAIRS)
    np.testing.assert_allclose(found, np.sqrt(2 * np.array(RISES) / drawn.mean().item()), rtol=4 * spread)


def test_directions_of_large_models_are_drawn_again_to_the_same_radii(monkeypatch):
    landscape = bowl(torch.rand(50, generator=seeds.generator("bowl"), dtype=torch.float64))
    held = pilot.reached(Sampler([landscape], 0, "none"), RISES)
    monkeypatch.setattr(pilot, "KEPT", 10)
    np.testing.assert_array_equal(pilot.reached(Sampler([landscape], 0, "none"), RISES), held)


def test_what_is_said_to_be_forwarded_is():
    landscape = bowl(torch.ones(50, dtype=torch.float64), shift=0.2)
    sampler, seen = Sampler([landscape], 0, "none"), []
    hook = landscape.model.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs.numel()))
    pilot.reached(sampler, RISES)
    hook.remove()
    assert sum(seen) <= pilot.reached_price(sampler) <= 20_000
    assert ReachSpec(rises=RISES).passes(SIZES) == 20_000


def test_a_loss_that_does_not_rise_so_far_is_refused():
    flat = Landscape(
        nn.Linear(4, 3).eval(),
        [(torch.randn(64, 4), torch.zeros(64))],
        lambda outputs, targets: torch.tanh(outputs.square().sum(1)),
    )
    refuses(lambda: pilot.reached(Sampler([flat], 0, "none"), (0.02, 2.0)), "must rise by 2 nats", "smaller rises")


@pytest.mark.parametrize("rises", [(), (0.0, 1.0), (0.2, 0.1), (0.1, 0.1)])
def test_rises_ascend_from_above_zero(rises):
    refuses(lambda: ByRise.make(rises=rises, references=("ab",)), "rises must be", "> 0", f"got {rises}")
    refuses(lambda: ReachSpec.make(rises=rises), "rises must be", "> 0", f"got {rises}")


# --- from runs to radii


def test_a_measurement_names_rises_and_runs_and_not_the_radii():
    assert parse_measurement(PROBE.canonical()) == PROBE and parse_measurement(CAM.canonical()) == CAM
    assert "0.02" in PROBE.canonical() and ERM.digest in PROBE.canonical()
    assert SphereSpec(radii=(0.0, 1.0)).canonical().count("rises") == 0  # old names hold
    assert [digest for digest, _ in PROBE.pilots] == [ERM.digest, OTHER.digest]
    filtered = PROBE.replace(normalisation="filter").pilots[0][1]
    assert filtered.normalisation == "filter" and filtered.images == 12
    assert PROBE.passes(SIZES) == 2 * 4 * 4 * 12 and SphereSpec(radii=(1.0,)).pilots == ()


def pilot_of(radii):
    return Reach(radii=np.array(radii), rises=(0.02, 0.5), strata=("rot0",), images=1)


def test_radii_are_geometric_means_rounded_to_two_digits(tmp_path):
    store = RunStore(tmp_path)
    for (_, pilot_), run, radii in zip(PROBE.pilots, (ERM, OTHER), ([1.0, 3.0], [1.21, 3.3]), strict=True):
        entry = store.run(run)
        entry.create()
        entry.measurement(pilot_).create()
        files.save_arrays(entry.measurement(pilot_).result, *pilot_of(radii).to_arrays())
        entry.measurement(pilot_).finish()
    assert by_rise(store, CHOSEN, PROBE).tolist() == [1.1, 3.1]  # sqrt(9.9) = 3.146
    files.save_arrays(entry.measurement(pilot_).result, *pilot_of([1.21, 0.41]).to_arrays())
    entry.measurement(pilot_).finish()
    refuses(lambda: by_rise(store, CHOSEN, PROBE), "differ in two digits", "1.1")


@pytest.mark.slow
def test_all_runs_share_radii_where_the_references_rise_so_far(store, tmp_path):
    store = copied(store, tmp_path / "store")
    wanted = [(run, PROBE.replace(normalisation=kind)) for run in (ERM, OTHER, QT) for kind in ("none", "filter")]
    assert done_all(store, [*wanted, (QT, CAM)]) == []
    for kind in ("none", "filter"):
        measurement = PROBE.replace(normalisation=kind)
        found = store.run(QT).result(measurement)
        assert found.radii.tolist() == [0.0, *by_rise(store, CHOSEN, measurement)] and list(found.rises) == [
            0,
            0.02,
            0.1,
        ]
        frame = tables.flatness(
            store, [("ERM", ERM, measurement), ("ERM", OTHER, measurement), ("QT-DoG", QT, measurement)]
        )
        assert frame.groupby("method")["radius"].unique().apply(tuple).nunique() == 1
    paired = PROBE.replace(num_samples=None, block_size=8, rel_error=0.1)  # four single rays know the slope, not F
    assert done_all(store, [(ERM, paired), (OTHER, paired)]) == []
    own = tables.flatness(store, [("ERM", ERM, paired), ("ERM", OTHER, paired)])
    risen = own[(own["panel"] == "source") & (own["radius"] > 0)].groupby("rise")["value"].mean()
    np.testing.assert_allclose(risen, risen.index, rtol=0.5)
    assert list(store.run(QT).result(CAM).radii) == by_rise(store, CHOSEN, CAM).tolist()


def test_before_its_pilots_a_measurement_is_refused(store, tmp_path):
    store = copied(store, tmp_path / "store")
    refuses(lambda: measure(store.run(QT), PROBE, PLACE), ERM.digest, "is not measured yet")


@pytest.mark.slow
def test_radii_of_other_pilots_are_not_put_beside_each_other(store, tmp_path):
    store = copied(store, tmp_path / "store")
    assert done_all(store, [(ERM, PROBE), (QT, PROBE)]) == []
    path = store.run(QT).measurement(PROBE).result
    arrays, facts = files.load_arrays(path)
    files.save_arrays(path, {**arrays, "radii": arrays["radii"] * 2}, facts)
    store.run(QT).measurement(PROBE).finish()
    refuses(lambda: tables.flatness(store, [("a", ERM, PROBE), ("b", QT, PROBE)]), "must be the same", QT.digest)


# --- planned and resumed


def test_trainings_come_before_pilots_and_pilots_before_measurements(tmp_path):
    store = RunStore(tmp_path / "empty")
    todo = jobs_plan.missing(store, [ERM, OTHER], [(QT, PROBE), (ERM, PROBE)], sizes=SIZES)
    kinds = [job.name.partition(" ")[0] for job in todo]
    assert kinds == ["train", "train", "train", "pilot", "pilot", "measure", "measure"]
    pilots, measures = todo[3:5], todo[5:]
    assert [job.needs for job in pilots] == [(ERM.digest,), (OTHER.digest,)]
    names = {f"{digest}/measurements/{spec.digest}" for digest, spec in PROBE.pilots}
    assert {name for job in pilots for name in job.fills} == names
    assert all(set(job.needs) == {*names, job.runs[0].digest} for job in measures)
    assert len({job.name for job in todo}) == len(todo) and not store.root.exists()
    refuses(lambda: jobs_plan.missing(store, [ERM], [(QT, PROBE)], sizes=SIZES), OTHER.digest)


def test_pilots_that_are_there_are_not_waited_for(store, tmp_path):
    store = copied(store, tmp_path / "store")
    assert done_all(store, [(QT, PROBE)]) == []
    todo = jobs_plan.missing(store, [ERM, OTHER], [(ERM, PROBE)], sizes=SIZES)
    assert [job.needs for job in todo] == [()]


def test_a_failed_pilot_is_said_and_its_measurements_are_given_up(store, tmp_path):
    store = copied(store, tmp_path / "store")
    hopeless = ByRise(rises=(0.02, 1e30), references=CHOSEN.references)
    told = done_all(store, [(QT, PROBE.replace(radii=hopeless))])
    assert len(told) == 3 and "smaller rises" in told[0] and "not tried" in told[2]


def _measures(root, tally, last):
    watch(tally, "rename", last)
    assert done_all(RunStore(root), [(QT, PROBE)]) == []


@pytest.mark.slow
@pytest.mark.parametrize("last", [3, 7, 11])
def test_killed_at_any_file_it_ends_with_the_same_bytes(store, tmp_path, last):
    whole, cut = copied(store, tmp_path / "whole"), copied(store, tmp_path / "cut")
    assert done_all(whole, [(QT, PROBE)]) == []
    assert run_child(_measures, cut.root, tmp_path / "tally", last) != 0
    assert done_all(cut, [(QT, PROBE)]) == []
    for run, measurement in [(ERM, PROBE.pilots[0][1]), (OTHER, PROBE.pilots[0][1]), (QT, PROBE)]:
        assert content(cut.run(run).measurement(measurement)) == content(whole.run(run).measurement(measurement))


# --- settings


def test_the_papers_radii_are_for_the_papers_network_alone():
    assert PAPER.radii == tuple(range(0, 61, 5)) and QUICK.radii is None
    assert for_data(QUICK, "PACS").radii == PAPER.radii
    others = [{"model": "mobilenet_v2"}, {"image_size": 64}, {"weights": "none"}, {"dataset": "VLCS"}]
    assert all(PAPER.replace(**change).radii is None for change in others)
    assert setting(for_data(QUICK, "PACS", model="mobilenet_v2"), model="mobilenet_v2").radii is None
    references = radii_by_rise(SMOKE, (0.1,)).references
    assert len(references) == 4 * SMOKE.seeds and list(references) == sorted(references)
    assert radii_by_rise(SMOKE.replace(lr=0.5), (0.1,)).references != references


def test_a_dry_run_works_from_an_empty_store(tmp_path, capsys):
    assert call("reproduce", "fig3", "--dry-run", "--setting", "smoke", "--store", tmp_path / "new") == 0
    assert "pilot erm" in capsys.readouterr().out and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_command_measures_where_the_first_run_rises(store, tmp_path, capsys):
    store = copied(store, tmp_path / "store")
    words = ("flatness", ERM.digest, QT.digest, "--samples", 2, "--images", 12, "--store", store.root)
    assert call(*words, "--out", tmp_path, "--json") == 0
    measurement = next(each.spec for each in store.run(QT).measurements() if each.spec.metric == "sphere")
    assert measurement.radii == ByRise(rises=(*QUICK.rises, QUICK.beyond), references=(ERM.digest,))
    piloted = ("--rel-error", 0.4, "--normalisation", "filter")
    assert call("flatness", QT.digest, *piloted, "--dry-run", "--store", store.root, "--out", tmp_path) == 0
    capsys.readouterr()
