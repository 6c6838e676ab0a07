"""Write a trained run as files that need no distseg: ONNX, a torch.export program, a model that MLflow serves.

    distseg export RUN --to FOLDER [--onnx] [--program] [--mlflow [--register NAME]] [--size HEIGHTxWIDTH]

Decoded pixels go in, (B, h, w, 3) uint8 RGB, and masks of the file's size come out: resizing, normalisation and the
threshold are inside. Each file is held against the run on images of the run's data, or on those that --check names, and
refused where a probability differs by more than --tolerance. FOLDER gets model.onnx, model.pt2, mlflow_model/,
export.json and model_card.md. Without any of --onnx, --program and --mlflow it is --onnx.

Exit codes: 0 done; 2 bad arguments, or a file that is not as the run, one line on stderr.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distseg.cli.process import say
from distseg.errors import UserError
from distseg.text import counted

if TYPE_CHECKING:
    from distseg.config.schema import Config
    from distseg.inference.export import Size
    from distseg.inference.predictor import Predictor


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = parse_arguments(argv, prog)
    # Late: help must not wait for what torch takes to import.
    import torch

    from distseg.config.load import load_config
    from distseg.inference.card import model_card
    from distseg.inference.export import check_graph, exported, write_onnx_graph, write_program
    from distseg.inference.predictor import Predictor
    from distseg.run_folder import RunFolder

    predictor = Predictor.of_run(
        arguments.run, torch.device("cpu"), checkpoint=arguments.checkpoint, allow_import=arguments.allow_import
    )
    config = load_config(RunFolder(arguments.run).config)
    images = find_images(arguments, config)
    facts = facts_of(arguments.run, config, predictor, arguments.size)
    program = exported(predictor, arguments.size)
    arguments.to.mkdir(parents=True, exist_ok=True)
    graphs = {}
    if arguments.program:
        graphs["model.pt2"] = write_program(program, arguments.to / "model.pt2", facts)
    if arguments.onnx or arguments.mlflow:
        graphs["model.onnx"] = write_onnx_graph(program, arguments.to / "model.onnx", arguments.size, facts)
    for name, graph in graphs.items():
        check = check_graph(predictor, graph, images, arguments.size)
        if not check.difference <= arguments.tolerance:
            (arguments.to / name).unlink()
            raise UserError(
                f"{arguments.to / name}: differs from the run by {check.difference:.3g} in a probability, above "
                f"--tolerance {arguments.tolerance:g}, and is removed; leave that format out, or allow more"
            )
        facts["checks"][name] = {"images": check.images, "difference": check.difference, "iou": check.iou}
        say(
            f"{arguments.to / name}: largest difference of a probability {check.difference:.1e}, least IoU of a mask "
            f"{check.iou:.5f}, {counted(check.images, 'image')}"
        )
    write_facts(arguments.to, facts, model_card(facts))
    if arguments.mlflow:
        write_servable(arguments, config, facts, images[0])
    say(str(arguments.to / "model_card.md"))
    return 0


def find_images(arguments: argparse.Namespace, config: "Config") -> list[Path]:
    """Those to check on, spread evenly: the ones that --check names, or the run's test images."""
    from distseg.data.survey import survey
    from distseg.inference.inputs import find_items

    if arguments.check:
        found = [item.path for item in find_items([str(arguments.check)], [], arguments.to)[0]]
    else:
        try:
            samples = survey(config.data)[0]
        except UserError as error:
            raise UserError(f"{error}; or name images to check on, --check FOLDER") from None
        found = [sample.image for sample in samples if sample.split == "test"] or [each.image for each in samples]
    if not found:
        raise UserError("there are no images to check on; name some, --check FOLDER")
    count = min(arguments.images, len(found))
    return [found[place * len(found) // count] for place in range(count)]


def facts_of(run: Path, config: "Config", predictor: "Predictor", size: "Size | None") -> dict[str, Any]:
    """What is known of a run, as export.json has it."""
    from distseg.data.augment import CHANNEL_DEVIATIONS, CHANNEL_MEANS
    from distseg.data.decode import FORMATS
    from distseg.data.roster import read_summary
    from distseg.run_folder import RunFolder
    from distseg.study.records import read_result
    from distseg.training.warm_start import digest_of_start

    folder, data = RunFolder(run), predictor.data
    summary = read_summary(folder.data)
    result = read_result(folder).numbers if folder.result.exists() else {}
    return {
        "format": 1,
        "input": {"layout": "batch, height, width, RGB", "dtype": "uint8", "size": size},
        "outputs": {"masks": "uint8 class ids", "probabilities": "float32, of the second class of two, or of each"},
        "reading": {
            "orientation": data.orientation,
            "max_pixels": data.max_pixels,
            "max_scans": data.max_scans,
            "formats": FORMATS,
        },
        "classes": {"names": data.class_names, "values": data.class_map.file_values},
        "model": {
            "name": config.name,
            "method": config.method.name,
            "network": config.model.name,
            "parameters": sum(parameter.numel() for parameter in predictor.network.parameters()),
            **predictor.identity,
            "init_sha256": digest_of_start(folder),
            "image_size": data.image_size,
            "shape": data.shape,
            "channel_means": CHANNEL_MEANS.tolist(),
            "channel_deviations": CHANNEL_DEVIATIONS.tolist(),
        },
        "data": {
            "root": data.root.name,
            "sha256": summary and summary.sha256,
            "splits": summary.splits if summary else {},
            "clean": summary and summary.clean,
        },
        "noise": {"kind": config.data.noise.level, "rate": result.get("noise_rate")},
        "scores": {name: value for name, value in result.items() if name.startswith("test/")},
        "checks": {},
    }


def write_facts(to: Path, facts: dict[str, Any], card: str) -> None:
    from distseg.files import write_atomically

    write_atomically(to / "export.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    write_atomically(to / "model_card.md", card)


def write_servable(arguments: argparse.Namespace, config: "Config", facts: dict[str, Any], example: Path) -> None:
    """mlflow_model/, and its version in the registry where it is to have one."""
    from distseg.run_folder import RunFolder
    from distseg.tracking.mlflow import register, save_servable, store_of

    folder = arguments.to / "mlflow_model"
    save_servable(folder, arguments.to / "model.onnx", arguments.to / "export.json", facts, example.read_bytes())
    say(f"{folder}: mlflow models serve --env-manager local -m {folder}")
    if arguments.register:
        id_file = RunFolder(arguments.run).mlflow_run_id
        if not id_file.is_file():
            raise UserError(f"--register: {arguments.run} has no run in MLflow; its model is in {folder}")
        card = (arguments.to / "model_card.md").read_text(encoding="utf-8")
        uri = register(store_of(config), id_file.read_text().strip(), folder, arguments.register, card, facts)
        say(uri)


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument("--onnx", action="store_true", help="model.onnx")
    parser.add_argument("--program", action="store_true", help="model.pt2, which torch.export.load reads")
    parser.add_argument("--mlflow", action="store_true", help="mlflow_model/, which mlflow models serve takes")
    parser.add_argument("--register", metavar="NAME", help="with --mlflow: a new version of this registered model")
    parser.add_argument("--size", type=_size, metavar="HEIGHTxWIDTH", help="of every image; any size without it")
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="last, best or the number of a step")
    parser.add_argument("--check", type=Path, metavar="INPUT", help="an image or a folder to check on")
    parser.add_argument("--images", type=int, default=10, metavar="N", help="to check on, at most")
    parser.add_argument("--tolerance", type=float, default=0.02, help="the largest difference of a probability")
    parser.add_argument("--allow-import", action="store_true", help="run the code that the run's model.name names")
    arguments = parser.parse_args(argv)
    if arguments.images < 1:
        parser.error(f"--images {arguments.images}: must be at least 1")
    if arguments.register and not arguments.mlflow:
        parser.error("--register: registers the model of --mlflow; give both")
    arguments.onnx |= not (arguments.program or arguments.mlflow)
    return arguments


def _size(text: str) -> "Size":
    match = re.fullmatch(r"([1-9][0-9]{0,4})[x×]([1-9][0-9]{0,4})", text, re.ASCII)
    if match is None or max(int(side) for side in match.groups()) > 2**16:
        raise argparse.ArgumentTypeError(f"{text}: must be HEIGHTxWIDTH in pixels, for instance 480x640")
    return int(match[1]), int(match[2])
