"""Every method through the loop on the embedded digits, and what each composition promises about its training."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from flatlab import files
from flatlab.data.batches import TrainingStream
from flatlab.errors import UserError
from flatlab.loading import checkpoint as loading_checkpoint
from flatlab.loading import data as loading_data
from flatlab.loading import network as loading_network
from flatlab.quant.attach import bake, quantized_layers
from flatlab.specs.methods import METHODS, Method, compose
from flatlab.specs.run import AverageSpec, Place, StepSpec
from flatlab.specs.settings import SMOKE
from flatlab.store.runs import RunStore
from flatlab.train import evaluate
from flatlab.train.evaluate import Evaluator
from flatlab.train.loop import Training, train

PLACE = Place(device="cpu")
QT_DOG = METHODS["QT-DoG"]
COMPOSITIONS = {name: parts for name, parts in METHODS.items() if not parts.members} | {
    "SAM+SWAD": Method(step="sam", average="swad"),
    "LSQ+SWA": Method(quantizer="lsq", average="swa"),
    "LSQ+SWAD": Method(quantizer="lsq", average="swad"),
    "SAM+LSQ+SMA": Method(step="sam", quantizer="lsq", average="sma"),
    "release-parity+SAM+SWA": Method(step="sam", quantizer="lsq", frozen=True, average="swa"),
    "freeze+SMA": Method(frozen=True, average="sma"),
    "INQ+SMA": Method(quantizer="inq", average="sma"),
    "SWAD+OBC": Method(quantizer="obc", average="swad"),
    "SAM+noise": Method(step="sam", noise="fresh"),
    "CORAL+MixStyle+SAM+LSQ+SWAD": Method(
        objective="coral", mixing="mixstyle", step="sam", quantizer="lsq", average="swad"
    ),
}
SETTING = SMOKE.replace(scale_lr=1e-4, eval_every=5)  # the switch falls on step 4 of 0..10, evaluations on 0, 5, 10


def spec_of(parts, setting=SETTING, **changes):
    return compose(parts, setting, held_out="rot45", seed=0, trial_seed=0).replace(**changes)


def weights_of(run, name="selected"):
    arrays, facts = files.load_arrays(run.checkpoint(name))
    return {key: torch.from_numpy(array) for key, array in arrays.items()}, facts["step"]


def judge_of(spec):
    return Evaluator(loading_data.domains(spec, PLACE), torch.device("cpu"), spec)


def observe(spec, store):
    """Train a run; return the training, and the parameters and buffers after each step."""
    training = Training([store.run(spec)], store, PLACE, forks=())
    states = []

    def keep(*_):
        states.append({name: value.clone() for name, value in training.trajectory.network.state_dict().items()})

    training.run(keep)
    return training, states


# --- every method, and compositions ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_method_trains_and_its_checkpoint_is_what_its_log_says(name, tmp_path):
    spec = spec_of(COMPOSITIONS[name])
    run = RunStore(tmp_path).run(spec)
    for each in [spec.parent, spec] if spec.derived and spec.parent else [spec]:
        train([each], RunStore(tmp_path), PLACE)
    assert run.done and not run.faults()
    rows = run.rows()
    if spec.derived:
        selected = weights_of(RunStore(tmp_path).run(spec.parent))[1]
        assert [row["step"] for row in rows] == [selected]
    else:
        assert [row["step"] for row in rows] == ([0, 5, 10] if spec.average.kind in ("last", "sma") else [10])
    assert [row["looks"] for row in rows] == list(range(1, len(rows) + 1))
    judge = judge_of(spec)
    for checkpoint in ("selected", "last"):
        _, step = weights_of(run, checkpoint)
        (logged,) = [row for row in rows if row["step"] == step]
        loaded = loading_checkpoint.network(run, checkpoint, PLACE)
        again = judge.row(loaded, step)
        assert again == {key: logged[key] for key in again}
        assert set(logged["source"]) == {"rot0", "rot15", "rot30"} and set(logged["target"]) == {"in", "out"}
        assert logged["validation"] == pytest.approx(sum(s["accuracy"] for s in logged["source"].values()) / 3)
        images = judge.target["out"][0][0]
        logits = loaded(images)
        assert bool(quantized_layers(loaded)) == (spec.quantizer is not None)
        bake(loaded)
        assert torch.equal(loaded(images), logits)
    best = max(row["validation"] for row in rows if row["step"] >= (spec.settled or 0))
    assert best == next(row["validation"] for row in rows if row["step"] == weights_of(run)[1])


def test_a_quantized_run_selects_only_after_the_switch(tmp_path, monkeypatch):
    honest = evaluate.Evaluator.row
    fading = lambda judge, network, step, *rest: {**honest(judge, network, step, *rest), "validation": -step}  # noqa: E731
    monkeypatch.setattr(evaluate.Evaluator, "row", fading)
    for name, step in {"ERM": 0, "QT-DoG": 5, "freeze": 5}.items():
        spec = spec_of(METHODS[name])
        train([spec], RunStore(tmp_path), PLACE)
        assert weights_of(RunStore(tmp_path).run(spec))[1] == step
        assert [row["step"] for row in RunStore(tmp_path).run(spec).rows()] == [0, 5, 10]


# --- averages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [Method(), QT_DOG, Method(step="sam", frozen=True)], ids=["erm", "lsq", "sam-frozen"])
def test_averages_are_arithmetic_means_of_the_trajectory(parts, tmp_path):
    store = RunStore(tmp_path)
    swa = AverageSpec(kind="swa", start=3, every=2, refresh_batches=2)
    wanted = {"last": AverageSpec(), "swa": swa, "sma": AverageSpec(kind="sma", start=7)}
    specs = {kind: spec_of(parts).replace(average=average) for kind, average in wanted.items()}
    _, states = observe(specs["last"], store)
    train([specs["swa"], specs["sma"]], store, PLACE)
    first = 3 if parts == Method() else 4  # averages begin at the switch
    steps = {
        "last": [10],
        "swa": list(range(first, 11, 2)),
        "sma": [5, 6, 7, 8, 9, 10],
    }  # EoA counts from 1, and keeps one more
    for kind, spec in specs.items():
        found, _ = weights_of(store.run(spec), "last")
        assert found.keys() == states[-1].keys()
        refreshed = ("running_mean", "running_var", "num_batches_tracked") if kind == "swa" else ()
        for name, value in found.items():
            if name.endswith("num_batches_tracked") and kind != "swa":
                assert value == 11
            elif not name.endswith(refreshed or "tracked"):
                mean = torch.stack([states[step][name] for step in steps[kind]]).mean(0)
                torch.testing.assert_close(value, mean.contiguous(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [Method(average="bma"), METHODS["CLIPood+QT-DoG"]], ids=["bma", "clipood-lsq"])
def test_bma_begins_with_the_initial_weights_or_at_the_switch(parts, tmp_path):
    spec = spec_of(parts)
    _, states = observe(spec, RunStore(tmp_path))
    iterates = dict(enumerate(states, 1))
    if spec.switch is None:
        start = loading_network.network(spec, loading_data.domains(spec, PLACE).data, PLACE).state_dict()
        iterates |= {0: start}
    else:
        iterates = {index: each for index, each in iterates.items() if index > spec.switch}
    density = stats.beta(0.5, 0.5).pdf((torch.tensor(list(iterates)).double() + 0.5) / 12)  # 11 updates
    found, _ = weights_of(RunStore(tmp_path).run(spec), "last")
    for name, value in found.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            stacked = torch.stack([each[name] for each in iterates.values()]).double()
            expected = torch.tensordot(torch.from_numpy(density / density.sum()), stacked, dims=1)
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)


def test_an_average_of_quantized_iterates_lies_on_the_grid_of_the_averaged_step_sizes(tmp_path):
    spec = spec_of(Method(quantizer="lsq", average="swa"))
    train([spec], RunStore(tmp_path), PLACE)
    run = RunStore(tmp_path).run(spec)
    stored, _ = weights_of(run)
    network = loading_checkpoint.network(run, "selected", PLACE)
    names = list(quantized_layers(network))
    bake(network)
    for name in names:
        ratio = network.get_submodule(name).weight / stored[f"{name}.parametrizations.weight.0.scale"]
        assert (ratio - ratio.round()).abs().max() < 1e-4
        assert ratio.min() >= -64 and ratio.max() <= 63 and ratio.round().unique().numel() > 20
        assert not torch.equal(network.get_submodule(name).weight, stored[f"{name}.parametrizations.weight.original"])


@pytest.mark.parametrize("average", ["swa", "swad"])
def test_refreshed_statistics_are_the_mean_over_unseen_batches(average, tmp_path):
    spec = spec_of(Method(average=average))
    train([spec], RunStore(tmp_path), PLACE)
    run = RunStore(tmp_path).run(spec)
    stored, _ = weights_of(run)
    domains = loading_data.domains(spec, PLACE)
    rows = {name: domains.in_[name] for name in domains.sources}
    stream = TrainingStream(domains.data, rows, batch_size=8, seed=spec.seed, device=torch.device("cpu"))
    conv = loading_checkpoint.network(run, "selected", PLACE).features[0]
    maps = [conv(stream.batch(step).inputs).transpose(0, 1).flatten(1) for step in (11, 12)]
    mean = torch.stack([each.mean(1) for each in maps]).mean(0)
    variance = torch.stack([each.var(1) for each in maps]).mean(0)
    torch.testing.assert_close(stored["features.1.running_mean"], mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stored["features.1.running_var"], variance, rtol=1e-4, atol=1e-6)
    assert stored["features.1.num_batches_tracked"] == 2


# --- what trains, and how ----------------------------------------------------------------------------------------


def test_runs_of_several_trajectories_are_refused(tmp_path):
    both = [compose(METHODS[name], SETTING, held_out="rot45", seed=0, trial_seed=0) for name in ("ERM", "SAM")]
    with pytest.raises(UserError, match="one trajectory, got 2 runs of several"):
        train(both, RunStore(tmp_path), PLACE)
    assert not list(tmp_path.iterdir())


def test_lsq_is_really_trained(tmp_path):
    """Each latent weight and step size is in one group of the optimizer, and moves; moments outlive the switch."""
    spec = spec_of(QT_DOG)
    store = RunStore(tmp_path)
    training = Training([store.run(spec)], store, PLACE, forks=())
    trajectory, states, moments = training.trajectory, [], {}
    switch = trajectory.switch

    def watched():
        before = {name.split(".parametrizations")[0]: p for name, p in trajectory.network.named_parameters()}
        state = {id(p): {k: v.clone() for k, v in trajectory.optimizer.state[p].items()} for p in before.values()}
        switch()
        moments["checked"] = all(
            torch.equal(value, trajectory.optimizer.state[p][key])
            for p in before.values()
            for key, value in state[id(p)].items()
        )
        moments["any"] = all(state[id(p)]["exp_avg"].any() for p in before.values())
        kept = {id(p) for p in trajectory.network.parameters()}
        moments["kept"] = all(id(p) in kept for p in before.values())

    trajectory.switch = watched
    training.run(lambda *_: states.append({n: p.detach().clone() for n, p in trajectory.network.named_parameters()}))
    assert moments == {"checked": True, "any": True, "kept": True}
    names = dict(trajectory.network.named_parameters())
    held = [id(p) for group in trajectory.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, names.values()))
    for group in trajectory.optimizer.param_groups:
        own = {"lr": 1e-4, "eps": 1e-12} if group["role"] == "scales" else {"lr": 3e-3, "eps": 1e-8}
        assert {key: group[key] for key in own} == own
        assert group["role"] != "scales" or len(group["params"]) == 3
    latent = [name for name in names if name.endswith(("original", "scale"))]
    assert len(latent) == 6
    for name in latent:
        assert name in states[4] and name not in states[3]
        assert (states[10][name] != states[4][name]).float().mean() > 0.9  # a weight beyond the grid has no gradient


@pytest.mark.parametrize("parts", [METHODS["release-parity"], METHODS["freeze"]], ids=["release-parity", "freeze"])
def test_what_is_frozen_stays_to_the_bit_and_the_rest_moves(parts, tmp_path):
    spec = spec_of(parts, weight_decay=0.1)
    training, states = observe(spec, RunStore(tmp_path))
    assert spec.switch == 4
    roles = loading_network.roles(training.trajectory.network)
    assert len(roles["scales"]) == (3 if spec.quantizer else 0) and len(roles["weights"]) == 3
    for role, group in roles.items():
        for name in group:
            moved = not torch.equal(states[4][name], states[10][name])
            assert moved == (role in ("norms", "head")), name
    for name in roles["weights"]:
        before = name.replace("parametrizations.weight.original", "weight")
        assert torch.equal(states[3][before], states[10][name])
        assert not torch.equal(states[2][before], states[3][before])


def test_seeds_and_step_rules_bite(tmp_path):
    ends = {}
    plain = spec_of(Method())
    variants = {"plain": plain, "again": plain, "seed": plain.replace(seed=1), "split": plain.replace(trial_seed=1)}
    variants |= {"sam": spec_of(Method(step="sam")), "none": plain.replace(step=StepSpec(kind="sam", rho=0.0))}
    for name, spec in variants.items():
        train([spec], RunStore(tmp_path / name), PLACE)
        ends[name], _ = weights_of(RunStore(tmp_path / name).run(spec), "last")
    same = {name for name, end in ends.items() if all(torch.equal(v, ends["plain"][k]) for k, v in end.items())}
    assert same == {"plain", "again", "none"}  # SAM without a radius is ERM, statistics included


# --- frozen BatchNorm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts", [Method(), Method(step="sam", average="swad"), Method(quantizer="lsq", average="swa")]
)
def test_frozen_statistics_stay_to_the_bit_while_their_affine_part_trains(parts, tmp_path):
    spec = spec_of(parts, freeze_batchnorm=True)
    training = Training([RunStore(tmp_path).run(spec)], RunStore(tmp_path), PLACE, forks=())
    network = training.trajectory.network
    with torch.no_grad():
        for name, buffer in network.named_buffers():  # not those of a fresh network
            if buffer.is_floating_point():
                buffer.uniform_(*(0.5, 1.5) if name.endswith("var") else (-0.1, 0.1))
    start = {name: value.clone() for name, value in network.state_dict().items()}
    modes = []
    training.run(lambda *_: modes.append([network.features[1].training, network.features[0].training]))
    assert modes == [[False, True]] * 11  # also after the evaluations at 0, 5 and 10
    stored, _ = weights_of(training.runs[0], "last")
    for name, value in start.items():
        if "running" in name or "tracked" in name:
            assert torch.equal(stored[name], value), name
    for layer in ("features.1", "features.5", "features.9"):
        assert not torch.equal(stored[f"{layer}.weight"], start[f"{layer}.weight"])
        assert not torch.equal(stored[f"{layer}.bias"], start[f"{layer}.bias"])


def test_unfrozen_statistics_follow_the_batches(tmp_path):
    _, states = observe(spec_of(Method()), RunStore(tmp_path))
    assert [state["features.1.num_batches_tracked"] for state in states] == list(range(1, 12))
    assert not torch.equal(states[0]["features.1.running_mean"], states[1]["features.1.running_mean"])


def test_the_loss_that_an_average_is_shown_is_the_mean_over_source_domains(tmp_path):
    spec = spec_of(Method(), eval_every=1, steps=3)
    training = Training([RunStore(tmp_path).run(spec)], RunStore(tmp_path), PLACE, forks=())
    seen = []
    (member,) = training.trajectory.observers
    update = member.average.update
    member.average.update = lambda weights, step, validate: (seen.append(validate()), update(weights, step, validate))
    training.run(None)
    judge = judge_of(spec)
    network = loading_checkpoint.network(training.runs[0], "last", PLACE)
    by_hand = []
    for batches in judge.validation.values():
        losses = [F.cross_entropy(network(x), y, reduction="sum").item() for x, y in batches]
        by_hand.append(sum(losses) / sum(len(y) for _, y in batches))
    assert len(by_hand) == 3
    assert seen[-1] == pytest.approx(sum(by_hand) / 3, rel=1e-5)
    assert seen == [row["validation_loss"] for row in training.runs[0].rows()]
