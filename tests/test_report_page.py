"""`flatlab report`: one page without network, of runs and of saved results; opened in Chromium, where there is one."""

import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
import test_saving as saved_results
import torch
from commandline import call, documented
from stores import ERM, PLACE, QT, refuses, trained
from torch import nn

import flatlab
from flatlab.measure.runner import measure
from flatlab.report.html import conclusions, page
from flatlab.report.surface import barrier_sentence
from flatlab.specs.measurements import SizeSpec, SphereSpec

pytest.importorskip("plotly", reason="plotly is not installed: uv sync --extra report")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
SPHERE = SphereSpec(radii=(0.5, 1.0), num_samples=3, images=4)


def landscape(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    torch.manual_seed(9)
    batches = [(torch.randn(40, 4), torch.randint(0, 3, (40,)))]
    return flatlab.Landscape(model, batches, nn.functional.cross_entropy)


def surface():
    at = landscape()
    points = [at.point + step * torch.randn(at.num_params) for step in (0.3, 0.6, 0.9)]
    return flatlab.plane(at, flatlab.trajectory_directions(at, points), grid=7)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with two measured runs, a saved surface whose name needs escaping, and the report of all."""
    root = tmp_path_factory.mktemp("pages")
    store = trained(root / "runs", ERM)
    trained(root / "runs", QT)
    for spec in (ERM, QT):
        measure(store.run(spec), SPHERE, PLACE)
    measure(store.run(QT), SizeSpec(), PLACE)
    surface().save(root / "a <b> & c.npz")
    words = (ERM.digest, QT.digest, root / "a <b> & c.npz", "--store", root / "runs", "--out", root)
    assert call("report", *words) == 0
    return root


def test_the_page_is_whole_and_small(made):
    text = (made / "report.html").read_text()
    assert len(text.encode()) < page.LARGEST
    without_plotly = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!#)|@import|url\((?!#)', without_plotly), "nothing is fetched"
    assert "a &lt;b&gt; &amp; c" in text and "<b>" not in without_plotly


def test_the_page_has_the_numbers_and_sentences_of_the_commands(made):
    text = (made / "report.html").read_text()
    run = flatlab.RunStore(made / "runs").run(ERM)
    found = run.result(SPHERE)
    source = found.of([name for name in found.strata if name != ERM.held_out])
    assert f"{source.value[0]:.4g}" in text and f"{source.interval()[1][1]:.4g}" in text
    assert re.search(rf"{run.name} \(digits, [\w-]+, seed 0\) classifies [\d.]+ % of the held-out", text)
    assert "command that writes this report again" in text and ERM.digest in text and "Flatness, source domains" in text
    assert re.search(r"(is flatter|not distinguishable)", text), "a verdict on the two"


def test_saved_results_are_summarised_in_the_sentences_of_their_classes(tmp_path):
    """Also without a run; two files of one name are both shown."""
    for kind in ("one", "two"):
        (tmp_path / kind).mkdir()
    a, b = (landscape(seed) for seed in (0, 1))
    line, paired = flatlab.connect(a, b, grid=3), flatlab.compare_flatness(a, b, (0.5, 1.0), num_samples=3)
    sphere = flatlab.sphere_flatness(a, (0.5, 1.0), num_samples=3)
    made = {"one/same": line, "two/same": paired, "sphere": sphere, "check": flatlab.trace_check(a, rel_error=0.3)}
    for name, found in made.items():
        found.save(tmp_path / f"{name}.npz")
    names = [tmp_path / f"{name}.npz" for name in made]
    assert call("report", *names, "--store", tmp_path / "none", "--out", tmp_path) == 0
    told = unescape((tmp_path / "report.html").read_text()).partition("<h2>Summary</h2>")[2].partition("<h2>")[0]
    assert f"<li>{names[0]} (Connection): {barrier_sentence(line)}</li>" in told
    assert f"<li>{names[1]} (PairedDifference): {paired.verdict()}</li>" in told
    assert f"<li>check (TraceCheck): {made['check'].verdict()}</li>" in told
    assert f"<li>sphere (SphereFlatness): its value is {sphere.value[0]:.4g} [" in told


@pytest.mark.parametrize("kind", saved_results.MADE, ids=lambda kind: kind.__name__)
def test_each_result_has_a_summary(kind):
    """The verdict and remarks of its class, whole and first in line; else numbers, or that there is no verdict."""
    found = saved_results.MADE[kind]()
    sentences = conclusions.summary("mine", found)
    own = [*([found.verdict()] if hasattr(found, "verdict") else []), *getattr(found, "remarks", ())]
    assert sentences and all(each.startswith(f"mine ({kind.__name__}): ") for each in sentences)
    assert [each.partition(": ")[2] for each in sentences][-len(own) :] == own or not own
    assert "nan" not in " ".join(sentences)


def test_a_missed_accuracy_is_said():
    found = flatlab.hessian_spectrum(landscape(), k=1)
    assert found.converged and len(conclusions.summary("top", found)) == 1
    (_, missed) = conclusions.summary("top", replace(found, verified=False))
    assert missed == "top (Spectrum): the accuracy that was asked for is not reached."


def test_its_place_is_answered_as_json(made, capsys):
    assert call("report", ERM.digest, "--store", made / "runs", "--out", made / "json", "--json") == 0
    assert documented("report", capsys.readouterr().out) == {"written": [str(made / "json" / "report.html")]}


def test_what_is_no_run_and_no_result_is_refused(made, capsys):
    (made / "text.npz").write_text("nothing")
    for word, sentence in {made / "text.npz": "another kind", made / "absent.npz": "does not exist"}.items():
        assert call("report", word, "--store", made / "runs", "--out", made) == 2
        assert sentence in capsys.readouterr().err


def test_a_page_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LARGEST", 100)
    refuses(lambda: page.write(tmp_path / "r.html", "title", [page.Section("one")]), "at most 0.0001 MB, got")
    assert not list(tmp_path.iterdir())


def test_interactive_pictures_hold_the_numbers():
    found = surface()
    relief, marks = found.interactive().data
    assert np.array_equal(relief.z, found.of().T) and np.array_equal(relief.x, found.x)
    assert np.allclose(np.transpose([marks.x, marks.y]), found.marks) and list(marks.text) == list(found.mark_labels)
    assert marks.mode == "lines+markers" and found.of().min() - 1e-9 <= min(marks.z) <= max(marks.z) <= found.of().max()
    at = flatlab.Landscape(
        nn.Linear(2, 2).eval(), [(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))], nn.functional.cross_entropy
    )
    flat = flatlab.sphere_flatness(at, (0.5, 1.0), num_samples=4)
    band, curve = flat.interactive("mine").data
    assert np.array_equal(curve.y, flat.value) and curve.name == "mine"
    low, high = flat.interval()
    assert list(band.y) == [*high, *low[::-1]]


TURN = """<script>window.addEventListener("load", async () => {
  const gd = [...document.querySelectorAll(".js-plotly-plot")].find((each) => each._fullLayout.scene);
  await Plotly.relayout(gd, {"scene.camera.eye": {x: 0.1, y: 2.0, z: 0.5}});
  document.title = "turned " + gd._fullLayout.scene._scene.getCamera().eye.y + " of "
    + document.querySelectorAll(".js-plotly-plot").length;
});</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed: apt install chromium")
@pytest.mark.slow
def test_the_page_opens_in_a_browser_without_an_error_and_the_surface_turns(made, tmp_path):
    copy = tmp_path / "page.html"
    copy.write_text((made / "report.html").read_text().replace("</body>", TURN))
    words = ["--headless", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-gpu"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    done = subprocess.run([BROWSER, *words, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=200)
    assert not re.findall(r":CONSOLE.*(?:Uncaught|Error|Failed|Refused).*", done.stderr), "others are on speed alone"
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title and title[1].startswith("turned 2 of "), done.stderr[-2000:]
    assert int(title[1].split()[-1]) == (made / "report.html").read_text().count('class="plotly-graph-div"')
