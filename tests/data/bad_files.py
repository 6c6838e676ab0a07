"""A data set with one sample of each kind of badness, in the layout of a manifest."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from distseg.data.decode import PLAIN

SIZE = 32


def _encoded(pixels: np.ndarray | Image.Image, format: str, **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _picture(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (SIZE, SIZE, 3), np.uint8)


def _mask(*shape: int) -> np.ndarray:
    mask = np.zeros(shape or (SIZE, SIZE), np.uint8)
    mask[8:20, 10:25] = 255
    return mask


def _palette(indices: np.ndarray, colours: list[int]) -> bytes:
    image = Image.frombytes("P", indices.shape[::-1], np.ascontiguousarray(indices).tobytes())
    image.putpalette(colours)
    return _encoded(image, "PNG")


def _png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width × height pixels."""
    return _png_of(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), zlib.compress(b"\0" * 999))


def _flipped(content: bytes, where: int) -> bytes:
    return content[:where] + bytes([content[where] ^ 0x10]) + content[where + 1 :]


def _png_of_few_rows(bits: int, rows: int, interlaced: int = 0) -> bytes:
    """32×32 grey or RGB by its header, `rows` rows by its stream, which is sound."""
    colour, width = (0, SIZE) if bits == 8 else (2, 3 * SIZE)
    header, content = struct.pack(">IIBBBBB", SIZE, SIZE, 8, colour, 0, 0, interlaced), bytes(rows * (1 + width))
    return _png_of(header, zlib.compress(content))


def _indices(indices: np.ndarray) -> bytes:
    """A PNG with a palette of two colours, black and white."""
    rows = np.column_stack([np.zeros(len(indices), np.uint8), indices])
    header = struct.pack(">IIBBBBB", *indices.shape[::-1], 8, 3, 0, 0, 0)
    return _png_of(header, zlib.compress(rows.tobytes()), palette=b"\0\0\0\xff\xff\xff")


def _png_of(header: bytes, content: bytes, palette: bytes = b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    colours = chunk(b"PLTE", palette) if palette else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colours + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def _scan(jpeg: bytes, number: int = 0) -> int:
    """Where the compressed data of a scan begin."""
    at = -1
    for _ in range(number + 1):
        at = jpeg.index(b"\xff\xda", at + 1)
    return at + 2 + struct.unpack_from(">H", jpeg, at + 2)[0]


def _zeroed(jpeg: bytes) -> bytes:
    first = _scan(jpeg)
    return jpeg[:first] + bytes(len(jpeg) - first - 2) + jpeg[-2:]


def _claiming(jpeg: bytes, height: int, width: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def _with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    jpeg = _encoded(_picture(), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + count * jpeg[last:-2] + jpeg[-2:]


def _sparse(size: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(PNG)
        os.truncate(path, size)

    return write


def _pages(pixels: np.ndarray, format: str) -> bytes:
    return _encoded(pixels * 0, format, save_all=True, append_images=[Image.fromarray(pixels)])


def _link(to: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(to)


PNG, JPEG, MASK = _encoded(_picture(), "PNG"), _encoded(_picture(), "JPEG"), _encoded(_mask(), "PNG")
SIDE = int(PLAIN.max_pixels**0.5)

# What is wrong with the image: the file's content, or how to make it, and what its reason must say.
IMAGES: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "missing": (lambda path: None, "no such file"),
    "zero-bytes": (b"", "is empty"),
    "web-page": (b"<!DOCTYPE html><html>404</html>", "cannot be decoded"),
    "text": ("not an image, é".encode(), "cannot be decoded"),
    "random-bytes": (_picture().tobytes(), "cannot be decoded"),
    "pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07success\x94.", "cannot be decoded"),
    "gif": (_encoded(_picture(), "GIF"), "cannot be decoded"),
    "jpeg-halved": (JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg-without-end": (JPEG[:-2], "truncated"),
    "jpeg-header-alone": (JPEG[:4], "cannot be decoded"),
    "png-halved": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "png-without-end": (PNG[:-20], "cannot be decoded"),
    "png-one-bit-flipped": (_flipped(PNG, len(PNG) // 2), "cannot be decoded"),
    "bmp-halved": (_encoded(_picture(), "BMP")[:1500], "truncated"),
    "tiff-halved": (_encoded(_picture(), "TIFF")[:1500], "cannot be decoded"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "pipe": (lambda path: os.mkfifo(path), "is no regular file"),
    "link-to-itself": (lambda path: path.symlink_to(path.name), "lead in a circle"),
    "link-to-nothing": (_link("nowhere.png"), "no such file"),
    "link-out-of-root": (_link("../../outside.png"), "leads out of data.root"),
    "16-bit-grey": (_encoded(_picture(SIZE, SIZE).astype(np.uint16) * 257, "PNG"), "16 bits a channel"),
    "16-bit-colour": (cv2.imencode(".png", _picture().astype(np.uint16) * 257)[1].tobytes(), "16 bits a channel"),
    "16-bit-tiff": (cv2.imencode(".tiff", _picture().astype(np.uint16) * 257)[1].tobytes(), "16 bits a channel"),
    "16-bit-ppm": (b"P6 32 32 65535\n" + _picture(SIZE, SIZE, 6).tobytes(), "16 bits a channel"),
    "float-tiff": (_encoded(_picture(SIZE, SIZE).astype(np.float32), "TIFF"), "32 bits a channel"),
    "cmyk": (_encoded(Image.fromarray(_picture()).convert("CMYK"), "JPEG"), "its colours are CMYK"),
    "lab-tiff": (_encoded(Image.fromarray(_picture(), "LAB"), "TIFF"), "its colours are LAB"),
    "transparent": (_encoded(_picture(SIZE, SIZE, 4), "PNG"), "transparent"),
    "bomb": (_png_claiming(SIDE, SIDE + 1), "decompression bomb"),
    "huge-bomb": (_png_claiming(60000, 60000), "decompression bomb"),
    "one-row-bomb": (_png_claiming(67_000_000, 1), "decompression bomb: 67000000×1"),
    "sparse-50-GB": (_sparse(50 * 2**30), "above data.max_file_bytes"),
    "png-of-5-rows": (_png_of_few_rows(24, 5), "fewer rows than its header says"),
    "png-of-31-rows": (_png_of_few_rows(24, 31), "fewer rows than its header says"),
    "png-interlaced-of-5-rows": (_png_of_few_rows(24, 5, interlaced=1), "fewer rows than its header says"),
    "jpeg-zeroed": (_zeroed(JPEG), "damaged or truncated"),
    "jpeg-of-64-megapixels": (_claiming(JPEG, 8000, 8000), "damaged or truncated"),
    "jpeg-of-30000-scans": (_with_scans(30_000), "a JPEG of 30,00"),
    "palette-index-beyond": (_indices(_picture(SIZE, SIZE) % 4), "uses colour 3 of a palette of 2"),
    "tiff-of-two-pages": (_pages(_picture(), "TIFF"), "has 2 pages"),
    "webp-that-moves": (_pages(_picture(), "WEBP"), "has 2 pages"),
    "no-pixels": (_png_claiming(0, 32), "cannot be decoded"),
}
MASKS: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "missing": (lambda path: None, "no such file"),
    "zero-bytes": (b"", "is empty"),
    "truncated": (MASK[:-30], "cannot be decoded"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "wider": (_encoded(_mask(SIZE, SIZE + 1), "PNG"), "mask is 33×32 and its image"),
    "smaller": (_encoded(_mask(SIZE // 2 + 8, SIZE), "PNG"), "mask is 32×24 and its image"),
    "soft-edges": (_encoded(cv2.GaussianBlur(_mask(), (0, 0), 1), "PNG"), "not binary"),
    "half-lit": (_encoded(_mask() // 2, "PNG"), "not binary: it holds 0, 127"),
    "three-classes": (_encoded(np.tile(np.array([0, 1, 255, 0], np.uint8), (SIZE, SIZE // 4)), "PNG"), "0, 1, 255"),
    "jpeg": (_encoded(_mask(), "JPEG", quality=30), "not binary"),
    "palette-inverted": (_palette(_mask() // 255, [255, 255, 255, 0, 0, 0]), "palette"),
    "palette-all-black": (_palette(_mask() // 255, [0, 0, 0, 0, 0, 0]), "palette"),
    "palette-of-three": (_palette(_picture(SIZE, SIZE) % 3, [0, 0, 0, 255, 0, 0, 0, 255, 0]), "not binary"),
    "png-of-5-rows": (_png_of_few_rows(8, 5), "fewer rows than its header says"),
    "tiff-of-two-pages": (_pages(_mask(), "TIFF"), "has 2 pages"),
    "palette-index-beyond": (_indices(_mask()), "uses colour 255 of a palette of 2"),
    "red-on-black": (_encoded(_mask()[..., None] * np.uint8([1, 0, 0]), "PNG"), "the colour #ff0000"),
    "16-bit": (_encoded(_mask().astype(np.uint16) * 257, "PNG"), "16 bits a channel"),
    "link-out-of-root": (_link("../../outside_mask.png"), "leads out of data.root"),
}
ROWS = {
    "parent,train,../outside.png,masks/good0.png": ("parent", "leaves the folder"),
    "absolute,train,/etc/passwd,masks/good0.png": ("absolute", "leaves the folder"),
    "backslashes,train,images/good0.png,..\\masks\\good0.png": ("backslashes", "leaves the folder"),
    "no-mask,train,images/good0.png,": ("no-mask", "has neither a reference nor an annotation"),
    "odd-split,training,images/good0.png,masks/good0.png": ("odd-split", "split 'training'"),
    "a/b,train,images/good0.png,masks/good0.png": ("a/b", "id 'a/b'"),
    "twice,train,images/twice1.png,masks/twice1.png": ("twice", "the id twice is twice in train"),
    "twice,train,images/twice2.png,masks/twice2.png": ("twice", "the id twice is twice in train"),
    "=1+1,train,images/good0.png,masks/good0.png": ("=1+1", "must begin with none of ="),
    '"two\nlines",train,images/good0.png,masks/good0.png': ("two\nlines", "must be of printable letters"),
    "twin-a,train,images/twin-a.png,masks/twin-a.png": ("twin-a", "same content as twin-b.png"),
    "twin-b,test,images/twin-b.png,masks/twin-b.png": ("twin-b", "same content as twin-a.png"),
    "leak-a,train,images/leak.png,masks/leak.png": ("leak-a", "in the train split as leak-a and in test as leak-b"),
    "leak-b,test,images/leak.png,masks/leak.png": ("leak-b", "in the train split as leak-a and in test as leak-b"),
}


def write_bad_data(root: Path, good: int = 9) -> dict[str, str]:
    """Write the set into `root` and, beside it, what its links lead to; returns what each bad id's reason must say."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root.parent / "outside.png").write_bytes(_encoded(_picture(seed=98), "PNG"))
    (root.parent / "outside_mask.png").write_bytes(MASK)
    splits = ["train", "train", "val", "test"]
    rows, expected = [], {}

    def put(id: str, split: str, image: bytes | Callable[[Path], None], mask: bytes | Callable[[Path], None]) -> None:
        for folder, content in (("images", image), ("masks", mask)):
            path = root / folder / f"{id}.png"
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content(path)
        rows.append(f"{id},{split},images/{id}.png,masks/{id}.png")

    for number in range(good):
        put(f"good{number}", splits[number % 4], _encoded(_picture(seed=number + 1), "PNG"), MASK)
    for kind, (content, reason) in IMAGES.items():
        put(f"image-{kind}", "train", content, MASK)
        expected[f"image-{kind}"] = reason
    for kind, (content, reason) in MASKS.items():
        put(f"mask-{kind}", "val", PNG, content)
        expected[f"mask-{kind}"] = reason
    for name in ("twin-a", "twin-b"):
        (root / "images" / f"{name}.png").write_bytes(_encoded(_picture(seed=99), "PNG"))
        (root / "masks" / f"{name}.png").write_bytes(MASK)
    for row, (id, reason) in ROWS.items():
        rows.append(row)
        expected[id] = reason
    (root / "manifest.csv").write_text("\n".join(["id,split,image,mask", *rows]) + "\n")
    return expected
