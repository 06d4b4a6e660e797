"""Latency: engines in turn, medians with intervals, and what the table says of machine and file."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from commandline import call
from scipy import stats
from stores import PLACE, TINY, trained

from flatlab.deploy import engines, latency
from flatlab.errors import UserError
from flatlab.results.size import Latency, median
from flatlab.specs.methods import METHODS, compose

QT = compose(METHODS["QT-DoG"], TINY, held_out="rot45", seed=0, trial_seed=0)


def test_engines_are_called_once_in_each_round_and_follow_each_other_in_all_orders():
    order = []
    times = latency.interleaved([lambda each=each: order.append(each) for each in "abc"], 40)
    assert "".join(order[:9]) == "aaabbbccc" and times.shape == (3, 40) and (times > 0).all()
    rounds = ["".join(order[start : start + 3]) for start in range(9, len(order), 3)]
    assert len(rounds) == 40 and len(set(rounds)) == 6 and {"".join(sorted(each)) for each in rounds} == {"abc"}
    follows = Counter(each[place : place + 2] for each in rounds for place in (0, 1))
    assert len(follows) == 6 and min(follows.values()) >= 4


@pytest.mark.parametrize("count", [6, 7, 11, 30, 101])
def test_the_interval_of_the_median_holds_at_least_95_percent(count):
    value, low, high = median(np.arange(count, dtype=float))
    assert value == (count - 1) / 2 == (low + high) / 2
    first = int(low)  # the order statistics are the numbers themselves
    assert 1 - 2 * stats.binom.cdf(first, count, 0.5) >= 0.95
    assert count < 9 or 1 - 2 * stats.binom.cdf(first + 1, count, 0.5) < 0.95  # and is no wider than that


@pytest.mark.slow
def test_the_command_times_a_run_and_a_file(tmp_path, capsys):
    run = trained(tmp_path, QT).run(QT)
    assert call("export", QT.digest, "--store", tmp_path, "--format", "onnx", "--file", tmp_path / "net.onnx") == 0
    capsys.readouterr()
    assert call("latency", QT.digest, tmp_path / "net.onnx", "--store", tmp_path, "--rounds", "6", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["engine"] for row in rows} == {"torch", "onnxruntime", "weight-only", "int8", "file"}
    assert {(row["batch"]) for row in rows} == {1, 32} and 1 in {row["threads"] for row in rows}
    for row in rows:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["peak_mb"] > 0
    size = {row["engine"]: row["bytes"] for row in rows}
    assert size["file"] == (tmp_path / "net.onnx").stat().st_size == size["weight-only"] < size["onnxruntime"]
    assert run.done


def test_what_is_no_file_of_images_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.onnx is no file; name one that `flatlab export RUN --format onnx`"):
        engines._of_file(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no")
    with pytest.raises(UserError, match=r"^onnxruntime \S+ cannot run \S+bad\.onnx"):
        engines._of_file(tmp_path / "bad.onnx")


def times(**changes):
    """Three engines of a network, and an ensemble of two with one member: seconds in 20 rounds that drift alike."""
    drift = np.linspace(1.0, 3.0, 20) * np.random.default_rng(0).uniform(0.99, 1.01, (5, 20))
    each = np.array([4.0, 3.0, 2.0, 6.1, 3.05])[:, None] * drift
    fields = {
        "seconds": each.reshape(5, 1, 1, 20),
        "networks": ("net", "net", "net", "both 12ab", "one member of 12ab"),
        "engines": ("torch", "onnxruntime", "int8", "weight-only", "onnxruntime"),
        "members": (1, 1, 1, 2, 1),
        "threads": (1,),
        "batches": (1,),
        "bytes": (400, 400, 100, 200, 400),
        "peaks": np.array([40.0, 30.0, 10.0, 90.0, 30.0]),
        "accuracies": np.full(5, np.nan),
        "processor": "one",
        "saturates": False,
    }
    return Latency(**{**fields, **changes})


def test_ratios_are_paired_within_rounds_and_have_intervals():
    found = times()
    value, low, high = found.ratio(1, 2, (0, 0))
    assert low <= value <= high and high - low < 0.02 and value == pytest.approx(1.5, rel=0.01)
    apart = found.to_frame().set_index("network").loc["net"]
    assert (apart["high_ms"] > 1.2 * apart["low_ms"]).all()  # the drift, which ratios are free of
    lines = found.remarks
    assert lines[0].startswith("net, batch 1, threads 1: int8 is 1.50 [1.50, 1.51] times as fast as full precision in ")
    assert "in onnxruntime." in lines[0] and "VNNI" not in " ".join(lines)
    assert lines[1].startswith("both 12ab, batch 1, threads 1: its 2 networks (weight-only) take 1.99 [")
    assert "with 0.50 times the bytes and 3.00 times the memory; the paper states no computational" in lines[1]
    assert lines[2] == "Each 95 % interval is that of one ratio alone; there is no joint correction."
    assert "34.28 ms" in lines[3] and "a ratio of 1.63" in lines[3]
    assert times(load=1.25).remarks[3] == "Load average over the minute before timing: 1.2."
    assert any("no VNNI" in each for each in times(saturates=True).remarks)
    alike = times(seconds=np.random.default_rng(1).uniform(0.9, 1.1, (5, 1, 1, 20)))
    assert alike.remarks[0].endswith(", not distinguishable from 1 at 95 %.")


def test_times_are_written_and_read_again():
    found = times()
    again = Latency.from_arrays(*found.to_arrays())
    assert again.to_frame().equals(found.to_frame()) and again.members == found.members
    assert again.load is None, "files from before it was recorded have none"
    assert Latency.from_arrays(*times(load=0.5).to_arrays()).load == 0.5


def test_the_page_says_under_which_load_it_was_measured():
    from analyses import latency as page

    rows = pd.DataFrame({"processor": ["one", None, "one"], "load": [0.25, None, 3.0]})
    assert page._provenance(rows)[1] == "Load average over the minute before timing: 0.2 to 3.0."
    assert page._provenance(rows.drop(columns="load"))[1] == "The load of the machine was not recorded."


@pytest.mark.slow
def test_a_network_by_name_is_timed_with_random_weights(capsys):
    assert call("latency", "--model", "resnet18", "--image-size", 32, "--rounds", 6, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["engine"] for row in rows} == {"torch", "onnxruntime", "weight-only", "int8"}
    assert {row["network"] for row in rows} == {"resnet18"}


def test_networks_of_sentences_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "calibration", lambda domains, count: [np.zeros((2, 5), np.int64)])
    monkeypatch.setattr(engines.loading_data, "domains", lambda spec, place: None)
    with pytest.raises(UserError, match=r"^words 12ab is of sentences; only networks of images are timed\.$"):
        engines._of_run(SimpleNamespace(name="words 12ab", spec=None), PLACE, tmp_path)


def test_nothing_to_time_is_refused(capsys):
    assert call("latency") == 2
    assert "Nothing to time: name runs, ONNX files, or a network by --model." in capsys.readouterr().err
    assert call("latency", "--image-size", 32) == 2
    assert "--image-size does nothing without --model" in capsys.readouterr().err
    assert call("latency", "--model", "vit_b_16", "--image-size", 32) == 2
    assert "vit_b_16 takes images of 224 pixels, got 32: write --image-size 224." in capsys.readouterr().err
    assert call("latency", "--model", "digits-cnn") == 2
    assert "resnet50" in capsys.readouterr().err
