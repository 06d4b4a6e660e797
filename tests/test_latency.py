"""Latency: engines in turn, medians with intervals, and what the table says of machine and file."""

import json

import numpy as np
import pytest
from commandline import call
from scipy import stats
from stores import TINY, trained

from flatlab.deploy import latency
from flatlab.errors import UserError
from flatlab.specs.methods import METHODS, compose

QT = compose(METHODS["QT-DoG"], TINY, held_out="rot45", seed=0, trial_seed=0)


def test_engines_are_called_in_turn_a_different_one_first():
    order = []
    times = latency.interleaved([lambda each=each: order.append(each) for each in "abc"], 4)
    assert "".join(order) == "aaabbbccc" + "abc" + "bca" + "cab" + "abc"
    assert times.shape == (3, 4) and (times > 0).all()


@pytest.mark.parametrize("count", [6, 7, 11, 30, 101])
def test_the_interval_of_the_median_holds_at_least_95_percent(count):
    found = latency.median(np.arange(count, dtype=float))
    assert found["median_ms"] == (count - 1) / 2 == (found["low_ms"] + found["high_ms"]) / 2
    first = int(found["low_ms"])  # the order statistics are the numbers themselves
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
        latency._of_file(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no")
    with pytest.raises(UserError, match=r"^onnxruntime \S+ cannot run \S+bad\.onnx"):
        latency._of_file(tmp_path / "bad.onnx")
