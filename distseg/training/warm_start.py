"""A run that begins with another's network: `model.init_from`, read once, at its first start."""

import hashlib
import json
import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from distseg.errors import UserError
from distseg.files import open_regular, read_regular, write_atomically
from distseg.models.warm_start import take_tensors
from distseg.run_folder import RunFolder
from distseg.training.checkpoint import chosen_checkpoint

logger = logging.getLogger(__name__)

_LARGEST_RECORD = 2**24


def warm_start(network: nn.Module, source: Path, folder: RunFolder, main: bool) -> None:
    """Put the tensors of `source`, a run or a safetensors file, into `network` where they fit.

    A run that has a checkpoint has them already, and `source` is not read. Rank 0, `main`, comes first: it says which
    tensors were taken, and records them with the file's SHA-256 in init.json. Raises UserError where nothing fits, and
    where the file is another one than at the run's first start.
    """
    if any(folder.checkpoints.glob("step_*")):
        return
    file = chosen_checkpoint(source) / "model.safetensors" if source.is_dir() else source
    try:
        with open_regular(file) as opened:
            content = opened.read()
        tensors = load(content)
    except FileNotFoundError:
        raise UserError(f"model.init_from {source}: no such file or run") from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"model.init_from {file}: cannot be read: {' '.join(str(error).split())[:200]}; name a run, or a file of "
            "safetensors (safetensors.torch.save_file)"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    before = digest_of_start(folder) if folder.config.exists() else None
    if before not in (None, digest):
        raise UserError(
            f"model.init_from {file}: has changed since this run began with it (SHA-256 {before}); put it back, or "
            "choose another name= for a new run"
        )
    try:
        found = take_tensors(network, tensors)
    except UserError as error:
        raise UserError(f"model.init_from {file}: {error}") from None
    if main:
        logger.info("model.init_from %s: %s", file, found)
        record = {
            "file": str(file),
            "sha256": digest,
            "taken": found.taken,
            "other_shape": found.other_shape,
            "absent": found.absent,
            "unused": found.unused,
        }
        folder.path.mkdir(parents=True, exist_ok=True)
        write_atomically(folder.init, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def digest_of_start(folder: RunFolder) -> str | None:
    """The SHA-256 of what a run began with; None for drawn parameters. Raises UserError where init.json is damaged."""
    try:
        return str(json.loads(read_regular(folder.init, _LARGEST_RECORD))["sha256"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder.init}: is damaged; put it back, or choose another name= for a new run") from None
