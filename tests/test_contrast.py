"""The small CLIP: what its captions are, its loss, and that class vectors come from the source domains and stay."""

import pytest
import torch
import torch.nn.functional as F
from commandline import call
from stores import PLACE, forked, spec, trained

from flatlab import files
from flatlab.data.batches import Batch
from flatlab.loading import data as loading_data
from flatlab.loading import network as loading_network
from flatlab.store.runs import RunStore
from flatlab.train import objectives

CPU = torch.device("cpu")


def run_of(method="ERM", **fields):
    return spec(method).replace(model="digits-clip", **fields)


def test_captions_are_numbers_of_characters_padded_with_zero():
    numbers = objectives._numbers(["ab", "b"])
    assert numbers.tolist() == [[1, 2], [2, 0]]
    batch = Batch(torch.zeros(4, 1), torch.tensor([3, 0, 3, 9]), (2, 2))
    assert objectives._captioned(batch, 10).tolist() == [3, 0, 13, 19]


def test_without_equal_captions_the_loss_is_clips():
    draws = torch.Generator().manual_seed(0)
    images, vectors = torch.randn(5, 3, generator=draws), torch.randn(7, 3, generator=draws)
    own = torch.tensor([6, 0, 3, 2, 5])
    logits = images @ vectors[own].T
    clips = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    torch.testing.assert_close(objectives._loss(images, vectors, own), clips)


def test_equal_captions_are_positives_of_each_other():
    images = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    vectors = torch.eye(2)
    own = torch.tensor([0, 0, 1])
    rows = (images @ vectors[own].T).log_softmax(1)
    columns = (images @ vectors[own].T).T.log_softmax(1)
    expected = [-(each[0, :2].mean() + each[1, :2].mean() + each[2, 2]) / 3 for each in (rows, columns)]
    torch.testing.assert_close(objectives._loss(images, vectors, own), sum(expected) / 2)


def test_class_vectors_are_of_the_sources_and_stay_while_the_image_tower_is_trained(tmp_path):
    runs = [run_of(), run_of("QT-DoG", held_out="rot0")]
    heads, towers = [], []
    for index, run in enumerate(runs):
        weights, _ = files.load_arrays(trained(tmp_path / str(index), run).run(run).checkpoint("last"))
        heads.append(torch.from_numpy(weights["head.weight"]))
        domains = loading_data.domains(run, PLACE)
        network = loading_network.network(run, domains.data, PLACE)
        objectives.contrast(network, run, domains, CPU)
        assert torch.equal(network.head.weight, heads[-1])  # the seed's, and the training leaves it as it is
        latent = [each for name, each in weights.items() if name.startswith("features.projection.") and each.ndim == 2]
        towers.append([torch.equal(network.features.projection.weight, torch.from_numpy(each)) for each in latent])
    assert not any(map(any, towers))
    assert not torch.allclose(heads[0], heads[1])
    torch.testing.assert_close(heads[0].norm(dim=1), torch.ones(10))


@pytest.mark.slow
def test_contrast_learns_to_distinguish_digits():
    run = run_of(steps=300, lr=1e-3, batch_size=32)
    domains = loading_data.domains(run, PLACE)
    network = loading_network.network(run, domains.data, PLACE)
    objectives.contrast(network, run, domains, CPU)
    hits = [
        (network.eval()(inputs).argmax(1) == labels).double().mean().item()
        for batches in domains.evaluation("out", domains.sources, CPU).values()
        for inputs, labels in batches
    ]
    assert min(hits) > 0.4  # chance is 0.1


def test_a_forked_run_is_the_run_alone(tmp_path):
    forked(tmp_path, run_of("QT-DoG", optimizer="adamw", schedule="cosine", weight_decay=0.1))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--model", "vit_b_16"), "vit_b_16 takes images of 224 pixels, got 16: write --image-size 224."),
        (("--model", "resnext50_32x4d"), "resnext50_32x4d takes images of 3 channels, and digits have 1"),
        (
            ("--model", "digits-vit", "--dataset", "sentences"),
            "sentences, which digits-vit does not take",
        ),
    ],
)
def test_a_network_that_does_not_suit_the_data_is_refused(words, sentence, tmp_path, capsys):
    assert call("train", *words, "--setting", "smoke", "--held-out", "0", "--store", tmp_path) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_new_networks_are_trained_quantized_and_measured_by_the_commands(tmp_path):
    places = ("--store", tmp_path, "--held-out", "rot0")
    for name in ("digits-vit", "digits-clip"):
        assert call("train", "--method", "qt-dog", "--model", name, "--setting", "smoke", "--seeds", "1", *places) == 0
    (run, _) = (each for each in RunStore(tmp_path).runs() if each.spec.quantizer)
    words = ("--radii", "0.5", "--samples", "2", "--images", "4", "--out", tmp_path / "out")
    assert call("flatness", run.spec.digest, *words, "--store", tmp_path) == 0
    assert call("export", run.spec.digest, "--file", tmp_path / "net.safetensors", "--store", tmp_path) == 0
