"""The choice of a section by its key `kind`, with errors that name the key and the mend."""

import difflib
from types import UnionType
from typing import Any, get_args

from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

from distseg.data.noise.kind import NoiseKind

_PYDANTIC_TYPES = frozenset(get_args(ErrorType))


def by_kind(kinds: UnionType, default: str | None = None) -> WrapValidator:
    """The validator around a discriminated union of `kinds`.

    A parameter of another kind is an error, unless it is null: so `data.noise.vertices=null` on a command line takes
    back what a config file sets for its own kind. A null parameter of the kind itself is its default. `default` is the
    kind where none is given. The union's tags are left out of the location of errors, which then is the key's name.
    """
    classes: dict[str, type[NoiseKind]] = {kind.model_fields["kind"].default: kind for kind in get_args(kinds)}

    def validate(values: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        if not isinstance(values, dict):
            return handler(values)
        kind = values.get("kind") or default
        if not isinstance(kind, str) or kind not in classes:
            expected = " or ".join(filter(None, [", ".join(map(repr, list(classes)[:-1])), repr(list(classes)[-1])]))
            raise _error("literal_error", "kind", kind, {"expected": expected})
        values = {"kind": kind} | _without_foreign_keys(values, kind, classes)
        try:
            return handler(values)
        except ValidationError as error:
            raise _without_tag(error) from None

    return WrapValidator(validate)


def _without_foreign_keys(values: dict[str, Any], kind: str, classes: dict[str, type[NoiseKind]]) -> dict[str, Any]:
    own = classes[kind].model_fields
    known = {name for each in classes.values() for name in each.model_fields}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(own)}"
            raise _error(PydanticCustomError("unknown_key", "unknown key; {hint}", {"hint": hint}), str(name), values)
        if name not in own and value is not None:
            raise ValueError(f"{name} is no parameter of {kind} noise; set {name}=null")
    return {name: value for name, value in values.items() if value is not None}


def _error(
    type: str | PydanticCustomError, key: str, given: Any, context: dict[str, Any] | None = None
) -> ValidationError:
    details = InitErrorDetails(type=type, loc=(key,), input=given)
    if context:
        details["ctx"] = context
    return ValidationError.from_exception_data("noise", [details])


def _without_tag(error: ValidationError) -> ValidationError:
    lines: list[InitErrorDetails] = []
    for problem in error.errors(include_url=False):
        custom = problem["type"] not in _PYDANTIC_TYPES
        line = InitErrorDetails(
            type=PydanticCustomError(problem["type"], problem["msg"]) if custom else problem["type"],
            loc=problem["loc"][1:],
            input=problem["input"],
        )
        if "ctx" in problem and not custom:
            line["ctx"] = problem["ctx"]
        lines.append(line)
    return ValidationError.from_exception_data(error.title, lines)
