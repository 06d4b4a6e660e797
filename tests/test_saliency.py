"""GradCAM of runs: which images are chosen, what is written down, and what the figures' table says of it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from commandline import call
from stores import ERM, PLACE, QT, content, copied, refuses, trained

from analyses import _gradcam_figure, fig6, fig7, fig9
from flatlab import files, reproduce
from flatlab.loading import data as loading_data
from flatlab.loading.checkpoint import network as network_of
from flatlab.measure.gradcam import choose_images
from flatlab.measure.runner import measure
from flatlab.metrics.gradcam import ablation, gradcam
from flatlab.quant.attach import bake
from flatlab.results.gradcam import agreement, energy
from flatlab.specs.measurements import GradCAMSpec
from flatlab.specs.settings import PAPER, QUICK, SMOKE

PROBE = GradCAMSpec(images=10, radii=(0.01, 0.03), num_samples=2, num_shares=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = trained(tmp_path_factory.mktemp("saliency"), ERM)
    trained(store.root, QT)
    for spec in (ERM, QT):
        measure(store.run(spec), PROBE, PLACE)
    return store


def written(store, spec):
    assert content(store.run(spec).measurement(PROBE))
    return files.load_arrays(store.run(spec).measurement(PROBE).result)


def test_images_are_chosen_by_a_seed_and_classes_take_turns():
    split, labels = np.arange(100, 140), np.repeat(np.arange(4), 10)
    chosen = choose_images(split, labels, 8, seed=0)
    assert sorted(labels[chosen[:4] - 100]) == sorted(labels[chosen[4:] - 100]) == [0, 1, 2, 3]
    backwards = choose_images(split[::-1], labels[::-1], 8, seed=0)
    np.testing.assert_array_equal(backwards, chosen)  # of the rows, not of their order
    assert choose_images(split, labels, 8, seed=1).tolist() != chosen.tolist()
    assert choose_images(split, labels, 4, seed=0).tolist() == chosen[:4].tolist()
    assert sorted(choose_images(split, labels, 999, seed=0)) == split.tolist()


def test_what_is_written_is_what_the_baked_network_says(store):
    arrays, facts = written(store, QT)
    domains = loading_data.domains(QT, PLACE)
    rows = torch.from_numpy(arrays["rows"])
    assert set(rows.tolist()) <= set(domains.in_["rot45"].tolist()) and facts["held_out"] == "rot45"
    domain = domains.data.domain("rot45")
    inputs, labels = domains.data.normalise(domain.images[rows]), domain.labels[rows].tolist()
    assert arrays["labels"].tolist() == labels and len(set(labels)) == 10
    model = network_of(store.run(QT), "selected", PLACE)
    bake(model)
    found = gradcam(model, inputs, labels)
    assert found.layer == facts["layer"] == "features.10"
    np.testing.assert_allclose(arrays["maps"], found.maps, rtol=1e-4, atol=1e-6)
    deleted, inserted = ablation(model, inputs, found, num_shares=4)
    np.testing.assert_allclose(arrays["deletion"], deleted, atol=1e-5)
    np.testing.assert_allclose(arrays["insertion"], inserted, atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(arrays["probabilities"], model(inputs).double().softmax(1), atol=1e-6)
    np.testing.assert_array_equal(arrays["images"], domain.images[rows].numpy())
    np.testing.assert_array_equal(arrays["mask"], arrays["images"][:, 0] > 63.75)


def test_both_networks_are_shown_the_same_images_and_nearer_weights_give_nearer_maps(store):
    (ours, _), (theirs, _) = written(store, ERM), written(store, QT)
    np.testing.assert_array_equal(ours["rows"], theirs["rows"])
    early = PROBE.replace(layer="features.2")  # of few steps, whose later maps are empty
    measure(store.run(ERM), early, PLACE)
    arrays, facts = files.load_arrays(store.run(ERM).measurement(early).result)
    assert facts["layer"] == "features.2"
    moved = arrays["moved"]
    assert moved.shape == (2, 2, 10)  # directions, radii, images
    near, far = np.nanmean(moved, axis=(0, 2))
    assert far < near < 1 and not np.array_equal(moved[0], moved[1])


def test_a_measurement_is_made_again_to_the_byte_from_its_units(store, tmp_path):
    again = copied(store, tmp_path / "again")
    measurement = again.run(ERM).measurement(PROBE)
    before = content(measurement)
    for path in (measurement.path / "done", measurement.result, measurement.unit("moved-01")):
        path.unlink()
    measure(again.run(ERM), PROBE, PLACE)
    assert content(measurement) == before


def test_the_latent_network_is_refused(store):
    latent = PROBE.replace(space="latent")
    refuses(lambda: measure(store.run(QT), latent, PLACE), "baked", "space")


# --- figures -----------------------------------------------------------------------------------------------------

CHOSEN = SMOKE.replace(held_out=("rot0", "rot45"), seeds=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("figures")
    words = ("--setting", "smoke", "--store", root / "runs", "--out", root / "figures", "--held-out", "rot45")
    assert call("reproduce", "fig9", *words) == 0
    return root


def test_the_papers_targets_or_those_that_stand_for_them():
    assert fig6.CAMS.held_out(QUICK) == ("rot0", "rot15", "rot30", "rot45")
    assert fig6.CAMS.held_out(PAPER) == ("art_painting", "cartoon", "sketch", "photo")  # the paper's order
    assert fig9.CAMS.held_out(QUICK) == ("rot15",)
    terra = PAPER.replace(held_out=("location_100", "location_38", "location_43", "location_46"))
    assert fig9.CAMS.held_out(terra) == ("location_38",)


def test_figure_7_goes_on_where_figure_6_ends_and_both_share_their_measurement():
    ends = [(each.first, each.first + each.shown) for each in (fig6.CAMS, fig7.CAMS)]
    assert ends == [(0, 3), (3, 6)]
    assert fig6.FIGURE.plan(CHOSEN) == fig7.FIGURE.plan(CHOSEN)
    assert all(words in fig7.FIGURE.caption(QUICK) for words in ("images 4 to 6", "in split, seed 0, by classes"))


def arrays_of(made, run):
    spec = fig9.CAMS.measurement(SMOKE.replace(held_out=("rot45",)))
    return files.load_arrays(made / "runs" / run / "measurements" / spec.digest / "result.safetensors")[0]


@pytest.mark.slow
def test_the_table_says_what_the_arrays_say(made):
    frame = pd.read_csv(made / "figures" / "fig9.csv")
    shown = frame[frame.quantity == "picture"]
    assert shown.image.tolist() == [0, 1, 2, 3, 4, 5] * 2 and set(shown.seed) == {"0"}
    measured = {run: arrays_of(made, run) for run in shown.run.unique()}
    drawn = np.load(made / "figures" / "fig9.npz")
    for run, mine in shown.groupby("run"):
        arrays = measured[run]
        for index in range(6):
            assert (drawn[f"{run}-map-{index}"] == arrays["maps"][index]).all()
            assert (drawn[f"{run}-image-{index}"] == arrays["images"][index]).all()
        assert mine.label.tolist() == arrays["labels"][:6].tolist()
        assert mine.predicted.tolist() == arrays["probabilities"][:6].argmax(1).tolist()
    ours, theirs = (measured[shown[shown.method == name].run.iloc[0]] for name in ("ERM", "QT-DoG"))
    one = frame[(frame.over == "images") & (frame.seed == "0") & frame.share.isna()].set_index(["quantity", "method"])
    inside = energy(ours["maps"].astype(float), ours["mask"])
    assert one.loc[("energy", "ERM"), "value"] == pytest.approx(np.nanmean(inside))
    assert one.loc[("deletion", "QT-DoG"), "value"] == pytest.approx(np.trapezoid(theirs["deletion"], dx=0.1).mean())
    alike = agreement(theirs["maps"].astype(float), ours["maps"].astype(float))
    assert one.loc[("agreement", "ERM with QT-DoG"), "value"] == pytest.approx(np.nanmean(alike))
    assert one.loc[("vanished", "ERM"), "value"] == pytest.approx(np.isnan(ours["moved"][:, :, inside >= 0]).mean())
    assert one.loc[("empty", "ERM"), "value"] == pytest.approx(np.isnan(inside).mean())
    record = json.loads((made / "figures" / "fig9.json").read_text())
    assert "correlate by" in record["remarks"][0] and len(record["measurements"]) == 2  # with the pilot


def test_a_figure_without_its_measurements_is_refused(store):
    refuses(lambda: fig6.FIGURE.table(store, CHOSEN), "not measured yet")
    assert reproduce.analysis("fig6").summary_title == _gradcam_figure.SUMMARY
