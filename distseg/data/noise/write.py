"""The noisy masks of a run: drawn and written as PNG by one rank, found by the others."""

import csv
import io
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from distseg.data.classes import IGNORE
from distseg.data.decode import PLAIN, Decoding, read_image, read_mask
from distseg.data.noise.kind import Image, Mask, NoiseKind
from distseg.data.sample import Annotation, Sample
from distseg.errors import BadFileError, UserError
from distseg.files import write_atomically


def corrupt(mask: Mask, noise: NoiseKind, sample_id: str, image: Image | None = None) -> Mask:
    """The noisy mask of one sample: (H, W) uint8 class ids, 255 = ignore, from a true one.

    Each class that there is, but background, is drawn as if it were alone, in the order of the ids, over what has been
    drawn before: where two overlap the later one stands, so classes inside others are named last. What nobody vouches
    for in the true mask is taken for background while drawing, and is ignored in the noisy one too.

    `image` (H, W, 3) uint8 RGB is needed where `noise.looks_at_image`; ValueError without it.
    """
    noisy = np.zeros_like(mask)
    labels = [id for id in np.unique(mask).tolist() if id not in (0, IGNORE)]
    for label in sorted({1, *labels}):  # a kind may mark a lesion where there is none
        noisy[noise.draw_for(sample_id, (mask == label).view(np.uint8), image, label) > 0] = label
    noisy[mask == IGNORE] = IGNORE
    return noisy


def write_noisy_masks(
    samples: list[Sample], noise: NoiseKind, folder: Path, decoding: Decoding = PLAIN
) -> tuple[list[Sample], float]:
    """Give each sample a noisy mask, as PNG in `folder`, and say how wrong they are.

    The PNGs have the values that the data's own masks have, 0 and 255 unless `data.classes` says otherwise.

    Each file is written aside and renamed, manifest.csv (id, mask, kind, parameters, seed, wrong_pixel_rate) last; a
    rerun writes the same bytes. With kind `none` nothing is written: samples keep the annotations that they bring.

    Returns:
        The samples with the drawn mask in place of any annotation, in the order given, and the mean over them of the
        fraction of wrong pixels among the labelled ones: 0 for a sample without an annotation, NaN where one has no
        reference.
    """
    if noise.kind == "none":
        return samples, _mean(_own_rate(sample, decoding) for sample in samples)
    folder.mkdir(parents=True, exist_ok=True)

    def write(sample: Sample) -> tuple[Sample, float]:
        if sample.reference is None:
            raise UserError(f"data.noise.kind {noise.kind}: {sample.id} has no reference mask to draw from")
        true = read_mask(sample.reference, decoding)
        noisy = corrupt(true, noise, sample.id, read_image(sample.image, decoding) if noise.looks_at_image else None)
        path = folder / f"{sample.id}.png"
        write_atomically(path, decoding.classes.encode(noisy), durable=False)  # can be drawn again
        return _with_noisy(sample, path), _wrong_pixel_rate(noisy, true)

    with ThreadPoolExecutor() as pool:
        written = list(pool.map(write, samples))
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["id", "mask", "kind", "parameters", "seed", "wrong_pixel_rate"])
    rows.writerows([*_described(sample, noise), rate] for sample, rate in written)  # the rate in full, to be read back
    write_atomically(folder / "manifest.csv", table.getvalue())
    return [sample for sample, _ in written], _mean(rate for _, rate in written)


def read_noisy_masks(
    samples: list[Sample], noise: NoiseKind, folder: Path, decoding: Decoding = PLAIN
) -> tuple[list[Sample], float]:
    """What `write_noisy_masks` returned for the same arguments, for a rank that finds its files in place.

    Where there is no manifest.csv the masks are drawn: the ranks of a dry run have a folder each. Raises BadFileError
    where it is not of these samples and this noise.
    """
    manifest = folder / "manifest.csv"
    if noise.kind == "none" or not manifest.exists():
        return write_noisy_masks(samples, noise, folder, decoding)
    try:
        with manifest.open(newline="", encoding="utf-8") as file:
            _, *rows = csv.reader(file)
        rates = [float(rate) for *_, rate in rows]
        same = [described for *described, _ in rows] == [_described(sample, noise) for sample in samples]
    except (OSError, ValueError, csv.Error):
        same = False
    if not same:
        raise BadFileError(
            f"{manifest}: is not what the first rank has written for this run; see that all ranks share its folder and "
            "have the same data"
        )
    return [_with_noisy(sample, folder / f"{sample.id}.png") for sample in samples], _mean(rates)


def _with_noisy(sample: Sample, path: Path) -> Sample:
    return replace(sample, annotations=(Annotation("", path),))


def _described(sample: Sample, noise: NoiseKind) -> list[str]:
    return [sample.id, f"{sample.id}.png", noise.kind, noise.parameters, str(noise.seed)]


def _own_rate(sample: Sample, decoding: Decoding) -> float:
    if sample.reference is None:
        return math.nan
    if not sample.annotations:
        return 0.0
    true = read_mask(sample.reference, decoding)
    rates = []
    for annotation in sample.annotations:
        noisy = read_mask(annotation.mask, decoding)
        if noisy.shape != true.shape:
            raise UserError(f"{annotation.mask}: not of the size of {sample.reference}; resample it, nearest neighbour")
        rates.append(_wrong_pixel_rate(noisy, true))
    return _mean(rates)


def _wrong_pixel_rate(noisy: Mask, true: Mask) -> float:
    """Of the pixels that both label; 0 where there is none."""
    known = (noisy != IGNORE) & (true != IGNORE)
    return float(((noisy != true) & known).sum() / max(known.sum(), 1))


def _mean(rates: Iterable[float]) -> float:
    values = list(rates)
    return float(np.mean(values)) if values else 0.0
