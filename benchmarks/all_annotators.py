"""A copy of a folder of data in which every annotator's masks are listed.

    python benchmarks/all_annotators.py SOURCE MASKS TARGET

SOURCE has a manifest.csv with one cheap mask an image (id, split, image, mask, noisy_mask), and a folder MASKS with
those of all annotators as ID_ANNOTATOR.png. TARGET's manifest.csv has a column annotation:ANNOTATOR for each. For
configs/experiments/annotators_screen.yaml and human_noise_annotators.yaml.
"""

import argparse
import csv
import shutil
from pathlib import Path


def list_annotators(source: Path, masks: str, target: Path) -> int:
    """Returns how many annotators there are."""
    with (source / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    of_image = {row["id"]: sorted((source / masks).glob(f"{row['id']}_*.png")) for row in rows}
    by_name = {id: {path.stem.removeprefix(f"{id}_"): path for path in paths} for id, paths in of_image.items()}
    # The files of an id that is the beginning of another one are not its own.
    by_name = {id: {name: path for name, path in own.items() if "_" not in name} for id, own in by_name.items()}
    names = sorted({name for own in by_name.values() for name in own})
    for folder in sorted({Path(row[column]).parts[0] for row in rows for column in ("image", "mask")} | {masks}):
        shutil.copytree(source / folder, target / folder)
    with (target / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "split", "image", "reference", *(f"annotation:{name}" for name in names)])
        for row in rows:
            own = by_name[row["id"]]
            paths = (str(own[name].relative_to(source)) if name in own else "" for name in names)
            table.writerow([row["id"], row["split"], row["image"], row["mask"], *paths])
    return len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("masks")
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True)
    print(f"{list_annotators(arguments.source, arguments.masks, arguments.target)} annotators")


if __name__ == "__main__":
    main()
