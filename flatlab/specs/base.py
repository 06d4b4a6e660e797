"""Base class of the specs: a frozen, strict record, named by the digest of its canonical JSON."""

import hashlib
import json
import reprlib
from functools import cache, cached_property
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from flatlab.errors import UserError

LARGEST_INT = 10**9  # of counts and steps: a larger number is a typing error
LARGEST_SEED = 2**31 - 1


class Spec(BaseModel):
    """A frozen record that rejects unknown fields and implicit type conversions, with one sentence per mistake."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
    later: ClassVar[tuple[str, ...]] = ()  # fields added later: omitted at their default, so that old digests stay

    @classmethod
    def make(cls, **fields: Any) -> Self:
        """Return a spec with these fields.

        Raises:
            UserError: if a field is unknown, missing or of the wrong type.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise UserError(_sentence(cls, error)) from None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a spec from its JSON.

        Args:
            text: JSON as written by `canonical`.

        Raises:
            UserError: if a field is unknown, missing or of the wrong type.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(_sentence(cls, error)) from None

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = write(self)
        for name, default in _defaults(type(self)).items():
            if self.__dict__[name] == default:
                fields.pop(name, None)  # absent where some fields alone are asked for
        return fields

    def canonical(self) -> str:
        """Return the JSON with sorted keys and no spaces; equal specs have equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def texts(self, *, exclude_defaults: bool = False) -> dict[str, str]:
        """Return the fields as text, those of parts by dotted names (step.rho)."""
        found, parts = {}, [*self.model_dump(mode="json", exclude_defaults=exclude_defaults).items()]
        while parts:
            name, value = parts.pop(0)
            if isinstance(value, dict):
                parts = [*((f"{name}.{part}", each) for part, each in value.items()), *parts]
            else:
                found[name] = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        return found

    def replace(self, **fields: Any) -> Self:
        """Return a validated copy with some fields replaced."""
        return self.make(**{**{name: self.__dict__[name] for name in type(self).model_fields}, **fields})


@cache
def _defaults(kind: type[Spec]) -> dict[str, Any]:
    """Return the defaults of the fields that were added later."""
    return {name: kind.model_fields[name].default for name in kind.later}


_BOUNDS = {  # pydantic's kinds of error -> what was expected, with the bound's name
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
}


def _sentence(kind: type[BaseModel], error: ValidationError) -> str:
    """Describe the first mistake of a validation in one sentence."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    if not where:
        return what
    if first["type"] == "extra_forbidden":
        return f"{kind.__name__} has no field {where!r}; its fields are {', '.join(kind.model_fields)}."
    if first["type"] == "missing":
        return f"{kind.__name__}: the field {where!r} is missing."
    expected = _BOUNDS.get(first["type"], "").format(**first.get("ctx", {}))
    rule = f"must be {expected}" if expected else what.replace("Input should be", "must be")
    return f"{kind.__name__}: {where} {rule}, got {reprlib.repr(first['input'])}."
