"""Wrong commands, generated: each option of each command with what it cannot mean is one sentence, and no work."""

import re

import pytest
from commandline import DOCUMENTED, TINY, call, only_run

from flatlab.cli import app
from flatlab.jobs import local
from flatlab.store.runs import RunStore

HUGE = 10**26
JUNK = {int: ("ten", "1.5", "nan", "-1", HUGE), float: ("fast", "nan", "inf", "-1", "1e300")}
MORE = [  # what does nothing or contradicts in this combination; RUN is the store's one run
    "flatness RUN --samples 10 --block-size 5",
    "flatness RUN --samples 10 --rel-error 0.1",
    "flatness RUN --radii 1e308",
    "flatness RUN --radii 0",
    "flatness RUN --space latent",
    "flatness RUN --params nix*",
    "flatness RUN --data-dir .",
    "flatness RUN --model-dir .",
    "flatness QT-DoG",
    "flatness ERM --held-out rot45",
    "landscape RUN RUN --axes line",
    "landscape RUN --axes runs --extent 2",
    "landscape RUN --no-triangle --rel-error 0.1",
    "hessian RUN --domains nix",
    "hessian RUN --domains source --domains source",
    "noise RUN",
    "noise RUN --samples 5",
    "export RUN",
    "runs merge --from STORE",
    "train --held-out rot0 --bits 4",
    "train --held-out rot0 --device cpu:7",
    "train --held-out rot0 --weights nix.pth",
    "train --held-out rot0 --weights imagenet",
    "train --dataset digits --data-dir .",
    "reproduce fig3 --controls",
    "reproduce fig3 --datasets ,",
    "reproduce fig99",
    "data check digits --data-dir .",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrong") / "runs"
    assert call("train", *TINY, "--store", root) == 0
    (root.parent / "file").write_text("no folder")
    return root


def commands():
    """Yield each command with its words."""
    group = app.typer.main.get_command(app.app)
    for name, command in group.commands.items():
        below = getattr(command, "commands", {})
        yield from ((f"{name} {each}", found) for each, found in below.items()) if below else [(name, command)]


def wrong():
    """Yield, for each option of each command, words that are wrong whatever the other words are."""
    for name, command in commands():
        yield name, ["--nix"]
        for param in command.params:
            if param.param_type_name == "argument" or param.name in ("help", "debug"):
                continue
            option = param.opts[0]
            if param.is_flag:
                yield name, [option, option]
                continue
            note = str(param.type_descriptor.annotation)
            kind = next((kind for kind in JUNK if kind.__name__ in note), None)
            yield from ((name, [f"{option}={junk}"]) for junk in ("", " ", *JUNK.get(kind, ())))
            if not param.multiple:
                yield name, [option, "1", option, "1"]
            if "Path" in note and option != "--file":
                yield name, [option, "file"]


def tree(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def refused(capsys, words):
    capsys.readouterr()
    code, told = call(*words), capsys.readouterr()
    return code == 2 and not told.out and told.err.count("\n") == 1


@pytest.fixture
def no_work(store, monkeypatch):
    """Fail where work begins or the store changes."""
    monkeypatch.chdir(store.parent)
    before = tree(store.parent)
    yield
    assert tree(store.parent) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_each_option_refuses_what_it_cannot_mean(store, no_work, capsys, name):
    arguments = {
        "reproduce": ["fig3"],
        "runs merge": ["--from", "elsewhere"],
        "data check": ["digits"],
        "import": ["file"],
    }
    run = {"flatness", "noise", "hessian", "landscape", "audit", "replay", "stability", "export", "ensemble"}
    first = arguments.get(name, [only_run(store)] if name in run | {"runs show", "runs rm"} else [])
    taken = [words for mine, words in wrong() if mine == name]
    bad = [words for words in taken if not refused(capsys, [*name.split(), *first, *words])]
    assert len(taken) > 1 and not bad


@pytest.mark.parametrize("words", MORE)
def test_what_has_no_effect_or_no_object_is_refused(store, no_work, capsys, monkeypatch, words):
    def begin(*_, **__):
        raise AssertionError("work begins")

    monkeypatch.setattr(local, "run_locally", begin)
    given = words.replace("RUN", only_run(store)).replace("STORE", str(store)).split()
    where = [] if given[0] == "data" else ["--store", str(store)]
    assert refused(capsys, [*given, *where, *(["--setting", "smoke"] if given[0] in ("train", "reproduce") else [])])


def test_home_is_expanded_in_paths(store, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(store.parent))
    monkeypatch.setenv("FLATLAB_STORE", "~/runs")
    assert call("runs", "list") == 0
    assert RunStore(store).runs()[0].spec.digest[:6] in capsys.readouterr().out


def test_the_answer_of_each_command_is_documented():
    named = {re.match(r"[a-z]+( [a-z]+)?", each)[0] for each in DOCUMENTED if not each.startswith("-")}
    assert {name for name, _ in commands()} <= named | {"latency"}  # which says what its table says
