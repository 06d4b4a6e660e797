"""The name of a corruption of images, as a field of specs."""

from typing import Annotated

from pydantic import AfterValidator


def _name_and_severity(corruption: str | None) -> str | None:
    """Return the canonical spelling of a corruption; which names are known depends on the size of the images."""
    if corruption is None:
        return None
    name, _, severity = corruption.strip().lower().replace("-", "_").partition(":")
    if not name or severity not in {"1", "2", "3", "4", "5"}:
        raise ValueError("must be NAME:SEVERITY with a severity from 1 to 5, such as gaussian_noise:3")
    return f"{name}:{severity}"


Corrupting = Annotated[str | None, AfterValidator(_name_and_severity)]  # NAME:SEVERITY; None: images as they are


def under(corruption: str | None) -> str:
    """Return a corruption as text after the name of a domain; empty without one."""
    return f" under {corruption}" if corruption else ""
