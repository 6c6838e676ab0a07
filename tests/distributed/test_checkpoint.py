"""A checkpoint of any number of ranks and ZeRO stage continues on any other; what the disk does to it."""

import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distseg.config.schema import Config
from distseg.distributed.collectives import AllReduce, sum_over_ranks
from distseg.distributed.engine import build_engine, optimizer_state
from distseg.distributed.ranks import ShardSpec
from distseg.distributed.runtime import Runtime
from distseg.errors import UserError
from distseg.meta.weights import uniform_weights
from distseg.optim.optimizers import build_optimizer
from distseg.testing.ranks import run_ranks
from distseg.testing.steps import GivenSteps
from distseg.training.checkpoint import find_checkpoint, load_checkpoint, restore, save_checkpoint
from distseg.training.train_step import train_step

GLOBAL, SIZE = 8, 8
NOTHING_LEARNED = GivenSteps([], [], list)
CASES = [("sgd", 0), ("adam", 1), ("sgd", 2), ("adam", 3)]
"""Of the run that writes: optimiser and ZeRO stage."""


class Dropped(nn.Module):
    """A network with a buffer that training moves, and parameters that divide evenly by no number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 1, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.last(torch.tanh(self.first(images)))


def configure(optimizer: str, stage: int, world_size: int, **train) -> Config:
    return Config.model_validate(
        {
            "name": "test",
            "data": {"root": "."},
            "train": {"steps": 9, "batch_size": GLOBAL // world_size, "clean_batch_size": GLOBAL // world_size} | train,
            "optim": {
                "name": optimizer,
                "lr": 0.05,
                "implementation": "torch",
                **({"momentum": 0.9} if optimizer == "sgd" else {}),
            },
            "deepspeed": {"zero_stage": stage},
        }
    )


def build(config: Config):
    torch.manual_seed(1)
    model = Dropped()
    optimizer, _ = build_optimizer(model.parameters(), config.optim)
    train = config.train
    sizes = {"batch_size": train.batch_size, "accumulation": train.accumulation}
    return build_engine(model, optimizer, config.deepspeed, **sizes, precision=train.precision)


def train(engine, config: Config, runtime, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(GLOBAL, 3, SIZE, SIZE, generator=generator)
        masks = torch.randint(0, 2, (GLOBAL, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        mine = runtime.shard.micro_batch(0, 0, 1, config.train.batch_size)
        own = slice(mine.start, mine.stop)
        weigh = partial(uniform_weights, [masks[own]], AllReduce(), torch.float32)
        train_step(engine, GivenSteps([images[own]], [masks[own]], weigh), step, 0.05)


def whole_state(engine, runtime) -> dict[str, torch.Tensor]:
    """Parameters and every optimiser slot, flat and whole, whoever owns the parts."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        state = {f"model/{name}": value.detach().clone() for name, value in engine.module.state_dict().items()}
        sizes = {name: parameter.numel() for name, parameter in engine.module.named_parameters()}
    slots = sorted({"momentum_buffer", "exp_avg", "exp_avg_sq", "step"})
    for name, size in sizes.items():
        for slot in slots:
            state[f"{slot}/{name}"] = torch.zeros(1 if slot == "step" else size)
    for key, run in optimizer_state(engine, runtime.shard.rank).items():
        slot, start, name = key.split("/", 2)
        state[f"{slot}/{name}"][int(start) : int(start) + len(run)] = run.detach()
    return {key: value if key.startswith("model/") else sum_over_ranks(value) for key, value in state.items()}


class Learned(GivenSteps):
    """A method that keeps tensors between steps."""

    def __init__(self) -> None:
        super().__init__([], [], list)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"counts": torch.arange(6.0), "total": torch.tensor(3)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        assert state.keys() == self.state_dict().keys()


def write_and_go_on(runtime, folder: str) -> dict[str, torch.Tensor]:
    out = {}
    for optimizer, stage in CASES:
        config = configure(optimizer, stage, runtime.shard.world_size)
        engine = build(config)
        train(engine, config, runtime, range(3))
        target = Path(folder, f"{optimizer}{stage}")
        assert save_checkpoint(target, engine, Learned(), {"step": 3}, config, runtime, best=False)
        out |= {f"{optimizer}{stage} at 3: {k}": v for k, v in whole_state(engine, runtime).items()}
        train(engine, config, runtime, range(3, 6))
        out |= {f"{optimizer}{stage} at 6: {k}": v for k, v in whole_state(engine, runtime).items()}
    return out


def read_and_go_on(runtime, folder: str, stages: list[int]) -> dict[str, torch.Tensor]:
    out = {}
    for (optimizer, written), stage in zip(CASES, stages, strict=True):
        config = configure(optimizer, stage, runtime.shard.world_size)
        engine = build(config)
        assert load_checkpoint(Path(folder, f"{optimizer}{written}"), engine, Learned(), config, runtime) == {"step": 3}
        out |= {f"{optimizer}{written} at 3: {k}": v for k, v in whole_state(engine, runtime).items()}
        train(engine, config, runtime, range(3, 6))
        out |= {f"{optimizer}{written} at 6: {k}": v for k, v in whole_state(engine, runtime).items()}
    return out


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_ranks(write_and_go_on, 2, str(folder))[0]


@pytest.mark.parametrize(
    ("world_size", "stages"),
    [(1, [2, 3, 1, 0]), (2, [s for _, s in CASES]), pytest.param(4, [3, 2, 0, 1], marks=pytest.mark.slow)],
    ids=["on 1 rank", "on as many", "on 4 ranks"],
)  # fmt: skip
def test_any_ranks_and_stage_continue_what_two_ranks_wrote(two_ranks, world_size: int, stages: list[int]) -> None:
    folder, expected = two_ranks
    assert all(expected[f"{name}{stage} at 6: model/first.weight"].abs().sum() > 0 for name, stage in CASES)
    for actual in run_ranks(read_and_go_on, world_size, str(folder), stages):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            if " at 3" in key or world_size == 2:
                assert actual[key].equal(value), f"{key} on {world_size} ranks"
            else:
                torch.testing.assert_close(
                    actual[key], value, rtol=1e-5, atol=1e-7, msg=lambda said, key=key: f"{key}: {said}"
                )


def refuse(runtime, folder: str) -> dict[str, torch.Tensor]:
    for train_keys, said in (
        ({"batch_size": 3}, "train.batch_size 3 × train.accumulation 1 × 1 ranks makes 3; set train.batch_size=8"),
        ({"accumulation": 2}, "set train.batch_size=4"),
        ({"clean_batch_size": 4}, "set train.clean_batch_size=8"),
        ({"accumulation": 3, "batch_size": 2}, "train.accumulation and the ranks so that their product is 8"),
    ):
        config = configure("sgd", 0, 1, **train_keys)
        with pytest.raises(UserError, match=said):
            load_checkpoint(Path(folder, "sgd0"), None, NOTHING_LEARNED, config, runtime)
    config = configure("sgd", 0, 1, accumulation=2, batch_size=4, clean_batch_size=4)
    assert load_checkpoint(Path(folder, "sgd0"), build(config), Learned(), config, runtime) == {"step": 3}
    return {}


def test_a_step_of_another_size_is_refused_with_the_value_that_keeps_it(two_ranks) -> None:
    run_ranks(refuse, 1, str(two_ranks[0]))


@pytest.fixture
def kept(two_ranks, tmp_path: Path) -> Path:
    """Three whole checkpoints of two ranks, `last` at the newest."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        shutil.copytree(two_ranks[0] / "adam1" / "step_00000003", folder / f"step_{step:08d}")
        rewrite_state(folder / f"step_{step:08d}", {"progress": {"step": step}})
    (folder / "last").write_text("step_00000003")
    return folder


def rewrite_state(checkpoint: Path, changes: dict) -> None:
    """With the right digest, as a later version of the code or a forger would."""
    path, sums = checkpoint / "state.json", checkpoint / "SHA256SUMS"
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    sums.write_text(sums.read_text().replace(before, hashlib.sha256(path.read_bytes()).hexdigest()))


def test_a_checkpoint_of_an_earlier_version_is_named_as_such(kept: Path, caplog) -> None:
    for checkpoint in kept.glob("step_*"):
        (checkpoint / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"none of its checkpoints is whole; put one back, or choose another name="):
        find_checkpoint(kept)
    assert "it has no SHA256SUMS; it is not complete, or an earlier version of distseg wrote it" in caplog.messages[0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGES = [truncate, flip_a_bit, Path.unlink, a_pipe, a_folder, a_device]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", ["model.safetensors", "rank_00001.safetensors", "state.json", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(kept: Path, caplog, damage, file: str) -> None:
    damage(kept / "step_00000003" / file)
    assert find_checkpoint(kept) == kept / "step_00000002"
    [said] = caplog.messages
    assert f"{kept}/step_00000003 is damaged" in said and "\n" not in said


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("file", ["state.json", "SHA256SUMS"])
def test_every_flipped_bit_is_named(kept: Path, caplog, counted, file: str) -> None:
    path = kept / "step_00000003" / file
    content = path.read_bytes()
    assert find_checkpoint(kept) == kept / "step_00000003"
    for bit in range(8 * len(content)):
        path.write_bytes(flipped(content, bit))
        assert find_checkpoint(kept) == kept / "step_00000002", f"bit {bit}"
    assert len(caplog.messages) == 8 * len(content)
    counted("flipped bits of a checkpoint's state and digests", 8 * len(content))
    assert all(f"{kept}/step_00000003 is damaged: " in said and "\n" not in said for said in caplog.messages)


def edits(chance: random.Random) -> list[Callable[[bytes], bytes]]:
    """What transfers, disks and hands do to a file, at random places."""

    def place(content: bytes) -> int:
        return chance.randrange(len(content))

    return [
        lambda content: flipped(content, 8 * place(content) + chance.randrange(8)),
        lambda content: content[: place(content)],
        lambda content: content + chance.randbytes(chance.randint(1, 9)),
        lambda content: content[: (at := place(content))] + chance.randbytes(8) + content[at:],
        lambda content: content[: (at := place(content))] + content[at + chance.randint(1, 9) :],
        lambda content: bytes(place(content)) + b"\0",
        lambda content: chance.randbytes(len(content)),
    ]


def test_random_edits_of_every_file_are_named_and_the_one_before_used(kept: Path, caplog, counted) -> None:
    chance, checkpoint, made = random.Random(0), kept / "step_00000003", 0
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        for edit in edits(chance) * 10:
            changed = edit(content)
            if changed == content:
                continue
            path.write_bytes(changed)
            assert find_checkpoint(kept) == kept / "step_00000002", f"{path.name}: edit {made}"
            made += 1
        path.write_bytes(content)
    assert made >= 400
    counted("random edits of a checkpoint's files", made)
    assert len(caplog.messages) == made
    assert all(f"{checkpoint} is damaged: " in said and "\n" not in said for said in caplog.messages)


@pytest.mark.parametrize(
    "changes",
    [
        {"world_size": 10**12},
        {"world_size": "2"},
        {"world_size": 0},
        {"format": 2},
        {"progress": {"step": 4}},
        {"progress": {"step": [3]}},
        {"progress": []},
        {"images_per_step": {"noisy": 8}},
        {"more": 1},
    ],
    ids=str,
)
def test_a_state_of_another_form_is_named_whatever_its_digest(kept: Path, caplog, changes: dict) -> None:
    rewrite_state(kept / "step_00000003", changes)
    assert find_checkpoint(kept) == kept / "step_00000002"
    [said] = caplog.messages
    assert "step_00000003 is damaged" in said and "\n" not in said


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"", b"step_", b"../../elsewhere/step_00000003", b"step_3", b"step_0000000003", b"s" * 999]
)
def test_a_damaged_pointer_is_named_and_the_newest_checkpoint_used(kept: Path, caplog, content: bytes) -> None:
    (kept / "last").write_bytes(content)
    assert find_checkpoint(kept) == kept / "step_00000003"
    [said] = caplog.messages
    assert f"{kept}/last is damaged: " in said and "\n" not in said


@pytest.mark.parametrize("damage", [a_pipe, a_folder, a_device], ids=lambda damage: damage.__name__)
def test_a_pointer_that_is_no_file_is_named_and_the_newest_checkpoint_used(kept: Path, caplog, damage) -> None:
    damage(kept / "last")
    assert find_checkpoint(kept) == kept / "step_00000003"
    assert [f"{kept}/last is damaged: last is not a regular file" in said for said in caplog.messages] == [True]


def test_what_is_restored_lies_on_the_device_of_the_run(two_ranks) -> None:
    """Every method's state and every slot of the optimiser, shown on the meta device."""
    meta, learned = torch.device("meta"), {}
    checkpoint = two_ranks[0] / "adam3" / "step_00000003"
    kept = load_file(checkpoint / "method.safetensors")
    method = SimpleNamespace(load_state_dict=learned.update, state_dict=lambda: kept)
    model = Dropped().to(meta)
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.param_groups[0]["fused"] = True  # as on a GPU, where counts lie on the device as well
    engine = SimpleNamespace(module=model, optimizer=optimizer)
    streams = torch.get_rng_state()
    try:
        progress = restore(checkpoint, engine, method, Runtime(ShardSpec(), meta))
    finally:
        torch.set_rng_state(streams)
    assert progress == {"step": 3}
    assert [tensor.device for tensor in learned.values()] == [meta, meta]
    slots = [tensor for slots in optimizer.state.values() for tensor in slots.values()]
    assert len(slots) == 3 * 4 and {tensor.device for tensor in slots} == {meta}


def test_without_a_whole_checkpoint_the_user_is_told(kept: Path, caplog) -> None:
    for checkpoint in kept.glob("step_*"):
        truncate(checkpoint / "model.safetensors")
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        find_checkpoint(kept)
    assert ["is damaged" in said for said in caplog.messages] == [True] * 3


def test_last_can_be_set_back_and_lost(kept: Path, caplog) -> None:
    (kept / "last").write_text("step_00000001")
    assert find_checkpoint(kept) == kept / "step_00000001"
    (kept / "last").unlink()
    assert find_checkpoint(kept) == kept / "step_00000003"
    (kept / "last").write_text("step_00000004")
    assert find_checkpoint(kept) == kept / "step_00000003"
    assert "step_00000004 is damaged" in caplog.text
    assert find_checkpoint(kept / "nowhere") is None


def keep_some(runtime, folder: str) -> dict[str, torch.Tensor]:
    config = configure("sgd", 0, 1, keep_checkpoints=2)
    engine = build(config)
    for step in (1, 2, 3, 4):
        assert save_checkpoint(Path(folder), engine, NOTHING_LEARNED, {"step": step}, config, runtime, best=step == 1)
    assert sorted(p.name for p in Path(folder).iterdir()) == [
        "best", "last", "step_00000001", "step_00000003", "step_00000004",
    ]  # fmt: skip
    after_a_return_to_2 = save_checkpoint(
        Path(folder), engine, NOTHING_LEARNED, {"step": 3}, config, runtime, best=False
    )
    assert after_a_return_to_2
    assert sorted(p.name for p in Path(folder).glob("step*")) == ["step_00000001", "step_00000003"]
    return {}


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    run_ranks(keep_some, 1, str(tmp_path / "checkpoints"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_the_disk(runtime, folder: str) -> dict[str, torch.Tensor]:
    config = configure("adam", 1, 2)
    engine = build(config)
    ballast, checkpoints = Path(folder, "ballast"), Path(folder, "checkpoints")
    train(engine, config, runtime, range(1))
    outcomes = [save_checkpoint(checkpoints, engine, NOTHING_LEARNED, {"step": 1}, config, runtime, best=False)]
    torch.distributed.barrier()
    if runtime.is_main:
        with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with ballast.open("r+b") as file:
            file.truncate(ballast.stat().st_size - 8192)  # some files fit, and not all
    torch.distributed.barrier()
    outcomes.append(save_checkpoint(checkpoints, engine, NOTHING_LEARNED, {"step": 2}, config, runtime, best=False))
    torch.distributed.barrier()  # the main rank takes away what was written
    assert find_checkpoint(checkpoints) == checkpoints / "step_00000001"
    assert not list(checkpoints.glob("*.part"))
    torch.distributed.barrier()
    if runtime.is_main:
        ballast.unlink()
    torch.distributed.barrier()
    outcomes.append(save_checkpoint(checkpoints, engine, NOTHING_LEARNED, {"step": 3}, config, runtime, best=False))
    torch.distributed.barrier()
    assert find_checkpoint(checkpoints) == checkpoints / "step_00000003"
    assert outcomes == [True, False, True]
    return {}


def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(small_disk: Path, capfd) -> None:
    run_ranks(fill_the_disk, 2, str(small_disk))
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("checkpoint")]
    assert len(said) == 1, said
    assert "step_00000002 could not be written ([Errno 28] No space left" in said[0]
    assert said[0].endswith("step_00000001 stays")
