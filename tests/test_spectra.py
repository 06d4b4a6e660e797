"""From a run to a measured spectrum: what is written is what the library says, resumable, and PyHessian beside it."""

import json
import warnings

import commandline
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from stores import PLACE, content, spec, trained

from flatlab import files
from flatlab.derivatives.operators import Hessian
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.loading import checkpoint
from flatlab.measure import inputs, spectrum
from flatlab.measure.runner import measure
from flatlab.metrics.curvature import density as curvature_density
from flatlab.metrics.curvature import resumable
from flatlab.metrics.curvature.density import spectral_density
from flatlab.metrics.curvature.eigenvalues import hessian_spectrum
from flatlab.metrics.curvature.trace import hessian_trace
from flatlab.quant.attach import bake
from flatlab.quant.lsq import Activations
from flatlab.report import spectrum as report_spectrum
from flatlab.specs.measurements import SpectrumSpec, SurfaceSpec, parse_measurement
from flatlab.store.runs import RunStore

PROBE = SpectrumSpec(images=10, k=2, tol=0.05, trace_budget=32, starts=2, steps=6)
ERM, QT = spec(), spec("QT-DoG")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("spectra") / "runs", ERM)


def measured(store, measurement):
    run = store.run(ERM)
    measure(run, measurement, PLACE)
    return files.load_arrays(run.measurement(measurement).result)


def landscape(store, names, limit=10):
    """The same loss by the library's own strata."""
    every = inputs.images(store.run(ERM), PROBE.replace(images=limit), PLACE)
    model = checkpoint.network(store.run(ERM), "selected", PLACE)
    return Landscape(model, {name: every[name] for name in names}, F.cross_entropy)


SEEN = ("rot0", "rot15", "rot30")


def test_what_is_written_is_what_the_library_says(store):
    arrays, facts = measured(store, PROBE)
    around = landscape(store, SEEN)
    found = hessian_spectrum(around, k=2, tol=0.05, vectors=True)
    trace = hessian_trace(around, budget=32, deflate=found)
    density = spectral_density(around, num_vectors=2, steps=6)
    assert arrays["eigenvalues"] == pytest.approx(found.eigenvalues, rel=1e-3)
    assert facts["trace"][0] == pytest.approx(trace.trace.value, rel=1e-2)
    assert facts["trace"][2] == trace.trace.freedom and facts["num_params"] == around.num_params
    assert arrays["nodes-01"] == pytest.approx(density.nodes[1], rel=1e-2, abs=1e-2 * found.eigenvalues[0])
    assert facts["negative weight"][0] == pytest.approx(density.negative_weight.value, abs=0.02)
    again, told = store.run(ERM).result(PROBE).to_arrays()
    assert json.loads(json.dumps(told)) == facts and again.keys() == arrays.keys()
    assert all(again[name].tobytes() == each.tobytes() for name, each in arrays.items())
    assert facts["products"] == found.cost.hvps + trace.cost.hvps + density.cost.hvps


@pytest.mark.parametrize(
    ("domains", "names"), [("source", SEEN), ("target", ("rot45",)), ("rot30, rot45", ("rot30", "rot45"))]
)
def test_domains_weigh_alike_whatever_their_sizes(store, domains, names, monkeypatch):
    true = inputs.images

    def uneven(*arguments):
        cut = dict(zip(("rot0", "rot15", "rot30", "rot45"), (3, 10, 7, 5), strict=True))
        return {name: [(x[: cut[name]], y[: cut[name]]) for x, y in each] for name, each in true(*arguments).items()}

    monkeypatch.setattr(spectrum, "images", uneven)
    batches = spectrum.batches_of(store.run(ERM), PROBE.replace(domains=domains), PLACE)
    model = checkpoint.network(store.run(ERM), "selected", PLACE)
    joined = Landscape(model, batches, spectrum.weighted)
    every = uneven(store.run(ERM), PROBE, PLACE)
    apart = Landscape(model, {name: every[name] for name in names}, F.cross_entropy)
    v = torch.ones(joined.num_params)
    expected = Hessian(apart) @ v
    assert joined.base_loss.mean() == pytest.approx(apart.base_loss.mean(), rel=1e-6)
    torch.testing.assert_close(Hessian(joined) @ v, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_a_measurement_goes_on_from_where_it_was_stopped(store, monkeypatch):
    measurement = PROBE.replace(seed=1)
    true, made = curvature_density.quadrature, []

    def killed(operator, seed, index, **given):
        made.append(index)
        if len(made) == 2:
            raise KeyboardInterrupt
        return true(operator, seed, index, **given)

    monkeypatch.setattr(spectrum, "quadrature", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(store, measurement)
    assert not store.run(ERM).measurement(measurement).done
    monkeypatch.setattr(spectrum, "_extremes", None)  # is not made again
    measured(store, measurement)
    assert made == [0, 1, 1]
    monkeypatch.undo()
    whole = content(store.run(ERM).measurement(measurement))
    for path in [*store.run(ERM).measurement(measurement).path.glob("*")]:
        path.unlink()
    measured(store, measurement)
    assert content(store.run(ERM).measurement(measurement)) == whole


def test_how_products_are_made_is_chosen_once(store, monkeypatch):
    measurement = store.run(ERM).measurement(PROBE.replace(seed=7, k=1, starts=1, steps=2))
    measurement.create()
    files.save_arrays(measurement.unit("method"), {"unit": np.array([1.0])})
    made = []
    monkeypatch.setattr(resumable, "Hessian", lambda around, **how: made.append(how) or Hessian(around, **how))
    measured(store, measurement.spec)
    assert made == [{"method": "forward"}]


def test_the_measurement_depends_on_the_seed_of_its_spec(store):
    one, other = measured(store, PROBE)[0], measured(store, PROBE.replace(seed=2))[0]
    assert not np.array_equal(one["vectors"], other["vectors"])
    assert one["eigenvalues"] == pytest.approx(other["eigenvalues"], rel=0.05)
    assert parse_measurement(PROBE.canonical()) == PROBE
    with pytest.raises(UserError, match="space"):
        SpectrumSpec.make(space="latent")


def test_progress_is_reported(store):
    heard = []
    measure(store.run(ERM), PROBE.replace(seed=3), PLACE, report=lambda *told: heard.append(told))
    assert len(heard) > 10 and all(made <= of for made, of, _ in heard)
    assert heard[-1][2]["products"] == heard[-1][0]


def test_a_quantized_network_is_baked(tmp_path):
    quantized = trained(tmp_path, QT).run(QT)
    measure(quantized, PROBE, PLACE)
    values = files.load_arrays(quantized.measurement(PROBE).result)[0]["eigenvalues"]
    model = checkpoint.network(quantized, "selected", PLACE)
    bake(model)
    every = inputs.images(quantized, PROBE, PLACE)
    around = Landscape(model, {name: every[name] for name in SEEN}, F.cross_entropy)
    assert values == pytest.approx(hessian_spectrum(around, k=2, tol=0.05).eigenvalues, rel=1e-3)


def test_inputs_that_are_rounded_are_clipped_alone(tmp_path):
    both = spec("LSQ+SAGM")
    run = trained(tmp_path, both).run(both)
    with pytest.raises(UserError, match="rounds activations"):
        measure(run, PROBE, PLACE)
    measure(run, PROBE.replace(unrounded=True), PLACE)
    values = files.load_arrays(run.measurement(PROBE.replace(unrounded=True)).result)[0]["eigenvalues"]
    model = checkpoint.network(run, "selected", PLACE)
    bake(model)
    inside = [module for module in model.modules() if isinstance(module, Activations)]
    for module in inside:
        module.forward = lambda x, module=module: x.clamp(*(end * module.scale for end in module.levels))
        module.rounded = False
    every = inputs.images(run, PROBE, PLACE)
    around = Landscape(model, {name: every[name] for name in SEEN}, F.cross_entropy)
    assert inside and values == pytest.approx(hessian_spectrum(around, k=2, tol=0.05).eigenvalues, rel=1e-3)


def test_the_option_for_rounded_inputs_is_asked_for_where_it_matters(store, tmp_path, capsys):
    both = spec("LSQ+SAGM")
    trained(tmp_path / "runs", both)
    for root, run, words, sentence in (
        (tmp_path / "runs", both, (), "and so has no curvature; add --unrounded."),
        (store.root, ERM, ("--unrounded",), "--unrounded does nothing for runs that do not round the inputs of layers"),
    ):
        assert commandline.call("hessian", run.digest, *words, "--store", root, "--out", tmp_path) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.oracle
def test_pyhessian_itself_runs_beside_ours(store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, facts = measured(store, PROBE.replace(engine="pyhessian"))
    ours = measured(store, PROBE.replace(tol=1e-3))[0]
    assert theirs["eigenvalues"] == pytest.approx(ours["eigenvalues"], rel=0.02)
    assert facts["trace"][1] is None
    frame = report_spectrum.numbers(store, [("ERM", ERM, PROBE.replace(engine="pyhessian"))])
    assert frame.low.isna().all() and set(frame.number) == {"eigenvalue", "trace"}


def test_tables_are_tidy_and_densities_integrate_to_one(store):
    measured(store, PROBE), measured(store, PROBE.replace(domains="target"))
    wanted = [("ERM", ERM, PROBE), ("ERM", ERM, PROBE.replace(domains="target"))]
    frame = report_spectrum.numbers(store, wanted)
    assert not frame.duplicated(["panel", "method", "held_out", "seed", "engine", "number", "index"]).any()
    assert ((frame.low <= frame.value) & (frame.value <= frame.high)).all()
    curves = report_spectrum.densities(store, wanted)
    for _, mine in curves.groupby("panel"):
        assert np.trapezoid(mine.value, mine.place) == pytest.approx(1.0, abs=0.01)


def test_the_command_prints_and_draws(store, tmp_path, capsys):
    words = ["hessian", ERM.digest[:8], "-k", 1, "--images", 8, "--starts", 1, "--lanczos-steps", 4, "--tol", 0.1]
    words += ["--trace-budget", 32, "--domains", "source", "--domains", "rot0,rot45", "--store", store.root]
    assert commandline.call(*words, "--out", tmp_path, "--json") == 0
    rows = commandline.documented("hessian", capsys.readouterr().out)
    assert {row["domains"] for row in rows} == {"source", "rot0,rot45"}
    assert [row["number"] for row in rows][:2] == ["eigenvalue", "trace"]
    assert len(pd.read_csv(tmp_path / "hessian.csv")) == len(rows)
    assert (tmp_path / "hessian.pdf").stat().st_size > 5000
    assert commandline.call(*words, "--dry-run") == 0
    assert "0 jobs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--domains", "rot7"), "Unknown domain 'rot7'"),
        (("-k", "99999999"), "-k must be an integer <= 10000, got 99999999"),
        (("--engine", "hessianpy"), "Unknown engine 'hessianpy'"),
        (("--which", "LM"), "Unknown which 'LM'; did you mean LA?"),
        (("--params", "nothing*"), "No trainable parameter matches 'nothing*'"),
        (("--tol", "0"), "--tol must be a number > 0, got 0.0"),
    ],
)
def test_mistakes_are_one_sentence(store, tmp_path, capsys, words, sentence):
    given = ["hessian", ERM.digest, "--images", 8, "--store", store.root, "--out", tmp_path]
    assert commandline.call(*given, *words) == 2
    told = capsys.readouterr().err
    assert sentence in " ".join(told.split()) and "Traceback" not in told


def test_what_is_not_measured_is_said(store):
    with pytest.raises(UserError, match="is not measured yet"):
        report_spectrum.numbers(RunStore(store.root), [("ERM", ERM, PROBE.replace(seed=77))])


def test_pyhessian_is_priced_by_its_own_count():
    sizes, measurement = {"rot0": 10, "rot15": 10}, SpectrumSpec(k=10)
    theirs = measurement.replace(engine="pyhessian")
    assert theirs.foreseen == 280 and theirs.passes(sizes) == 20 * 0.5 * 10 * 280
    unstarted = [each.replace(starts=50) for each in (measurement, theirs)]
    assert unstarted[0].passes(sizes) > measurement.passes(sizes) and unstarted[1].passes(sizes) == theirs.passes(sizes)


def test_a_search_that_its_budget_ends_is_reported(store, monkeypatch):
    def cut(operator, **how):
        return hessian_spectrum(operator, **how, budget=hessian_spectrum(operator, **how).cost.hvps - 1)

    monkeypatch.setattr(spectrum, "hessian_spectrum", cut)
    arrays, _ = measured(store, PROBE.replace(seed=9))
    assert (arrays["converged"] == 0.5).all()
    frame = report_spectrum.numbers(store, [("ERM", ERM, PROBE.replace(seed=9))])
    assert set(frame.loc[frame["number"] == "eigenvalue", "converged"]) == {"not verified"}


def test_runs_that_span_a_plane_were_trained_on_the_same_data(tmp_path):
    store = trained(tmp_path / "runs", ERM, spec("SWA"), spec("SMA"))
    runs = [store.run(each) for each in (ERM, spec("SWA"), spec("SMA"))]
    measurement = SurfaceSpec(
        axes="runs", through=tuple(run.spec.digest for run in runs[1:]), grid=2, images=4, refine=None
    )
    runs[2].note(data_fingerprint="0" * 64)
    with pytest.raises(UserError, match="differ from those that run"):
        measure(runs[0], measurement, PLACE)
