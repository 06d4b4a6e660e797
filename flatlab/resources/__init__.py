"""Data that ships with the package: the tables and curves that the paper printed, as published."""

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def published() -> dict[str, Any]:
    """Return the paper's numbers (arXiv 2410.06020): `tables`, `figures`, and `anomalies`, its misprints."""
    text = files(__name__).joinpath("published.json").read_text()
    return dict(json.loads(text))
