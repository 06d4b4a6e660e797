"""Results as files: what is loaded is what was saved, of every public class; other files are refused."""

import json
import math
import zipfile
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stores import refuses
from torch import nn

import flatlab
from flatlab import api, files, saving


def landscape(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    torch.manual_seed(9)
    return flatlab.Landscape(model, [(torch.randn(20, 1, 4, 4), torch.randint(0, 3, (20,)))], F.cross_entropy)


def model_and_images():
    made = landscape()
    return made.model, torch.randn(3, 1, 4, 4), [0, 1, 2]


WEIGHT = np.random.default_rng(0).normal(size=200)
NOISE = api.quantization_noise(WEIGHT, WEIGHT.round(1), step=0.1, bins=20)
MADE = {
    api.SphereFlatness: lambda: api.sphere_flatness(landscape(), (0.5, 1.0), num_samples=3),
    api.PairedDifference: lambda: api.compare_flatness(landscape(), landscape(1), radii=(0.5, 1.0), num_samples=3),
    api.Reach: lambda: api.radii_at_rises(landscape(), (0.02, 0.1)),
    api.WorstRise: lambda: api.worst_rise(landscape(), (0.5,), steps=2),
    api.AverageSharpness: lambda: api.average_sharpness(landscape(), (0.5,), num_samples=3),
    api.WorstSharpness: lambda: api.worst_sharpness(landscape(), (0.5,), steps=2),
    api.Spectrum: lambda: api.hessian_spectrum(landscape(), k=2, vectors=True),
    api.SpectralDensity: lambda: api.spectral_density(landscape(), steps=5, num_vectors=2),
    api.Trace: lambda: api.hessian_trace(landscape(), rel_error=0.3),
    api.TraceCheck: lambda: api.trace_check(landscape(), rel_error=0.3, density=(6, 2)),
    api.ScaleAudit: lambda: api.scale_audit(landscape(), most=2.0, num_samples=2),
    api.Profile: lambda: api.line(landscape(), grid=3),
    api.Surface: lambda: api.plane(landscape(), api.random_directions(landscape()), grid=3),
    api.Connection: lambda: api.connect(landscape(), landscape(1), grid=3),
    api.Connections: lambda: api.Connections({"source": api.connect(landscape(), landscape(1), grid=3)}),
    api.RoundingRise: lambda: api.typical_rise(landscape(), {"all": landscape().point * 0.01}, num_samples=2),
    api.RoundingRises: lambda: api.RoundingRises({("all", "none"): MADE[api.RoundingRise]()}, 20),
    api.QuantizationNoise: lambda: NOISE,
    api.Symmetry: lambda: NOISE.symmetry,
    api.LayerNoise: lambda: api.LayerNoise.of(NOISE, WEIGHT, {"layer": "a", "index": 0, "mode": "tensor", "bits": 7}),
    api.NetworkNoise: lambda: api.NetworkNoise((MADE[api.LayerNoise](),)),
    api.ClassMaps: lambda: api.gradcam(*model_and_images()),
    api.MeasuredMaps: lambda: api.MeasuredMaps(
        **dict.fromkeys(("maps", "deletion", "insertion", "images", "probabilities"), np.zeros((1, 2, 2), np.float32)),
        **dict.fromkeys(("rows", "labels"), np.zeros(1, np.int64)),
        **{"layer": "0", "classes": ("a", "b"), "radii": (0.1,), "held_out": "rot0", "seed": 0},
    ),
    api.Generalisation: lambda: api.Generalisation({"sigma": float("nan")}, ("contrast",), np.ones((1, 5))),
    api.FileSize: lambda: api.FileSize(3, 12),
    api.Latency: lambda: api.Latency(
        seconds=np.ones((1, 1, 2, 6)),
        networks=("net",),
        engines=("int8",),
        members=(1,),
        threads=(1,),
        batches=(1, 32),
        bytes=(10,),
        peaks=np.array([float("nan")]),
        accuracies=np.array([0.5]),
        processor="one",
        saturates=False,
    ),
    api.MeasuredSpectrum: lambda: api.MeasuredSpectrum.by_pyhessian(np.array([2.0, 1.0]), 3.0),
    api.Stability: lambda: api.accuracy_stability([0.1, 0.5, 0.4], [0.2, 0.3, 0.1]),
}
NO_RESULTS = {  # public dataclasses that are asked for, trained or evaluated, not measured
    *("Evaluation", "Directions", "Setting", "Method", "Exported", "Replay", "Place"),
}


def same(one, other):
    """Whether two values are equal in type and content, NaN to NaN."""
    if type(one) is not type(other):
        return False
    if is_dataclass(one):
        return all(same(getattr(one, each.name), getattr(other, each.name)) for each in fields(one))
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other or (math.isnan(one) and math.isnan(other))


def test_every_public_result_can_be_saved():
    public = {name: getattr(api, name) for name in api.__all__}
    data = {name for name, each in public.items() if isinstance(each, type) and is_dataclass(each)}
    assert {each.__name__ for each in MADE} == data - NO_RESULTS
    assert all(issubclass(each, saving.Saved) for each in MADE)


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.__name__)
def test_what_is_loaded_is_what_was_saved(kind, tmp_path):
    found = MADE[kind]()
    assert type(found) is kind
    found.save(tmp_path / "result")
    assert [each.name for each in tmp_path.iterdir()] == ["result"], "written aside and renamed"
    assert same(flatlab.load(str(tmp_path / "result")), found)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "reach.npz"
    api.Reach(radii=np.array([1.0, 2.0]), rises=(0.1, 0.2), strata=("all",), images=3).save(path)
    return path


def test_numpy_alone_reads_the_arrays_under_the_names_of_the_fields(saved):
    with np.load(saved, allow_pickle=False) as content:
        assert content["radii"].tolist() == [1.0, 2.0]
        head = json.loads(content["flatlab"].item())
    assert (head["version"], head["result"]["class"]) == (flatlab.__version__, "results.sphere.Reach")


def test_a_file_of_another_kind_is_refused(tmp_path):
    refuses(lambda: flatlab.load(tmp_path / "absent.npz"), "absent.npz", "does not exist")
    refuses(lambda: flatlab.load(tmp_path), tmp_path.name, "does not exist")
    (tmp_path / "text").write_text("{}")
    np.savez(tmp_path / "other.npz", radii=np.ones(2))
    np.savez(tmp_path / "head.npz", flatlab=np.array('{"format": 1}'))
    for name in ("text", "other.npz", "head.npz"):
        refuses(lambda name=name: flatlab.load(tmp_path / name), name, "another kind")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_damaged_file_is_refused(saved, share):
    whole = saved.read_bytes()
    at = int(share * len(whole))
    saved.write_bytes(whole[:at])
    refuses(lambda: flatlab.load(saved), "reach.npz", "damaged")


def test_an_array_that_has_changed_is_refused(saved):
    with zipfile.ZipFile(saved) as archive:
        place = archive.getinfo("radii.npy").header_offset + 60
    content = bytearray(saved.read_bytes())
    content[place : place + 20] = bytes(20)
    saved.write_bytes(content)
    refuses(lambda: flatlab.load(saved), "reach.npz", "damaged")


def changed(path, edit, seal=True):
    with np.load(path) as content:
        arrays = dict(content)
    head = json.loads(arrays.pop("flatlab").item())
    edit(head, arrays)
    if seal:
        head["sha256"] = files.content_hash(head["result"], arrays)
    np.savez(path, flatlab=np.array(json.dumps(head)), **arrays)


def test_a_file_of_a_later_version_is_refused(saved):
    changed(saved, lambda head, _: head.update(format=2, version="9.0"))
    refuses(lambda: flatlab.load(saved), "reach.npz", "format 2", "install flatlab 9.0")


@pytest.mark.parametrize("kind", ["results.sphere.Spheres", "results.spheres.Reach", "os.path.join", "cli.app.Reach"])
def test_a_class_that_is_not_known_is_refused(saved, kind):
    changed(saved, lambda head, _: head["result"].update({"class": kind}))
    refuses(lambda: flatlab.load(saved), "reach.npz", f"a {kind.rpartition('.')[2]}", "does not know")


def test_fields_that_are_not_known_or_missing_are_named(saved):
    changed(saved, lambda head, _: head["result"]["fields"].update(more=1))
    refuses(lambda: flatlab.load(saved), "reach.npz", "a Reach with other fields (more)")
    changed(saved, lambda head, _: [head["result"]["fields"].pop(name) for name in ("more", "images")])
    refuses(lambda: flatlab.load(saved), "a Reach with other fields (images)")


@pytest.mark.parametrize("seal", [True, False])
@pytest.mark.parametrize(
    "edit",
    [
        lambda head, _: head.update(format="x"),
        lambda head, _: head.update(format=None),
        lambda head, _: head.update(result={}),
        lambda head, _: head.update(result=5),
        lambda head, _: head.update(result={"array": "radii", "b": 1}),
        lambda head, _: head["result"]["fields"].update(radii={"array": "radii", "b": 1}),
        lambda head, _: head["result"].update(fields=None),
        lambda head, arrays: arrays.pop("radii"),
    ],
)
def test_a_head_that_makes_no_result_is_refused(saved, edit, seal):
    changed(saved, edit, seal)
    refuses(lambda: flatlab.load(saved), "reach.npz is damaged")


def test_an_array_that_was_exchanged_is_noticed(saved):
    changed(saved, lambda head, arrays: arrays.update(radii=2 * arrays["radii"]), seal=False)
    refuses(lambda: flatlab.load(saved), "reach.npz is damaged")


def test_a_result_is_saved_to_a_file_in_a_folder(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "x.npz"):
        refuses(lambda path=path: MADE[api.Reach]().save(path), str(path), "a file in a folder that exists")


REPORTED = [kind for kind in MADE if kind is not api.MeasuredMaps]  # that of the table above has no image to be drawn


@pytest.mark.parametrize("kind", REPORTED, ids=lambda kind: kind.__name__)
def test_a_report_shows_each(kind):
    pytest.importorskip("plotly", reason="plotly is not installed: uv sync --extra report")
    from flatlab.report.html import sections

    section = sections._of_result("saved", found := MADE[kind](), level=2)
    assert section.title.startswith("saved")
    assert not hasattr(found, "verdict") or found.verdict() in section.sentences
