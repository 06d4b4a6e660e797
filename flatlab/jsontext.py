"""JSON that any reader takes."""

import json
import math
from typing import Any


def strict_json(value: Any, **style: Any) -> str:
    """Return JSON that any reader takes: what is not finite is null there."""
    return json.dumps(_finite(value), sort_keys=True, allow_nan=False, **style)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
