"""Sentences in domains: the embedded ones, anybody's own, their vocabulary, and a run of them through the commands."""

import importlib.resources

import commandline
import numpy as np
import pytest
import torch

from flatlab.data import catalog, fingerprints, folders
from flatlab.data.corruptions import corrupted, with_corrupted
from flatlab.data.domains import Domain, split
from flatlab.data.load import load
from flatlab.data.text import sets, tables
from flatlab.data.text.vocabulary import PAD, START, UNKNOWN, Vocabulary, words_of
from flatlab.errors import UserError
from flatlab.loading.data import domains
from flatlab.models.networks import build_network
from flatlab.models.transformer import PIECES
from flatlab.quant.attach import attach, quantized_layers
from flatlab.specs.run import MixSpec, Place, RunSpec
from flatlab.store.runs import RunStore
from flatlab.train.objectives import objective_of

OWN = {
    "books": ["good\tA fine, fine book.", "bad\tI was bored.", "good\tBeautiful."] * 4,
    "films": ["bad\tA dull film", "good\tI was moved."] * 5,
    "songs": ["good\tlovely tune", "bad\tout of tune"] * 5,
}


@pytest.fixture
def own(tmp_path):
    for name, lines in OWN.items():
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def spec(**changes):
    fields = {"dataset": "sentences", "held_out": "tweets", "image_size": 24, "model": "sentences-transformer"}
    return RunSpec(**{**fields, "steps": 1, "eval_every": 1, "lr": 1e-3, **changes})


def test_the_embedded_sentences_are_as_the_catalog_says_and_have_their_licence():
    found, known = tables.embedded(), catalog.CATALOG["sentences"]
    assert {name: len(table.texts) for name, table in found.items()} == dict(known.domains)
    assert tables.classes_of(found) == known.classes
    positive = {name: table.labels.count("positive") for name, table in found.items()}
    assert positive == {"amazon": 1725, "movie": 4982, "nyt": 1100, "tweets": 2300}
    assert all(text.strip() for table in found.values() for text in table.texts)
    page = importlib.resources.files("flatlab.resources").joinpath("sentences.md").read_text()
    assert "Hutto" in page and "The MIT License" in page and f"{sum(known.domains.values()):,} English" in page
    assert all(row.ok for row in folders.check("sentences", None))


def test_the_vocabulary_is_that_of_the_source_domains_alone():
    run = domains(spec(), Place())
    assert (
        run.data.vocabulary.numbers
        == Vocabulary(text for name in ("amazon", "movie", "nyt") for text in tables.embedded()[name].texts).numbers
    )
    other = domains(spec(held_out="nyt"), Place()).data.vocabulary
    assert "#" in other.numbers and other.numbers != run.data.vocabulary.numbers
    assert len(run.data.vocabulary) <= PIECES
    assert run.data.fingerprint == fingerprints.at_hand("sentences", None, None)
    rows = split(3362, 3, trial_seed=0)
    assert np.array_equal(run.in_["tweets"], rows.in_)  # DomainBed's split, as of images


def test_what_changes_images_is_refused():
    with pytest.raises(UserError, match="Corruptions change images, and sentences has sentences"):
        corrupted(tiny(), "gaussian_noise:1", {})
    with pytest.raises(UserError, match="Corruptions change images, and sentences has sentences"):
        with_corrupted(tiny(), "gaussian_noise:1", tiny().names[0])
    with pytest.raises(UserError, match="MixStyle needs a convolutional model, got sentences-transformer"):
        objective_of(spec(mixing=MixSpec()))


def tiny():
    return sets.TextSet("sentences", (Domain("a", torch.zeros(2, 4), torch.zeros(2)),), ("x", "y"), mean=(), std=())


def test_words_are_cut_into_the_longest_pieces():
    vocabulary = Vocabulary(["walking talking walk"] * 3 + ["in king"])
    pieces = {number: piece for piece, number in vocabulary.numbers.items()}

    def cut(text, length=8):
        return [pieces.get(number, number) for number in vocabulary.encode(text, length).tolist()]

    assert cut("Walking") == [START, "walking", *[PAD] * 6]
    assert cut("talks, inking") == [START, "t", "##alk", UNKNOWN, UNKNOWN, "in", "##king", PAD]
    assert cut("walking talking walk walk", 3) == [START, "walking", "talking"]
    assert words_of("It's 5 o'clock!") == ["it", "'", "s", "5", "o", "'", "clock", "!"]
    assert len(Vocabulary(tables.embedded()["nyt"].texts, 100)) == 100


def test_the_encoder_does_not_see_padding():
    network = build_network("sentences-transformer", num_classes=2, in_channels=48).eval()
    assert sum(p.numel() for p in network.parameters()) == 332_418
    pieces = torch.tensor([[2, 17, 30, 5], [2, 8, 0, 0]])
    longer = torch.nn.functional.pad(pieces, (0, 4))
    torch.testing.assert_close(network(pieces), network(longer), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network(pieces[1:, :2]), network(pieces)[1:], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(network(pieces[:, [0, 2, 1, 3]])[0], network(pieces)[0], atol=1e-4)  # order matters


def test_a_folder_of_ones_own_sentences(own):
    data = load("folder-text:mine", data_dir=own)
    assert data.names == ("books", "films", "songs") and data.classes == ("bad", "good")
    assert data.domain("books").labels.tolist() == [1, 0, 1] * 4
    seen = data.seen_from(("books", "films"))
    inputs = seen.normalise(seen.domain("songs").images)
    assert inputs.dtype == torch.int64 and inputs.shape == (10, sets.LENGTH)
    assert "lovely" not in seen.vocabulary.numbers and "book" in seen.vocabulary.numbers
    before = fingerprints.at_hand("folder-text:mine", str(own), None)
    assert before == data.fingerprint == seen.fingerprint
    (own / "songs.tsv").write_text("\n".join([*OWN["songs"], "bad\tflat"]))
    assert fingerprints.at_hand("folder-text:mine", str(own), None) != before


def test_sentences_are_trained_quantized_and_measured_by_the_commands(own, tmp_path_factory):
    store = tmp_path_factory.mktemp("text")
    here = ("--held-out", "songs", "--store", store)
    words = ("--dataset", f"folder-text:{own}", "--setting", "smoke", "--seeds", "1")
    assert commandline.call("train", "--method", "QT-DoG", *words, *here) == 0
    (run,) = (each for each in RunStore(store).runs() if each.spec.quantizer)
    assert (run.spec.dataset, run.spec.image_size) == (f"folder-text:{own.name}", 48)
    network = build_network(run.spec.model, num_classes=2, in_channels=48)
    attach(network, bits=7)
    names = [f"features.blocks.{block}.{each}" for block in (0, 1) for each in ("qkv", "proj", "fc1", "fc2")]
    assert list(quantized_layers(network)) == names  # neither embeddings nor the head
    sizes = ("--radii", "0.5", "--samples", "2", "--images", "4", "--out", store / "out", "--data-dir", own)
    assert commandline.call("flatness", "QT-DoG", *sizes, *here) == 0
    assert commandline.call("train", "--model", "resnet18", *words, *here) == 2
    assert commandline.call("train", "--dataset", "digits", "--model", "sentences-transformer", *here[2:]) == 2


BROKEN = {  # the third line of films.tsv -> what the sentence says
    "no tab here": r"Line 3 of .*films.tsv must be a label, a tab and a sentence, got 0 tabs in 'no tab here'",
    "good\ta\tb": r"Line 3 of .*films.tsv must be a label, a tab and a sentence, got 2 tabs",
    "\tno label": r"Line 3 of .*films.tsv must be a label",
    "good\t  ": r"Line 3 of .*films.tsv has an empty sentence: write one, or remove the line",
    "goood\tfine": r"Label 'goood' is outside the classes of .*books.tsv \(bad, good\)",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_named(own, line):
    (own / "films.tsv").write_text("\n".join([*OWN["films"][:2], line, *OWN["films"]]))
    with pytest.raises(UserError, match=BROKEN[line]):
        tables.read(own)
    assert commandline.call("data", "check", f"folder-text:{own}") == 2


def test_a_folder_without_domains_or_classes_is_refused(own, tmp_path):
    (own / "films.tsv").write_bytes(b"good\t\xff\xfe\n")
    with pytest.raises(UserError, match=r"films.tsv must be UTF-8 text, but byte 5 is not"):
        tables.read(own)
    (own / "films.tsv").write_text("")
    with pytest.raises(UserError, match=r"films.tsv has no line"):
        tables.read(own)
    for name in OWN:
        (own / f"{name}.tsv").write_text("good\tfine\n")
    with pytest.raises(UserError, match=r"must have at least two classes, got only good"):
        tables.read(own)
    for name in ("films", "songs"):
        (own / f"{name}.tsv").unlink()
    with pytest.raises(UserError, match=r"needs at least two domains, and .* holds 1: expected one file DOMAIN.tsv"):
        tables.read(own)
