"""What is found in the data: each rule on data that it is about and on data that it is not, and in one pass."""

import json
import logging
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile

from distseg.cli.prepare import main
from distseg.data.agreement import agreement, dice, thinned
from distseg.data.checks import check_findings, facts_of, inspect_files, usable_samples
from distseg.data.classes import BINARY_NAMES
from distseg.data.config import DataConfig
from distseg.data.decode import PLAIN
from distseg.data.findings import FINDING_NAMES, DataFacts, Finding, annotators, find, suspects
from distseg.data.report import write_report
from distseg.data.sample import Annotation, Problem, Sample
from distseg.data.twins import find_twins
from distseg.errors import UserError

SIDE = 64
SPLITS = ("train", "train", "val", "test")


def scene(seed: int, side: int = SIDE) -> np.ndarray:
    """(H, W, 3) uint8: no two seeds look alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(60, 200, (10, 10, 3), np.uint8))
    return np.array(coarse.resize((side, side), Image.Resampling.BICUBIC))


def disc(seed: int, side: int = SIDE, radius: float = 0.2) -> np.ndarray:
    """(H, W) uint8 in {0, 255}: a disc near the middle."""
    row, column = np.random.default_rng(seed).uniform(0.4, 0.6, 2) * side
    rows, columns = np.mgrid[:side, :side]
    return ((rows - row) ** 2 + (columns - column) ** 2 < (radius * side) ** 2).astype(np.uint8) * 255


def write(folder: Path, name: str, pixels: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def write_samples(root: Path, count: int = 12, annotators: Sequence[str] = ()) -> list[Sample]:
    """Sound samples with a reference, and annotations of `annotators` that are larger by a little."""
    return [
        Sample(
            f"s{n:03d}",
            SPLITS[n % 4],
            write(root, f"s{n:03d}.png", scene(n)),
            write(root, f"s{n:03d}_m.png", disc(n)),
            tuple(
                Annotation(name, write(root, f"s{n:03d}_{name}.png", disc(n, radius=0.22 + 0.01 * place)))
                for place, name in enumerate(annotators)
            ),
        )
        for n in range(count)
    ]


def look(samples: Sequence[Sample]) -> DataFacts:
    inspection = inspect_files(samples, PLAIN, 2)
    assert inspection.problems == []
    return facts_of(samples, inspection, BINARY_NAMES)


def found(samples: Sequence[Sample]) -> dict[str, Finding]:
    findings = find(look(samples))
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding for finding in findings}


def with_masks(samples: Sequence[Sample], change: Callable[[int, np.ndarray], np.ndarray]) -> list[Sample]:
    """`samples` whose references have been changed on the disk."""
    for number, sample in enumerate(samples):
        Image.fromarray(change(number, np.array(Image.open(sample.truth)))).save(sample.truth)
    return list(samples)


def test_sound_data_has_no_findings(tmp_path):
    assert found(write_samples(tmp_path, 40, ("a", "b", "c"))) == {}


# --- one pass, bounded memory -----------------------------------------------------------------------------------------


def test_every_file_is_read_and_decoded_once(tmp_path, monkeypatch):
    samples = write_samples(tmp_path, 8, ("a", "b"))
    photo = tmp_path / "photo.jpg"
    Image.fromarray(scene(300, 400)).save(photo)
    samples[0] = replace(samples[0], image=photo)
    for path in (samples[0].truth, *(each.mask for each in samples[0].annotations)):
        Image.open(path).resize((400, 400), Image.Resampling.NEAREST).save(path)
    read: Counter[Path] = Counter()
    decoded: Counter[str] = Counter()
    read_bytes, load, decode = Path.read_bytes, ImageFile.ImageFile.load_prepare, simplejpeg.decode_jpeg
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.update([path]), read_bytes(path))[1])
    monkeypatch.setattr(
        ImageFile.ImageFile, "load_prepare", lambda image: (decoded.update([image.format]), load(image))[1]
    )
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda *args, **keys: (decoded.update(["turbo"]), decode(*args, **keys))[1]
    )
    assert found(samples) == {}
    assert read == dict.fromkeys((path for sample in samples for path in sample.files.values()), 1)
    assert decoded == {"PNG": 8 * 4 - 1, "turbo": 1}


def test_what_is_kept_of_a_sample_does_not_grow_with_its_pixels(tmp_path):
    sizes = []
    for side in (64, 512):
        image, mask = write(tmp_path, f"{side}.png", scene(0, side)), write(tmp_path, f"m{side}.png", disc(0, side))
        other = write(tmp_path, f"o{side}.png", disc(0, side, radius=0.3))
        sample = Sample("a", "train", image, mask, (Annotation("x", other),))
        sizes.append(len(pickle.dumps(inspect_files([sample], PLAIN, 1))))
    assert max(sizes) < 6000
    assert abs(sizes[1] - sizes[0]) < 600  # a JPEG of 48×48 pixels has not always the same length


# --- agreement --------------------------------------------------------------------------------------------------------


def test_dice_of_classes_counts_the_same_class_and_leaves_out_what_is_ignored():
    first = np.array([[1, 1, 2, 0, 255]], np.uint8)
    second = np.array([[1, 2, 2, 1, 1]], np.uint8)
    assert dice(first, second) == 2 * 2 / (3 + 4)
    assert dice(first * 0, second * 0) == 1.0
    assert dice(first, second * 0) == 0.0
    masks = {"reference": first, "annotation:x": second, "annotation:y": first[:, :2]}
    assert agreement(masks) == {("reference", "annotation:x"): 4 / 7}  # of the third there is no telling


def test_large_masks_are_compared_on_a_part_of_their_pixels():
    big = np.zeros((1100, 3000), np.uint8)
    big[:, 1000:] = 1
    assert thinned(big).size <= 2**20
    assert thinned(big).mean() == pytest.approx(big.mean(), abs=0.01)
    assert thinned(big[:100]).shape == (100, 3000)


def test_annotators_are_set_beside_each_other_and_beside_the_reference(tmp_path):
    samples = write_samples(tmp_path, 6, ("a", "b"))
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(samples[0].annotations[1].mask)
    known = annotators(look(samples))
    with_reference, between = [], []
    for sample in samples:
        drawn = {each.annotator: np.array(Image.open(each.mask)) > 0 for each in sample.annotations}
        truth = np.array(Image.open(sample.truth)) > 0
        with_reference.append(2 * (drawn["b"] & truth).sum() / (drawn["b"].sum() + truth.sum()))
        between.append(2 * (drawn["a"] & drawn["b"]).sum() / (drawn["a"].sum() + drawn["b"].sum()))
    b = known["annotation:b"]
    assert (b.masks, b.empty) == (6, 1)
    assert (b.reference, b.others) == pytest.approx((np.mean(with_reference), np.mean(between)), rel=1e-12)


# --- images that show the same ----------------------------------------------------------------------------------------


def saved_again(image: np.ndarray) -> np.ndarray:
    return simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=40))


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "brighter": lambda image: np.clip(image.astype(int) + 40, 0, 255).astype(np.uint8),
    "paler": lambda image: (image * 0.5 + 100).astype(np.uint8),
    "saved again": saved_again,
    "mirrored": lambda image: image[:, ::-1],
    "upside down": lambda image: image[::-1, ::-1],
    "turned and mirrored": lambda image: np.rot90(image)[:, ::-1],
    "reduced": lambda image: np.array(Image.fromarray(image).resize((41, 41))),
    "in grey": lambda image: image.mean(axis=2, keepdims=True).repeat(3, 2).astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_in_another_split_is_found(tmp_path, change):
    samples = write_samples(tmp_path, 30)
    copy = CHANGES[change](scene(2))
    image = write(tmp_path, "copy.png", np.ascontiguousarray(copy))
    samples.append(Sample("copy", "test", image, write(tmp_path, "copy_m.png", disc(99, copy.shape[0]))))
    twins = found(samples)["near_twins"]
    assert (twins.severity, twins.pairs) == ("warn", (("s002", "copy"),))
    assert twins.text.startswith("1 of 7 val images and 1 of 8 test images look")


def test_many_pairs_are_found_across_the_blocks_of_the_search():
    copied = [*range(50), *range(600, 650)]
    thumbnails = np.stack([scene(seed, 16) for seed in range(700)] + [scene(seed, 16)[::-1] for seed in copied])
    pairs = find_twins(thumbnails)
    assert {(pair.first, pair.second) for pair in pairs} == {(n, 700 + place) for place, n in enumerate(copied)}
    assert find_twins(np.zeros((0, 16, 16, 3), np.uint8)) == []
    assert find_twins(np.full((5, 16, 16, 3), 80, np.uint8)) == []  # blank images show nothing that is the same


def test_a_split_full_of_copies_is_refused_unless_it_is_allowed(tmp_path):
    samples = write_samples(tmp_path, 80)
    for number in range(20):
        image = write(tmp_path, f"c{number}.png", CHANGES["paler"](scene(4 * number)))
        samples.append(Sample(f"c{number:03d}", "test", image, write(tmp_path, f"c{number}_m.png", disc(number + 500))))
    facts = look(samples)
    with pytest.raises(
        UserError, match=r"20 of 40 test images look .* data\.allow=\[near_twins\] trains on it"
    ) as told:
        check_findings(find(facts))
    assert "\n" not in str(told.value)
    check_findings(find(facts, ("near_twins",)))


def test_copies_within_a_split_are_noted(tmp_path):
    samples = write_samples(tmp_path, 30)
    image = write(tmp_path, "copy.png", CHANGES["brighter"](scene(0)))
    samples.append(Sample("copy", "train", image, write(tmp_path, "copy_m.png", disc(99))))
    repeated = found(samples)["repeated_images"]
    assert (repeated.severity, repeated.pairs) == ("note", (("s000", "copy"),))


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name", "severity", "said"),
    [
        (lambda n, mask: mask * 0, "empty_masks", "refuse", "all 20 masks of the train split are empty"),
        (lambda n, mask: mask * 0 + 255, "full_masks", "refuse", "all 20 masks of the train split are full"),
        (lambda n, mask: mask * (n > 0), "empty_masks", "note", "1 image has a mask that marks nothing"),
        (lambda n, mask: 255 - mask, "inverted_masks", "warn", "in 40 of 40 masks lesion covers most of the frame's"),
        (lambda n, mask: 255 - mask if n < 3 else mask, "inverted_masks", "note", "in 3 of 40 masks"),
        (lambda n, mask: disc(n, radius=0.06), "small_objects", "warn", "half of the masks mark less than"),
        (lambda n, mask: disc(0) if n < 5 else mask, "shared_masks", "warn", "5 images share their mask"),
        (lambda n, mask: disc(0), "shared_masks", "refuse", "40 images share their mask"),
        (lambda n, mask: disc(n, radius=0.2 + 0.15 * (n % 4 > 1)), "unlike_splits", "warn", "the median lesion covers"),
    ],
)
def test_masks_that_cannot_be_meant(tmp_path, change, name, severity, said):
    facts = look(with_masks(write_samples(tmp_path, 40), change))
    findings = [finding for finding in find(facts) if finding.name == name]
    assert [finding.severity for finding in findings] == [severity] * len(findings)
    assert any(finding.text.startswith(said) for finding in findings), findings
    if severity == "refuse":
        with pytest.raises(UserError, match=rf"data\.allow=\[.*{name}.*\]"):
            check_findings(find(facts))
    check_findings(find(facts, FINDING_NAMES))


def test_of_several_classes_one_that_a_split_lacks_is_named_and_a_full_frame_is_no_fault(tmp_path):
    samples = write_samples(tmp_path, 24)
    for sample in samples:
        mask = 1 + (np.array(Image.open(sample.truth)) > 0) * (sample.split != "val")
        Image.fromarray(mask.astype(np.uint8)).save(sample.truth)
    config = DataConfig(root=tmp_path, classes={"background": 0, "rim": 1, "core": 2})
    inspection = inspect_files(samples, config.decoding, 2)
    facts = facts_of(samples, inspection, config.class_names)
    assert inspection.problems == []
    findings = {(each.name, each.severity): each.text for each in find(facts)}
    assert findings["absent_classes", "warn"] == "no mask of the val split marks core"
    assert not {name for name, severity in findings} & {"inverted_masks"}
    check_findings(find(facts))
    write_report(tmp_path / "report", "classes", facts, find(facts), [], config.decoding)
    shares = json.loads((tmp_path / "report" / "report.json").read_text())["splits"]["train"]["class_shares"]
    assert shares["background"] == 0 and shares["rim"] + shares["core"] == pytest.approx(1)


def test_annotations_that_are_the_reference_or_far_from_it(tmp_path):
    samples = write_samples(tmp_path, 20, ("a",))
    for sample in samples[:5]:
        sample.annotations[0].mask.write_bytes(sample.truth.read_bytes())
    corner = np.zeros((SIDE, SIDE), np.uint8)
    corner[:9, :9] = 255
    Image.fromarray(corner).save(samples[7].annotations[0].mask)
    findings = found(samples)
    assert findings.keys() == {"copied_annotations", "far_annotations"}
    assert findings["copied_annotations"].text.startswith("5 of 20 annotations are the same file")
    assert findings["far_annotations"].suspects == {"s007": "a has Dice 0.00 with the reference"}


def test_an_annotator_who_agrees_with_nobody_is_named(tmp_path):
    samples = write_samples(tmp_path, 8, ("a", "b", "stranger"))
    for number, sample in enumerate(samples):
        shifted = np.roll(disc(number), 20, axis=1)
        Image.fromarray(shifted).save(sample.annotations[2].mask)
    [text] = [each.text for each in find(look(samples)) if each.name == "lone_annotators"]
    assert text.startswith("the annotator stranger agrees with the others by a Dice of 0.")


# --- images that do not belong ----------------------------------------------------------------------------------------


def test_blank_oddly_coloured_and_oddly_shaped_images(tmp_path):
    samples = write_samples(tmp_path, 40)
    Image.fromarray(np.full((SIDE, SIDE, 3), 130, np.uint8)).save(samples[3].image)
    Image.fromarray(scene(4) // np.array([1, 4, 1], np.uint8)).save(samples[4].image)
    wide = Image.fromarray(scene(5, 128)[:40])
    wide.save(samples[5].image)
    Image.open(samples[5].truth).resize(wide.size, Image.Resampling.NEAREST).save(samples[5].truth)
    findings = found(samples)
    assert {name: list(each.suspects) for name, each in findings.items()} == {
        "blank_images": ["s003"],
        "odd_colours": ["s004"],
        "odd_shapes": ["s005"],
    }
    assert findings["odd_shapes"].suspects["s005"].startswith("128×40 pixels")
    assert next(iter(suspects(list(findings.values())))) == "s003"  # a warning goes before notes


# --- the report and the commands --------------------------------------------------------------------------------------


def test_the_page_and_the_json_show_what_was_found_and_no_text_is_markup(tmp_path):
    samples = write_samples(tmp_path / "files", 12, ("<b>a", "b"))
    bad = "<script>alert(1)</script>"
    empty = np.zeros((SIDE, SIDE), np.uint8)
    Image.fromarray(empty).save(samples[0].annotations[0].mask)
    samples[0] = replace(samples[0], id=bad)
    image = write(tmp_path / "files", "copy.png", CHANGES["paler"](scene(1)))
    samples.append(Sample("copy", "val", image, write(tmp_path / "files", "copy_m.png", disc(77))))
    facts = look(samples)
    findings = find(facts, ("near_twins",))
    write_report(tmp_path, bad, facts, findings, [Problem("z", "z.png", f"is {bad}")], PLAIN)
    page = (tmp_path / "report.html").read_text()
    assert bad not in page and "<b>a" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4  # title, heading, card, problem
    assert "&lt;b&gt;a" in page
    for finding in findings:
        assert f"{finding.text[1:]}." in page
    assert '<span class="badge">allowed</span>' in page

    content = json.loads((tmp_path / "report.json").read_text())
    assert [each["name"] for each in content["findings"]] == [finding.name for finding in findings]
    assert {"near_twins", "empty_masks"} <= {finding.name for finding in findings}
    assert content["splits"]["train"]["images"] == 6
    assert content["splits"]["train"]["class_shares"]["lesion"] == pytest.approx(
        np.mean([mask.lit for s in samples if s.split == "train" for mask in facts.masks[s.id].values()])
    )
    assert content["annotators"]["<b>a"]["empty"] == 1
    between = {tuple(each["between"]): each["images"] for each in content["agreement"]}
    assert between == {("reference", "<b>a"): 12, ("reference", "b"): 12, ("<b>a", "b"): 12}


def write_manifest(root: Path, samples: Sequence[Sample]) -> None:
    rows = [f"{s.id},{s.split},{s.image.name},{s.truth.name}" for s in samples]
    (root / "manifest.csv").write_text("\n".join(["id,split,image,mask", *rows]) + "\n")


def test_prepare_refuses_what_training_refuses_and_writes_the_report_first(tmp_path, capfd):
    samples = with_masks(write_samples(tmp_path / "data", 24), lambda n, mask: mask * 0)
    write_manifest(tmp_path / "data", samples)
    (tmp_path / "c.yaml").write_text("name: x\ndata: {image_size: 32, clean_count: 2}\ntrain: {steps: 1}\n")
    words = ["--config", str(tmp_path / "c.yaml"), f"data.root={tmp_path / 'data'}"]
    with pytest.raises(UserError, match=r"all 12 masks of the train split .* \(and 2 more\)") as prepared:
        main([*words, "--report", str(tmp_path / "report")])
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    assert "refuse: all 12 masks" in (tmp_path / "report" / "report.txt").read_text()
    config = DataConfig(root=tmp_path / "data", clean_count=2)
    with pytest.raises(UserError) as trained:
        usable_samples(config, tmp_path / "run", check=True)
    assert str(trained.value) == str(prepared.value)
    assert main([*words, "data.allow=[empty_masks]"]) == 0
    assert len(usable_samples(config.model_copy(update={"allow": ("empty_masks",)}), tmp_path / "run", True)) == 24
    assert "image/s" not in capfd.readouterr().err  # the bar is for terminals


def test_an_unknown_finding_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text(f"name: x\ndata: {{root: {tmp_path}, allow: [twins]}}\ntrain: {{steps: 1}}\n")
    with pytest.raises(UserError, match=r"data\.allow.*near_twins"):
        main(["--config", str(tmp_path / "c.yaml")])


def test_training_warns_once_of_each_finding_and_notes_nothing(tmp_path, caplog):
    samples = with_masks(write_samples(tmp_path, 40), lambda n, mask: disc(n, radius=0.06) * (n > 0))
    with caplog.at_level(logging.INFO):
        check_findings(find(look(samples)))
    [said] = caplog.messages
    assert said.startswith("data: half of the masks mark less than")
