"""Networks as ONNX files: the codes are ours, the answers are the network's, and what does not fit is refused."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from commandline import call
from onnx import helper, numpy_helper
from stores import PLACE, TINY, spec, trained
from torch import nn

from flatlab.deploy import session
from flatlab.deploy.calibration import ranges
from flatlab.deploy.graph import Codes, Graph, Range
from flatlab.deploy.onnx import ExportedOnnx, _codes, _in_floats, _logits, _saturation, compare, export_onnx, write
from flatlab.deploy.session import opened
from flatlab.errors import UserError
from flatlab.loading import checkpoint
from flatlab.models.networks import build_network
from flatlab.quant.attach import attach, bake, quantized_layers
from flatlab.specs.deploy import OnnxSpec
from flatlab.specs.methods import METHODS, compose
from flatlab.train.derived import join


def quantized(method="QT-DoG", **fields):
    run = compose(METHODS[method], TINY, held_out="rot45", seed=0, trial_seed=0)
    return run.replace(quantizer=run.quantizer.replace(**fields))


SMALL = ("digits-clip", "digits-densenet", "digits-resnext")
RUNS = {
    "7 bits": quantized(),
    "8 bits": quantized(bits=8),
    "4 bits, tensor": quantized(bits=4, granularity="tensor"),
    "unsigned": quantized(bits=5, signed=False),
    "full precision": spec(),
}


@pytest.mark.parametrize("wanted", RUNS.values(), ids=RUNS)
def test_a_file_of_integer_weights_agrees_to_rounding(tmp_path, wanted):
    run = trained(tmp_path, wanted).run(wanted)
    done = export_onnx(run, tmp_path / "net.onnx", PLACE)
    assert [row.domain for row in done.rows] == ["source", "target"]
    for row in done.rows:
        assert row.deviation < 1e-5 * (1 + row.largest) and row.agreement == 1 and row.images > 80
        assert row.accuracy == row.accuracy_onnx
    model = onnx.load(tmp_path / "net.onnx")
    kinds = {each.name: onnx.TensorProto.DataType.Name(each.data_type) for each in model.graph.initializer}
    codes = {name for name in kinds if name.endswith(".codes")}
    assert len(codes) == (3 if wanted.quantizer else 0)
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)
    assert {kinds[name] for name in codes} <= {"UINT8" if wanted is RUNS["unsigned"] else "INT8"}
    if wanted is RUNS["7 bits"]:  # the codes are those of the run, a channel turned where BatchNorm's gain is negative
        network = checkpoint.network(run, "selected", PLACE)
        layer = quantized_layers(network)["features.0"]
        stored = next(numpy_helper.to_array(e) for e in model.graph.initializer if e.name == "features.0.weight.codes")
        gain = network.features[1].weight.detach().sign().reshape(-1, 1, 1, 1)
        assert np.array_equal(stored, (layer.quantizer.codes(layer.latent) * gain).numpy())


@pytest.mark.parametrize("rule", ["min-max", "percentile", "mse"])
def test_int8_activations_are_nearly_the_network(tmp_path, rule):
    run = trained(tmp_path, quantized()).run(quantized())
    done = export_onnx(run, tmp_path / "net.onnx", PLACE, OnnxSpec(activations="int8", calibration=rule))
    for row in done.rows:
        assert 1e-6 < row.deviation < 0.15 * row.largest
        assert row.agreement > 0.9 and abs(row.accuracy - row.accuracy_onnx) < 0.05
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds.count("QuantizeLinear") >= 3
    images = np.random.default_rng(0).standard_normal((5, 1, 16, 16)).astype(np.float32)
    engines = [opened(tmp_path / "net.onnx", integers=each) for each in (True, False)]
    whole, floats = (engine.run(None, {"images": images})[0] for engine in engines)
    assert np.abs(whole - floats).max() < 0.05 * np.abs(floats).max()  # 7-bit codes: no sum of 16 bits saturates


def test_ranges_come_from_the_images_alone_and_keep_their_rules():
    graph, images, _ = small()
    found = {rule: ranges(graph, [images], rule) for rule in ("min-max", "percentile", "mse")}
    whole = found["min-max"]["images"]
    assert (whole.low, whole.high) == (float(images.min()), float(images.max()))
    for rule in ("percentile", "mse"):
        inner = found[rule]["images"]
        assert whole.low <= inner.low < 0 < inner.high <= whole.high
    tails = found["percentile"]["images"]
    outside = ((images < tails.low) | (images > tails.high)).mean()
    assert outside < 1.5e-4
    with pytest.raises(UserError, match=r"^int8 activations need at least one image of the source domains"):
        ranges(graph, [], "min-max")


def test_the_grid_of_a_range_holds_zero_exactly():
    for low, high in [(-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)]:
        scale, zero = Range(low, high).grid
        first, last = -int(zero) * scale, (255 - int(zero)) * scale
        assert scale > 0 and first <= 0 <= last
        assert last >= high - scale and first <= low + scale


def small(**options):
    network = build_network("digits-cnn", num_classes=10, in_channels=1).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    attach(network, **options)
    codes = _codes(network, OnnxSpec())
    bake(network)
    images = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    graph = Graph(network, images, opset=17)
    graph.codes.update(codes)
    graph.fold()
    return _in_floats(graph), images.numpy(), network


@pytest.mark.parametrize(("bits", "signed"), [(7, True), (8, True), (8, False)])
def test_channels_that_batchnorm_turns_over_keep_their_codes(tmp_path, bits, signed):
    graph, images, network = small(bits=bits, signed=signed)
    assert all((codes.scale > 0).all() for codes in graph.codes.values())
    (tmp_path / "net.onnx").write_bytes(graph.finished().SerializeToString())
    row = compare(network, tmp_path / "net.onnx", "random", [(torch.from_numpy(images), torch.zeros(8))])
    assert row.deviation < 1e-5 * row.largest


def test_codes_that_integer_kernels_cannot_hold_are_refused():
    codes = Codes(np.array([[-128, 5], [127, 0]]), np.ones(2, np.float32)).times(np.array([-1.0, 1.0]))
    shifted, zero = codes.fitting(np.dtype(np.int8), level=False)
    assert shifted.tolist() == [[127, -6], [127, 0]] and zero.tolist() == [-1, 0]
    assert codes.fitting(np.dtype(np.int8), level=True)[0].tolist() == [[127, -5], [127, 0]]
    unsigned = Codes(np.array([[255, 0], [3, 4]]), np.ones(2, np.float32)).times(np.array([-1.0, 1.0]))
    shifted, zero = unsigned.fitting(np.dtype(np.int8), level=False)
    assert shifted.tolist() == [[-128, 127], [3, 4]] and zero.tolist() == [127, 0]
    with pytest.raises(UserError, match="got unsigned codes of 8 bits and a negative gain"):
        unsigned.fitting(np.dtype(np.int8), level=True)


@pytest.mark.parametrize("name", ["digits-vit", *(pytest.param(each, marks=pytest.mark.slow) for each in SMALL)])
def test_small_networks_agree_for_any_number_of_images(tmp_path, name):
    network = build_network(name, num_classes=5, in_channels=1).eval()
    attach(network)
    images = torch.randn(7, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for activations, limit in (("float", 1e-5), ("int8", 0.2)):
        graph = write(
            copy.deepcopy(network), tmp_path / "net.onnx", OnnxSpec(activations=activations), [images.numpy()]
        )
        row = compare(
            network, tmp_path / "net.onnx", "random", [(images, torch.zeros(7)), (images[:1], torch.zeros(1))]
        )
        assert row.deviation < limit * row.largest and row.images == 8
    transformer = name in ("digits-vit", "digits-clip")
    assert (graph.products > 0) is transformer
    kinds = [node.op_type for node in graph.proto.node]
    assert kinds.count("QuantizeLinear") == 1 if transformer else kinds.count("QuantizeLinear") > 5
    remark = ExportedOnnx("net.onnx", 1, (), graph.products).remarks
    assert bool(remark) is transformer and all(
        "matrix products, which are computed in floats" in each for each in remark
    )


def test_a_network_without_convolutions_has_no_integers(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    attach(network, outside="3")
    with pytest.raises(UserError, match=r"^--activations int8 needs quantized convolutions, and this network has none"):
        write(network, tmp_path / "net.onnx", OnnxSpec(activations="int8"), [np.zeros((2, 1, 4, 4), np.float32)])


class Constant(nn.Module):
    def forward(self, images):
        return torch.cat([torch.ones(1, 1).expand(len(images), -1), images.flatten(1)], dim=1)


def test_a_number_of_images_that_the_file_holds_as_a_constant_is_explained(tmp_path):
    write(Constant().eval(), tmp_path / "net.onnx", OnnxSpec(), [np.zeros((2, 1, 2, 2), np.float32)])
    with pytest.raises(
        UserError, match=r"net\.onnx for 3 images \(.*\), but for one image: the network must take their number from"
    ):
        compare(Constant().eval(), tmp_path / "net.onnx", "", [(torch.zeros(3, 1, 2, 2), torch.zeros(3))])


def test_another_error_of_onnxruntime_is_not_explained_by_the_number_of_images(tmp_path):
    class Broken:
        def get_inputs(self):
            return [SimpleNamespace(name="images", shape=["N", 1, 2, 2])]

        def run(self, outputs, inputs):
            raise RuntimeError("no kernel for Gelu.\nmore")

    with pytest.raises(UserError, match=r"for 3 images \(no kernel for Gelu\): write --format packed\.$"):
        _logits(Broken(), Path("net.onnx"), np.zeros((3, 1, 2, 2), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "resnet50"])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_networks_of_photographs_agree(tmp_path, name, activations):
    network = build_network(name, num_classes=5).eval()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    attach(network)
    codes = _codes(network, OnnxSpec())
    bake(network)
    graph = Graph(network, images, opset=17)
    graph.codes.update(codes)
    graph.fold()
    assert not any(node.op_type == "BatchNormalization" for node in graph.proto.node)
    if activations == "int8":
        graph.round_activations(ranges(_in_floats(graph), [images.numpy()], "min-max"))
    (tmp_path / "net.onnx").write_bytes(graph.finished().SerializeToString())
    row = compare(network, tmp_path / "net.onnx", "random", [(images, torch.zeros(4))])
    assert row.deviation < {"float": 1e-4, "int8": 0.2}[activations] * row.largest


def test_an_ensemble_is_one_file(tmp_path):
    members = quantized(), quantized(bits=4)
    store = [trained(tmp_path, each) for each in members][0]
    joint = spec().replace(members=members, combine="probabilities")
    join(joint, store, PLACE)
    done = export_onnx(store.run(joint), tmp_path / "net.onnx", PLACE)
    assert all(row.agreement == 1 and row.deviation < 1e-4 for row in done.rows)
    both = [store.run(each) for each in members]
    again = export_onnx(both, tmp_path / "two.onnx", PLACE, combine="probabilities")
    assert again.rows == done.rows and again.bytes == done.bytes
    assert (tmp_path / "two.onnx").read_bytes() == (tmp_path / "net.onnx").read_bytes()
    plain = export_onnx(both, tmp_path / "logits.onnx", PLACE, OnnxSpec(activations="int8"))
    assert plain.rows != done.rows and all(row.agreement > 0.9 for row in plain.rows)
    with pytest.raises(UserError, match="must have the same data set, held-out domain and image size"):
        export_onnx([both[0], store.run(spec(held_out="rot0"))], tmp_path / "none.onnx", PLACE)


# --- sums in 16 bits ------------------------------------------------------------------------------------------------


def test_one_channel_of_two_exceeds_16_bits():
    graph, _, _ = small()
    graph.codes = {"one": Codes(np.array([[120, 1, 10], [60, 65, -128]]), np.ones(2, np.float32))}
    graph.top = 255
    assert graph.exceeding == 0.5  # 255 (120 + 10) > 32767 >= 255 max(60 + 65, 128)
    graph.codes["one"].codes[1, 0] = -1
    assert graph.exceeding == 1.0  # 255 (128 + 1)
    graph.top = 127
    assert graph.exceeding == 0.0


def test_a_reduced_range_prevents_sums_of_more_than_16_bits(tmp_path):
    network = build_network("digits-cnn", num_classes=10, in_channels=1).eval()
    attach(network, bits=8)
    for layer in quantized_layers(network).values():  # all codes are used
        with torch.no_grad():
            layer.quantizer.scale.copy_(layer.latent.abs().amax((1, 2, 3), keepdim=True) / 127)
    batches = [np.random.default_rng(0).uniform(-1, 3, (64, 1, 16, 16)).astype(np.float32)]
    off, path, found = {}, tmp_path / "net.onnx", {}
    for reduced in (False, True):
        options = OnnxSpec(activations="int8", reduce_range=reduced)
        found[reduced] = write(copy.deepcopy(network), path, options, batches).exceeding
        off[reduced] = _saturation(path, batches)
        model = onnx.load(path)
        model.graph.output.append(helper.make_tensor_value_info("images.codes", onnx.TensorProto.UINT8, None))
        codes = opened(model.SerializeToString()).run(["images.codes"], {"images": batches[0]})[0]
        assert (codes.min(), codes.max()) == (0, 127 if reduced else 255)
    assert found[False] > 0.9 and found[True] == 0
    if session.saturates():
        assert off[False] > 2 * off[True]
    remark = ExportedOnnx("net.onnx", 1, (), 0, found[False], off[False]).remarks[0]
    assert re.match(r"In [\d.]+% of the quantized channels the sum of two products can exceed 16 bits", remark)
    assert not ExportedOnnx("net.onnx", 1, (), 0, found[True], off[True]).remarks


def test_processors_without_vnni_are_recognised(monkeypatch):
    known = {"avx2 fma": True, "avx2 fma avx512f avx512_vnni": False, "avx2 avx_vnni": False, "asimd neon": False}
    for sets, expected in known.items():
        monkeypatch.setattr(session.environment, "facts", lambda sets=sets: {"instructions": sets})
        assert session.saturates() is expected


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("store"), quantized()).run(quantized())


def refused(pattern, run, path, **fields):
    with pytest.raises(UserError, match=pattern) as caught:
        export_onnx(run, path, PLACE, OnnxSpec(**fields))
    assert "\n" not in str(caught.value) and not path.exists()


def test_quantizers_that_do_not_fit_are_refused(tmp_path):
    wanted = {
        r"^features\.0\.weight has 16 bits on a uniform grid; .* 8 bits: write --format packed": quantized(bits=16),
        r"^features\.0 quantizes its inputs on a learned grid": quantized(bits=4, activations="unsigned"),
        r"^--activations int8 needs a run whose weights are quantized": spec(),
    }
    for pattern, each in wanted.items():
        refused(pattern, trained(tmp_path, each).run(each), tmp_path / "net.onnx", activations="int8")


def test_versions_of_operators_that_are_not_there_are_refused(run, tmp_path):
    refused(r"^This network cannot be exported to ONNX with --opset 99: ", run, tmp_path / "net.onnx", opset=99)
    graph, _, _ = small()
    graph.model.opset_import[0].version = 99
    (tmp_path / "net.onnx").write_bytes(graph.model.SerializeToString())
    with pytest.raises(UserError, match=r"^onnxruntime \S+ cannot run \S+net\.onnx: .*; write the file again with an"):
        opened(tmp_path / "net.onnx")


class Unknown(nn.Module):
    def forward(self, images):
        return torch.linalg.eigvals(images[:, 0]).real


def test_an_operator_that_cannot_be_exported_is_named():
    with pytest.raises(UserError, match=r"^This network cannot be exported to ONNX with --opset 17: .*linalg_eigvals"):
        Graph(Unknown().eval(), torch.randn(2, 1, 4, 4), opset=17)


def test_a_file_of_another_network_is_refused(tmp_path):
    graph, images, _ = small()
    (tmp_path / "net.onnx").write_bytes(graph.model.SerializeToString())
    batches = [(torch.from_numpy(images), torch.zeros(8))]
    with pytest.raises(UserError, match=r"net\.onnx is of another network: it gives 10 classes, and 3 are expected"):
        compare(build_network("digits-cnn", num_classes=3, in_channels=1).eval(), tmp_path / "net.onnx", "", batches)
    wide = [(torch.zeros(2, 3, 16, 16), torch.zeros(2))]
    with pytest.raises(UserError, match=r"is of another network: it takes images of .*, not images \(2, 3, 16, 16\)"):
        compare(nn.Flatten(), tmp_path / "net.onnx", "", wide)


def test_the_command_line_writes_both_formats(run, tmp_path, capsys):
    line = ["export", run.spec.digest, "--json", "--store", run.path.parent, "--file"]
    more = ["--format", "onnx", "--activations", "int8", "--calibration-images", "20"]
    assert call(*line, tmp_path / "net.onnx", *more[2:]) == 0  # the format is that of the name
    onnx.checker.check_model(str(tmp_path / "net.onnx"))
    rows = json.loads(capsys.readouterr().out)
    assert [row["domain"] for row in rows] == ["source", "target"] and (tmp_path / "net.onnx").exists()
    assert call(*line, tmp_path / "net.safetensors", "--opset", "18") == 2
    assert "--opset is of ONNX files; write --format onnx." in capsys.readouterr().err
    assert call(*line, tmp_path / "net.safetensors", "--format", "tflite") == 2
    assert "packed" in capsys.readouterr().err
    assert call(*line, tmp_path / "net.onnx", "--format", "onnx", "--reduce-range") == 2
    assert "--reduce-range does nothing without --activations int8" in capsys.readouterr().err
    assert call(*line, tmp_path / "net.onnx", "--format", "onnx", "--combine", "logits") == 2
    assert "--combine does nothing for one run" in capsys.readouterr().err
