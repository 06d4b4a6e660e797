"""A result owns its file: what a run's measurement gives back is what the public function returns."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stores import ERM, PLACE, PROBE, trained
from torch import nn

from flatlab import files
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.measure.inputs import landscape
from flatlab.measure.runner import measure
from flatlab.metrics.flatness.norm_matched import typical_rise
from flatlab.metrics.flatness.sphere import sphere_flatness
from flatlab.metrics.quantization_noise import quantization_noise
from flatlab.metrics.scale_audit import scale_audit
from flatlab.metrics.trace_check import trace_check
from flatlab.results.gradcam import MeasuredMaps
from flatlab.results.quantization_noise import LayerNoise, NetworkNoise
from flatlab.results.rounding import RoundingRises
from flatlab.results.sphere import PairedDifference, SphereFlatness
from flatlab.results.trace_check import TraceCheck

LATER = ("seed", "normalisation", "notes", "forward_passes")  # facts that the first files of a sphere lack


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("results") / "runs", ERM).run(ERM)


def check_same(found, expected):
    """Assert that two results are of one class and hold the same bytes."""
    assert type(found) is type(expected)
    (arrays, facts), (others, theirs) = found.to_arrays(), expected.to_arrays()
    assert facts == theirs and arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert array.dtype == others[name].dtype and array.tobytes() == others[name].tobytes()


def test_a_measured_sphere_is_what_the_function_returns(run):
    measure(run, PROBE, PLACE)
    found = run.result(PROBE)
    expected = sphere_flatness(landscape(run, PROBE, PLACE), PROBE.radii, num_samples=PROBE.num_samples)
    check_same(found, replace(expected, chance=float(np.log(10))))
    assert found.value.tobytes() == expected.value.tobytes() and found.remarks == expected.remarks
    path = run.measurement(PROBE).result
    arrays, facts = files.load_arrays(path)
    older = {name: fact for name, fact in facts.items() if name not in LATER}
    files.save_arrays(path, arrays, older)
    run.measurement(PROBE).finish()
    again = run.result(PROBE)
    assert np.isnan(again.cost.forward_passes)
    check_same(replace(again, cost=found.cost, notes=found.notes), found)


def flat(visits, *, block_size=0, blocks=1, chance=None, seed=0):
    count = len(visits)
    return SphereFlatness.from_arrays(
        {f"visits-{index:02d}": np.array(rises)[:, None] for index, rises in enumerate(visits)}
        | {"radii": np.arange(1.0, count + 1), "base_loss": np.array([0.5])},
        {
            "plans": [{"radius": index + 1.0, "block_size": block_size} for index in range(count)],
            "blocks": [blocks] * count,
            "stopped": ["samples"] * count,
            "strata": ["a"],
            "chance": chance,
            "images": 1,
            "seed": seed,
            "normalisation": "none",
            "num_params": 4,
            "norm": 2.0,
            "reach": 1.0,
        },
    )


def pair(a, b):
    return PairedDifference(cost=a.cost + b.cost, radii=a.radii, a=a, b=b)


def test_common_visits_are_paired_and_other_plans_are_independent():
    a, b = flat([[1.0, 2.0, 4.0]]), flat([[0.5, 1.4]])
    assert pair(a, b).value == pytest.approx([0.55])  # of the two visits that both have made
    other = flat([[0.5, 1.4]], block_size=8, blocks=2)
    (found,), (one,), (two,) = pair(a, other).estimates, a.estimates, other.estimates
    assert found.value == pytest.approx(one.value - two.value)
    assert found.stderr == pytest.approx(np.hypot(one.stderr, two.stderr))
    assert found.freedom == min(one.freedom, two.freedom)


def test_no_verdict_is_read_where_the_loss_is_that_of_guessing():
    rises = [[0.1, 0.11, 0.12], [0.2, 0.21, 0.22], [5.0, 5.1, 5.2]]
    a, b = flat(rises, chance=2.0), flat((np.array(rises) - 0.05).tolist(), chance=2.0)
    assert a.guessing.tolist() == [False, False, True] and pair(a, b).read.tolist() == [True, True, False]
    assert pair(a, b).verdict("A", "B") == "B is flatter at all radii measured"
    assert "chance level (2.00 nats) at radius 3" in a.remarks[-1]
    assert not flat(rises).guessing.any() and flat(rises).remarks == []


def small(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 3)).eval()
    return Landscape(model, [(torch.randn(40, 4), torch.randint(0, 3, (40,)))], F.cross_entropy)


def back(result, **spec):
    """What is read from the file of a result."""
    arrays, facts = result.to_arrays()
    return type(result).from_arrays(arrays, {**spec, **json.loads(json.dumps(facts))})


def test_an_audit_is_read_back():
    audit = scale_audit(small(nn.ReLU()), num_samples=3)
    found = back(audit, most=4.0, seed=0)
    assert found.to_frame().equals(audit.to_frame())
    assert (found.pairs, found.refusals, found.cost.hvps) == (audit.pairs, audit.refusals, audit.cost.hvps)


def test_a_trace_check_is_read_back():
    check = trace_check(small(nn.Tanh()), rel_error=0.2, density=(12, 3))
    found = back(check, rel_error=0.2, seed=0)
    assert found.verdict() == check.verdict() and found.differences() == check.differences()
    assert (
        found.value.tobytes() == check.value.tobytes() and found.density.negative_share == check.density.negative_share
    )
    assert replace(found.cost, seconds=0.0) == replace(check.cost, seconds=0.0)
    with pytest.raises(UserError, match=r"draws of this trace check must be in its file.* repeat the command"):
        TraceCheck.from_arrays({"radii": np.ones(1)}, {"verdict": ""})


def test_rises_by_rounding_are_read_back():
    around = small(nn.Tanh())
    noise = {"4": torch.full((around.num_params,), 0.01), "2": torch.full((around.num_params,), 0.1)}
    parts = {
        ("all", null): typical_rise(around, noise, normalisation=null, num_samples=3) for null in ("none", "filter")
    }
    parts["0.weight", "layer"] = typical_rise(around, {"3": noise["2"]}, normalisation="layer", num_samples=3)
    rises = RoundingRises(parts, around.num_samples)
    found = back(rises, params=None, seed=0)
    assert list(found.parts) == list(parts)
    for key, part in found.parts.items():
        expected = parts[key]
        assert part.to_frame().equals(expected.to_frame()) and part.normalisation == expected.normalisation
        assert replace(part.cost, seconds=0.0) == replace(expected.cost, seconds=0.0)
    check_same(found, rises)


def test_the_noise_of_layers_is_read_back():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=500), rng.normal(size=300)]
    layers = [
        LayerNoise.of(
            quantization_noise(weight, weight.round(1), step=0.1, normalise=mode == "normalised", bins=bins),
            weight,
            {"layer": f"{index}.weight", "index": index, "mode": mode, "bits": 7},
        )
        for index, weight in enumerate(weights)
        for mode, bins in (("normalised", 20), ("raw", 20))
    ]
    noise = NetworkNoise(tuple(layers))
    arrays, rows = noise.to_arrays()
    found = NetworkNoise.from_arrays(arrays, json.loads(json.dumps(rows)))
    check_same(found, noise)
    (second,) = NetworkNoise.from_arrays(arrays, rows[2:3]).layers
    assert second.numbers["layer"] == "1.weight" and second.weight.counts.sum() == 300
    assert second.noise.edges.tobytes() == layers[2].noise.edges.tobytes() and len(second.lower) == len(second.upper)


@pytest.mark.parametrize("inked", [True, False])
def test_maps_are_read_back(inked):
    rng = np.random.default_rng(0)
    found = MeasuredMaps(
        maps=rng.random((3, 4, 4), dtype=np.float32),
        deletion=rng.random((3, 5)),
        insertion=rng.random((3, 5)),
        images=np.full((3, 1, 4, 4), 200, np.uint8),
        rows=np.arange(3),
        labels=np.array([1, 0, 1]),
        probabilities=np.full((3, 2), 0.5),
        moved=rng.random((2, 1, 3)) if inked else None,
        mask=np.ones((3, 4, 4), np.uint8) if inked else None,
        layer="features.6",
        classes=("a", "b"),
        radii=(0.5,) if inked else (),
        held_out="rot45",
        seed=3,
    )
    check_same(back(found, layer=None, radii=None, seed=0, images=3), found)


def test_results_alone_know_the_names_of_stored_arrays():
    root = Path(__file__).parents[1]
    found = set()
    for path in [each for folder in ("flatlab", "analyses") for each in sorted((root / folder).rglob("*.py"))]:
        for call in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]:
            name, text = getattr(call.func, "attr", ""), ast.unparse(call)
            reads = name == "load_arrays" and ".result" in text and path.stem != "runs"  # where `Run.result` is
            writes = name == "save_arrays" and "measurement.result" in text and "to_arrays()" not in text
            found |= {path.stem} if reads or writes else set()
    assert not found
