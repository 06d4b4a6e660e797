"""Runs made from finished ones, INQ's stages and noise through the loop: what they promise, and exact resume."""

import pytest
import torch
from stores import (
    LAST,
    PLACE,
    SIZES,
    SWITCH,
    TINY,
    content,
    copied,
    forked,
    forkserver,
    refuses,
    run_child,
    spec,
    trained,
    watch,
)

from flatlab import files
from flatlab.jobs import plan as jobs_plan
from flatlab.jobs.worker import work
from flatlab.loading import checkpoint
from flatlab.loading import data as loading_data
from flatlab.measure import inputs as measure_inputs
from flatlab.quant.attach import quantized_layers
from flatlab.quant.codebook import initial_scale, searched_scale
from flatlab.specs.measurements import SphereSpec
from flatlab.specs.methods import METHODS, Method, compose
from flatlab.specs.quantizers import INQSpec, NoiseSpec, OBCSpec
from flatlab.specs.run import AverageSpec
from flatlab.store.runs import RunStore
from flatlab.train import loop
from flatlab.train.loop import Training, train

ERM = spec()
INQ = spec("INQ", quantizer="inq")


def weights_of(run, name="selected"):
    arrays, _ = files.load_arrays(run.checkpoint(name))
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


@pytest.fixture(scope="module")
def erm(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("erm"), ERM)


def observe(wanted, root):
    """Train a run; return the training, and the network's state after each step."""
    store, states = RunStore(root), []
    training = Training([store.run(wanted)], store, PLACE, forks=())
    network = training.trajectory.network
    training.run(lambda *_: states.append({name: value.clone() for name, value in network.state_dict().items()}))
    return training, states


# --- round-to-nearest and OBC --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rtn", "obc"])
def test_a_derived_run_is_its_parents_checkpoint_on_the_grid(erm, tmp_path, kind):
    wanted = spec(quantizer=kind)
    if kind == "obc":
        wanted = wanted.replace(quantizer=wanted.quantizer.replace(exact_columns=144))  # exact but for the last layer
    store = copied(erm, tmp_path / "store")
    train([wanted], store, PLACE)
    run, parent = store.run(wanted), store.run(ERM)
    assert run.done and not run.faults() and wanted.parent == ERM
    latent, network = weights_of(parent), checkpoint.network(run, "selected", PLACE)
    found = quantized_layers(network)
    assert list(found) == ["features.0", "features.4", "features.8"]
    changed = 0
    for name, layer in found.items():
        weight = latent[f"{name}.weight"]
        assert torch.equal(layer.latent, weight)  # the weights behind are the parent's: the noise can be looked at
        scale = searched_scale(weight, 7)
        assert torch.equal(layer.quantizer.scale, scale)
        rounded = (weight / scale).round().clamp(-64, 63) * scale
        changed += int((layer.weight != rounded).sum())
        codes = layer.weight / scale
        assert (codes - codes.round()).abs().max() < 1e-4 and codes.min() >= -64.01 and codes.max() <= 63.01
    assert (changed == 0) == (kind == "rtn")
    assert kind == "rtn" or layer.quantizer.kept.dtype == torch.int16
    others = {name: value for name, value in network.state_dict().items() if name in latent}
    assert len(others) == len(latent) - 3 and all(torch.equal(value, latent[name]) for name, value in others.items())
    (row,) = run.rows()
    assert run.provenance["parent"] == ERM.digest
    assert set(row["layers"]) == (set(found) if kind == "obc" else set())
    for name, facts in row["layers"].items():
        assert facts["error"] < facts["error_nearest"] and facts["order"] == (
            "fixed" if name == "features.8" else "exact"
        )
        assert 0 <= facts["rows_worse"] < facts["rows"] / 4
    again = content(run)
    train([wanted], store, PLACE)
    other = copied(erm, tmp_path / "again")
    train([wanted], other, PLACE)
    assert content(run) == content(other.run(wanted)) == again


def test_calibration_sees_training_images_of_the_sources_alone(erm, tmp_path, monkeypatch):
    seen = []
    honest = loading_data.batches.evaluation_batches

    def watched(data, name, rows, **options):
        seen.append((name, len(rows), options.get("limit")))
        return honest(data, name, rows, **options)

    monkeypatch.setattr(loading_data.batches, "evaluation_batches", watched)
    wanted = ERM.replace(quantizer=OBCSpec(images=60, exact_columns=0))
    domains = loading_data.domains(wanted, PLACE)
    parts = domains.calibration(20, torch.device("cpu"))
    assert [(name, limit) for name, _, limit in seen] == [("rot0", 20), ("rot15", 20), ("rot30", 20)]
    for name, part in zip(domains.sources, parts, strict=True):
        images = torch.cat([inputs for inputs, _ in part])
        rows = domains.in_[name][:20]
        assert torch.equal(images, domains.data.normalise(domains.data.domain(name).images[torch.tensor(rows)]))
    store = copied(erm, tmp_path / "store")
    train([wanted], store, PLACE)
    assert {limit for name, _, limit in seen if name == "rot45"} == {None}  # its evaluation, no calibration


def test_the_number_of_calibration_images_matters(erm, tmp_path):
    store, found = copied(erm, tmp_path / "store"), {}
    for images in (30, 300):
        wanted = ERM.replace(quantizer=OBCSpec(images=images, bits=3, exact_columns=0))
        train([wanted], store, PLACE)
        found[images] = weights_of(store.run(wanted))["features.8.parametrizations.weight.0.kept"]
    assert not torch.equal(found[30], found[300])


def test_a_derived_run_without_its_parent_is_refused(tmp_path):
    refuses(lambda: train([spec(quantizer="obc")], RunStore(tmp_path), PLACE), ERM.digest, "is not finished")


def test_settled_codes_have_no_latent_landscape(erm, tmp_path):
    store, wanted = copied(erm, tmp_path / "store"), spec(quantizer="rtn")
    train([wanted], store, PLACE)
    measurement = SphereSpec(radii=(0.0, 1.0), images=8)
    refuses(
        lambda: measure_inputs.landscape(store.run(wanted), measurement.replace(space="latent"), PLACE), "fixed codes"
    )
    assert measure_inputs.landscape(store.run(wanted), measurement, PLACE).num_params == 33658


def test_a_plan_trains_the_parent_first(tmp_path):
    store, wanted = RunStore(tmp_path), [spec(quantizer="obc"), spec(quantizer="rtn", average="swa")]
    todo = jobs_plan.missing(store, wanted, [], sizes=SIZES)
    assert [job.name for job in todo] == [
        "train erm+swa on rot45, seed 0",
        "make obc on rot45, seed 0",
        "make rtn-swa on rot45, seed 0",
    ]
    assert [job.needs for job in todo] == [(), (ERM.digest,), (spec(average="swa").digest,)]
    events = []
    work(todo, store, PLACE, emit=events.append)
    assert not [event for event in events if "error" in event]
    assert all(store.run(each).done for each in wanted)
    assert jobs_plan.missing(store, wanted, [], sizes=SIZES) == []
    assert store.run(wanted[1]).rows()[0]["step"] == LAST  # SWA's only checkpoint


# --- INQ -----------------------------------------------------------------------------------------------------------


def test_inq_freezes_by_stages_and_never_moves_what_is_frozen(tmp_path):
    _, states = observe(INQ, tmp_path)
    every = INQ.quantizer.every
    stages = [SWITCH + stage * every for stage in range(4)]
    assert stages[-1] == INQ.settled <= LAST
    for name in ("features.0", "features.4", "features.8"):
        inside = f"{name}.parametrizations.weight"
        assert f"{inside}.0.frozen" not in states[SWITCH - 1]
        for step in range(SWITCH, LAST + 1):
            frozen, count = states[step][f"{inside}.0.frozen"], states[step][f"{inside}.original"].numel()
            share = INQ.quantizer.fractions[sum(stage <= step for stage in stages) - 1]
            assert int(frozen.sum()) == round(share * count)
            if step > SWITCH:
                before = states[step - 1][f"{inside}.0.frozen"]
                assert (frozen & before).sum() == before.sum()
                for part in ("0.kept", "original"):  # the latent ones stand still too: their moments are cleared
                    assert torch.equal(
                        states[step][f"{inside}.{part}"][before], states[step - 1][f"{inside}.{part}"][before]
                    )
                free = ~frozen
                moved = states[step][f"{inside}.original"] != states[step - 1][f"{inside}.original"]
                assert not free.any() or moved[free].float().mean() > 0.9
    assert not torch.equal(states[LAST]["head.weight"], states[INQ.settled]["head.weight"])


def test_an_inq_run_counts_from_its_last_stage_and_ends_on_its_grid(tmp_path):
    store = trained(tmp_path, INQ)
    run = store.run(INQ)
    assert weights_step(run) >= INQ.settled
    for layer in quantized_layers(checkpoint.network(run, "selected", PLACE)).values():
        assert layer.quantizer.frozen.all()
        for channel, scale in zip(layer.weight, layer.quantizer.scale.flatten(), strict=True):
            codes = channel / scale
            assert (codes - codes.round()).abs().max() < 1e-4 and codes.abs().max() <= 63.001


def weights_step(run):
    return files.load_arrays(run.checkpoint("selected"))[1]["step"]


# --- noise ---------------------------------------------------------------------------------------------------------


def noisy(**fields):
    return ERM.replace(noise=NoiseSpec(**fields), switch=SWITCH)


def test_noise_has_the_norm_of_the_quantizers_in_each_channel(tmp_path):
    training, states = observe(noisy(bits=4), tmp_path)
    noise = training.trajectory.noise
    for name, amplitude in noise.amplitudes.items():
        weight = states[SWITCH - 1][f"{name}.weight"]
        scale = initial_scale(weight, 7)
        error = (weight / scale).clamp(-8, 7).round() * scale - weight
        expected = error.square().flatten(1).sum(1)
        assert amplitude.shape == (len(weight), 1, 1, 1)
        torch.testing.assert_close(amplitude.flatten() ** 2 / 3 * weight[0].numel(), expected)
        drawn = noise.drawn[name]
        assert (drawn.abs() <= amplitude).all() and (drawn.abs() / amplitude).max() > 0.95
        # Of 32 or 64 channels the mean square is within a few standard errors, sqrt(4/5 / n) of it.
        assert drawn.square().mean() == pytest.approx((amplitude**2 / 3).mean().item(), rel=4 / drawn.numel() ** 0.5)


def test_fresh_noise_enters_the_gradient_and_leaves_the_weights(tmp_path):
    wanted = noisy(amplitude=0.05)
    training, states = observe(wanted, tmp_path / "noisy")
    none, silent = observe(noisy(amplitude=0.0), tmp_path / "none")
    _, bare = observe(ERM, tmp_path / "bare")
    for name, value in bare[LAST].items():
        assert torch.equal(silent[LAST][name], value), name
    assert all(torch.equal(states[SWITCH - 1][name], value) for name, value in bare[SWITCH - 1].items())
    first = states[SWITCH]["features.0.weight"] - states[SWITCH - 1]["features.0.weight"]
    assert first.abs().max() <= 1.01 * wanted.lr * 5 and not torch.equal(
        states[SWITCH]["features.0.weight"], bare[SWITCH]["features.0.weight"]
    )
    assert none.trajectory.noise.home == {} == training.trajectory.noise.home


def test_kept_noise_is_a_random_walk_of_the_quantizers_norm(tmp_path):
    wanted = noisy(bits=4, persistent=True).replace(lr=1e-12)
    training, states = observe(wanted, tmp_path)
    for name in training.trajectory.noise.amplitudes:
        start, end = states[SWITCH - 1][f"{name}.weight"], states[LAST][f"{name}.weight"]
        scale = initial_scale(start, 7)
        norm = ((start / scale).clamp(-8, 7).round() * scale - start).norm()
        assert (end - start).norm() == pytest.approx(norm.item(), rel=0.25 if name == "features.0" else 0.1)


def test_the_noise_depends_on_its_seed(tmp_path):
    ends = []
    for seed in (0, 1):
        training, _ = observe(noisy(bits=7).replace(seed=seed), tmp_path / str(seed))
        ends.append(training.trajectory.noise.drawn["features.0"] / training.trajectory.noise.amplitudes["features.0"])
    assert not torch.allclose(*ends)


# --- resumed, forked, killed ---------------------------------------------------------------------------------------

WANTED = {
    "inq": INQ,
    "inq-swa": INQ.replace(average=AverageSpec(kind="swa", start=7, refresh_batches=2)),
    "noise": noisy(bits=7),
    "noise-kept": noisy(bits=7, persistent=True),
    "activations": compose(Method(quantizer="lsq"), TINY, held_out="rot45", seed=0, trial_seed=0),
}
WANTED["activations"] = WANTED["activations"].replace(
    quantizer=WANTED["activations"].quantizer.replace(activations="unsigned", log_scale=True)
)


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_a_forked_run_is_the_run_alone(tmp_path, wanted):
    forked(tmp_path, wanted)


def _train(root, wanted, tally, last):
    watch(tally, "step", last)
    loop.SAVE_SECONDS = 0.0
    train([wanted], RunStore(root), PLACE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inq", "noise-kept", "activations"])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, name):
    forkserver()
    wanted = WANTED[name]
    whole = trained(tmp_path / "whole", wanted).run(wanted)
    store, tally = RunStore(tmp_path / "killed"), tmp_path / "tally"
    for last in (9, 3):  # after the second stage of INQ, and again after that
        assert run_child(_train, store.root, wanted, tally, last) == -9
    train([wanted], store, PLACE)
    assert [session["how"] for session in store.run(wanted).provenance["sessions"]] == ["begun", "resumed", "resumed"]
    assert content(store.run(wanted)) == content(whole)


def test_methods_name_what_table_4_and_15_compare():
    assert {"ERM", "OBC", "INQ", "QT-DoG", "RTN", "freeze", "release-parity", "noise", "noise-kept"} <= set(METHODS)
    assert isinstance(INQ.quantizer, INQSpec) and INQ.quantizer.fractions == (0.5, 0.75, 0.875, 1.0)
