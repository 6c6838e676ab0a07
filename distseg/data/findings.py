"""What the data shows that a training would not tell: splits that leak, masks that mark nothing, annotators who err.

Rules on the facts that the one pass over the files gathers (inspect.py); nothing here reads a file. Each finding has a
name. What is dangerous is refused, unless `data.allow` names it; the rest is warned of, or noted in the report.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from distseg.data.agreement import Agreement
from distseg.data.inspect import THUMBNAIL, ImageFacts, MaskFacts
from distseg.data.sample import SPLITS, FileKey, Sample
from distseg.data.twins import Pair, find_twins
from distseg.text import for_terminal

Severity = Literal["refuse", "warn", "note"]
FindingName = Literal[
    "empty_masks",
    "full_masks",
    "shared_masks",
    "near_twins",
    "inverted_masks",
    "copied_annotations",
    "lone_annotators",
    "far_annotations",
    "absent_classes",
    "small_objects",
    "unlike_splits",
    "blank_images",
    "odd_colours",
    "odd_shapes",
    "repeated_images",
]
FINDING_NAMES: tuple[str, ...] = get_args(FindingName)

_MANY_TWINS = 0.1
"""Of a split that is scored on; ISIC 2017 has 3 % and is used by everyone."""
_FEW = 20
"""Images that are at least concerned before twins or shared masks are refused: toy data is of few, and much alike."""
_SWAPPED_BORDER = 0.5
_SMALL = 0.035
"""A short training on lesions of 3 % of the frame ended with a network that marked nothing."""
_UNLIKE = 2.0
_FAR = 0.3
"""Dice with the reference below which an annotation is likely of something else."""
_LONE = 0.7
"""Of the median annotator's agreement with the others."""
_BLANK = 2.0
"""Grey levels: deviation over a thumbnail."""
_ODD_COLOUR = 8.0
"""In deviations as robust estimates have them: 1.4826 times the median absolute deviation."""
_ODD_ASPECT = 1.5
_NOTHING: tuple[tuple[float, FindingName, str, str], ...] = (
    (0.0, "empty_masks", "empty: they mark no lesion", "marks nothing"),
    (1.0, "full_masks", "full: they mark no background", "marks the whole frame"),
)


@dataclass(frozen=True)
class Finding:
    name: FindingName
    severity: Severity
    text: str
    """One sentence, with the mend where there is one."""
    suspects: Mapping[str, str] = field(default_factory=dict)
    """What each sample shows, by id, the most suspicious first."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Samples that are alike, the most alike first."""
    allowed: bool = False
    """Named by `data.allow`: neither refused nor warned of."""

    def __str__(self) -> str:
        return for_terminal(f"{'allowed' if self.allowed else self.severity}: {self.text} ({self.name})")


@dataclass(frozen=True)
class DataFacts:
    """The samples that can be used, sorted by id, and what their files hold."""

    samples: Sequence[Sample]
    images: Mapping[str, ImageFacts]
    masks: Mapping[str, Mapping[FileKey, MaskFacts]]
    agreements: Mapping[str, Agreement]
    class_names: tuple[str, ...]
    """By id, background first."""

    def of_split(self, split: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.split == split]

    def thumbnails(self, samples: Sequence[Sample]) -> NDArray[np.uint8]:
        """(N, 16, 16, 3) uint8 RGB."""
        content = b"".join(self.images[sample.id].thumbnail for sample in samples)
        return np.frombuffer(content, np.uint8).reshape(len(samples), THUMBNAIL, THUMBNAIL, 3)


def find(facts: DataFacts, allow: Iterable[str] = ()) -> list[Finding]:
    """All findings, the dangerous ones first."""
    rules = (_showing_nothing, _shared, _twins, _inverted, _absent, _copied, _annotators, _small, _unlike, _images)
    found = [finding for rule in rules for finding in rule(facts)]
    order = get_args(Severity)
    allowed = set(allow)
    found = [replace(each, allowed=each.name in allowed) for each in found]
    return sorted(found, key=lambda each: (each.allowed, order.index(each.severity)))


def suspects(findings: Sequence[Finding]) -> dict[str, list[str]]:
    """What each suspicious sample shows, the most suspicious first: those of the most and the gravest findings."""
    weight = {"refuse": 4, "warn": 2, "note": 1}
    score: dict[str, float] = {}
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        for place, (id, reason) in enumerate(finding.suspects.items()):
            # One that stands out among few is worth more of a look than one of a thousand.
            score[id] = score.get(id, 0.0) + weight[finding.severity] + 1 / (1 + place)
            reasons.setdefault(id, []).append(reason)
    return {id: reasons[id] for id in sorted(reasons, key=lambda id: (-score[id], id))}


# --- masks ------------------------------------------------------------------------------------------------------------


def _showing_nothing(facts: DataFacts) -> list[Finding]:
    findings = []
    for share, name, what, word in _NOTHING:
        concerned: dict[str, str] = {}
        whole = []
        for split in SPLITS:
            masks = [(s, key, mask) for s in facts.of_split(split) for key, mask in facts.masks[s.id].items()]
            empty = [(sample, key) for sample, key, mask in masks if mask.lit == share]
            concerned |= {sample.id: f"{key} {word}" for sample, key in empty}
            # Of several classes, background may be marked nowhere.
            if masks and len(empty) == len(masks) and not (share and len(facts.class_names) > 2):
                whole.append((split, len(masks)))
        for split, count in whole:
            text = (
                f"all {count} masks of the {split} split are {what}; look at the files, a conversion may have gone "
                "wrong: background is 0, lesion is 255 or 1, or as data.classes has it"
            )
            findings.append(Finding(name, "refuse", text, concerned))
        if concerned and not whole:
            text = f"{_images_of(concerned)} a mask that {word}"
            findings.append(Finding(name, "note", text, concerned))
    return findings


def _shared(facts: DataFacts) -> list[Finding]:
    """One file's content as the mask of several images that differ: of one image it is an agreement."""
    owners: dict[str, dict[str, str]] = {}
    for sample in facts.samples:
        for mask in facts.masks[sample.id].values():
            if 0 < mask.lit < 1:
                owners.setdefault(mask.digest, {})[facts.images[sample.id].digest] = sample.id
    shared = sorted((list(of.values()) for of in owners.values() if len(of) > 1), key=len, reverse=True)
    if not shared:
        return []
    concerned = {id: f"its mask is also that of {ids[0] if id != ids[0] else ids[1]}" for ids in shared for id in ids}
    many = 2 * len(concerned) > len(facts.samples) and len(concerned) >= _FEW
    text = f"{len(concerned)} images share their mask with another image; give each the one that was drawn on it"
    return [Finding("shared_masks", "refuse" if many else "warn", text, concerned)]


def _inverted(facts: DataFacts) -> list[Finding]:
    if len(facts.class_names) > 2:
        return []
    masks = [(s.id, key, mask) for s in facts.samples for key, mask in facts.masks[s.id].items() if mask.lit < 1]
    swapped = {id: (key, mask.lit_border) for id, key, mask in masks if mask.lit_border > _SWAPPED_BORDER}
    count = sum(mask.lit_border > _SWAPPED_BORDER for *_, mask in masks)
    if not swapped:
        return []
    worst = sorted(swapped.items(), key=lambda item: -item[1][1])
    concerned = {id: f"{key} covers {border:.0%} of the border" for id, (key, border) in worst}
    text = f"in {count} of {len(masks)} masks lesion covers most of the frame's border"
    if 2 * count > len(masks):
        text += "; if background and lesion are swapped, invert the masks"
        return [Finding("inverted_masks", "warn", text, concerned)]
    return [Finding("inverted_masks", "note", text, concerned)]


def _absent(facts: DataFacts) -> list[Finding]:
    """Splits that have some of several classes and not all; background may be marked nowhere."""
    objects = facts.class_names[1:]
    findings = []
    for split in SPLITS:
        shares = [mask.shares[1:] for s in facts.of_split(split) for mask in facts.masks[s.id].values()]
        absent = [name for name, each in zip(objects, zip(*shares, strict=True), strict=False) if not any(each)]
        if 0 < len(absent) < len(objects):
            text = f"no mask of the {split} split marks {', '.join(absent)}"
            findings.append(Finding("absent_classes", "warn", text))
    return findings


def _small(facts: DataFacts) -> list[Finding]:
    lit = [mask.lit for sample in facts.samples for mask in facts.masks[sample.id].values() if mask.lit > 0]
    if not lit or statistics.median(lit) >= _SMALL:
        return []
    text = (
        f"half of the masks mark less than {statistics.median(lit):.1%} of their frame: a network may learn to mark "
        "nothing; watch validation, and consider method.loss=dice_cross_entropy or a larger data.image_size"
    )
    return [Finding("small_objects", "warn", text)]


def _unlike(facts: DataFacts) -> list[Finding]:
    """Reference masks of one split that mark far more than those of another."""
    medians = {}
    for split in SPLITS:
        lit = [each for each in lesion_shares(facts, split, reference=True) if each > 0]
        if len(lit) >= 10:
            medians[split] = statistics.median(lit)
    if len(medians) < 2:
        return []
    low, high = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
    if medians[high] < _UNLIKE * medians[low]:
        return []
    text = (
        f"the median lesion covers {medians[high]:.1%} of the frame in {high} and {medians[low]:.1%} in {low}: are "
        "these the same kind of images?"
    )
    return [Finding("unlike_splits", "warn", text)]


def lesion_shares(facts: DataFacts, split: str, reference: bool) -> list[float]:
    """The shares that are lesion in the references of a split, or else in its annotations."""
    return [
        mask.lit
        for sample in facts.of_split(split)
        for key, mask in facts.masks[sample.id].items()
        if (key == "reference") == reference
    ]


# --- annotators -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnnotatorFacts:
    masks: int
    empty: int
    reference: float | None
    """Mean Dice with the reference; None where no image has both."""
    others: float | None
    """Mean Dice with each other annotator."""


def annotators(facts: DataFacts) -> dict[FileKey, AnnotatorFacts]:
    """By the key of their masks, `annotation` for the one without a name."""
    counts, empty = Counter[str](), Counter[str]()
    for of_sample in facts.masks.values():
        counts.update(key for key in of_sample if key != "reference")
        empty.update(key for key, mask in of_sample.items() if key != "reference" and mask.lit == 0)
    with_reference: dict[str, list[float]] = {}
    with_others: dict[str, list[float]] = {}
    for (first, second), values in pairwise(facts).items():
        if "reference" in (first, second):
            with_reference.setdefault(second if first == "reference" else first, []).extend(values)
        else:
            with_others.setdefault(first, []).extend(values)
            with_others.setdefault(second, []).extend(values)
    return {
        key: AnnotatorFacts(counts[key], empty[key], _mean(with_reference.get(key)), _mean(with_others.get(key)))
        for key in sorted(counts)
    }


def pairwise(facts: DataFacts) -> dict[tuple[FileKey, FileKey], list[float]]:
    """Dice of every two kinds of masks, of each image that has both."""
    values: dict[tuple[FileKey, FileKey], list[float]] = {}
    for sample in facts.samples:
        for pair, value in facts.agreements[sample.id].items():
            values.setdefault(pair, []).append(value)
    return values


def _copied(facts: DataFacts) -> list[Finding]:
    """Annotations that are the reference: where a table gives one mask for both, the noise rate is 0 and not true."""
    both = [
        (sample.id, key, facts.masks[sample.id]["reference"].digest == mask.digest)
        for sample in facts.samples
        if "reference" in facts.masks[sample.id]
        for key, mask in facts.masks[sample.id].items()
        if key != "reference" and mask.lit > 0
    ]
    same = {id: f"{key} is the reference itself" for id, key, equal in both if equal}
    if not same:
        return []
    text = (
        f"{sum(equal for *_, equal in both)} of {len(both)} annotations are the same file as the image's reference; if "
        "no expert drew these references, take them out"
    )
    return [Finding("copied_annotations", "warn", text, same)]


def _annotators(facts: DataFacts) -> list[Finding]:
    findings = []
    known = {key: each.others for key, each in annotators(facts).items() if each.others is not None}
    if len(known) >= 3:
        usual = statistics.median(known.values())
        lone = {key: value for key, value in known.items() if value < _LONE * usual}
        for key, value in lone.items():
            text = (
                f"the annotator {name_of(key)} agrees with the others by a Dice of {value:.2f}, the median one by "
                f"{usual:.2f}: another task, or other images?"
            )
            findings.append(Finding("lone_annotators", "warn", text))
    far = sorted(
        (value, sample.id, second)
        for sample in facts.samples
        for (first, second), value in facts.agreements[sample.id].items()
        if first == "reference" and value < _FAR and facts.masks[sample.id][second].lit > 0
    )
    if far:
        concerned: dict[str, str] = {}
        for value, id, key in far:
            concerned.setdefault(id, f"{name_of(key)} has Dice {value:.2f} with the reference")
        count = sum("reference" in pair for sample in facts.samples for pair in facts.agreements[sample.id])
        text = f"{len(far)} of {count} annotations have a Dice below {_FAR} with the reference"
        findings.append(Finding("far_annotations", "warn" if 10 * len(far) > count else "note", text, concerned))
    return findings


def name_of(key: FileKey) -> str:
    """How a page calls who has drawn a mask."""
    return key.partition(":")[2] or key


# --- images -----------------------------------------------------------------------------------------------------------


def _twins(facts: DataFacts) -> list[Finding]:
    samples = list(facts.samples)
    pairs = find_twins(facts.thumbnails(samples))
    across = [pair for pair in pairs if samples[pair.first].split != samples[pair.second].split]
    within = [pair for pair in pairs if samples[pair.first].split == samples[pair.second].split]
    findings = []
    if across:
        scored_on = {samples[place].id for pair in across for place in (pair.first, pair.second)}
        counts = {
            split: (sum(sample.id in scored_on for sample in facts.of_split(split)), len(facts.of_split(split)))
            for split in ("val", "test")
        }
        many = any(count >= max(_FEW, _MANY_TWINS * whole) for count, whole in counts.values() if whole)
        told = " and ".join(f"{count} of {whole} {split} images" for split, (count, whole) in counts.items() if count)
        text = f"{told} look almost like an image of another split"
        text += "; keep them in one split, by a column group, or take one of each pair out"
        findings.append(_pairs_found("near_twins", "refuse" if many else "warn", text, samples, across))
    if within:
        text = f"{len(within)} pairs of images in one split look almost alike"
        findings.append(_pairs_found("repeated_images", "note", text, samples, within))
    return findings


def _pairs_found(
    name: FindingName, severity: Severity, text: str, samples: Sequence[Sample], pairs: Sequence[Pair]
) -> Finding:
    named = tuple((samples[pair.first].id, samples[pair.second].id) for pair in pairs)
    return Finding(name, severity, text, {}, named)


def _images(facts: DataFacts) -> list[Finding]:
    samples = list(facts.samples)
    if not samples:
        return []
    pixels = facts.thumbnails(samples).astype(np.float32)
    deviation = pixels.mean(axis=3).std(axis=(1, 2))
    blank = {samples[i].id: "the image is of one colour" for i in np.flatnonzero(deviation < _BLANK)}
    findings = []
    if blank:
        findings.append(Finding("blank_images", "warn", f"{_images_of(blank)} one colour only", blank))

    # Mean colour and saturation: an image of another camera or stain, a grey one among coloured ones.
    means = pixels.mean(axis=(1, 2))
    marks = np.concatenate([means, np.ptp(means, axis=1, keepdims=True)], axis=1)
    distance = np.abs(_robust(marks)).max(axis=1)
    odd = [int(i) for i in np.argsort(-distance) if distance[i] > _ODD_COLOUR and samples[i].id not in blank]
    if odd:
        concerned = {samples[i].id: f"mean colour {distance[i]:.0f} deviations from the median" for i in odd}
        findings.append(Finding("odd_colours", "note", f"{_images_of(concerned)} unusual colours", concerned))

    aspects = np.array([size[0] / size[1] for size in (facts.images[sample.id].size for sample in samples)])
    usual = float(np.median(aspects))
    ratio = np.maximum(aspects / usual, usual / aspects)
    shaped = [int(i) for i in np.argsort(-ratio, kind="stable") if ratio[i] > _ODD_ASPECT]
    if shaped:
        sizes = {samples[i].id: "×".join(map(str, facts.images[samples[i].id].size)) for i in shaped}
        concerned = {id: f"{size} pixels, where {usual:.2f} : 1 is usual" for id, size in sizes.items()}
        findings.append(Finding("odd_shapes", "note", f"{_images_of(concerned)} another shape", concerned))
    return findings


def _robust(values: NDArray[np.float32]) -> NDArray[np.floating]:
    """Distances to the median in robust deviations, column by column; the least deviation is a grey level."""
    away = values - np.median(values, axis=0)
    return away / np.maximum(1.4826 * np.median(np.abs(away), axis=0), 1.0)


def _images_of(concerned: Mapping[str, str]) -> str:
    count = len(concerned)
    return f"{count} image has" if count == 1 else f"{count} images have"


def _mean(values: Sequence[float] | None) -> float | None:
    return statistics.fmean(values) if values else None
