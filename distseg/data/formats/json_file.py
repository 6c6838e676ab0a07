"""JSON of a bounded size, checked against a model; one line says what is wrong and where."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from distseg.errors import BadFileError
from distseg.files import read_regular
from distseg.text import for_terminal

T = TypeVar("T")
_SHOWN = 120


class Part(BaseModel):
    """A part of a tool's file: what is not used is not looked at, and no number is infinite."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


def read_json(path: Path, limit: int, model: type[T] | Any) -> T:
    """The content of a JSON file as `model` has it. Raises BadFileError, one line that names the file and the place."""
    if path.is_file() and (size := path.stat().st_size) > limit:
        raise BadFileError(
            f"{path}: has {size:,} bytes, above data.max_file_bytes ({limit:,}); export fewer images at once"
        )
    try:
        text = read_regular(path, limit).decode("utf-8-sig")
    except FileNotFoundError:
        raise BadFileError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise BadFileError(f"{path}: is no UTF-8: {error}; export it again") from None
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        content = json.loads(text, object_hook=_packed)
    except RecursionError:
        raise BadFileError(f"{path}: is nested too deeply; export it again") from None
    except (ValueError, TypeError) as error:  # JSONDecodeError, numbers of thousands of digits
        raise BadFileError(f"{path}: cannot be read as JSON: {_short(str(error))}; export it again") from None
    del text
    return checked(content, path, model)


def checked(content: Any, where: Path | str, model: type[T] | Any) -> T:
    try:
        return TypeAdapter[T](model).validate_python(content)
    except ValidationError as error:
        # Of the members of a union that failed, the one that was meant got furthest.
        problem = max(error.errors(include_url=False), key=lambda problem: len(problem["loc"]))
        place = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("list[", "function-")))
        message = problem["msg"].removeprefix("Value error, ")
        given = problem["input"]
        shown = f", got {repr(given)[:40]}" if isinstance(given, str | int | float | bool | None) else ""
        raise BadFileError(
            f"{where}: {for_terminal(place[:_SHOWN])}: {_short(message[0].lower() + message[1:])}{for_terminal(shown)}"
        ) from None


def _packed(part: dict[str, Any]) -> dict[str, Any]:
    """A brush mask's list of bytes as bytes: as a list it takes eight times the memory."""
    if isinstance(rle := part.get("rle"), list):
        try:
            part["rle"] = bytes(rle)
        except (ValueError, TypeError):
            raise ValueError("an rle must be a list of numbers from 0 to 255") from None
    return part


def _short(text: str) -> str:
    return for_terminal(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
