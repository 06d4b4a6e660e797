"""The results of all metrics: one public class each, with a table, a picture and the numbers of its file."""

from typing import get_type_hints

import matplotlib.pyplot as plt
import numpy as np
import pytest
import test_saving as saved_results
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from stores import ERM, PLACE, QT, trained
from torch import nn

from flatlab import api, files
from flatlab.landscape.landscape import Landscape
from flatlab.measure.runner import FUNCTIONS, measure
from flatlab.report.panels import TITLES
from flatlab.results.quantization_noise import LayerNoise, kl_to_uniform
from flatlab.results.spectrum import NUMBERS as NUMBERS_OF
from flatlab.specs.generalisation import GeneralisationSpec
from flatlab.specs.measurements import (
    ConnectionSpec,
    GradCAMSpec,
    LatencySpec,
    QuantizationNoiseSpec,
    RoundingSpec,
    ScaleAuditSpec,
    SizeSpec,
    SpectrumSpec,
    SphereSpec,
    SurfaceSpec,
    TraceCheckSpec,
)
from flatlab.specs.rises import ReachSpec
from flatlab.store.runs import RESULTS

ESTIMATE = ["value", "stderr", "low", "high", "over", "reached"]
PERTURBATION = ["radius", *ESTIMATE, "name", "rise", "reverse", "z", "rank"]
MEASURED = [
    SizeSpec(),
    SpectrumSpec(images=4, k=2, tol=0.1, trace_budget=32, starts=1, steps=2),
    ConnectionSpec(to=ERM.digest, images=4, grid=3),
    RoundingSpec(bits=(4, 2), layer_bits=(3,), images=4, num_samples=2, params="features.0*"),
    QuantizationNoiseSpec(bins=20),
    GradCAMSpec(images=5, num_shares=2, radii=(0.01,), num_samples=2),
    GeneralisationSpec(images=4, ascent=1, num_samples=2, products=2, corruptions=("contrast",)),
]
MADE = {  # spec -> the public function's result on a small landscape, where a network's would take minutes
    SphereSpec(radii=(0.5, 1.0), num_samples=3): lambda at: api.sphere_flatness(at, (0.5, 1.0), num_samples=3),
    ReachSpec(rises=(0.02, 0.1)): lambda at: api.radii_at_rises(at, (0.02, 0.1)),
    ScaleAuditSpec(most=2.0): lambda at: api.scale_audit(at, most=2.0, num_samples=2),
    TraceCheckSpec(rel_error=0.2): lambda at: api.trace_check(at, rel_error=0.2, density=(6, 2)),
    LatencySpec(): lambda at: saved_results.MADE[api.Latency](),
    SurfaceSpec(grid=3): lambda at: api.plane(at, api.random_directions(at), grid=3),
}
# metric -> the public function, and the part of the result that it returns
PARTS = {
    "sphere": (api.sphere_flatness, lambda whole: whole),
    "reach": (api.radii_at_rises, lambda whole: whole),
    "scale_audit": (api.scale_audit, lambda whole: whole),
    "trace_check": (api.trace_check, lambda whole: whole),
    "surface": (api.plane, lambda whole: whole),
    "spectrum": (api.spectral_density, lambda whole: whole.density),
    "connectivity": (api.connect, lambda whole: whole.panels["target"]),
    "rounding": (api.typical_rise, lambda whole: whole.parts["all", "none"]),
    "gradcam": (api.gradcam, lambda whole: whole.class_maps),
}
AUDIT = [f"{end}, by {way}" for way in ("layer", "channel") for end in ("after", "ratio", "low", "high")]
NOISE = "layer index mode bits count bins kl kl_null kl_corrected kl_low kl_high kl_pvalue kl_miller_madow explained "
NOISE += "clipped zero_channels variance_ratio ks ks_pvalue chi_square_pvalue departure departure_pvalue "
NOISE += " ".join(f"{name} {name}_null_low {name}_null_high" for name in ("slope", "bowley"))
NOISE += " departure_null_low departure_null_high"
MAPS = "row label predicted probability empty deletion insertion energy area moved vanished"
FRAMES = {  # metric -> columns and rows of the table
    "sphere": (["radius", *ESTIMATE], 2),
    "reach": (["radius", "rise"], 2),
    "scale_audit": (["measure", "before", *AUDIT, "movement", "invariant"], 6),
    "trace_check": (["radius", *ESTIMATE], 7),
    "surface": (["x", "y", "stratum", "metric", "value", "measured"], 9 * 2),
    "spectrum": (["number", "index", "value", "low", "high", "converged", "over"], 2 + 4),
    "connectivity": (["place", "distance", "loss", "height", "low", "high", "panel"], 2 * 3),
    "rounding": ([*PERTURBATION, "part", "normalisation"], 2 * 3 + 2 * 2),
    "quantization_noise": (NOISE.split(), 3 * 3),
    "gradcam": (MAPS.split(), 5),
    "size": (["bytes", "float_bytes", "compression"], 1),
    "latency": (
        ["network", "engine", "batch", "threads", "median_ms", "low_ms", "high_ms", "bytes", "peak_mb", "accuracy"],
        2,
    ),
    "generalisation": (["name", "severity", "value"], 9 + 5),
}
NUMBERS = {  # metric -> a column of the table, and the same from the arrays and facts of the file
    "sphere": ("value", lambda arrays, facts: [arrays["visits-00"].mean(), arrays["visits-01"].mean()]),
    "reach": ("radius", lambda arrays, facts: arrays["radii"]),
    "scale_audit": ("after, by channel", lambda arrays, facts: [row["after, by channel"] for row in facts["rows"]]),
    "trace_check": ("radius", lambda arrays, facts: arrays["radii"]),
    "surface": ("value", lambda arrays, facts: arrays["values"].ravel()),
    "spectrum": ("value", lambda arrays, facts: [*arrays["eigenvalues"], *(facts[name][0] for name in NUMBERS_OF)]),
    "connectivity": ("loss", lambda arrays, facts: [x for p in TITLES for x in arrays[f"{p}.losses"].mean(axis=1)]),
    "rounding": ("rise", lambda arrays, facts: [arrays[f"own-{index:04d}"].mean() for index in range(10)]),
    "quantization_noise": (
        "kl",
        lambda arrays, facts: [kl_to_uniform(arrays[f"{row['mode']}-{row['index']:03d}"]) for row in facts],
    ),
    "gradcam": ("row", lambda arrays, facts: arrays["rows"]),
    "size": ("bytes", lambda arrays, facts: [arrays["bytes"]]),
    "latency": ("median_ms", lambda arrays, facts: 1000 * np.median(arrays["seconds"], axis=-1).ravel()),
    "generalisation": ("value", lambda arrays, facts: [*arrays["values"], *arrays["accuracies"].ravel()]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes") / "runs"
    trained(root, ERM)
    return trained(root, QT).run(QT)


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    return Landscape(model, [(torch.randn(40, 4), torch.randint(0, 3, (40,)))], F.cross_entropy)


@pytest.fixture(scope="module")
def results(run):
    """Each metric's result as the run gives it back, and the arrays and facts of its file."""
    for spec in MEASURED:
        measure(run, spec, PLACE)
    for spec, made in MADE.items():
        entry = run.measurement(spec)
        entry.create()
        files.save_arrays(entry.result, *made(small()).to_arrays())
        entry.finish()
    specs = [*MEASURED, *MADE]
    return {each.metric: (run.result(each), *files.load_arrays(run.measurement(each).result)) for each in specs}


@pytest.mark.parametrize("metric", FUNCTIONS)
def test_the_class_of_a_result_is_public_and_holds_what_the_function_returns(results, metric):
    found, _, _ = results[metric]
    assert type(found).__name__ == RESULTS[metric].rpartition(".")[2] and type(found).__name__ in api.__all__
    if metric in PARTS:
        function, part = PARTS[metric]
        assert type(part(found)) is get_type_hints(function)["return"]


@pytest.mark.parametrize("metric", FUNCTIONS)
def test_a_result_has_a_table_of_the_numbers_of_its_file(results, metric):
    found, arrays, facts = results[metric]
    frame, (columns, rows) = found.to_frame(), FRAMES[metric]
    assert sorted(frame.columns) == sorted(columns) and len(frame) == rows
    name, expected = NUMBERS[metric]
    assert frame[name].tolist() == np.asarray(expected(arrays, facts)).tolist()
    if {"value", "low", "high"} <= set(columns):
        sampled = frame[frame["low"].notna()]
        assert len(sampled) and ((sampled["low"] <= sampled["value"]) & (sampled["value"] <= sampled["high"])).all()


@pytest.mark.parametrize("metric", FUNCTIONS)
def test_a_result_draws_itself(results, metric):
    found, _, _ = results[metric]
    drawn = found.plot()
    for axes in [drawn] if isinstance(drawn, Axes) else drawn:
        assert isinstance(axes, Axes) and axes.has_data()
    plt.close("all")


def test_what_is_kept_of_a_layer_has_the_numbers_of_the_whole():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=500)
    whole = api.quantization_noise(weight, weight.round(1), step=0.1, bins=20)
    kept = LayerNoise.of(whole, weight, {"layer": "0.weight", "index": 0, "mode": "normalised", "bits": 7})
    assert (kept.value, *kept.interval()) == (whole.value, *whole.interval())
    assert kept.to_frame()[list(whole.to_frame())].equals(whole.to_frame())
    drawn = [each.plot().patches[0].get_data() for each in (kept, whole)]
    assert all(np.array_equal(one, two) for one, two in zip(*drawn, strict=True) if one is not None)
    plt.close("all")
