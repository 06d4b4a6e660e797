"""Small networks trained to a loss, what is measured of them, and Kendall's tau: closed forms, SciPy, and the loop."""

import json
import math

import cases
import commandline
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, optimize, stats
from spectra import normal, rotated
from stores import PLACE, SIZES, TINY, content, refuses
from torch import nn

from analyses import _kendall, _qgen_grid, _qgen_tests, qgen
from flatlab.jobs import plan as jobs_plan
from flatlab.landscape.landscape import Landscape
from flatlab.measure import generalisation
from flatlab.measure.inputs import latent_network, noise_norm
from flatlab.measure.runner import measure
from flatlab.metrics.flatness.largest_noise import EPSILON, HIGHEST, largest_noise, pac_bayes, rounding_penalty
from flatlab.models.networks import build_network
from flatlab.specs.generalisation import GeneralisationSpec
from flatlab.specs.measurements import SphereSpec
from flatlab.specs.methods import METHODS, compose
from flatlab.specs.rises import ByNoise
from flatlab.specs.run import AverageSpec, StopSpec
from flatlab.specs.settings import PAPER, QUICK, SMOKE
from flatlab.store.runs import RunStore
from flatlab.train.loop import Training, train

# --- training to a loss -------------------------------------------------------------------------------------------

SWITCH, STEPS = 8, 40


def spec(method="ERM", *, loss=1.9, after=SWITCH, **fields):
    setting = TINY.replace(steps=STEPS, switch=SWITCH, eval_every=4, model="cnn-10x2", bits=4)
    run = compose(METHODS[method], setting, held_out="rot45", seed=3, trial_seed=3)
    return run.replace(stop=StopSpec(loss=loss, after=after), **fields)


def fits(run):
    return [(row["step"], np.mean([each["loss"] for each in row["fitted"].values()])) for row in run.rows()]


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    """A trajectory of two networks, of full precision and of 4 bits, in one store."""
    store = RunStore(tmp_path_factory.mktemp("trajectory"))
    train([spec()], store, PLACE, forks={SWITCH})
    train([spec("QT-DoG")], store, PLACE)
    return store


@pytest.mark.parametrize("method", ["ERM", "QT-DoG"])
def test_training_ends_at_the_first_evaluation_that_reaches_the_loss(trajectory, method):
    run = trajectory.run(spec(method))
    *before, (last, loss) = fits(run)
    assert loss <= 1.9 and SWITCH <= last < STEPS
    assert all(each > 1.9 for step, each in before if step >= SWITCH)
    assert run.done and generalisation.files.load_arrays(run.checkpoint("last"))[1]["step"] == last


def test_no_training_ends_before_it_may(tmp_path):
    store = RunStore(tmp_path)
    train([spec(loss=100.0)], store, PLACE)
    assert fits(store.run(spec(loss=100.0)))[-1][0] == SWITCH


def test_a_loss_that_is_not_reached_takes_all_steps(tmp_path):
    wanted = spec(loss=1e-9)
    train([wanted], RunStore(tmp_path), PLACE)
    assert fits(RunStore(tmp_path).run(wanted))[-1][0] == STEPS


def test_the_networks_of_a_trajectory_share_it_up_to_the_switch(trajectory, tmp_path):
    alone = RunStore(tmp_path)
    train([spec("QT-DoG")], alone, PLACE)
    assert content(alone.run(spec("QT-DoG"))) == content(trajectory.run(spec("QT-DoG")))
    sessions = trajectory.run(spec("QT-DoG")).provenance["sessions"]
    assert [(each["from_step"], each["how"]) for each in sessions] == [(SWITCH, f"forked from {spec().digest}")]


@pytest.mark.parametrize("cut", [SWITCH + 2, "end"])
def test_a_stopped_training_resumes_to_the_same_bytes(trajectory, tmp_path, cut):
    store, wanted = RunStore(tmp_path), spec()
    end = fits(trajectory.run(wanted))[-1][0]

    def stop(done, _, shown):
        if done == (end if cut == "end" else cut) + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Training([store.run(wanted)], store, PLACE, forks={SWITCH}).run(stop)
    train([wanted], store, PLACE, forks={SWITCH})
    assert content(store.run(wanted)) == content(trajectory.run(wanted))


def test_a_stop_before_the_switch_or_of_an_average_is_refused():
    refuses(lambda: spec("QT-DoG", after=SWITCH - 1), "no stop before the switch at step 8", "stop.after=7")
    refuses(lambda: spec(average=AverageSpec(kind="sma")), "needs the last weights", "sma")


def test_training_images_are_counted_in_the_price():
    without, stopped = (
        jobs_plan.training_passes(each, SIZES, forked=False) for each in (spec().replace(stop=None), spec())
    )
    share = 1 - spec().holdout - spec().test_share
    assert stopped - without == pytest.approx(
        (STEPS + 1) / 4 * share * sum(SIZES[name] for name in SIZES if "4" not in name)
    )


# --- measures -----------------------------------------------------------------------------------------------------


def line(images):
    """Two classes by the sign of a weighted sum: the logits are (w.x, 0), and accuracy under noise is known."""

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, -0.5, 0.0]))

        def forward(self, x):
            first = x @ self.w
            return torch.stack([first, torch.zeros_like(first)], dim=1)

    x = normal("line", shape=(images, 3)).float()
    model = Line().eval()
    labels = (x @ model.w.detach() <= 0).long()
    return Landscape(model, [(x, labels)], F.cross_entropy), x.double().numpy()


@pytest.mark.parametrize("relative", [False, True])
def test_the_largest_noise_of_a_linear_classifier_is_the_closed_forms(relative):
    landscape, x = line(400)
    w = landscape.point.double().numpy()

    def accuracy(sigma):
        variance = sigma**2 * w**2 + EPSILON**2 if relative else np.full(3, sigma**2)
        return stats.norm.cdf(np.abs(x @ w) / np.sqrt(x**2 @ variance)).mean()

    exact = optimize.brentq(lambda sigma: accuracy(sigma) - 0.9, 1e-3, HIGHEST)
    found = largest_noise(landscape, relative=relative, num_samples=400, seed=2)
    assert found == pytest.approx(exact, rel=0.08) and found == largest_noise(
        landscape, relative=relative, num_samples=400, seed=2
    )


def test_the_largest_noise_lies_within_its_bounds(untouched):
    landscape, _ = line(64)
    with untouched(landscape.model):
        assert largest_noise(landscape, drop=0.9) == HIGHEST
        assert largest_noise(landscape, drop=0.001) < largest_noise(landscape, drop=0.2)
    refuses(lambda: largest_noise(landscape, drop=1.0), "between 0 and 1, got 1.0")
    refuses(lambda: largest_noise(landscape, num_samples=0), "num_samples", "got 0")


def test_the_penalty_of_rounding_on_a_quadratic_is_the_expected_rise():
    hessian = rotated(np.linspace(-1, 4, 5), "penalty")
    steps = torch.tensor([0.1, 0.0, 0.3, 1.0, 0.2], dtype=torch.float64)
    exact = float((steps.square() * hessian.diagonal()).sum() / 24)
    means = [
        integrate.quad(np.square, -s / 2, s / 2)[0] / s if s else 0.0 for s in steps.tolist()
    ]  # of the noise's square
    rise = 0.5 * float((hessian.diagonal() * torch.tensor(means, dtype=torch.float64)).sum())
    assert exact == pytest.approx(rise)
    found = rounding_penalty(cases.Quadratic(hessian).landscape(), steps, num_samples=4000)
    assert abs(found.value - exact) < 4 * found.stderr and found.stderr < 0.02 * abs(exact)
    alone = torch.diag(hessian.diagonal())  # of a diagonal Hessian each vector gives the value itself
    found = rounding_penalty(cases.Quadratic(alone).landscape(), steps, num_samples=2)
    assert found.value == pytest.approx(exact, rel=1e-12) and found.stderr < 1e-12
    refuses(lambda: rounding_penalty(cases.Quadratic(alone).landscape(), steps, num_samples=1), ">= 2, got 1")


def test_the_penalty_of_rounding_of_a_network_is_that_of_the_dense_hessian():
    case = cases.make("mlp").double()
    landscape = case.landscape()
    names = list(landscape.named)

    def loss(flat):
        weights = dict(zip(names, landscape.split(flat), strict=True))
        return F.cross_entropy(torch.func.functional_call(case.model, weights, case.inputs), case.targets)

    dense = torch.autograd.functional.hessian(loss, landscape.point)
    steps = torch.rand(landscape.num_params, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = float((steps.square() * dense.diagonal()).sum() / 24)
    found = rounding_penalty(landscape, steps, num_samples=3000)
    assert abs(found.value - exact) < 4 * found.stderr and found.stderr < 0.1 * abs(exact)


def test_pac_bayes_bounds_are_the_published_formulas():
    moved, sigma, aware, count = torch.tensor([3.0, -4.0]), 0.5, 0.25, 100
    found = pac_bayes(moved, sigma, aware, num_samples=count)
    assert found["plain"] == pytest.approx(math.sqrt((25 / (4 * 0.25) + math.log(count / sigma) + 10) / count))
    top = EPSILON**2 + (aware**2 + 1) * 25 / 2
    terms = [math.log(top / (EPSILON**2 + aware**2 * each**2)) for each in (3.0, 4.0)]
    bound = sum(terms) / 4 + math.log(count / aware) + 10
    assert found["magnitude-aware"] == pytest.approx(math.sqrt(bound / count))


def test_the_margin_is_the_tenth_percentile_of_the_lead():
    leads = torch.arange(11.0) - 2
    logits = torch.stack([torch.zeros(11), leads, torch.full((11,), -9.0)], dim=1)
    assert generalisation.margin(logits, torch.ones(11, dtype=torch.long)) == pytest.approx(-1.0)


def test_measures_of_a_trajectory(trajectory):
    wanted = GeneralisationSpec(checkpoint="last", images=20, num_samples=2, products=2, corruptions=("contrast",))
    found = {}
    for method in ("ERM", "QT-DoG"):
        run = trajectory.run(spec(method))
        measure(run, wanted, PLACE)
        found[method] = run.result(wanted)
        values = found[method].values
        assert all(np.isfinite(list(values.values()))) and values["sigma"] > 0 and values["sharpness"] >= 0
        assert found[method].accuracies.shape == (1, 5) and (found[method].accuracies >= 0).all()
        first = build_network("cnn-10x2", num_classes=10, in_channels=1, seed=3)
        plain, layers = latent_network(run, "last", PLACE)
        ends = {name: layers[name].quantized if name in layers else w for name, w in plain.named_parameters()}
        moved = sum((ends[name] - w).detach().double().square().sum() for name, w in first.named_parameters()) ** 0.5
        assert values["distance"] == pytest.approx(float(moved), rel=1e-5)
    assert found["ERM"].values["penalty"] == 0 != found["QT-DoG"].values["penalty"]


def test_radii_in_units_of_noise_are_multiples_of_its_norm(trajectory):
    quantized, plain = trajectory.run(spec("QT-DoG")), trajectory.run(spec())
    _, layers = latent_network(quantized, "last", PLACE)
    norm = math.sqrt(sum(float((each.quantized - each.weight).double().square().sum()) for each in layers.values()))
    radii = ByNoise(multiples=(1.0, 2.0))
    probe = SphereSpec(radii=radii, checkpoint="last", images=8, num_samples=3)
    measure(quantized, probe, PLACE)
    np.testing.assert_allclose(quantized.result(probe).radii, [0, norm, 2 * norm], rtol=1e-6)
    assert noise_norm(plain, "last", PLACE, 2) > noise_norm(plain, "last", PLACE, 8) > 0
    assert probe.passes(SIZES) == SphereSpec(radii=(0.0, 1.0, 2.0), images=8, num_samples=3).passes(SIZES)
    refuses(lambda: measure(plain, probe, PLACE), "need `bits` for a run without a quantizer", spec().digest)
    own = probe.replace(radii=radii.replace(bits=4))
    refuses(lambda: measure(quantized, own, PLACE), "need `bits` for a run without a quantizer", "bits=4")
    refuses(lambda: ByNoise.make(multiples=(2.0, 1.0)), "multiples must be one or more numbers > 0 in increasing order")


# --- the grid -----------------------------------------------------------------------------------------------------


def test_the_grid_of_quick_has_240_networks_that_share_their_trajectories():
    networks = _qgen_grid.labelled(QUICK)
    runs = [run for _, run in networks]
    assert len(runs) == len({run.digest for run in runs}) == 240
    whole = {run.digest for name, run in networks if name == "32 bits"}
    assert len(whole) == 48 == len({run.seed for run in runs}) == len({run.trial_seed for run in runs})
    assert all(run.parent.digest in whole for run in runs if run.quantizer)
    for model in {run.model for run in runs}:
        network = build_network(model, num_classes=10, in_channels=1)
        assert sum(each.numel() for each in network.parameters()) >= 5_000
    jobs = jobs_plan.missing(RunStore("nowhere"), runs, [], sizes=SIZES)
    forking = [job for job in jobs if job.forks]
    assert len(jobs) == 240 and len(forking) == 48 and {job.forks for job in forking} == {(30,)}


def test_the_grid_of_paper_has_2160_networks():
    runs = [run for _, run in _qgen_grid.labelled(PAPER)]
    assert len({run.digest for run in runs}) == 2160 and {run.weights for run in runs} == {"none"}
    axes = {name: {getattr(run, name) for run in runs} for name in ("model", "lr", "batch_size", "weight_decay")}
    assert [len(values) for values in axes.values()] == [6, 3, 2, 3]


def test_references_have_the_networks_own_width_and_depth():
    models = {run.digest: run.model for _, run in _qgen_grid.labelled(QUICK)}
    for _, run, specs in _qgen_grid.planned(QUICK):
        assert [models[digest] for digest in specs["raw"].radii.references] == [run.model]
        assert {name for name in specs if "noise" in name} == {
            f"noise {b}" for b in ([run.quantizer.bits] if run.quantizer else [2, 3, 4, 8])
        }


# --- Kendall's tau --------------------------------------------------------------------------------------------------


def networks(count=40, seed=0, link=1.0):
    """Networks in groups of four, one of each stratum, two columns with ties."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=count)
    y = link * x + rng.normal(size=count)
    strata, groups = np.arange(count) % 4, np.arange(count) // 4
    return pd.DataFrame({"x": x.round(1), "y": y.round(1), "bits": strata, "seed": groups})


def test_tau_is_scipys_over_all_pairs_and_in_each_stratum():
    frame = networks()
    found = _kendall.taus(frame, [("x", "y")], stratum="bits", group="seed").set_index("among")
    assert found.loc[_kendall.ALL, "value"] == pytest.approx(stats.kendalltau(frame["x"], frame["y"]).statistic)
    for bits, mine in frame.groupby("bits"):
        assert found.loc[str(bits), "value"] == pytest.approx(stats.kendalltau(mine["x"], mine["y"]).statistic)
    assert (found["low"] < found["value"]).all() and (found["value"] < found["high"]).all()
    assert list(found["networks"]) == [40, 40, 10, 10, 10, 10]


def test_tau_of_equal_bits_does_not_see_what_differs_between_bits():
    frame = networks(400, link=0.0)
    shifted = frame.assign(x=frame["x"] + 10 * frame["bits"], y=frame["y"] + 10 * frame["bits"])
    at = [("x", "y")]
    before, after = (
        _kendall.taus(each, at, stratum="bits", group="seed").set_index("among") for each in (frame, shifted)
    )
    assert after.loc[_kendall.EQUAL, "value"] == pytest.approx(before.loc[_kendall.EQUAL, "value"])
    assert after.loc[_kendall.ALL, "value"] > 0.5 > before.loc[_kendall.ALL, "value"]
    pairs = concordant = 0
    for _, mine in frame.groupby("bits"):
        dx, dy = (np.sign(np.subtract.outer(*2 * [mine[name].to_numpy()])) for name in "xy")
        concordant, pairs = concordant + (dx * dy).sum(), pairs + np.array([abs(dx).sum(), abs(dy).sum()])
    assert before.loc[_kendall.EQUAL, "value"] == pytest.approx(concordant / np.sqrt(pairs.prod()))


def test_tau_intervals_hold_and_are_corrected_as_scipy_does():
    found = [
        _kendall.taus(networks(60, seed, link=0.0), [("x", "y")], stratum="bits", group="seed").iloc[0]
        for seed in range(60)
    ]
    held = sum(row["low"] <= 0 <= row["high"] for row in found)
    assert stats.binomtest(held, 60, 0.95).pvalue > 0.001
    frame = networks(60).assign(z=lambda each: each["x"].to_numpy()[::-1])
    table = _kendall.taus(frame, [("x", "y"), ("z", "y"), ("x", "z")], stratum="bits", group="seed")
    mine = table[table["among"] == _kendall.ALL]
    np.testing.assert_allclose(mine["p_bh"], stats.false_discovery_control(mine["p"]))


def test_few_groups_and_columns_that_do_not_vary_have_no_interval():
    few = _kendall.taus(networks(36), [("x", "y")], stratum="bits", group="seed")
    assert few["value"].notna().all() and few[["low", "high", "p", "p_bh"]].isna().all(axis=None)
    still = _kendall.taus(networks().assign(x=1.0), [("x", "y")], stratum="bits", group="seed")
    assert still[["value", "low", "p", "p_bh"]].isna().all(axis=None)


# --- what the page says ---------------------------------------------------------------------------------------------


def frame_of(*, flatter=0.0, count=24, reached=True):
    """A table of `qgen` of trajectories with networks of 2, 8 and 32 bits; F of the quantized ones is lower."""
    rng = np.random.default_rng(5)
    rows = []
    for seed in range(count):
        for bits in (2, 8, 32):
            row = {"method": f"{bits} bits", "bits": bits, "held_out": "rot45", "seed": seed}
            row |= {name: rng.normal() for name in (*_qgen_tests.MEASURES, *_qgen_tests.GAPS)}
            row |= {"raw": 0.5 + 0.02 * rng.normal() - flatter * (bits < 32), "reached": reached or bits > 2}
            for own in (2, 8) if bits == 32 else (bits,):
                row |= {f"noise {own} x {k:g}": 0.1 * k + 0.01 * rng.normal() for k in _qgen_grid.MULTIPLES}
            row |= {f"contrast:{level}": 0.9 - 0.1 * level + 0.01 * rng.normal() for level in range(1, 6)}
            row |= {"train loss": 0.04, "train accuracy": 1.0, "test accuracy": 0.9, "target accuracy": 0.8}
            rows.append(row)
    return pd.DataFrame(rows)


def test_the_page_answers_by_the_tests_whether_quantized_networks_lie_flatter():
    said = qgen.remarks(frame_of(flatter=0.1))
    raw, filtered, noise = (next(each for each in said if each.startswith(word)) for word in ("Raw", "Filter", "Noise"))
    assert "2 bits is flatter than 32 bits" in raw and "8 bits is flatter than 32 bits" in raw
    assert "no difference is established for the 2 pairs" in filtered and "no difference" in noise
    assert "sharper than 32 bits" in next(
        each for each in qgen.remarks(frame_of(flatter=-0.1)) if each.startswith("Raw")
    )


def test_networks_that_miss_the_target_are_named_and_left_out_of_a_second_column():
    frame = frame_of(reached=False)
    said = qgen.remarks(frame)
    assert "48 reach a cross-entropy of 0.05 nats" in said[0] and "24 do not (24 of 2 bits)" in said[0]
    found = qgen.findings(frame)
    counts = found[(found["among"] == _kendall.ALL)].groupby("reached")["networks"].first()
    assert counts.to_dict() == {False: 72, True: 48}
    assert {"all pairs", "equal bits", "all pairs, target reached"} <= set(qgen.summary(found).columns)


def test_each_tau_is_said_once():
    frame = frame_of(count=40)
    frame["gap in"] = frame["trace"] + 0.1 * frame["gap in"]
    for among in (_kendall.ALL, _kendall.EQUAL):
        (said,) = [each for each in qgen.remarks(frame) if each.startswith(f"Kendall's tau, {among}")]
        assert "over 48 taus" in said and said.count("trace of the Hessian") == 1
        assert "; out of domain, loss: none; in domain, accuracy: none" in said


def test_the_price_counts_the_model_of_each_network(tmp_path, capsys):
    words = ("reproduce", "qgen", "--dry-run", "--json", "--store", tmp_path / "runs")
    assert commandline.call(*words) == 0
    jobs = json.loads(capsys.readouterr().out)["jobs"]
    rates = {round(job["core_seconds"] / job["passes"], 9) for job in jobs}
    assert rates == {jobs_plan.REFERENCE[name] for name in _qgen_grid.DIGITS.models}


def test_smoke_has_networks_of_full_precision():
    assert {name for name, _ in _qgen_grid.labelled(SMOKE)} == {"2 bits", "8 bits", "32 bits"}


def test_the_page_says_which_images_are_corrupted_and_where_no_test_was_made():
    assert "rot45 under gaussian_noise:3 held out" in qgen.caption(SMOKE.replace(corruption="gaussian_noise:3"))
    assert "rot45 held out" in qgen.caption(SMOKE)
    tau = pd.DataFrame({"gap": ["gap in"], "measure": ["trace"], "value": [0.1], "p": [np.nan], "p_bh": [np.nan]})
    assert "no test was made" in qgen._correlated(tau, "all pairs")
