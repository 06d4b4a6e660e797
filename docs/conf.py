"""The documentation: every code block is executed when the site is built, and a warning is an error (`-W`)."""

import inspect
import os
import re
import sys
from pathlib import Path

import pydantic
from myst_nb.core import render

import flatlab
from flatlab import api

HERE, COLON = Path(__file__).parent, "\0"
project, author, release = "flatlab", "The flatlab authors", flatlab.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
extensions += ["sphinx-mathjax-offline"]  # formulas need no network
html_theme, html_title = "furo", f"flatlab {release}"
html_show_copyright = False
code = {"code-font-size": "0.75rem"}  # lines of 95 characters, as commands print them
html_theme_options = {"light_css_variables": code, "dark_css_variables": code}
exclude_patterns = ["_build", "jupyter_execute", "**/.ipynb_checkpoints"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode, nb_execution_raise_on_error, nb_execution_timeout = "force", True, 300
nb_execution_excludepatterns = ["clusters.md", "slurm.md", "ray.md", "clouds.md", "notebooks/*"]
nb_merge_streams = True
nb_render_markdown_format = "myst"  # CommonMark has no tables
autodoc_typehints, autodoc_member_order = "none", "bysource"
napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # a name that several result classes share, such as `value`
suppress_warnings += ["mystnb.unknown_mime_type"]  # the 3-D surface of a notebook, which needs plotly's script


def joined(outputs):
    """Join the parts of each stream of a cell, stderr last; myst-nb's own function ends a line after each part."""
    streams = {}
    for output in outputs:
        if output["output_type"] == "stream":
            streams.setdefault(output["name"], []).append(output)
    for parts in streams.values():
        text = "".join(part["text"] for part in parts).strip("\n")
        parts[0]["text"] = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    firsts = [parts[0] for parts in streams.values()]
    kept = [each for each in outputs if each["output_type"] != "stream" or any(each is first for first in firsts)]
    return sorted(kept, key=lambda each: each.get("name") == "stderr")


def written(value):
    """Return a value of a spec as Python writes it; of a spec within a spec its class and what is not the default."""
    if isinstance(value, pydantic.BaseModel):
        changed = [f"{name}={written(each)}" for name, each in value if each != type(value).model_fields[name].default]
        return f"{type(value).__name__}({', '.join(changed)})"
    return repr(value)


def commented(spec, name):
    """Return the comment behind a field, in the source of the class that declares it, as a sentence; or nothing."""
    owner = next(each for each in spec.__mro__ if name in vars(each).get("__annotations__", {}))
    found = re.search(rf"^    {name}: .*?  # (.+)$", inspect.getsource(owner), re.MULTILINE)
    return f"{found[1][0].upper()}{found[1][1:].rstrip('.')}." if found else ""


def fields(spec):
    """Return the fields of a spec as a list: type, default and, as far as it is described there, meaning."""
    lines = []
    for name, field in spec.model_fields.items():
        kind = re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(field.annotation))
        kind = re.sub(r"Annotated\[(.*?), FieldInfo\(.*?\)\](?=[\],]|$)", r"\1", kind)
        default = "" if field.is_required() else f" = ``{written(field.get_default(call_default_factory=True))}``"
        meaning = " ".join(filter(None, (field.description or "", commented(spec, name))))
        meaning = re.sub(r"([|*])", r"\\\1", meaning).replace("`", "``")
        lines.append(f"- ``{name}``: ``{kind}``{default}{'. ' * bool(meaning)}{meaning}")
    return [*lines, ""]


def settings():
    """Return the fields in which the three settings differ, as a table."""
    rows = [("field", "SMOKE", "QUICK", "PAPER")]
    for name in api.Setting.model_fields:
        values = [getattr(each, name) for each in (api.SMOKE, api.QUICK, api.PAPER)]
        if len(set(values)) > 1:
            rows.append([f"``{each}``" for each in (name, *map(written, values))])
    lines = ["   * - " + "\n     - ".join(row) for row in rows]
    return [".. list-table::", "   :header-rows: 1", "", *lines, ""]


def hidden(app, what, name, obj, options, lines):
    """Hide the colons of a property's first line from napoleon, which takes what precedes one for a type."""
    if what == "property":
        lines[:1] = [line.replace(":", COLON) for line in lines[:1]]


def plain(app, what, name, obj, options, lines):
    """Escape what docstrings hold as plain text and reStructuredText would read as markup."""
    for index, line in enumerate(lines):
        line = re.sub(r"^(\s*:[^:]+: )(?=\w\.)", r"\1\\", line)  # "P." would be the first item of a list
        parts = re.split(r"(``.+?``|`[^`]*`|^\s*:[^:]+:|^\s*\.\. \S+::.*$)", line)
        lines[index] = "".join(
            part if place % 2 else re.sub(r"([|*])|(?<=\w)(_)(?!\w)", r"\\\1\2", part)
            for place, part in enumerate(parts)
        ).replace(COLON, ":")


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
                if name == "METHODS":
                    text += [f"   By name: {', '.join(each)}.", ""]
                if name == "PAPER":
                    text += ["Where the three settings differ:", "", *settings()]
                continue
            kind = "class" if inspect.isclass(each) else "function"
            text.append(f".. auto{kind}:: flatlab.api.{name}")
            if kind == "class" and not issubclass(each, pydantic.BaseModel):
                text += ["   :members:", "   :inherited-members: ABC, Sampled, Exception, Module"]
            text.append("")
            if kind == "class" and issubclass(each, pydantic.BaseModel):
                text += [f"   {line}" for line in fields(each)]
    text += ["Flatness while training", "-----------------------", ""]
    watching = ("Monitor", "CSV", "TensorBoard", "Sink", "lightning.FlatnessCallback", "transformers.FlatnessCallback")
    text += [f".. autoclass:: flatlab.watch.{name}\n   :members:\n" for name in watching]
    text += ["The paper's numbers", "-------------------", "", ".. autofunction:: flatlab.resources.published", ""]
    return "\n".join(text)


def setup(app):
    """Write the reference, and connect the escaping."""
    (HERE / "api.rst").write_text(reference())
    render.coalesce_streams = joined
    app.connect("autodoc-process-docstring", hidden, priority=100)
    app.connect("autodoc-process-docstring", plain, priority=900)


sys.path.insert(0, str(HERE.parent))  # analyses/
# Pages call `flatlab` in a shell, which must be that of this interpreter, also where its environment is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
