"""Noise and rounding of runs: measured, resumed, tabulated, drawn and told; what the commands refuse."""

from functools import partial

import commandline
import numpy as np
import pandas as pd
import pytest
import stores
import torch
from stores import ERM, PLACE, QT, content, copied, refuses
from torch import nn

from flatlab import files, quantization_noise
from flatlab.landscape import landscape
from flatlab.loading import checkpoint
from flatlab.measure import inputs
from flatlab.measure import quantization_noise as measured_noise
from flatlab.measure.runner import measure
from flatlab.metrics.flatness import perturbations, sampler
from flatlab.models.networks import Network
from flatlab.report import quantization_noise as report_quantization_noise
from flatlab.report import rounding
from flatlab.specs.measurements import QuantizationNoiseSpec, RoundingSpec

NOISE = QuantizationNoiseSpec(bins=20)
RADIUS = RoundingSpec(bits=(4, 2), layer_bits=(3,), num_samples=9, images=8)  # two units for each perturbation


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("rounding") / "runs"
    store = [stores.trained(root, each) for each in (ERM, QT)][0]
    for spec, measurement in ((QT, NOISE), (QT, RADIUS), (ERM, RADIUS)):
        measure(store.run(spec), measurement, PLACE)
    return store


def facts(store, spec, measurement):
    return files.load_arrays(store.run(spec).measurement(measurement).result)


# --- noise ---------------------------------------------------------------------------------------------------------


def test_noise_is_that_of_the_checkpoint(store):
    arrays, rows = facts(store, QT, NOISE)
    layers = inputs.trained_layers(store.run(QT), "selected", PLACE)
    assert [row["layer"] for row in rows[::3]] == list(layers)
    assert [row["mode"] for row in rows[:3]] == list(report_quantization_noise.MODES)
    for index, layer in enumerate(layers.values()):
        assert torch.equal(layer.quantized, (layer.quantized / layer.step).round() * layer.step)
        raw, own = (
            quantization_noise(layer.weight, layer.quantized, step=layer.step, normalise=each, bins=20)
            for each in (False, True)
        )
        for row, expected in zip(rows[3 * index :], (own, raw), strict=False):
            assert {name: row[name] for name in expected.statistics()} == pytest.approx(
                expected.statistics(), nan_ok=True
            )
            assert np.array_equal(arrays[f"{row['mode']}-{index:03d}"], expected.counts)
        assert arrays[f"weight-{index:03d}"].sum() == layer.weight.numel()


def test_a_run_that_is_not_quantized_is_refused(store, capsys):
    refuses(lambda: measure(store.run(ERM), NOISE, PLACE), "not quantized", "--radius", ERM.digest)
    assert commandline.call("noise", ERM.digest, "--store", store.root) == 2
    assert "is not quantized" in capsys.readouterr().err


def test_a_layer_without_noise_is_named(store, monkeypatch, tmp_path):
    layer = next(iter(inputs.trained_layers(store.run(QT), "selected", PLACE).values()))
    zeros, broken = (inputs.Layer(layer.weight * x, layer.quantized * x, layer.step, 7) for x in (0, float("nan")))
    for case, words in ((zeros, "Layer features.0.weight: The weight has only zeros"), (broken, "not finite")):
        monkeypatch.setattr(measured_noise, "trained_layers", lambda *_, case=case: {"features.0.weight": case})
        run = copied(store, tmp_path / words).run(QT)
        refuses(partial(measure, run, QuantizationNoiseSpec(seed=1), PLACE), "features.0", words)


# --- rounding ------------------------------------------------------------------------------------------------------


def test_the_trained_noise_leads_from_the_latent_to_the_baked_loss(store):
    arrays, told = facts(store, QT, RADIUS)
    plain, layers = inputs.latent_network(store.run(QT), "selected", PLACE)
    baked = inputs.landscape(store.run(QT), RADIUS, PLACE)
    weights = {name: layer.weight for name, layer in layers.items()}
    assert all(torch.equal(plain.get_parameter(name), w) for name, w in weights.items())
    around = landscape.Landscape(plain, inputs.images(store.run(QT), RADIUS, PLACE), nn.CrossEntropyLoss())
    index = [(row["part"], row["perturbation"]) for row in told["rows"]].index(("all", "trained"))
    assert around.base_loss + arrays[f"own-{index:04d}"] == pytest.approx(baked.base_loss, rel=1e-5)
    assert told["num_params"] == sum(w.numel() for w in weights.values())
    expected = torch.cat([(layer.quantized - layer.weight).flatten() for layer in layers.values()]).norm().item()
    assert told["rows"][index]["norm"] == pytest.approx(expected, rel=1e-5)


def test_layers_alone_share_the_noise_of_all(store):
    _, told = facts(store, ERM, RADIUS.replace())
    alone = [row for row in told["rows"] if row["part"] != "all" and row["null"] == "layer"]
    weights = {row["part"]: row["norm"] for row in alone}
    assert len(weights) == 3 and {row["perturbation"] for row in alone} == {"3"}
    run = checkpoint.network(store.run(ERM), "selected", PLACE)
    for name, norm in weights.items():
        weight = run.get_parameter(name)
        layer = inputs.rounded(weight, 3, granularity="channel", name=name)
        assert norm == pytest.approx((layer.quantized - weight).norm().item(), rel=1e-5)
        assert len(layer.quantized[0].unique()) <= 8


def test_fewer_bits_are_larger_radii(store):
    frame = rounding.rises(store, [("ERM", ERM, RADIUS)])
    whole = frame[(frame["part"] == "all") & (frame["panel"] == "source") & (frame["null"] == "channel")]
    gamma = whole.groupby("perturbation")["gamma"].first()
    assert gamma["4"] < gamma["2"] and set(frame["quantity"]) == {"rise", "reverse", "random", "z", "rank"}
    random = frame[frame["quantity"] == "random"]
    assert (random["low"] <= random["value"]).all() and frame[frame["quantity"] == "rank"]["value"].between(0, 1).all()


def test_a_network_that_no_direction_moves_has_a_row_without_a_standing(store):
    frame = rounding.rises(store, [("ERM", ERM, RADIUS)])
    frame.loc[frame["quantity"] == "z", "value"] = np.nan
    table = rounding.wide(frame)
    assert set(rounding.SHOWN) <= set(table.columns) and table["channel z"].isna().all()
    assert table["channel"].notna().all()


def test_a_measurement_that_was_stopped_goes_on_to_the_same_bytes(store, tmp_path, monkeypatch):
    whole, again = content(store.run(QT).measurement(RADIUS)), copied(store, tmp_path / "runs")
    run = again.run(QT)
    for name in ("done", "result.safetensors"):
        (run.measurement(RADIUS).path / name).unlink()
    units = sorted(run.measurement(RADIUS).path.glob("unit-*"))
    for path in units[len(units) // 4 :]:
        path.unlink()
    calls, draw = [], perturbations.draw_direction

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(sampler, "draw_direction", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(run, RADIUS, PLACE)
    assert not run.measurement(RADIUS).done
    measure(run, RADIUS, PLACE)
    assert content(run.measurement(RADIUS)) == whole
    rows = len(files.load_arrays(run.measurement(RADIUS).result)[1]["rows"])
    assert 20 < len(calls) < 20 + rows * RADIUS.num_samples


def test_a_network_with_nothing_to_quantize_is_refused():
    refuses(lambda: inputs.quantizable(Network(nn.Flatten(), nn.Linear(4, 2))), "Nothing to quantize")


def test_weights_that_are_not_finite_are_refused():
    refuses(
        lambda: inputs.rounded(torch.full((2, 3), torch.nan), 4, granularity="channel", name="features.0"), "features.0"
    )


def test_a_pattern_that_no_layer_matches_is_refused(store):
    refuses(lambda: measure(store.run(ERM), RADIUS.replace(params="head*"), PLACE), "'head*'", "features.0")
    refuses(lambda: report_quantization_noise.chosen_layers(pd.DataFrame({"layer": ["a", "b"]}), "c*"), "'c*'", "a, b")


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_a_picture_and_a_table(store, tmp_path, capsys):
    words = ("--store", store.root, "--out", tmp_path)
    assert commandline.call("noise", QT.digest, *words, "--json") == 0
    frame = pd.read_csv(tmp_path / "noise.csv")
    assert len(frame) == 9 and (frame["kl_null"] > 0).all() and set(frame["bins"]) == {100}
    rows = commandline.documented("noise", capsys.readouterr().out)
    assert "features.0.weight" in {row["layer"] for row in rows}
    assert commandline.call("noise", ERM.digest, "--radius", "--samples", 2, "--images", 4, *words, "--json") == 0
    assert commandline.documented("noise --radius", capsys.readouterr().out)
    assert set(pd.read_csv(tmp_path / "radius.csv", dtype=str)["perturbation"]) == set("2345678")
    for name in ("noise.png", "noise.pdf", "radius.png", "radius.pdf"):
        assert (tmp_path / name).stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--samples", "5"), "--samples does nothing without --radius"),
        (("--images", "5"), "without --radius"),
        (("--layers", "nothing*"), "No layer matches 'nothing*'"),
        (("--checkpoint", "lst"), "did you mean last"),
        (("--radius", "--samples", "1"), "--samples must be an integer >= 2, got 1."),
    ],
)
def test_the_command_refuses_in_a_sentence(store, tmp_path, capsys, words, told):
    assert commandline.call("noise", QT.digest, *words, "--store", store.root, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert told in " ".join(error.split()) and "Traceback" not in error


def test_what_is_foreseen_grows_with_the_work():
    sizes = {"a": 100, "b": 50}
    assert NOISE.passes(sizes) == 1
    assert RADIUS.passes(sizes) < RADIUS.replace(num_samples=18).passes(sizes)
