"""CLIP from a folder of transformers: its logits are CLIP's zero-shot ones, its image tower is trained; all tiny."""

import json

import commandline
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_saved_models import WORDS

from flatlab import files
from flatlab.errors import UserError
from flatlab.loading.data import domains
from flatlab.loading.network import finished, network
from flatlab.models import clip, saved
from flatlab.quant.attach import layers
from flatlab.specs.run import Place, RunSpec
from flatlab.store.runs import RunStore

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TOWER, "vocab_size": len(WORDS), "max_position_embeddings": 20, "bos_token_id": 2, "eos_token_id": 3}
IMAGES = {**TOWER, "image_size": 16, "patch_size": 8}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tiny"
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config={**TEXT, "pad_token_id": 0}, vision_config=IMAGES, projection_dim=12)
    transformers.CLIPModel(config).save_pretrained(path)
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS[:-4], "photo", "dog", "cat", "of"]))
    transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(path)
    return path


def run_of(folder, tree):
    fields = {"dataset": f"folder:{tree.name}", "held_out": "sketch", "image_size": 16, "steps": 1, "eval_every": 1}
    weights = folder / "model.safetensors"
    fields |= {"model": saved.named(f"clip:{folder}"), "lr": 1e-3, "weights": f"sha256:{files.file_hash(weights)}"}
    return RunSpec(**fields), Place(data_dir=str(tree), model_dir=str(folder), weights_file=str(weights))


def test_the_logits_are_those_of_clip(folder, tmp_path):
    spec, place = run_of(folder, commandline.pets(tmp_path / "pets"))
    data = domains(spec, place).data
    built = network(spec, data, place).eval()
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        [f"a photo of a {name}." for name in data.classes], padding=True, return_tensors="pt"
    )
    images = data.domains[0].images[:3]
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in clip.CLIPS)
    expected = theirs(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        pixel_values=(images / 255 - mean) / std,
    ).logits_per_image
    torch.testing.assert_close(built(data.normalise(images)), expected, rtol=1e-4, atol=1e-4)
    trained = {name for name, each in built.named_parameters() if each.requires_grad}
    assert "head.weight" not in trained and not any("text" in name for name in built.state_dict())
    assert next(iter(layers(built))) == "features.vision_model.embeddings.patch_embedding"


@pytest.mark.slow
def test_clip_is_trained_quantized_and_measured_by_the_commands(folder, tmp_path):
    tree, store = commandline.pets(tmp_path / "pets"), tmp_path / "runs"
    words = ("--dataset", f"folder:{tree}", "--model", f"clip:{folder}", "--image-size", "16", "--seeds", "1")
    here = ("--held-out", "sketch", "--store", store)
    assert commandline.call("train", "--method", "QT-DoG", "--setting", "smoke", *words, *here) == 0
    (run,) = (each for each in RunStore(store).runs() if each.spec.quantizer)
    _, place = run_of(folder, tree)
    start = network(run.spec, domains(run.spec, place).data, place)
    arrays, _ = files.load_arrays(run.checkpoint("last"))
    assert torch.equal(torch.from_numpy(arrays["head.weight"].copy()), start.head.weight)  # stays frozen
    assert finished(run.spec, domains(run.spec, place).data, place).head.weight.shape == (2, 12)
    sizes = ("--radii", "0.5", "--samples", "2", "--images", "4", "--out", tmp_path / "out")
    assert commandline.call("flatness", "QT-DoG", *sizes, *here) == 0


def test_a_checkpoint_of_clip_is_imported_with_the_vectors_of_its_own_text_tower(folder, tmp_path, capsys):
    tree, store = commandline.pets(tmp_path / "pets"), tmp_path / "runs"
    words = ("--dataset", f"folder:{tree}", "--held-out", "sketch", "--model", f"clip:{folder}", "--image-size", "16")
    tuned = {key: each * 1.5 for key, each in load_file(folder / "model.safetensors").items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    assert commandline.call("import", tmp_path / "tuned.safetensors", *words, "--store", store, "--json") == 0
    (run,) = RunStore(store).runs()
    spec, place = run_of(folder, tree)
    save_file(tuned, folder / "model.safetensors")  # the folder of that checkpoint: trained from it, one starts there
    spec = spec.replace(weights=f"sha256:{files.file_hash(folder / 'model.safetensors')}")
    expected = network(spec, domains(spec, place).data, place).state_dict()
    arrays, _ = files.load_arrays(run.checkpoint("last"))
    assert arrays.keys() == expected.keys()
    assert all(torch.equal(torch.from_numpy(each.copy()), expected[name]) for name, each in arrays.items())
    save_file({name: each.contiguous() for name, each in expected.items()}, tmp_path / "ours.safetensors")
    assert commandline.call("import", tmp_path / "ours.safetensors", *words, "--store", store) == 0  # by our names
    save_file({key: each for key, each in tuned.items() if "text" not in key}, tmp_path / "half.safetensors")
    assert commandline.call("import", tmp_path / "half.safetensors", *words, "--store", store) == 2
    assert "does not fit the text tower, which has 21 tensors: 21 missing" in capsys.readouterr().err.replace("\n", " ")


def test_what_does_not_fit_is_refused(folder, tmp_path, capsys):
    tree = commandline.pets(tmp_path / "pets")

    def refused(sentence, *words):
        given = ("--dataset", f"folder:{tree}", "--held-out", "sketch", "--seeds", "1", "--setting", "smoke")
        assert commandline.call("train", *given, "--store", tmp_path / "runs", *words) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())

    ours = ("--model", f"clip:{folder}", "--image-size", "16")
    refused("takes images of 16 pixels, got 32: write --image-size 16", *ours[:2], "--image-size", "32")
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    save_file({key: each for key, each in state.items() if "text" not in key}, folder / "model.safetensors")
    refused("does not fit the text tower, which has 21 tensors: 21 missing (first text_model", *ours)
    save_file({key: each for key, each in state.items() if "fc2" not in key}, folder / "model.safetensors")
    refused("missing (first vision_model.encoder.layers.0.mlp.fc2.", *ours)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    refused("needs a folder whose config.json has the model_type clip", *ours)
    with pytest.raises(UserError, match="CLIP needs images of 3 channels, got 1"):
        clip.image_tower(json.dumps(config), 1)
