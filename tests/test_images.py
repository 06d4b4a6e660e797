"""Folders and files as people have them: links, pipes, bombs, wrong suffixes, and the modes that images come in."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from commandline import call
from PIL import Image

from flatlab.data import catalog, decode, folders
from flatlab.errors import UserError

GREY = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], -1)
DOMAINS = ("left", "right")


@pytest.fixture
def tree(tmp_path):
    """Two domains of two classes, three images in each."""
    for domain in DOMAINS:
        for each in ("cat", "dog"):
            (tmp_path / "set" / domain / each).mkdir(parents=True)
            for k in range(3):
                Image.fromarray(COLOURS).save(tmp_path / "set" / domain / each / f"{k}.png")
    return tmp_path / "set"


def count(root):
    return folders.listing("folder:set", root).count


# --- links, pipes, devices ---------------------------------------------------------------------------------------

LINKS = {
    "to its own folder": ("left/cat/loop", "."),
    "to its domain": ("left/cat/loop", ".."),
    "to the root": ("left/cat/loop", "../.."),
    "to the file system's root": ("left/cat/loop", "/"),
    "to another class": ("left/cat/loop", "../dog"),
    "to another domain's class": ("left/cat/loop", "../../right/dog"),
    "as a class, to the root": ("left/loop", "../.."),
    "as a class, to its domain": ("left/loop", "."),
    "as a domain, to the root": ("loop", "."),
    "as a domain, above the root": ("loop", ".."),
}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_leads_back_adds_nothing(tree, name):
    place, target = LINKS[name]
    before = folders.listing("folder:set", tree)
    (tree / place).symlink_to(target)
    assert folders.listing("folder:set", tree) == before
    assert catalog.sizes("folder:set", tree) == dict.fromkeys(DOMAINS, 6)


def test_two_folders_that_link_to_each_other_count_once(tree):
    for first, second in (("cat", "dog"), ("dog", "cat")):
        (tree / "left" / first / "other").symlink_to(f"../{second}")
    assert count(tree) == 12


def test_folders_elsewhere_are_read_once_by_links(tree, tmp_path):
    (tree / "left" / "cat").rename(tmp_path / "cats")
    (tree / "left" / "cat").symlink_to(tmp_path / "cats")
    (tree / "right").rename(tmp_path / "elsewhere")
    (tree / "right").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "more").mkdir()
    Image.fromarray(GREY).save(tmp_path / "more" / "9.png")
    (tree / "left" / "dog" / "more").symlink_to(tmp_path / "more")
    (tree / "right" / "dog" / "again").symlink_to(tmp_path / "more")
    found = folders.listing("folder:set", tree)
    assert found.count == 13 and [len(found.paths(domain)) for domain in DOMAINS] == [7, 6]
    assert found.tree["left"]["dog"][-1] == tree / "left" / "dog" / "more" / "9.png"


IRREGULAR = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("gone.png"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("name", IRREGULAR)
def test_what_is_no_regular_file_is_refused_by_name_and_never_opened(tree, name):
    IRREGULAR[name](tree / "left" / "cat" / "x.png")
    sentence = f"{tree}/left/cat/x.png is not a regular file; replace or remove it."
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        folders.listing("folder:set", tree)
    assert folders.check("folder:set", tree)[0].unreadable == (sentence,)
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        decode.decode(tree / "left" / "cat" / "x.png", 8)


def test_a_folder_named_like_an_image_is_a_folder(tree):
    (tree / "left" / "cat" / "more.png").mkdir()
    assert count(tree) == 12


# --- formats and limits ------------------------------------------------------------------------------------------


def refused(path):
    with pytest.raises(UserError) as error:
        decode.decode(path, 8)
    assert str(error.value).startswith(f"{path} ") and "\n" not in str(error.value)
    return str(error.value)


def test_no_other_decoder_is_started(tmp_path, monkeypatch):
    Image.fromarray(COLOURS).save(tmp_path / "x.eps")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript"))
    (tmp_path / "x.eps").rename(tmp_path / "x.jpg")
    assert "not an image of a known format (BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP)" in refused(tmp_path / "x.jpg")


def test_a_format_goes_by_its_content_not_its_suffix(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert (decode.decode(tmp_path / "x.jpg", 8).square == COLOURS.transpose(2, 0, 1)).all()


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.fromarray(COLOURS).save(tmp_path / "x.png")
    monkeypatch.setattr(decode, "MOST_PIXELS", 64)
    decode.decode(tmp_path / "x.png", 8)
    monkeypatch.setattr(decode, "MOST_PIXELS", 63)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert "has 8 x 8 pixels; an image must have at most 63: scale it" in refused(tmp_path / "x.png")


def test_a_bomb_is_refused(tmp_path):
    head = b"P5 60000 60000 255\n"
    (tmp_path / "x.pgm").write_bytes(head + b"\0" * 100)
    assert "limit of" in refused(tmp_path / "x.pgm") or "at most" in refused(tmp_path / "x.pgm")


def test_a_file_of_too_many_bytes_is_not_read(tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(2**40)  # sparse
    assert "holds 1,099,511,627,776 bytes; an image file must hold at most 1,073,741,824" in refused(tmp_path / "x.png")


# --- modes -------------------------------------------------------------------------------------------------------


def grey(values, path):
    Image.fromarray(values).save(path)


def pgm(bits):
    values = np.rint(GREY.astype(float) * ((2**bits - 1) / 255)).astype(">u2")
    return lambda path: path.write_bytes(b"P5 8 8 %d\n" % (2**bits - 1) + values.tobytes())


def tiff12(path):
    """Twelve bits a pixel, as cameras and microscopes have them; two pixels in three bytes."""
    values = np.rint(GREY.astype(float) * (4095 / 255)).astype(int).reshape(-1, 2)
    packed = bytes(b for one, two in values.tolist() for b in (one >> 4, (one & 15) << 4 | two >> 8, two & 255))
    entries = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(packed)}
    directory = b"".join(
        np.array([tag, 4], "<u2").tobytes() + np.array([1, value], "<u4").tobytes() for tag, value in entries.items()
    )
    offset = np.array([8 + len(packed)], "<u4").tobytes()
    path.write_bytes(b"II*\0" + offset + packed + np.array([len(entries)], "<u2").tobytes() + directory + bytes(4))


def palette(path, **options):
    Image.fromarray(GREY).convert("P").save(path, **options)


SIXTEEN = GREY.astype(np.uint16) * 257
MODES = {  # how it is written; the largest difference to the same image in eight bits of grey
    "eight.png": (lambda path: grey(GREY, path), 0),
    "sixteen.png": (lambda path: grey(SIXTEEN, path), 0),
    "sixteen.tiff": (lambda path: grey(SIXTEEN, path), 0),
    "big-endian.tiff": (lambda path: grey(SIXTEEN.astype(">u2"), path), 0),
    "sixteen.pgm": (pgm(16), 0),
    "ten.pgm": (pgm(10), 1),
    "twelve.tiff": (tiff12, 0),
    "float.tiff": (lambda path: grey((GREY / 255).astype(np.float32), path), 0),
    "alpha.png": (lambda path: Image.fromarray(GREY).convert("LA").save(path), 0),
    "see-through.png": (lambda path: palette(path, transparency=bytes(range(256))), 0),
    "one-colour.png": (lambda path: palette(path, transparency=3), 0),
    "cmyk.tiff": (lambda path: Image.fromarray(GREY).convert("RGB").convert("CMYK").save(path), 0),
    "cmyk.jpg": (lambda path: Image.fromarray(GREY).convert("RGB").convert("CMYK").save(path, quality=100), 3),
    "ycbcr.tiff": (lambda path: Image.fromarray(GREY).convert("YCbCr").save(path), 1),
    "rgba.webp": (lambda path: Image.fromarray(GREY).convert("RGBA").save(path, lossless=True), 0),
}


@pytest.mark.parametrize("name", MODES)
def test_each_mode_is_scaled_by_its_own_range(tmp_path, name):
    write, tolerance = MODES[name]
    write(tmp_path / name)
    found = decode.decode(tmp_path / name, 8).square.astype(int)
    assert found.shape == (3, 8, 8) and np.abs(found - GREY).max() <= tolerance


@pytest.mark.parametrize("end", ["png", "tiff"])
def test_one_bit_is_black_and_white(tmp_path, end):
    grey(GREY > 99, tmp_path / f"x.{end}")
    assert (decode.decode(tmp_path / f"x.{end}", 8).square == 255 * (GREY > 99)).all()


UNKNOWN = {
    "signed or 32-bit integers, of no known range": GREY.astype(np.int32),
    "floating-point pixels from 0 to 255; they must lie between 0 and 1": GREY.astype(np.float32),
    "floating-point pixels from nan to nan": np.where(GREY > 9, np.nan, 0.5).astype(np.float32),
    "floating-point pixels from -1 to 0": (GREY / 255 - 1).astype(np.float32),
}


@pytest.mark.parametrize("sentence", UNKNOWN)
def test_pixels_of_no_known_range_are_refused(tmp_path, sentence):
    grey(UNKNOWN[sentence], tmp_path / "x.tiff")
    assert sentence in refused(tmp_path / "x.tiff")


# --- the command -------------------------------------------------------------------------------------------------


def test_data_check_says_which_image_and_fails(tree, capsys):
    words = ("data", "check", f"folder:{tree}")
    assert call(*words) == 0
    capsys.readouterr()
    (tree / "left" / "cat" / "0.png").write_text("text")
    os.mkfifo(tree / "right" / "dog" / "pipe.jpg")
    assert call(*words) == 1
    told = capsys.readouterr().out.replace("\n", " ")
    assert f"{tree}/left/cat/0.png is empty or not an image" in told and "pipe.jpg is not a regular file" in told
    assert call(*words, "--json") == 1
    left, right = json.loads(capsys.readouterr().out)
    assert (left["off"], left["ok"], len(right["unreadable"])) == ("1 image cannot be decoded", False, 1)
    assert Path(right["unreadable"][0].partition(" ")[0]).name == "pipe.jpg"
