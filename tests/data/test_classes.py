"""Several classes, ignored values and thresholds: from any file's values to class ids, and back into files."""

import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from distseg.config.load import changed_keys, config_hash, dump_config, load_config
from distseg.data.annotators import fuse_annotations
from distseg.data.augment import identity_transform
from distseg.data.batch import Request
from distseg.data.cache import open_cache, write_cache
from distseg.data.checks import checked_samples
from distseg.data.config import DataConfig
from distseg.data.decode import read_mask, read_resized_mask
from distseg.data.inspect import inspect_mask
from distseg.data.noise.config import NoiseConfig
from distseg.data.noise.write import corrupt, write_noisy_masks
from distseg.data.reader import PixelReader
from distseg.data.streams import _find_loader
from distseg.data.survey import read_samples
from distseg.errors import BadFileError, UserError

IDS = np.zeros((24, 30), np.uint8)
IDS[4:18, 5:25] = 1
IDS[8:14, 10:20] = 2
BAND = IDS.copy()
BAND[:3] = 255
"""With a band that nobody vouches for."""
VALUES = {"background": 0, "lesion": 1, "hair": 2}
COLOURS = {"background": "#000000", "lesion": "#ff0000", "hair": "#00FF00"}


def data(**keys: Any) -> DataConfig:
    return DataConfig(root=Path("nowhere"), **keys)


def painted(ids: np.ndarray) -> np.ndarray:
    colours = np.zeros((256, 3), np.uint8)
    colours[1], colours[2], colours[255] = (255, 0, 0), (0, 255, 0), (255, 255, 255)
    return colours[ids]


def palette(ids: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(ids)
    image.putpalette([part for colour in colours for part in colour])
    return image


def wide(ids: np.ndarray, *values: int) -> Image.Image:
    return Image.fromarray(np.array(values, np.uint16)[ids])


RED_AND_GREEN = ((0, 0, 0), (255, 0, 0), (0, 255, 0))
READ: dict[str, tuple[Image.Image, dict[str, Any], np.ndarray]] = {
    "class ids": (Image.fromarray(IDS), {"classes": VALUES}, IDS),
    "several values to one class": (Image.fromarray(IDS), {"classes": {"skin": 0, "lesion": [1, 2]}}, IDS > 0),
    "greys of one's own": (Image.fromarray(IDS * 90), {"classes": {"a": 0, "b": 90, "c": 180}}, IDS),
    "background is not 0": (Image.fromarray(2 - IDS), {"classes": {"a": 2, "b": 1, "c": 0}}, IDS),
    "unlabelled 128": (Image.fromarray(np.where(BAND == 255, 128, (IDS > 0) * 255).astype(np.uint8)),
                       {"ignore": 128}, np.where(BAND == 255, 255, IDS > 0)),
    "unlabelled 255": (Image.fromarray(np.where(BAND == 255, 255, IDS > 0).astype(np.uint8)),
                       {"ignore": [255]}, np.where(BAND == 255, 255, IDS > 0)),
    "ids with 255": (Image.fromarray(BAND), {"classes": VALUES, "ignore": 255}, BAND),
    "0 and 255 of which 255 is ignored": (Image.fromarray((IDS > 0).astype(np.uint8) * 255), {"ignore": [255]},
                                         (IDS > 0) * 255),
    "red on black": (Image.fromarray(painted((IDS > 0).astype(np.uint8))),
                     {"classes": {"background": "#000000", "lesion": "#ff0000"}}, IDS > 0),
    "colours": (Image.fromarray(painted(IDS)), {"classes": COLOURS}, IDS),
    "colours with an alpha of 255": (Image.fromarray(painted(IDS)).convert("RGBA"), {"classes": COLOURS}, IDS),
    "colours and an ignored one": (Image.fromarray(painted(BAND)), {"classes": COLOURS, "ignore": "#FFFFFF"}, BAND),
    "greys saved as RGB": (Image.fromarray(IDS).convert("RGB"), {"classes": VALUES}, IDS),
    "greys with alpha": (Image.fromarray(IDS).convert("LA"), {"classes": VALUES}, IDS),
    "palette by index": (palette(IDS, *RED_AND_GREEN), {"classes": VALUES}, IDS),
    "palette by colour": (palette(2 - IDS, *RED_AND_GREEN[::-1]), {"classes": COLOURS}, IDS),
    "greys by colour": (Image.fromarray(IDS * 90), {"classes": {"a": "#000000", "b": "#5a5a5a", "c": "#b4b4b4"}}, IDS),
    "16 bits": (wide(IDS, 0, 7, 40_000), {"classes": {"a": 0, "b": 7, "c": 40_000}}, IDS),
    "one bit": (Image.fromarray(IDS > 0), {"classes": {"a": 0, "b": 1}}, IDS > 0),
    "one bit as shown": (Image.fromarray(IDS > 0), {"classes": {"a": 0, "b": 255}}, IDS > 0),
    "threshold": (Image.fromarray(IDS * 100), {"threshold": 150}, IDS == 2),
    "threshold beside ignored": (Image.fromarray(BAND // 2 * 2 + BAND // 255), {"threshold": 2, "ignore": 255},
                                 np.where(BAND == 255, 255, IDS == 2)),
    "threshold of 16 bits": (wide(IDS, 0, 300, 40_000), {"threshold": 30_000}, IDS == 2),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("format", ["png", "tif"])
def test_every_coding_becomes_class_ids_and_back(name, format, tmp_path):
    image, keys, expected = READ[name]
    path = tmp_path / f"mask.{format}"
    image.save(path)
    decoding = data(**keys).decoding
    facts, _ = inspect_mask(path, decoding)
    actual = read_mask(path, decoding)
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == np.uint8
    labelled = expected[expected != 255]
    assert facts.lit == pytest.approx((labelled > 0).mean() if labelled.size else 0)
    assert sum(facts.shares) == pytest.approx(1) and facts.size == (30, 24)

    (tmp_path / "again.png").write_bytes(decoding.classes.encode(actual))
    inspect_mask(tmp_path / "again.png", decoding)
    np.testing.assert_array_equal(read_mask(tmp_path / "again.png", decoding), expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_greys_of_few_bits_are_taken_as_stored(bits, tmp_path):
    path = tmp_path / "mask.png"
    rows = np.unpackbits(IDS[..., None], axis=2)[..., 8 - bits :].reshape(24, -1)
    packed = np.pad(np.packbits(rows, axis=1), ((0, 0), (1, 0)))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30, 24, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(packed.tobytes())), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks))  # pillow writes no such depth
    decoding = data(classes=VALUES).decoding
    inspect_mask(path, decoding)
    np.testing.assert_array_equal(read_mask(path, decoding), IDS)


REFUSED: dict[str, tuple[Image.Image, dict[str, Any], str]] = {
    "classes without the key": (Image.fromarray(IDS), {}, r"not binary: it holds 0, 1, 2; say what the values mean "
                                r"\(data\.classes=\{background: 0, .*data\.ignore.*data\.threshold=128"),
    "colours without the key": (Image.fromarray(painted(IDS)), {},
                                r'not binary.*the colour #ff0000.*data\.classes=\{background: "#000000", lesion: "#'),
    "a value without a class": (Image.fromarray(IDS), {"classes": {"a": 0, "b": 1}},
                                r"holds 2, which data\.classes does not name; add it there or to data\.ignore"),
    "several of them": (Image.fromarray(IDS * 7), {"classes": {"a": 0, "b": 1}},
                        r"holds 7, 14, which .* add them there"),
    "a colour without a class": (Image.fromarray(painted(BAND)), {"classes": COLOURS},
                               r"holds the colour #ffffff, which"),
    "an index without a class": (palette(IDS, *RED_AND_GREEN), {"classes": {"a": 0, "b": 1}},
                                 r"holds the palette's entry 2 \(#00ff00\), which"),
    "a third value beside ignore": (Image.fromarray(IDS * 7), {"ignore": 7},
                                    r"holds 14, neither background \(0\) nor lesion \(1 or 255\)"),
    "1 and 255": (Image.fromarray(BAND), {"ignore": 2}, r"holds 1 and 255: which is lesion\?"),
    "16 bits without the key": (wide(IDS, 0, 7, 40_000), {}, r"16 bits a channel; .*data\.classes"),
    "16 bits, a value without a class": (wide(IDS, 0, 7, 40_000), {"classes": {"a": 0, "b": 7}}, "holds 40000, which"),
    "transparent": (Image.fromarray(np.dstack([painted(IDS), IDS])), {"classes": COLOURS}, "transparent"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_class_is_refused_by_name_with_the_key(name, tmp_path):
    image, keys, said = REFUSED[name]
    image.save(tmp_path / "mask.png")
    with pytest.raises(BadFileError, match=said) as raised:
        inspect_mask(tmp_path / "mask.png", data(**keys).decoding)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(str(tmp_path / "mask.png"))


@pytest.mark.parametrize("keys", [{}, {"classes": VALUES}, {"ignore": [128]}])
def test_a_jpeg_keeps_no_values_and_a_threshold_parts_its_greys(keys, tmp_path):
    path = tmp_path / "mask.jpg"
    Image.fromarray(cv2.resize((IDS > 0).astype(np.uint8) * 255, (300, 240))).save(path, quality=40)
    with pytest.raises(BadFileError, match=r"JPEG, which does not keep values; .*data\.threshold=128"):
        inspect_mask(path, data(**keys).decoding)
    decoding = data(threshold=128).decoding
    inspect_mask(path, decoding)
    expected = cv2.resize((IDS > 0).astype(np.uint8) * 255, (300, 240)) >= 128
    assert (read_mask(path, decoding) != expected).mean() < 0.01


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"classes": {"a": 0}}, "names 1; give 2 to 254, background first"),
        ({"classes": {"a": 0, "b": [1, 0]}}, "0 is of b and of a; keep it in one"),
        ({"classes": {"a": 0, "b": 1}, "ignore": 1}, "1 is of b and of ignore"),
        ({"classes": {"a": 0, "b": []}}, "b has no value"),
        ({"classes": {"a": 0, "b": 1}, "threshold": 3}, "remove one of the two"),
        ({"classes": {"a": 0, "b": "#ff0000"}}, "needs a number .* or each of them a colour"),
        ({"classes": {"a": 0, "b": 65536}}, "65535"),
        ({"classes": {"a": 0, "b": "red"}}, "'red' is no value of a mask; .*#rrggbb"),
        ({"classes": {"a": 0, "b": [1, True]}}, "True is no value"),
        ({"classes": {"a": 0, "b": 1.5}}, "1.5 is no value"),
        ({"classes": {0: 0, 1: 1}}, "the name 0: take letters and digits"),
        ({"classes": ["a", "b"]}, "give a mapping"),
        ({"ignore": {"a": 1}}, "give a value or a list"),
        ({"classes": {"a/b": 0, "b": 1}}, "the name 'a/b': take letters"),
        ({"ignore": 0}, "takes all of background or lesion"),
        ({"ignore": [1, 255, "#ffffff"]}, "takes all of background or lesion"),
        ({"classes": VALUES, "noise": "unsupervised", "clean_count": 1}, r"unsupervised: .*noise\.kind=boundary"),
        ({"classes": VALUES, "noise": {"kind": "mixed", "annotators": ["box", "unsupervised"]}}, "knows no classes"),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other_are_refused(keys, said):
    with pytest.raises(ValidationError, match=said):
        data(**keys)


def test_keys_come_from_yaml_and_the_command_line_and_their_order_counts(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: x\ndata: {root: d, clean_count: 1, image_size: 32}\nmodel: {depth: 2}\ntrain: {steps: 1}\n")
    plain = load_config(path)
    assert plain.data.class_names == ("background", "lesion") and plain.data.decoding.classes.is_plain
    three = load_config(path, ["data.classes={skin: 0, lesion: [1, 3], hair: '#00FF00'}".replace("'#00FF00'", "2"),
                               "data.ignore=255"])  # fmt: skip
    assert three.data.class_names == ("skin", "lesion", "hair") and three.data.ignore == (255,)
    swapped = load_config(path, ["data.classes={skin: 0, hair: 2, lesion: [1, 3]}", "data.ignore=255"])
    assert changed_keys(three, swapped) and config_hash(three) != config_hash(swapped)
    fewer = load_config(path, ["data.classes={a: 0, b: 1, c: 2}", "data.classes.b=null"])
    assert fewer.data.classes == {"a": (0,), "c": (2,)}
    (tmp_path / "again.yaml").write_text(dump_config(three))
    again = load_config(tmp_path / "again.yaml")
    assert again == three and not changed_keys(three, again)
    assert again.data.class_map == three.data.class_map


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """12 images with masks of three classes and an ignored band, and cheap masks by two annotators for the first 6."""
    for folder in ("images", "masks", "cheap"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    lines = ["id,split,image,reference,annotation:a,annotation:b"]
    for number in range(12):
        ids = np.roll(BAND, number, axis=1)
        id = f"{number:02d}"
        picture = np.repeat((ids % 255 * 100)[..., None], 3, 2) + np.uint8(number)
        cv2.imwrite(str(tmp_path / f"data/images/{number}.png"), picture)
        cv2.imwrite(str(tmp_path / f"data/masks/{number}.png"), painted(ids)[..., ::-1])
        files = f"images/{number}.png,masks/{number}.png,"
        if number < 6:
            for name, shift in (("a", 1), ("b", 2)):
                cheap = np.roll(ids, shift, axis=0)
                cv2.imwrite(str(tmp_path / f"data/cheap/{number}{name}.png"), painted(cheap)[..., ::-1])
            files += f"cheap/{number}a.png,cheap/{number}b.png"
        else:
            files += ","
        split = ("train",) * 8 + ("val", "val", "test", "test")
        lines.append(f"{id},{split[number]},{files}")
    (tmp_path / "data/manifest.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


def three_classes(root: Path, **keys: Any) -> DataConfig:
    return DataConfig(root=root, image_size=16, classes=COLOURS, ignore="#ffffff", clean_count=2, **keys)


def test_noisy_and_fused_masks_are_written_as_the_data_codes_them(root, tmp_path):
    config = three_classes(root)
    samples, _ = checked_samples(config, tmp_path / "run", check=True)
    noisy, rate = write_noisy_masks(
        samples, three_classes(root, noise={"kind": "boundary", "alpha": 1}).noise, tmp_path / "n", config.decoding
    )
    assert 0 < rate < 1
    for before, after in zip(samples, noisy, strict=True):
        true, drawn = read_mask(before.truth, config.decoding), read_mask(after.annotations[0].mask, config.decoding)
        np.testing.assert_array_equal(drawn == 255, true == 255)
        assert set(np.unique(drawn)) <= {0, 1, 2, 255} and (drawn != true).any()
        assert Image.open(after.annotations[0].mask).mode == "RGB"
    fused = fuse_annotations(samples, "majority", tmp_path / "fused", config.decoding, write=True)
    [one] = fused[0].annotations
    np.testing.assert_array_equal(
        np.unique(read_mask(one.mask, config.decoding)), np.unique(read_mask(samples[0].truth, config.decoding))
    )


def test_each_class_is_drawn_alone_and_painted_over_the_one_before():
    kinds: dict[str, NoiseConfig] = {
        "box": data(noise="box", clean_count=1).noise,
        "polygon": data(noise={"kind": "polygon", "vertices": 7}, clean_count=1).noise,
    }
    drawn = corrupt(BAND, kinds["box"], "a")
    np.testing.assert_array_equal(drawn, BAND)  # both are boxes, the inner one named last
    for kind in kinds.values():
        first = corrupt((BAND == 1).astype(np.uint8), kind, "a")
        both = corrupt(BAND, kind, "a")
        np.testing.assert_array_equal((both == 1) | (both == 2) & (first > 0), (first > 0) & (BAND != 255))
        np.testing.assert_array_equal(both == 255, BAND == 255)
        np.testing.assert_array_equal(corrupt((IDS > 0).astype(np.uint8), kind, "a"),
                                      kind.draw_for("a", (IDS > 0).astype(np.uint8), None))  # fmt: skip


def test_a_cache_holds_class_ids_and_is_of_these_classes_only(root, tmp_path):
    config = three_classes(root)
    samples = read_samples(config)
    assert write_cache(samples, [], config, tmp_path / "cache", 1) == (1, 0)
    assert write_cache(samples, [], config, tmp_path / "cache", 1) == (0, 1)
    cache = open_cache(three_classes(root, cache=tmp_path / "cache"))
    assert cache is not None
    for sample in samples:
        cached = cache.find(sample.truth)
        np.testing.assert_array_equal(cached, read_resized_mask(sample.truth, config.frame, config.decoding))
        assert set(np.unique(cached)) == {0, 1, 2, 255}
    lower = {name: (value.lower(),) for name, value in COLOURS.items()}
    changed = config.model_copy(update={"cache": tmp_path / "cache", "classes": lower | {"ruler": ("#0000ff",)}})
    with pytest.raises(UserError, match=r"was made with other data\.classes, data\.ignore or data\.threshold"):
        open_cache(changed)
    (tmp_path / "cache" / "index.json").unlink()
    assert write_cache(samples, [], changed, tmp_path / "cache", 1) == (1, 0)


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_loaders_hand_class_ids_through(pipeline, root):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    config = three_classes(root)
    samples = read_samples(config)[:4]
    assert all(sample.annotations for sample in samples)
    requests = [Request.of(sample, "noisy", identity_transform(16)) for sample in samples]
    reader = PixelReader(config.frame, decoding=config.decoding)
    [batch] = _find_loader(pipeline)(iter([requests]), reader, 4, torch.device("cpu"), 1)
    expected = [read_resized_mask(sample.annotations[0].mask, config.frame, config.decoding) for sample in samples]
    np.testing.assert_array_equal(batch.masks.numpy(), expected)
    assert batch.true_masks is not None
    np.testing.assert_array_equal(
        batch.true_masks.numpy(), [read_resized_mask(sample.truth, config.frame, config.decoding) for sample in samples]
    )


def test_a_split_without_a_class_is_told_and_one_with_nothing_but_background_refused(root, tmp_path, caplog):
    for number in (10, 11):
        cv2.imwrite(
            str(root / f"masks/{number}.png"), painted(np.where(BAND == 2, 1, BAND).astype(np.uint8))[..., ::-1]
        )
    with caplog.at_level(logging.WARNING):
        checked_samples(three_classes(root), tmp_path / "run", check=True)
    assert "no mask of the test split marks hair" in caplog.text
    for number in (10, 11):
        cv2.imwrite(str(root / f"masks/{number}.png"), painted(np.zeros_like(IDS)))
    with pytest.raises(UserError, match="all 2 masks of the test split are empty"):
        checked_samples(three_classes(root), tmp_path / "run", check=True)
