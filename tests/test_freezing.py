"""Disorder of step sizes' gradients against sequences by hand; GAQAT and FQAT through the loop."""

import math
from functools import partial

import pandas as pd
import pytest
import torch
from stores import PLACE, TINY, content, forked, forkserver, run_child, trained, watch
from torch import nn

from analyses import _disorder, _qat, gaqat
from flatlab import files
from flatlab.errors import UserError
from flatlab.quant.attach import quantized_layers, scales
from flatlab.specs.methods import METHODS, Method, compose
from flatlab.specs.quantizers import BothSpec
from flatlab.specs.run import FreezeSpec
from flatlab.store.runs import RunStore
from flatlab.train import loop
from flatlab.train.freezing import Disorder, layer_of
from flatlab.train.loop import Training, train

SHORT = TINY.replace(switch=None, freeze_every=4)  # 14 steps: three whole windows, and evaluations inside of them


def spec_of(name, **changes):
    return compose(METHODS[name], SHORT.replace(**changes), held_out="rot45", seed=0, trial_seed=0)


def disorder(every=4, sizes=(1,), **options):
    step_sizes = {f"layer{index}": nn.Parameter(torch.ones(size)) for index, size in enumerate(sizes)}
    return Disorder(step_sizes, FreezeSpec(every=every, **options))


def show(found, task, smooth=None):
    """Show gradients of all step sizes, one number a step or one for each."""
    for step, each in enumerate(task):
        other = each if smooth is None else smooth[step]
        found.see(
            *(
                {p: torch.as_tensor(value).float().expand(p.shape).clone() for p in found.step_sizes.values()}
                for value in (each, other)
            )
        )


# --- the measure -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "expected"), [([1, -1] * 4, 1), ([2, 5] * 4, 0), ([1, 0, 1, 0, -1, 0, 0, -2], 1 / 3)])
def test_disorder_is_the_share_of_changed_signs_and_zeros_are_passed_over(task, expected):
    found = disorder(every=100)
    show(found, task)
    assert found.disorder.item() == pytest.approx(expected)
    row = found.row()["layer0"]
    assert row["task"] == row["smooth"] == pytest.approx(expected) and row["between"] == 0.0


@pytest.mark.parametrize("when", ["window", "step"])
def test_random_signs_have_a_disorder_of_one_half(when):
    found = disorder(every=400, sizes=(50,), when=when)
    for _ in range(399):
        show(found, [torch.randn(50)])
    assert found.disorder.item() == pytest.approx(0.5, abs=0.02)


def test_the_mean_that_forgets_is_the_exponential_mean_without_its_bias():
    found, signs = disorder(every=5, when="step"), [1, -1, -1, 1, -1, 1, 1, 1, -1]
    show(found, signs)
    mean, share = 0.0, 1 - 1 / 5
    for before, now in zip(signs, signs[1:], strict=False):
        mean = share * mean + (before != now) / 5
    assert found.disorder.item() == pytest.approx(mean / (1 - share ** (len(signs) - 1)), rel=1e-5)


def test_disorder_between_two_gradients_compares_them_in_the_same_step():
    found = disorder(every=100, trigger="between")
    show(found, [1, 1, -1, 1, 0], [1, -1, -1, -1, 1])
    assert found.disorder.item() == pytest.approx(2 / 4)


def test_without_a_pair_of_signs_nothing_is_frozen():
    for options in ({}, {"top": 1.0}, {"direction": "high", "threshold": 0.0}):
        found = disorder(every=2, **options)
        show(found, [0, 0, 0, 0])
        assert not found.frozen.any()
        assert found.row()["layer0"] == {"task": None, "smooth": None, "between": None, "frozen": 0.0}


# --- decisions ---------------------------------------------------------------------------------------------------

STEADY_THEN_NOT = [1, 1, 1, 1, -1, 1, -1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [True, False, True]),
        ({"forever": True}, [True, True, True]),
        ({"direction": "high"}, [False, True, False]),
        ({"threshold": 0.0}, [False, False, False]),
        ({"threshold": 1.1}, [True, True, True]),
    ],
)
def test_a_decision_is_made_after_each_window(options, expected):
    found, frozen = disorder(every=4, **options), []
    for step, sign in enumerate(STEADY_THEN_NOT):
        show(found, [sign])
        frozen.append(bool(found.frozen))
        assert step % 4 == 3 or frozen[-1] == (frozen[-2] if step else False)  # between decisions nothing changes
    assert frozen[3::4] == expected


def test_units_are_tensors_channels_or_layers():
    task = [torch.tensor([1.0, sign]) for sign in (1, -1, 1, -1, 1)]
    expected = {"scale": [True, True, True], "channel": [True, False, True], "layer": [True, True, True]}
    for unit, frozen in expected.items():
        each = {"a": nn.Parameter(torch.ones(2)), "a.activations": nn.Parameter(torch.ones(()))}
        found = Disorder(each, FreezeSpec(every=5, threshold=0.6 if unit != "channel" else 0.5, unit=unit))
        for gradient in task:
            grads = {each["a"]: gradient, each["a.activations"]: torch.tensor(1.0)}
            found.see(grads, grads)
        assert found.frozen.tolist() == frozen
        assert found.counts.shape[-1] == {"scale": 2, "channel": 3, "layer": 1}[unit]
    assert layer_of("a.activations") == layer_of("a") == "a"


def test_the_top_share_of_units_is_frozen():
    task = [torch.tensor([1.0, a, b, c]) for a, b, c in [(1, 1, 1), (1, 1, -1), (1, -1, 1), (1, 1, -1), (-1, -1, 1)]]
    for direction, expected in {"high": [False, False, True, True], "low": [True, True, False, False]}.items():
        found = disorder(every=5, sizes=(4,), unit="channel", top=0.5, direction=direction)
        show(found, task)
        assert found.frozen.tolist() == expected


def test_what_is_withheld():
    found = disorder(every=2)
    show(found, [1, 1])
    assert found.frozen and found.withheld["task"] and not found.withheld["smooth"]
    for gradient, expected in {"task": [True, False], "smooth": [False, True], "both": [True, True]}.items():
        found.spec = FreezeSpec(every=2, gradient=gradient)
        assert [bool(found.withheld[kind]) for kind in ("task", "smooth")] == expected
    turns = disorder(every=2, alternate=True)
    seen = []
    for _ in range(6):
        seen.append(bool(turns.withheld["task"]))
        assert turns.withheld["smooth"] == ~turns.withheld["task"]
        show(turns, [1])
    assert seen == [False, False, True, True, False, False]


# --- through the loop --------------------------------------------------------------------------------------------


def test_both_are_quantized_from_the_first_step_but_the_first_layers_weight():
    spec = spec_of("GAQAT")
    assert spec.quantizer == BothSpec(scale_lr=spec.lr) and (spec.switch, spec.label) == (0, "gaqat-lsq-both")
    assert (spec.step.freezing, spec.step.alpha) == (FreezeSpec(every=4), 1e-3)
    assert spec_of("GAQAT", freeze_every=None, steps=300).step.freezing.every == 18
    assert spec_of("GAQAT", freeze_every=None, steps=5000).step.freezing.every == 300
    fqat = FreezeSpec(every=4, unit="layer", when="step", direction="high", threshold=0.45)
    assert spec_of("FQAT").step.freezing == fqat
    assert spec_of("FQAT", qat_bits=3).quantizer == BothSpec(bits=3, activation_bits=3, scale_lr=spec.lr)


def test_the_network_of_lsq_both(tmp_path):
    training = Training([RunStore(tmp_path).run(spec_of("LSQ"))], RunStore(tmp_path), PLACE, forks=())
    training.run(None)
    network = training.trajectory.network
    assert list(quantized_layers(network)) == ["features.4", "features.8"]
    inputs = {
        name: module.activations.levels for name, module in network.named_modules() if "activations" in dir(module)
    }
    assert inputs == {"features.0": (-8, 7), "features.4": (0, 15), "features.8": (0, 15)}
    assert len(scales(network)) == 5


def test_a_threshold_of_zero_and_no_top_unit_are_lsq_with_sagm_to_the_byte(tmp_path):
    weights = {}
    for name, changes in {"LSQ+SAGM": {}, "GAQAT": {"freeze_threshold": 0.0}, "FQAT": {"freeze_top": 0.0}}.items():
        spec = spec_of(name, **changes)
        run = trained(tmp_path / name, spec).run(spec)
        weights[name] = {each: files.load_arrays(run.checkpoint(each))[0] for each in ("selected", "last")}
    for name, other in weights.items():
        for each, found in other.items():
            assert found.keys() == weights["LSQ+SAGM"][each].keys(), name
            assert all(array.tobytes() == weights["LSQ+SAGM"][each][key].tobytes() for key, array in found.items()), (
                name
            )


def test_fqat_with_gaqats_unit_window_and_direction_gives_its_trace(tmp_path):
    alike = {"freeze_unit": "scale", "freeze_when": "window", "freeze_direction": "low", "freeze_threshold": 0.3}
    traces = {}
    for name, changes in {"GAQAT": {}, "FQAT": alike, "own": {}}.items():
        spec = spec_of("FQAT" if name == "own" else name, **changes)
        run = trained(tmp_path / name, spec).run(spec)
        traces[name] = run.rows(), {k: a.tobytes() for k, a in files.load_arrays(run.checkpoint("last"))[0].items()}
    assert traces["FQAT"] == traces["GAQAT"] != traces["own"]


def test_the_frozen_share_weighs_steps_alike(monkeypatch):
    rows = [("A", "rot45", 0, layer, step, "frozen", value) for layer in "ab" for step, value in ((4, 0.0), (14, 1.0))]
    rows += [("A", "rot45", 0, "c", step, "frozen", 0.0) for step in (4, 14)]
    monkeypatch.setattr(_disorder, "along", lambda *_: pd.DataFrame(rows, columns=_disorder.COLUMNS))
    share = _qat._frozen(None, [("A", spec_of("GAQAT"))])
    assert share["value"].item() == pytest.approx(100 * 2 / 3 * 10 / 14)


def test_one_seed_has_no_standard_error_on_the_page():
    measures = ["source", "target", _qat.FROZEN]
    frame = pd.DataFrame({"block": "4/4 bits", "method": "ERM", "measure": measures, "over": "seeds", "value": 67.036})
    for error, shown in ((float("nan"), "67.04"), (0.5, "67.04 ± 0.50")):
        assert _qat.sheet(frame.assign(stderr=error)).iloc[0, 2:].tolist() == [shown] * 3


def test_the_caption_says_when_quantization_begins():
    assert "quantized from the first step on" in gaqat.COMPARISON.caption(SHORT)
    assert "quantized from step 3 on" in gaqat.COMPARISON.caption(SHORT.replace(switch=3))


def test_gradients_that_alternate_freeze_nothing(tmp_path):
    spec = spec_of("GAQAT", freeze_alternate=True)
    rows = trained(tmp_path, spec).run(spec).rows()
    assert {each["frozen"] for row in rows for each in row["disorder"].values()} == {0.0}


def test_frozen_step_sizes_follow_the_perturbed_loss_alone(tmp_path):
    """Above 1, all are frozen from the second window on; with both gradients withheld they get none."""
    spec = spec_of("GAQAT", freeze_threshold=1.1, freeze_gradient="both")
    training = Training([RunStore(tmp_path).run(spec)], RunStore(tmp_path), PLACE, forks=())
    trajectory, moments = training.trajectory, []

    def keep(*_):
        moments.append(torch.cat([each.grad.flatten().clone() for each in trajectory.disorder.step_sizes.values()]))

    training.run(keep)
    assert all(each.any() for each in moments[:4]) and not any(each.any() for each in moments[4:])
    rows = training.runs[0].rows()
    assert [row["step"] for row in rows] == [0, 4, 8, 12, 13]
    names = ["features.0.activations", "features.4", "features.4.activations", "features.8", "features.8.activations"]
    for row in rows:
        assert list(row["disorder"]) == names
        shares = {each["frozen"] for each in row["disorder"].values()}
        assert shares == ({0.0} if row["step"] == 0 else {0.25} if row["step"] == 4 else {1.0})
    assert all(math.isfinite(each["task"]) for each in rows[-1]["disorder"].values())


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("gradient", "kept"), [("task", 5.0), ("smooth", 3.0), ("both", 0.0)])
@pytest.mark.parametrize("what", ["steps", "weights", "layer"])
def test_what_is_frozen_gets_the_other_gradient_half_or_whole(what, gradient, kept, rescale, tmp_path):
    """The first pass gives all parameters the gradient 3, the second 5, and one layer is frozen."""
    options = {"freeze_what": what, "freeze_gradient": gradient, "freeze_rescale": rescale}
    spec = spec_of("FQAT", **options)
    trajectory = Training([RunStore(tmp_path).run(spec)], RunStore(tmp_path), PLACE, forks=()).trajectory
    trajectory.switch()
    rule, found, passes = trajectory.step_rule(), trajectory.disorder, iter((3.0, 5.0))
    found.frozen = torch.tensor([layer_of(name) == "features.4" for name in found.step_sizes])[found.tensor]

    def closure():
        value = next(passes)
        for parameter in trajectory.network.parameters():
            parameter.grad = torch.full_like(parameter, value)
        return torch.tensor(0.0)

    rule.step(closure)
    steps = {found.step_sizes["features.4"], found.step_sizes["features.4.activations"]}
    weights = {quantized_layers(trajectory.network)["features.4"].latent}
    frozen = {"steps": steps, "weights": weights, "layer": steps | weights}[what]
    for name, parameter in trajectory.network.named_parameters():
        expected = 4.0 if parameter not in frozen else kept if rescale else kept / 2
        assert parameter.grad.unique().tolist() == [expected], name


def test_some_step_size_is_frozen_and_released_again_within_a_short_run(tmp_path):
    """K is 6 % of the steps, as in QUICK and in the published runs."""
    spec = spec_of("GAQAT", steps=100, eval_every=50, freeze_every=None)
    assert spec.step.freezing == FreezeSpec(every=6)
    training = Training([RunStore(tmp_path).run(spec)], RunStore(tmp_path), PLACE, forks=())
    trajectory, history = training.trajectory, []
    training.run(lambda *_: history.append(trajectory.disorder.frozen.clone()))
    frozen = torch.stack(history).int()  # (steps, step sizes)
    changes = frozen.diff(dim=0)
    assert not frozen[:5].any() and {int(step) % 6 for step in (changes != 0).any(dim=1).nonzero()} == {4}
    released = (changes == 1).any(dim=0) & (changes == -1).any(dim=0)
    assert released.any() and 0 < frozen.float().mean() < 1
    shares = [each["frozen"] for each in training.runs[0].rows()[-1]["disorder"].values()]
    assert any(0 < share < 1 for share in shares)


def _train(root, spec, tally, every, *death):
    watch(tally, *death)
    loop.SAVE_SECONDS = every
    train([spec], RunStore(root), PLACE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GAQAT", "FQAT"])
def test_killed_inside_a_window_it_goes_on_to_the_same_bytes(name, tmp_path):
    forkserver()
    spec, tally = spec_of(name), tmp_path / "tally"
    whole, start = trained(tmp_path / "whole", spec), partial(run_child, _train, tmp_path / "killed", spec, tally, 0.0)
    for call in (3, 4):  # dies after steps 2 and 5, and goes on at 2 and 5: windows begin at 0, 4, 8
        assert start("step", call) == -9
    assert start() == 0
    killed = RunStore(tmp_path / "killed").run(spec)
    assert [session["from_step"] for session in killed.provenance["sessions"]] == [0, 2, 5]
    assert content(killed) == content(whole.run(spec))


@pytest.mark.parametrize("name", ["GAQAT", "FQAT", "LSQ+SAQ"])
def test_a_forked_run_is_the_run_alone(name, tmp_path):
    spec = spec_of(name, switch=6)
    assert spec.parent.step.kind == ("sam" if name == "LSQ+SAQ" else "sagm")
    forked(tmp_path, spec)


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_freezing_needs_learned_step_sizes_and_whole_layers():
    for quantizer, match in {
        "none": "needs a quantizer in training",
        "inq": "step sizes, got the quantizer inq",
    }.items():
        with pytest.raises(UserError, match=match):
            compose(Method(step="gaqat", quantizer=quantizer), SHORT, held_out="rot45", seed=0, trial_seed=0)
    with pytest.raises(UserError, match="Freezing weights needs the unit layer, got scale: write --freeze-unit layer"):
        spec_of("GAQAT", freeze_what="weights")
    for what in ("weights", "layer"):
        assert spec_of("FQAT", freeze_what=what).step.freezing.what == what
