"""Folders in which transformers saved a tiny model: read, checked, trained and measured by the commands."""

import json
import logging
import shutil

import commandline
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_text import OWN
from transformers.pytorch_utils import Conv1D

from flatlab import files
from flatlab.errors import UserError
from flatlab.loading.checkpoint import network as checkpoint_network
from flatlab.loading.data import domains
from flatlab.loading.export import load_exported
from flatlab.loading.network import finished, load, network
from flatlab.measure.inputs import quantizable, rounded
from flatlab.models import saved
from flatlab.models.networks import build_network
from flatlab.quant.attach import attach, channel_axis, quantized_layers
from flatlab.quant.calibration import second_moments
from flatlab.specs.quantizers import OBCSpec, QuantSpec, RTNSpec
from flatlab.specs.run import Place, RunSpec
from flatlab.store.runs import RunStore
from flatlab.train.loop import train

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", ",", "book", ".", "i", "was", "bored", "beautiful"]
WORDS += ["dull", "film", "moved", "lovely", "tune", "out", "of"]
DRAWN = "is drawn from the seed, since the file has none for 2 classes"
SIZES = {"vocab_size": len(WORDS), "max_position_embeddings": 32}
BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **SIZES}
DISTIL = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, **SIZES}
KINDS = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig(**BERT)),
    "encoder": (transformers.BertModel, transformers.BertConfig(**BERT)),
    "masked": (transformers.DistilBertForMaskedLM, transformers.DistilBertConfig(**DISTIL)),
    "distilbert": (transformers.DistilBertForSequenceClassification, transformers.DistilBertConfig(**DISTIL)),
    "electra": (transformers.ElectraForSequenceClassification, transformers.ElectraConfig(**BERT, embedding_size=16)),
    "xlm": (transformers.XLMRobertaForSequenceClassification, transformers.XLMRobertaConfig(**BERT, pad_token_id=0)),
    "gpt2": (  # its last linear map has no bias, and comes before what picks a sentence's last piece
        transformers.GPT2ForSequenceClassification,
        transformers.GPT2Config(
            **{"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": len(WORDS)},
            **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
        ),
    ),
    "bart": (  # encoder and decoder share the embedding
        transformers.BartForSequenceClassification,
        transformers.BartConfig(
            **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, **SIZES},
            **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3},
        ),
    ),
    "roberta": (
        transformers.RobertaForSequenceClassification,
        transformers.RobertaConfig(**BERT, pad_token_id=0, bos_token_id=2, eos_token_id=3),
    ),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    (root / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizer(vocab=str(root / "vocab.txt"))
    for name, (kind, config) in KINDS.items():
        torch.manual_seed(0)
        kind(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def folder(zoo, tmp_path):
    return shutil.copytree(zoo / "bert", tmp_path / "model")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    for name, lines in OWN.items():
        (root / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return root


def built(folder, weights="own", *, classes=2, **more):
    config = json.dumps(saved.config_of(folder))
    given = saved.weights_in(folder) if weights == "own" else weights
    more = {"in_channels": 12, **more}
    return build_network("hf:x@0", num_classes=classes, weights=given, config=config, **more)


def run_of(folder, own, **changes):
    fields = {"dataset": f"folder-text:{own.name}", "held_out": "songs", "image_size": 12, "steps": 1, "eval_every": 1}
    fields |= {"model": saved.named(f"hf:{folder}"), "lr": 1e-3}
    return RunSpec(**{**fields, **changes}), Place(data_dir=str(own), model_dir=str(folder))


PIECES = torch.tensor([[2, 10, 11, 12, 3, 0, 0], [2, 5, 6, 7, 6, 8, 3]])


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra", "xlm", "gpt2", "bart"])
def test_the_network_is_that_of_transformers(zoo, kind, caplog):
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(zoo / kind).eval()
    network = built(zoo / kind, classes=theirs.config.num_labels).eval()
    expected = theirs(input_ids=PIECES, attention_mask=(PIECES != 0).long()).logits
    torch.testing.assert_close(network(PIECES), expected, rtol=1e-5, atol=1e-6)
    assert not caplog.records
    network.train()
    torch.testing.assert_close(network(PIECES), expected, rtol=1e-5, atol=1e-6)  # no dropout


def test_what_a_checkpoint_lacks_is_drawn_from_the_seed_and_named(zoo, caplog):
    alone = built(zoo / "encoder", seed=3)
    assert (
        "classifier.bias, classifier.weight is drawn from the seed, since the file has none for 2 classes"
        in caplog.text
    )
    caplog.clear()
    masked = built(zoo / "masked")
    assert "classifier.bias, classifier.weight, pre_classifier.bias, pre_classifier.weight is drawn" in caplog.text
    for each, name, prefix in ((alone, "encoder", "bert."), (masked, "masked", "")):
        stored, ours = load_file(zoo / name / "model.safetensors"), each.features.model.state_dict()
        kept = [key for key in stored if f"{prefix}{key}" in ours]
        assert len(kept) > 10 and all(torch.equal(stored[key], ours[f"{prefix}{key}"]) for key in kept)
    fresh = built(zoo / "encoder", "none", seed=3)
    assert torch.equal(fresh.head.weight, alone.head.weight)
    assert not torch.equal(built(zoo / "encoder", "none", seed=4).head.weight, alone.head.weight)
    caplog.clear()
    assert built(zoo / "bert", classes=3).head.weight.shape == (3, 16)
    assert "classifier.bias, classifier.weight is drawn from the seed, since the file has none for 3" in caplog.text


def rename(state, old, new):
    return {key.replace(old, new): each for key, each in state.items()}


def without(state, part):
    return {key: each for key, each in state.items() if part not in key}


SPOILT = {
    r"1 missing \(first bert.encoder.layer.1.output.dense.bias, shape \(16,\)\)": lambda state: without(
        state, "layer.1.output.dense.bias"
    ),
    r"1 unexpected \(first bert.encoder.layer.2.x, shape \(1,\)\)": lambda state: {
        **state,
        "bert.encoder.layer.2.x": torch.ones(1),
    },
    r"first bert.embeddings.word_embeddings.weight, shape \(7, 16\) where \(21, 16\) is expected": lambda state: {
        **state,
        "bert.embeddings.word_embeddings.weight": torch.ones(7, 16),
    },
    r"bert.pooler.dense.bias holds 16 of 16 values that are not finite": lambda state: {
        **state,
        "bert.pooler.dense.bias": torch.full((16,), torch.nan),
    },
}


@pytest.mark.parametrize("sentence", SPOILT)
def test_weights_that_do_not_fit_are_named(folder, sentence):
    save_file(SPOILT[sentence](load_file(folder / "model.safetensors")), folder / "model.safetensors")
    with pytest.raises(UserError, match=sentence):
        built(folder)


def test_other_forms_of_the_same_weights(folder, zoo, tmp_path):
    state, expected = load_file(folder / "model.safetensors"), built(folder)(PIECES)
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): each for key, each in state.items()}
    torch.save({**old, "bert.embeddings.position_ids": torch.arange(32)}, tmp_path / "old.bin")
    assert torch.equal(built(folder, tmp_path / "old.bin")(PIECES), expected)
    with pytest.raises(UserError, match=r"does not fit hf:x@0.*first bert.embeddings.word_embeddings.weight"):
        built(folder, zoo / "distilbert" / "model.safetensors")


def test_a_folder_that_is_none_is_refused_in_one_sentence(folder):
    def refused(sentence):
        with pytest.raises(UserError, match=sentence):
            saved.named(f"hf:{folder}")

    (folder / "tokenizer.json").rename(folder / "t")
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.txt").unlink(missing_ok=True)
    refused("has no tokenizer: expected tokenizer.json or vocab.txt beside config.json")
    (folder / "config.json").write_text("{}")
    refused("must have the entry model_type")
    (folder / "config.json").write_text("{")
    refused("config.json must be JSON, and is not")
    (folder / "config.json").unlink()
    refused("must be a folder with config.json and tokenizer, got .*model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"has its weights in 1 file; write them as one: model.save_pretrained"):
        saved.weights_in(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights: expected model.safetensors or pytorch_model.bin"):
        saved.weights_in(folder)


def configured(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_tokenizer_that_does_not_fit_is_refused(folder, own):
    configured(folder, vocab_size=15)
    with pytest.raises(UserError, match=r"does not fit the model: it gives the number \d+, and the embedding has 15"):
        domains(*run_of(folder, own))
    configured(folder, vocab_size=len(WORDS), pad_token_id=1)
    with pytest.raises(UserError, match=r"it pads by 0, and config.json has pad_token_id 1"):
        domains(*run_of(folder, own))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"The tokenizer in .*model cannot be read"):
        domains(*run_of(folder, own))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "vit"}, "no sequence classifier of model_type 'vit'"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "transformers refuses the model's config"),
        ({"pad_token_id": None}, "must have the entry pad_token_id"),
        ({"max_position_embeddings": 8}, "has positions for 8 word pieces, got 12: write --image-size 8"),
        ({"hidden_size": 17}, "refuses the model's config.json|no sequence classifier"),
    ],
)
def test_a_configuration_of_another_kind_is_refused(folder, changes, sentence):
    configured(folder, **changes)
    with pytest.raises(UserError, match=sentence):
        built(folder, "none")


def test_sentences_are_cut_at_the_length_and_counted(zoo, own, caplog):
    spec, place = run_of(zoo / "bert", own, image_size=5)
    with caplog.at_level(logging.WARNING):
        data = domains(spec, place).data
    lengths = [
        len(each.split("\t")[1].replace(",", " ,").replace(".", " .").split()) + 2 for d in OWN.values() for each in d
    ]
    longer = sum(length > 5 for length in lengths)
    assert f"{longer} of {len(lengths)} sentences have more than 5 word pieces and are cut" in caplog.text
    rows = data.domain("books").images
    assert rows.dtype == torch.int32 and data.normalise(rows).dtype == torch.int64
    assert rows[0].tolist() == [2, 5, 6, 7, 3]  # [CLS] a fine , [SEP]
    assert rows[2].tolist() == [2, 13, 9, 3, 0]
    assert data.fingerprint == domains(*run_of(zoo / "bert", own)).data.fingerprint


def test_the_folder_is_part_of_a_run_by_content(folder, own):
    spec, place = run_of(folder, own)
    assert spec.model.startswith("hf:model@") and "model_dir" not in spec.canonical()
    assert "model_dir" not in Place().canonical()
    with pytest.raises(
        UserError, match=r"This run's network is hf:model@\w+, whose folder is not known: write --model-dir"
    ):
        domains(spec, place.replace(model_dir=None))
    configured(folder, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"The configuration or tokenizer in .* is not that of the run, hf:model@"):
        domains(spec, place)


def test_a_saved_model_is_trained_quantized_measured_and_exported_by_the_commands(zoo, own, tmp_path, capsys, caplog):
    store, path = tmp_path / "runs", shutil.copytree(zoo / "encoder", tmp_path / "minilm")
    words = ("--dataset", f"folder-text:{own}", "--model", f"hf:{path}", "--image-size", "12")
    here = ("--held-out", "songs", "--store", store)
    training = ("--setting", "smoke", "--seeds", "1", "--optimizer", "adamw", "--schedule", "linear")
    assert commandline.call("train", "--method", "QT-DoG", *words, *training, *here) == 0
    assert (
        "classifier.bias, classifier.weight is drawn from the seed, since the file has none for 2 classes"
        in caplog.text
    )
    (run,) = (each for each in RunStore(store).runs() if each.spec.quantizer)
    assert run.spec.model == saved.named(f"hf:{path}") and run.spec.weights.startswith("sha256:")
    assert (run.spec.lr, run.spec.quantizer.scale_lr) == (5e-5, 1e-5)  # the paper's, for pretrained weights
    place = Place(**{name: run.provenance.get(name) for name in ("data_dir", "model_dir", "weights_file")})
    layers = [*quantized_layers(finished(run.spec, domains(run.spec, place).data, place))]
    assert layers[0] == "features.model.bert.encoder.layer.0.attention.self.query" and len(layers) == 6 * 2 + 1
    start = network(run.spec, domains(run.spec, place).data, place)
    assert torch.equal(
        start.features.model.bert.pooler.dense.weight, load_file(path / "model.safetensors")["pooler.dense.weight"]
    )
    file = tmp_path / "net.safetensors"
    assert commandline.call("export", run.spec.digest[:8], "--file", file, "--store", store) == 0
    path.rename(tmp_path / "moved")
    assert load_exported(file)(PIECES).shape == (2, 2)
    sizes = ("--radii", "0.5", "--samples", "2", "--images", "4", "--out", tmp_path / "out")
    again = ("flatness", "QT-DoG", *sizes, *here)
    assert commandline.call(*again) == 2
    assert "must be a folder with config.json" in capsys.readouterr().err
    assert commandline.call(*again, "--model-dir", tmp_path / "moved") == 0


def test_the_head_follows_the_names_of_the_classes(folder, own):
    def head():
        spec, place = run_of(folder, own)
        weights = folder / "model.safetensors"
        spec = spec.replace(weights=f"sha256:{files.file_hash(weights)}")
        place = place.replace(weights_file=str(weights))
        return network(spec, domains(spec, place).data, place).head.weight

    stored = load_file(folder / "model.safetensors")["classifier.weight"]
    configured(folder, id2label={"0": "GOOD", "1": "BAD"})  # the data's classes are bad, good
    assert torch.equal(head(), stored.flip(0))
    configured(folder, id2label={"0": "LABEL_0", "1": "LABEL_1"})
    assert torch.equal(head(), stored)
    with pytest.raises(UserError, match="Unknown model 'hf:x'"):
        build_network("hf:x", num_classes=2)


def test_mistakes_on_the_command_line(zoo, own, tmp_path, capsys):
    def refused(sentence, *words):
        assert commandline.call("train", "--setting", "smoke", "--store", tmp_path / "runs", *words) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())

    text, bert = ("--dataset", f"folder-text:{own}", "--held-out", "songs"), ("--model", f"hf:{zoo}/bert")
    refused("must be a folder with config.json", *text, "--model", f"hf:{tmp_path}/none")
    refused("must be a folder with config.json", *text, "--model", "hf:")
    refused("which hf:bert@", "--model", f"hf:{zoo}/bert")  # digits are images
    refused("has no ImageNet weights", *text, *bert, "--image-size", "12", "--weights", "imagenet")
    other = ("--weights", zoo / "distilbert")
    refused("does not fit hf:bert@", *text, *bert, "--image-size", "12", *other)
    refused("has positions for 32 word pieces, got 48", *text, "--model", f"hf:{zoo}/bert")
    refused("has no weights", *text, "--model", f"hf:{zoo}/bert", "--weights", tmp_path)


def test_a_finished_classifier_is_imported(zoo, own, tmp_path, capsys):
    words = (
        "--model",
        f"hf:{zoo}/bert",
        "--dataset",
        f"folder-text:{own}",
        "--held-out",
        "songs",
        "--image-size",
        "12",
    )
    words += ("--store", tmp_path / "runs")
    assert commandline.call("import", zoo / "bert" / "model.safetensors", *words) == 0
    (run,) = RunStore(tmp_path / "runs").runs()
    spec, place = run_of(zoo / "bert", own)
    rebuilt = finished(run.spec, domains(spec, place).data, place)
    arrays, _ = files.load_arrays(run.checkpoint("last"))
    load(rebuilt, arrays)
    assert torch.equal(rebuilt.eval()(PIECES), built(zoo / "bert").eval()(PIECES))
    assert commandline.call("import", zoo / "encoder" / "model.safetensors", *words) == 2
    assert "model.safetensors has no classifier.bias, classifier.weight" in capsys.readouterr().err


def test_a_transposed_linear_map_is_quantized_as_a_linear_one():
    theirs, linear = torch.nn.Sequential(Conv1D(6, 4)), torch.nn.Sequential(torch.nn.Linear(4, 6))
    with torch.no_grad():
        theirs[0].weight.copy_(linear[0].weight.T)
        theirs[0].bias.copy_(linear[0].bias)
    inputs = torch.randn(9, 5, 4, generator=torch.Generator().manual_seed(0))
    pair = (theirs, linear)
    moments = [second_moments(each, [inputs])["0"] for each in pair]
    torch.testing.assert_close(*moments)
    assert [quantizable(each) for each in pair] == [{"0.weight": 1}, {"0.weight": 0}]
    near = [rounded(each[0].weight, 3, granularity="channel", name="w", axis=1 - i) for i, each in enumerate(pair)]
    assert torch.equal(near[0].quantized.T, near[1].quantized)
    found = []
    for each in pair:
        assert attach(each, bits=3) == ["0"]
        each(inputs).square().sum().backward()
        ((layer, quantizer),) = quantized_layers(each).values()
        axis = channel_axis(layer)
        parts = (quantizer.scale, quantizer.scale.grad, quantized_layers(each)["0"].latent.grad)
        found.append([each(inputs), *(part.movedim(axis, 0) for part in parts)])
    assert found[0][1].shape == (6, 1)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "quantizer", [QuantSpec(bits=4), RTNSpec(bits=4), OBCSpec(bits=4, images=8)], ids=lambda q: q.kind
)
def test_gpt2_is_quantized_in_and_after_training(zoo, own, tmp_path, quantizer):
    switch = 0 if isinstance(quantizer, QuantSpec) else None
    spec, place = run_of(zoo / "gpt2", own, quantizer=quantizer, switch=switch)
    store = RunStore(tmp_path)
    if spec.parent:
        train([spec.parent], store, place)
    train([spec], store, place)
    loaded = checkpoint_network(store.run(spec), "last", place)
    layers = quantized_layers(loaded)
    assert [name.rpartition(".h.")[2] for name in layers] == [
        "0.attn.c_attn",
        "0.attn.c_proj",
        "0.mlp.c_fc",
        "0.mlp.c_proj",
    ]
    for layer, fixed in layers.values():
        codes = layer.weight / fixed.scale
        assert fixed.scale.shape == (1, layer.nf) and (codes - codes.round()).abs().max() < 1e-3
        assert codes.round().unique(dim=0).numel() > 4
