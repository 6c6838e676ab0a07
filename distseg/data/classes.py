"""What the values of a mask's file mean: which class, or nothing that anybody vouches for.

A file's value is a whole number, as it is stored (a grey of 1 to 16 bits, or the index of a palette's entry), or the
colour of a pixel. From here on masks are (H, W) uint8 class ids, 255 = ignore.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

IGNORE = 255
MOST_CLASSES = 254
BINARY_NAMES = ("background", "lesion")
FileValue = int | str
"""0 to 65535, or "#rrggbb"."""

_UNNAMED = 254
_SHOWN_VALUES = 5
# What is taken for a lesion where only `data.ignore` is given; the first is what is written.
_BINARY_VALUES: tuple[tuple[FileValue, ...], ...] = ((0, "#000000"), (255, 1, "#ffffff"))
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L")


class UnnamedValues(ValueError):
    """A mask holds what nobody has named: the rest of a line that begins with the file."""


@dataclass(frozen=True)
class ClassMap:
    """File values to class ids. Without any field it is the plain binary one: 0 background, 1 or 255 lesion."""

    names: tuple[str, ...] = BINARY_NAMES
    values: tuple[tuple[FileValue, ...], ...] = ()
    """Of each class; the first one is what masks of our own are written with."""
    ignored: tuple[FileValue, ...] = ()
    threshold: int | None = None
    """Greys from here on are lesion; there are no `values` then."""

    @property
    def is_plain(self) -> bool:
        return not self.values and not self.ignored and self.threshold is None

    @property
    def key(self) -> str:
        """The whole as text; empty for the plain one."""
        return "" if self.is_plain else json.dumps([self.names, self.values, self.ignored, self.threshold])

    def ids(self, image: Image.Image, step: int) -> NDArray[np.uint8]:
        """(H, W) uint8 of a mask as PIL has it; `step` as from `grey_step` before it was loaded. Not for a plain map.

        A grey or an index that is not named as a number counts by its colour. Raises UnnamedValues.
        """
        grey = _greys(image, step)
        if grey is not None and image.mode == "1" and 1 not in self._by_value():
            grey = np.where(grey, np.uint8(255), np.uint8(0))  # as viewers show it
        ids = self._of_colours(image) if grey is None else self._table(image)[grey]
        unnamed = ids == _UNNAMED
        if self.threshold is not None:
            shown = np.asarray(image if image.mode in _WIDE_MODES else image.convert("L"))
            return np.where(unnamed, (shown >= self.threshold).astype(np.uint8), ids)
        if unnamed.any():
            found = np.unique(np.asarray(image.convert("RGB"))[unnamed], axis=0) if grey is None else grey[unnamed]
            raise UnnamedValues(self._refusal(image, found))
        return ids

    def check_one_lesion(self, image: Image.Image, step: int) -> None:
        """Raises UnnamedValues where 1 and 255 are both in one mask, and nobody has said which is lesion."""
        grey = _greys(image, step)
        if self.values == _BINARY_VALUES and grey is not None and (grey == 1).any() and (grey == 255).any():
            raise UnnamedValues(
                "holds 1 and 255: which is lesion? Name both in data.classes, or one of them in data.ignore"
            )

    @property
    def file_values(self) -> tuple[FileValue, ...]:
        """Of each class, what `encode` writes."""
        return (0, 255) if self.is_plain else tuple(self._written()[: len(self.names)])

    def encode(self, ids: NDArray[np.uint8]) -> bytes:
        """(H, W) class ids as the PNG that this map reads as these ids; 0 and 255 for the plain map."""
        if self.is_plain:
            pixels: NDArray[Any] = ids * np.uint8(255)
        else:
            written = self._written()
            if isinstance(written[0], int):
                depth = np.uint8 if max(int(value) for value in written) < 256 else np.uint16
                table = np.array([*written, *[0] * 256][:256], depth)
            else:
                table = np.array([[*_rgb(str(value))[::-1]] for value in written] + [[0, 0, 0]] * 256, np.uint8)[:256]
            if self.ignored:
                table[IGNORE] = table[len(written) - 1]
            pixels = table[ids]
        return cv2.imencode(".png", pixels)[1].tobytes()

    def _written(self) -> list[FileValue]:
        """A value for each class and, where there is one, for what is ignored, last: all numbers or all colours."""
        groups: list[tuple[FileValue, ...]] = list(self.values)
        if self.threshold is not None:
            top = 255 if self.threshold <= 255 else 65535
            below = next(value for value in range(self.threshold) if value not in self.ignored)
            above = next(value for value in range(top, -1, -1) if value not in self.ignored)
            groups = [(below,), (above,)]
        for kind in (int, str):
            those = [*groups, self.ignored] if self.ignored else groups
            firsts = [next((value for value in group if isinstance(value, kind)), None) for group in those]
            chosen = [value for value in firsts if value is not None]
            if len(chosen) == len(those):
                return chosen
        raise ValueError(
            "classes, ignore: every class, and what is ignored, needs a number among its values, or each of them a "
            "colour: masks that are drawn for training are written with these"
        )

    def _table(self, image: Image.Image) -> NDArray[np.uint8]:
        """The id of each number that a mask may store; `_UNNAMED` for others."""
        palette = image.getpalette("RGB") if image.mode == "P" else None
        return _table_of(self, image.mode in _WIDE_MODES, None if palette is None else tuple(palette))

    def _of_colours(self, image: Image.Image) -> NDArray[np.uint8]:
        pixels = np.asarray(image.convert("RGB")).astype(np.uint32)
        packed = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
        ids = np.full(packed.shape, _UNNAMED, np.uint8)
        for value, id in sorted(self._by_value().items(), key=lambda item: isinstance(item[0], str)):
            if isinstance(value, str):
                ids[packed == int(value[1:], 16)] = id
            elif value < 256:
                ids[packed == value * 0x010101] = id
        return ids

    def _by_value(self) -> dict[FileValue, int]:
        named = {value: id for id, values in enumerate(self.values) for value in values}
        return named | dict.fromkeys(self.ignored, IGNORE)

    def _refusal(self, image: Image.Image, found: NDArray[Any]) -> str:
        palette = image.getpalette("RGB") if image.mode == "P" else None
        if found.ndim == 2:
            shown = [f"the colour {_hex(*colour)}" for colour in found.tolist()]
        elif palette is not None:
            numbers = np.unique(found).tolist()
            shown = [f"the palette's entry {n} ({_hex(*palette[3 * n : 3 * n + 3])})" for n in numbers]
        else:
            shown = [str(value) for value in np.unique(found).tolist()]
        listed = ", ".join(shown[:_SHOWN_VALUES]) + (", …" if len(shown) > _SHOWN_VALUES else "")
        them = "it" if len(shown) == 1 else "them"
        if self.values == _BINARY_VALUES:
            return (
                f"holds {listed}, neither background (0) nor lesion (1 or 255) nor in data.ignore; name {them} in "
                "data.classes or add to data.ignore"
            )
        return f"holds {listed}, which data.classes does not name; add {them} there or to data.ignore"


PLAIN_CLASSES = ClassMap()


def class_map(
    classes: Mapping[str, Sequence[FileValue]] | None, ignore: Sequence[FileValue], threshold: int | None
) -> ClassMap:
    """From the keys `data.classes`, `data.ignore` and `data.threshold`. Raises ValueError that names key and mend."""
    ignored = tuple(ignore)
    if threshold is not None and classes is not None:
        raise ValueError("threshold: parts lesion from background, and classes names the values; remove one of the two")
    if threshold is not None:
        made = ClassMap(BINARY_NAMES, (), ignored, threshold)
    elif classes is not None:
        _check_classes(classes, ignored)
        made = ClassMap(tuple(classes), tuple(tuple(values) for values in classes.values()), ignored)
    elif ignored:
        kept = tuple(tuple(value for value in values if value not in ignored) for values in _BINARY_VALUES)
        if not all(kept) or 0 in ignored:
            raise ValueError("ignore: takes all of background or lesion; name the values of both in classes")
        made = ClassMap(BINARY_NAMES, kept, ignored)
    else:
        return PLAIN_CLASSES
    try:
        made._written()
    except StopIteration:
        raise ValueError("threshold: ignore leaves no grey on one of its sides; choose another threshold") from None
    return made


def _check_classes(classes: Mapping[str, Sequence[FileValue]], ignored: Sequence[FileValue]) -> None:
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise ValueError(f"classes: names {len(classes)}; give 2 to {MOST_CLASSES}, background first")
    owner: dict[FileValue, str] = dict.fromkeys(ignored, "ignore")
    for name, values in classes.items():
        if not values:
            raise ValueError(f"classes: {name} has no value; give one, or remove the class")
        for value in values:
            if owner.setdefault(value, name) != name:
                raise ValueError(f"classes: {value} is of {name} and of {owner[value]}; keep it in one")


def grey_step(image: Image.Image) -> int:
    """By what PIL multiplies a grey value of a file as it loads it, which it does with those of 2 and 4 bits."""
    tiles = getattr(image, "tile", [])
    raw = next((tile[3][0] if isinstance(tile[3], tuple) else tile[3] for tile in tiles), "")
    return {"L;2": 85, "L;4": 17}.get(str(raw)[:3], 1)


def is_wide_grey(image: Image.Image) -> bool:
    """Whether the file stores one grey value of 16 bits a pixel, which PIL hands on as it is."""
    modes = {"PNG": _WIDE_MODES, "TIFF": _WIDE_MODES[1:]}.get(str(image.format), ())
    return image.mode in modes


def _greys(image: Image.Image, step: int) -> NDArray[Any] | None:
    """(H, W): what is stored where that is one number a pixel; None where it is a colour."""
    if image.mode == "LA":
        return np.asarray(image.convert("L"))
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8)
    if image.mode in ("L", "P", *_WIDE_MODES):
        return np.asarray(image) // step if step > 1 else np.asarray(image)
    return None


@lru_cache(maxsize=64)
def _table_of(classes: ClassMap, wide: bool, palette: tuple[int, ...] | None) -> NDArray[np.uint8]:
    by_value = classes._by_value()
    table = np.full(65536 if wide else 256, _UNNAMED, np.uint8)
    if not wide:
        for place in range(256 if palette is None else len(palette) // 3):
            colour = (place,) * 3 if palette is None else palette[3 * place : 3 * place + 3]
            table[place] = by_value.get(_hex(*colour), _UNNAMED)
    for value, id in by_value.items():
        if isinstance(value, int) and value < len(table):
            table[value] = id
    return table


def _hex(red: int, green: int, blue: int) -> str:
    return f"#{red:02x}{green:02x}{blue:02x}"


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
