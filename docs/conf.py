"""The documentation: every code block is executed when the site is built, and a warning is an error (`-W`)."""

import inspect
import re
import sys
from pathlib import Path

import pydantic

import flatlab
from flatlab import api

HERE = Path(__file__).parent
project, author, release = "flatlab", "The flatlab authors", flatlab.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme, html_title = "furo", f"flatlab {release}"
exclude_patterns = ["_build", "jupyter_execute"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode, nb_execution_raise_on_error, nb_execution_timeout = "force", True, 300
nb_execution_excludepatterns = ["clusters.md", "slurm.md", "ray.md", "clouds.md"]
nb_merge_streams = True
nb_render_markdown_format = "myst"  # CommonMark has no tables
autodoc_typehints, autodoc_member_order = "none", "bysource"
napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # a name that several result classes share, such as `value`


def plain(app, what, name, obj, options, lines):
    """Escape what docstrings hold as plain text and reStructuredText would read as markup."""
    for index, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`|^\s*:[^:]+:|^\s*\.\. \S+::.*$)", line)
        lines[index] = "".join(
            part if place % 2 else re.sub(r"([|*])|(?<=\w)(_)(?!\w)", r"\\\1\2", part)
            for place, part in enumerate(parts)
        )


def reference():
    """Return the reference of every public name, in the groups of `api.__all__`, as reStructuredText."""
    groups, title = {}, ""
    for line in inspect.getsource(api).partition("__all__ = [")[2].splitlines():
        if line.strip().startswith("#"):
            title = line.strip("# ").capitalize()
        elif found := re.match(r'\s+"(\w+)"', line):
            groups.setdefault(title, []).append(found[1])
    text = ["API reference", "=============", "", "``flatlab.NAME`` is ``flatlab.api.NAME``.", ""]
    for title, names in groups.items():
        text += [title, "-" * len(title), ""]
        for name in names:
            each = getattr(api, name)
            if not callable(each):  # a constant, whose docstring is that of its class
                text += [f".. py:data:: flatlab.api.{name}", "", f"   Of class ``{type(each).__name__}``.", ""]
                continue
            kind = "class" if inspect.isclass(each) else "function"
            text.append(f".. auto{kind}:: flatlab.api.{name}")
            if kind == "class" and not issubclass(each, pydantic.BaseModel):
                text += ["   :members:", "   :inherited-members: ABC, Sampled, Exception, Module"]
            text.append("")
    text += ["Flatness while training", "-----------------------", ""]
    watching = ("Monitor", "CSV", "TensorBoard", "Sink")
    text += [f".. autoclass:: flatlab.watch.{name}\n   :members:\n" for name in watching]
    return "\n".join(text)


def setup(app):
    """Write the reference, and connect the escaping."""
    (HERE / "api.rst").write_text(reference())
    app.connect("autodoc-process-docstring", plain, priority=900)


sys.path.insert(0, str(HERE.parent))  # analyses/
