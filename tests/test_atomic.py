"""Pictures and tables are written aside: a full disk leaves the old file; foreign names are escaped on the terminal."""

import errno
import io
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from rich.console import Console
from rich.progress import Progress

from flatlab import files, plots
from flatlab.cli import display, errors
from flatlab.cli.errors import of_system
from flatlab.errors import UserError, printable


def _figure():
    figure, ax = plt.subplots()
    ax.plot([0, 1])
    return figure


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    old = {path: path.read_bytes() for path in plots.save(_figure(), tmp_path / "fig")}
    assert len(old) == 2

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)  # the content is in the temporary file by then
    with pytest.raises(OSError, match="No space left") as caught:
        plots.save(_figure(), tmp_path / "fig")
    sentence = of_system(caught.value)
    assert (
        str(tmp_path / "fig.pdf") in sentence
        and "free some space, or choose another folder with --store or --out" in sentence
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == old
    assert plt.get_fignums() == []


LIMITED = """
import errno, pathlib, resource, sys
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from flatlab import files, plots
from flatlab.cli.errors import of_system
folder = pathlib.Path(sys.argv[1])
figure, ax = plt.subplots()
ax.plot([0, 1])
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
writes = [lambda: plots.save(figure, folder / "fig"), lambda: files.write_bytes(folder / "table.csv", b"x" * 10_000)]
for write in writes:
    try:
        write()
    except OSError as error:
        assert error.errno == errno.EFBIG
        print(of_system(error))
"""


def test_a_limit_on_the_size_of_files_leaves_the_old_ones(tmp_path):
    plots.save(_figure(), tmp_path / "fig")
    files.write_bytes(tmp_path / "table.csv", b"old")
    old = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=True)
    told = done.stdout.splitlines()
    assert [str(tmp_path / name) in line for name, line in zip(["fig.pdf", "table.csv"], told, strict=True)] == [
        True
    ] * 2
    assert all("free some space, or choose another folder with --store or --out" in line for line in told)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_temporary_names_do_not_collide(tmp_path, monkeypatch):
    """Containers and nodes share process ids, not names."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with files.aside(tmp_path / "x") as one, files.aside(tmp_path / "x") as other:
        assert one != other and files.HOST in one.name
        one.write_bytes(b"1")
        other.write_bytes(b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


# --- the terminal

HOSTILE = "a\x1b[31m[red]b\nc\\"


def test_foreign_names_are_escaped(capsys, monkeypatch):
    assert printable(HOSTILE) == "a\\x1b[31m[red]b\\nc\\"
    assert printable("γ = 6 µs, Größe") == "γ = 6 µs, Größe"
    assert str(UserError(HOSTILE, "two")) == "a\\x1b[31m[red]b\\nc\\\ntwo"
    errors.say(HOSTILE.replace("\n", ""))
    assert "a\\x1b[31m[red]bc\\" in capsys.readouterr().err
    console = Console(width=200, force_terminal=False, record=True, file=sys.stdout)
    monkeypatch.setattr(display, "out", console)
    display.frame(pd.DataFrame([{"domain": HOSTILE, "[bold]x": 1.0}]), f"Title {HOSTILE}")
    told = console.export_text()
    assert "\x1b" not in told and told.count("a\\x1b[31m[red]b\\nc\\") == 2 and "[bold]x" in told


def test_progress_shows_names_as_they_are(capsys, monkeypatch):
    monkeypatch.setattr(display, "err", Console(stderr=True, width=200))
    monkeypatch.setattr(display, "PLAIN_SECONDS", -1.0)
    board = display.Board([], None)
    board({"job": HOSTILE, "share": 0.5})
    board({"job": "worker", "note": HOSTILE})
    assert capsys.readouterr().err.count("a\\x1b[31m[red]b\\nc\\") == 2


def test_outside_a_terminal_each_job_that_ends_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter sets it for its shell lines
    monkeypatch.setattr(display, "err", display._console(stderr=True))
    jobs = [
        SimpleNamespace(name=name, passes=1, kind=("train", "net"), runs=(), measurements=())
        for name in ("first", "second")
    ]
    with display.board(jobs, workers=1) as board, display.counter("images") as count:
        for job in jobs:
            for share in (0.1, 0.2, 0.9):
                board({"job": job.name, "share": share})
                count(1, 2)
            for _ in range(2):  # by two workers
                board({"job": job.name, "finished": True})
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["50%", "100%"]


# --- workers


def test_a_term_signal_has_its_exit_code():
    from flatlab.jobs import worker

    assert worker.STOPPED == 128 + signal.SIGTERM == 143


@pytest.mark.parametrize("width", [80, 60])
def test_a_narrow_terminal_shows_shares_and_times_whole(width):
    console = Console(width=width, force_terminal=True, file=io.StringIO(), color_system=None)
    with Progress(*display.columns(), console=console, auto_refresh=False) as progress:
        progress.add_task("16 of 108 jobs", total=1.0, completed=0.031, left="1:13:01 left")
        name = "train sam on rot15, seed 1  loss 0.013  validation 0.951  target 0.933"
        progress.add_task(name, total=1.0, completed=0.42, left="")
        progress.refresh()
    text = console.file.getvalue()
    assert "16 of 108 jobs" in text and "  3 %" in text and " 42 %" in text
    assert "1:13:01 left" in text and "train sam on r" in text
