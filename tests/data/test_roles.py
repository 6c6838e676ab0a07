"""Which masks are experts' and which are cheap, whose they are, and what follows for the streams and the splits."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distseg.data.annotators import majority, staple
from distseg.data.checks import check_splits
from distseg.data.config import DataConfig
from distseg.data.noise.box import BoxNoise
from distseg.data.sample import Annotation, Sample
from distseg.data.splits import split_clean
from distseg.data.streams import Stream
from distseg.data.survey import read_samples, survey
from distseg.distributed.ranks import ShardSpec
from distseg.errors import UserError
from distseg.run_folder import RunFolder
from distseg.training.splits import prepare_splits

SIZE = 16


def draw(seed: int, grow: int = 0) -> np.ndarray:
    """A box whose place depends on the seed."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[4 - grow : 9 + grow, 3 + seed % 4 - grow : 9 + seed % 4 + grow] = 255
    return mask


def write_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def folders(root: Path, references: dict[str, int], annotations: dict[str, int], **keys) -> DataConfig:
    """Of images named by `references` and `annotations`: paths of masks, and how much each box is grown."""
    ids = sorted({Path(name).stem.split("_")[0] for name in [*references, *annotations]})
    for number, id in enumerate(ids):
        write_image(root / "images" / f"{id}.png", number)
        for name, grow in (references | annotations).items():
            if Path(name).stem.split("_")[0] == id:
                write_mask(root / name, draw(number, grow))
    return DataConfig(root=root, val_fraction=0, test_fraction=0, **keys)


def found(config: DataConfig) -> dict[str, tuple[bool, list[str]]]:
    """Whether each sample has a reference, and who has annotated it."""
    return {s.id: (s.reference is not None, [a.annotator for a in s.annotations]) for s in read_samples(config)}


# --- folders ----------------------------------------------------------------------------------------------------------


def test_expert_and_cheap_masks_in_folders(tmp_path):
    config = folders(tmp_path, {"references/a.png": 0, "references/b.png": 0}, {"annotations/c.png": 1})
    assert found(config) == {"a": (True, []), "b": (True, []), "c": (False, [""])}
    clean, noisy = split_clean(read_samples(config), None, 0)
    assert [s.id for s in clean] == ["a", "b"] and [s.id for s in noisy] == ["c"]


@pytest.mark.parametrize(("experts", "cheap"), [("expert", "cheap"), ("Ground_Truth", "Noisy"), ("gold", "crowd")])
def test_other_names_that_people_give_to_the_folders(tmp_path, experts, cheap):
    config = folders(tmp_path, {f"{experts}/a.png": 0}, {f"{cheap}/b.png": 1})
    assert found(config) == {"a": (True, []), "b": (False, [""])}


@pytest.mark.parametrize("names", ["annotations/{who}/{id}.png", "annotations/{id}_{who}.png", "masks/{id}_{who}.png"])
def test_annotators_are_known_by_folder_or_by_the_end_of_a_name(tmp_path, names):
    masks = {names.format(id=id, who=who): grow for id in ("a", "b") for who, grow in (("A07", 2), ("A01", 1))}
    config = folders(tmp_path, {}, masks)
    assert found(config) == {"a": (False, ["A01", "A07"]), "b": (False, ["A01", "A07"])}


def test_masks_beside_references_are_cheap_and_beside_annotations_the_truth(tmp_path):
    beside = folders(tmp_path / "one", {"references/a.png": 0}, {"masks/a.png": 1, "masks/b.png": 1})
    assert found(beside) == {"a": (True, [""]), "b": (False, [""])}
    beside = folders(tmp_path / "two", {"masks/a.png": 0}, {"annotations/a.png": 1, "annotations/b.png": 1})
    assert found(beside) == {"a": (True, [""]), "b": (False, [""])}


def test_a_mask_without_a_name_beside_named_ones_is_not_guessed_at(tmp_path):
    config = folders(tmp_path, {}, {"masks/a.png": 0, "masks/a_A01.png": 1, "masks/b_A01.png": 1})
    with pytest.raises(UserError, match=r"a\.png and a_A01\.png are masks of a, and which is the expert's is not said"):
        read_samples(config)


def test_three_folders_of_masks_are_not_guessed_at(tmp_path):
    config = folders(tmp_path, {"references/a.png": 0}, {"annotations/a.png": 1, "masks/a.png": 1})
    with pytest.raises(UserError, match="are these references or annotations"):
        read_samples(config)


def test_an_id_with_the_beginning_of_another_has_its_own_masks(tmp_path):
    for number, id in enumerate(("s", "s_1")):
        write_image(tmp_path / "images" / f"{id}.png", number)
    for name in ("s", "s_1"):
        write_mask(tmp_path / "masks" / f"{name}.png", draw(0))
    config = DataConfig(root=tmp_path, val_fraction=0, test_fraction=0)
    assert {s.id: s.reference.name for s in read_samples(config)} == {"s": "s.png", "s_1": "s_1.png"}


@pytest.mark.parametrize("inside", ["{split}/images/{id}", "images/{split}/{id}"])
@pytest.mark.parametrize("masks", ["masks", "labels"])
def test_a_folder_a_split(tmp_path, inside, masks):
    for number, (split, id) in enumerate([("train", "a"), ("train", "b"), ("valid", "c"), ("test", "d")]):
        place = inside.format(split=split, id=id)
        write_image(tmp_path / f"{place}.png", number)
        write_mask(tmp_path / f"{place.replace('images', masks)}.png", draw(number))
    samples = read_samples(DataConfig(root=tmp_path))
    assert {s.id: s.split for s in samples} == {"a": "train", "b": "train", "c": "val", "d": "test"}
    assert all(s.reference is not None and s.reference.stem == s.id for s in samples)


def test_a_mask_of_no_image_is_told(tmp_path, caplog):
    config = folders(tmp_path, {"masks/a.png": 0}, {})
    write_mask(tmp_path / "masks" / "stranger.png", draw(0))
    assert found(config) == {"a": (True, [])}
    assert "1 masks belong to no image, the first is stranger.png" in caplog.text
    caplog.clear()
    for folder in ("images", "masks"):  # which is refused with its own reason
        write_mask(tmp_path / folder / os.fsdecode(b"l\xe4sion.png"), draw(0))
    (tmp_path / "masks" / "stranger.png").rename(tmp_path / "masks" / os.fsdecode(b"\xe4.png"))
    survey(config)
    assert "1 masks belong to no image, the first is \\xe4.png" in caplog.text and caplog.text.encode()


# --- tables -----------------------------------------------------------------------------------------------------------


def table(root: Path, *lines: str) -> DataConfig:
    root.mkdir(exist_ok=True)
    (root / "manifest.csv").write_text("\n".join(lines) + "\n")
    return DataConfig(root=root, val_fraction=0, test_fraction=0)


def test_a_manifest_of_references_annotations_and_groups(tmp_path):
    config = table(
        tmp_path,
        "id,split,image,reference,annotation:Bo,annotation:ann,group",
        "a,train,a.jpg,r/a.png,,,p1",
        "b,train,b.jpg,,x/b.png,y/b.png,p1",
        "c,test,c.jpg,r/c.png,,,p2",
    )
    a, b, c = read_samples(config)
    assert a == Sample("a", "train", tmp_path / "a.jpg", tmp_path / "r/a.png", (), "p1")
    both = (Annotation("Bo", tmp_path / "x/b.png"), Annotation("ann", tmp_path / "y/b.png"))
    assert b == Sample("b", "train", tmp_path / "b.jpg", None, both, "p1")
    assert c.group == "p2" and list(b.files) == ["image", "annotation:Bo", "annotation:ann"]


@pytest.mark.parametrize("column", ["annotation", "mask"])
def test_a_row_an_annotation(tmp_path, column):
    config = table(
        tmp_path, f"id,image,{column},annotator", "a,a.jpg,1.png,Bo", "a,a.jpg,2.png,Ann", "b,b.jpg,3.png,Bo"
    )
    assert found(config) == {"a": (False, ["Ann", "Bo"]), "b": (False, ["Bo"])}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["a,a.jpg,1.png,Bo", "a,a.jpg,2.png,Bo"], "id a is twice in train"),
        (["a,a.jpg,1.png,Bo", "a,b.jpg,2.png,Ann"], "id a is twice in train"),
        (["a,a.jpg,1.png,", "a,a.jpg,2.png,"], "rows of several annotators name each"),
        (["a,a.jpg,1.png,=Bo"], "annotator '=Bo' must begin with none of"),
        (["a,a.jpg,,Bo"], "has neither a reference nor an annotation"),
    ],
)
def test_rows_that_contradict_each_other(tmp_path, rows, said):
    with pytest.raises(UserError) as raised:
        read_samples(table(tmp_path, "id,image,annotation,annotator", *rows))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_scored_on_needs_a_reference(tmp_path):
    config = table(tmp_path, "id,split,image,reference,annotation", "a,train,a,,x", "b,val,b,,y", "c,test,c,r,")
    with pytest.raises(UserError, match="of the val split, has no reference mask"):
        read_samples(config)


# --- groups and splits ------------------------------------------------------------------------------------------------


def test_a_group_is_in_one_split(tmp_path):
    rows = [f"s{n:03d},i{n},r{n},,g{n // 5}" for n in range(200)] + [f"t{n},j{n},,x{n},g{n}" for n in range(40)]
    config = table(tmp_path, "id,image,reference,annotation,group", *rows)
    config = config.model_copy(update={"val_fraction": 0.2, "test_fraction": 0.3})
    splits: dict[str, set[str]] = {}
    samples = read_samples(config)
    for sample in samples:
        splits.setdefault(sample.group, set()).add(sample.split)
    assert all(len(each) == 1 for each in splits.values())
    assert {sample.split for sample in samples} == {"train", "val", "test"}
    assert all(sample.reference for sample in samples if sample.split != "train")
    scored = {sample.group for sample in samples if sample.split != "train"}
    assert len(samples) == 240 - len(scored)  # each group has one image without a reference


def test_a_group_in_two_splits_is_refused(tmp_path):
    config = table(tmp_path, "id,split,image,reference,group", "a,train,a,r,p7", "b,test,b,q,p7", "c,train,c,p,")
    samples, problems = survey(config)
    assert [sample.id for sample in samples] == ["c"]
    assert {problem.reason for problem in problems} == {"the group p7 is in test and train; keep it in one split"}


def test_only_images_with_a_reference_are_drawn_to_be_scored_on(tmp_path):
    rows = [f"s{n},i{n},{f'r{n}' if n < 12 else ''},x{n}" for n in range(300)]
    config = table(tmp_path, "id,image,reference,annotation", *rows)
    samples = read_samples(config.model_copy(update={"val_fraction": 0.25, "test_fraction": 0.25}))
    assert len(samples) == 300
    assert all(sample.reference for sample in samples if sample.split != "train")


# --- roles ------------------------------------------------------------------------------------------------------------


def test_masks_of_which_nobody_says_whose_they_are_are_refused_with_the_mend(tmp_path):
    config = folders(tmp_path, {f"masks/{letter}.png": 0 for letter in "abc"}, {})
    with pytest.raises(UserError, match=r"all 3 training images have a reference mask.*data\.clean_count=K") as raised:
        split_clean(read_samples(config), None, 0)
    assert "annotations/ beside references/" in str(raised.value) and "\n" not in str(raised.value)
    assert [len(part) for part in split_clean(read_samples(config), 2, 0)] == [2, 1]


def test_an_annotator_may_be_the_expert(tmp_path):
    masks = {f"masks/{id}_{who}.png": 0 for id in "abc" for who in ("A01", "A07") if (id, who) != ("b", "A07")}
    config = folders(tmp_path, {}, masks, expert="A07")
    assert found(config) == {"a": (True, ["A01"]), "b": (False, ["A01"]), "c": (True, ["A01"])}
    with pytest.raises(UserError, match=r"data\.expert Bo: no annotator of this name; there are A01, A07"):
        read_samples(config.model_copy(update={"expert": "Bo"}))


def test_where_nobody_is_the_expert_nothing_can_be_scored(tmp_path):
    config = folders(tmp_path, {}, {f"masks/{id}_{who}.png": 0 for id in "abc" for who in ("A01", "A07")})
    with pytest.raises(UserError, match=r"no image has a reference mask.*by data\.expert: A01, A07$"):
        check_splits(read_samples(config))


@pytest.mark.parametrize("known", ["a", "ab"])
def test_of_fewer_than_three_references_no_fraction_makes_three_splits(tmp_path, known):
    cheap = {f"annotations/{id}.png": 1 for id in "cdefgh"}
    config = folders(tmp_path, {f"references/{id}.png": 0 for id in known}, cheap)
    config = config.model_copy(update={"val_fraction": 0.5, "test_fraction": 0.2})
    with pytest.raises(
        UserError, match=rf"the (val|test) split is empty.*there (is|are) {len(known)}, give at least 3$"
    ):
        check_splits(read_samples(config))


# --- streams ----------------------------------------------------------------------------------------------------------


def stream_of(samples: list[Sample], config: DataConfig, seed: int = 0) -> Stream:
    return Stream(samples, "noisy", "noisy", config, seed, ShardSpec(), 4, 1, torch.device("cpu"))


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_a_truth_that_nobody_has_is_absent(tmp_path, pipeline):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    keys = {"image_size": SIZE, "pipeline": pipeline}
    config = folders(tmp_path, {"references/a.png": 0}, {f"annotations/{id}.png": 1 for id in "bcd"}, **keys)
    _, noisy = split_clean(read_samples(config), None, 0)
    stream = stream_of(noisy, config)
    batch = stream.batch(0, 0)
    stream.close()
    assert batch.true_masks is None
    for id, mask in zip(batch.ids, batch.masks.numpy(), strict=True):
        np.testing.assert_array_equal(mask, draw("abcd".index(id), 1) > 0)


def test_each_time_one_annotator_is_drawn_by_the_seed(tmp_path):
    masks = {f"annotations/{who}/{id}.png": grow for id in "ab" for who, grow in (("x", 0), ("y", 1), ("z", 2))}
    config = folders(tmp_path, {}, masks, image_size=SIZE, pipeline="torch")
    samples = read_samples(config)

    def drawn(seed: int) -> list[int]:
        stream = stream_of(samples, config, seed)
        batches = [stream.batch(step, 0) for step in range(15)]
        stream.close()
        return [int(mask.sum()) for batch in batches for mask in batch.masks]

    first = drawn(0)
    assert drawn(0) == first != drawn(1)
    counts = [first.count(area) for area in (30, 56, 90)]
    assert sum(counts) == 60 and min(counts) >= 10


@pytest.mark.parametrize("rule", ["majority", "staple"])
def test_several_annotations_become_one(tmp_path, rule):
    masks = {f"annotations/{who}/b.png": grow for who, grow in (("x", 0), ("y", 1), ("z", 1))}
    held = {f"references/{id}.png": 0 for id in ("a", "v", "t")}
    config = folders(tmp_path / "data", held, masks, image_size=SIZE, annotators=rule)
    table = ["id,split,image,reference,annotation:x,annotation:y,annotation:z"]
    table += [
        f"{id},{split},images/{id}.png,references/{id}.png,{','.join(masks) if id == 'a' else ',,'}"
        for id, split in zip("avt", ("train", "val", "test"), strict=True)
    ]
    table += [f"b,train,images/b.png,,{','.join(masks)}"]
    (config.root / "manifest.csv").write_text("\n".join(table))
    splits = prepare_splits(config, 0, RunFolder(tmp_path / "run"), check=True)
    [noisy], [clean] = splits.noisy, splits.clean
    for sample in (noisy, clean):  # a clean image says of annotators what is learned from them
        assert [each.annotator for each in sample.annotations] == [rule]
    np.testing.assert_array_equal(np.asarray(Image.open(noisy.annotations[0].mask)) > 0, draw(1, 1) > 0)
    assert np.isnan(splits.noise_rate) and splits.figures["noise_rate"] is None
    assert prepare_splits(config, 0, RunFolder(tmp_path / "run"), check=False).noisy == splits.noisy
    roster = json.loads((tmp_path / "run" / "data.json").read_text())["samples"]
    assert {id for id, member in roster.items() if member["clean"]} == {"a"}
    assert set(roster["b"]["sha256"]) == {"image", "annotation:x", "annotation:y", "annotation:z"}


def test_simulated_annotators_leave_picked_references_alone_and_are_not_those_of_the_data(tmp_path):
    ids = "abcdefvt"
    masks = ({f"{kind}/{id}.png": grow for id in ids} for kind, grow in (("references", 0), ("annotations", 2)))
    config = folders(tmp_path / "data", *masks, image_size=SIZE)
    splits = {"v": "val", "t": "test"}
    rows = [
        f"{id},{splits.get(id, 'train')},images/{id}.png,references/{id}.png,annotations/{id}.png,{int(id in 'ab')}"
        for id in ids
    ]
    (config.root / "manifest.csv").write_text("\n".join(["id,split,image,reference,annotation,picked", *rows]))
    for noise, own in ((config.noise.model_copy(), True), (BoxNoise(), False)):
        study = config.model_copy(update={"noise": noise, "clean_count": 2})
        parts = prepare_splits(study, 0, RunFolder(tmp_path / f"run{own}"), check=True)
        assert all(bool(sample.annotations) == own for sample in parts.clean) and len(parts.clean) == 2
        picked = [sample for sample in parts.noisy if sample.picked]
        assert [sample.id for sample in picked] == ["a", "b"] and not any(sample.annotations for sample in picked)
        rest = [sample for sample in parts.noisy if not sample.picked]
        assert len(rest) == 2 and all(sample.annotations for sample in rest)
        assert all((sample.annotations[0].mask.parent.name == "annotations") == own for sample in rest)


def test_votes(tmp_path):
    votes = np.array([[0, 1, 2, 255, 255, 1], [0, 1, 0, 255, 1, 2], [1, 2, 1, 255, 255, 255]], np.uint8)[:, None]
    np.testing.assert_array_equal(majority(votes), [[0, 1, 0, 255, 1, 1]])
    same = np.stack([draw(0) // 255] * 3)
    np.testing.assert_array_equal(staple(same), same[0])
