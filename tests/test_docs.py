"""The documentation's own functions: joined outputs, and a reference that names all that is public."""

import os
import runpy
import sys
from pathlib import Path

import pytest

import flatlab

pytest.importorskip("myst_nb")
CONF = runpy.run_path(str(Path(__file__).resolve().parents[1] / "docs" / "conf.py"))


def test_pages_call_the_commands_of_this_interpreter():
    assert os.environ["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def part(name, text):
    return {"output_type": "stream", "name": name, "text": text}


def test_parts_of_a_stream_are_joined_where_they_were_cut():
    shown = {"output_type": "execute_result", "data": {}}
    outputs = [part("stdout", "dom"), part("stderr", "1 job\n"), part("stdout", "ain  \n pet"), shown]
    assert CONF["joined"](outputs) == [part("stdout", "domain\n pet\n"), shown, part("stderr", "1 job\n")]


def test_the_reference_has_every_public_name_and_field():
    text = CONF["reference"]()
    for name in flatlab.api.__all__:
        assert f":: flatlab.api.{name}\n" in text
    for name in (*flatlab.watch.__all__, "lightning.FlatnessCallback", "transformers.FlatnessCallback"):
        assert f":: flatlab.watch.{name}\n" in text
    assert ":: flatlab.resources.published\n" in text
    for spec in (flatlab.RunSpec, flatlab.Setting, flatlab.SphereSpec):
        listed = text.partition(f":: flatlab.api.{spec.__name__}\n")[2].partition(".. auto")[0]
        assert all(f"   - ``{field}``: " in listed for field in spec.model_fields)
