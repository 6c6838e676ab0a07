"""Many images into a folder of predictions: shared among ranks, taken up again where it was stopped.

    predict.json        of which network and settings the folder is
    masks/ID.png        and probabilities/, contours/, overlays/ if asked for
    table.csv           a row an image
    failed.csv          id, file and reason of what could not be predicted; only if there is any
    done.jsonl          what is done, for a restart
    journal/            of a run that goes on: a file a rank, whose lines are added to done.jsonl at its end

An image is done once its line is in the journal, which is after its files are there. Batches are cut from the whole
list, whatever the number of ranks and whatever is done already, so that each image is always predicted beside the same
others: N ranks and any restart give the bits of one.
"""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from distseg.data.checks import problems_table
from distseg.data.decode import stored_pixels
from distseg.data.reader import read_ahead
from distseg.data.sample import Problem
from distseg.distributed.ranks import ShardSpec
from distseg.errors import BadFileError, StorageError, UserError
from distseg.files import read_regular, write_atomically
from distseg.inference.canvas import Canvas
from distseg.inference.inputs import PLAN, Item
from distseg.inference.outputs import Outputs, Record, record_line, table
from distseg.inference.predictor import LARGE, Prediction, Predictor

logger = logging.getLogger(__name__)

FORMAT = 1
_LARGEST_JSON = 2**20
_LARGEST_LINES = 2**32


class Job:
    """The predictions of a list of images in a folder. Rank 0 calls `begin`, every rank `run`, rank 0 `finish`."""

    def __init__(self, predictor: Predictor, outputs: Outputs, items: Sequence[Item], problems: list[Problem]) -> None:
        self.predictor = predictor
        self.outputs = outputs
        self.items = items
        self.problems = problems
        self.folder = outputs.folder

    def check_folder(self) -> None:
        """Raises UserError where the folder holds something that is not ours. Call it before anything is written."""
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise UserError(f"--to {self.folder}: is a file; choose a folder")
        others = [path.name for path in self.folder.iterdir() if path.name != "run.lock"]
        if others and not (self.folder / PLAN).exists():
            raise UserError(f"--to {self.folder}: holds other things than predictions; choose a new folder")

    def begin(self) -> None:
        """Make the folder ready: collect what earlier starts have done, or clear it away if they were of another
        network or other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        plan = {"format": FORMAT, **self._plan()}
        earlier = _read_plan(self.folder / PLAN)
        done = self._collected()
        if earlier is not None and earlier != plan:
            logger.info("%s: is of another network or other settings; everything is predicted anew", self.folder)
            _remove_all(self.folder, [record.id for record in done.values()])
            done = {}
        write_atomically(self.folder / PLAN, json.dumps(plan, indent=1, ensure_ascii=False) + "\n")
        self.outputs.make_folders()
        self._write_done(done)
        (self.folder / "journal").mkdir(exist_ok=True)
        self._check_sources(done)

    def count(self, shard: ShardSpec) -> int:
        """Images of this rank's share."""
        return sum(len(batch) for batch in self._share(shard))

    def run(self, shard: ShardSpec, advance: Callable[[int], object]) -> list[Problem]:
        """Predict this rank's share; the files that could not be. `advance` is told the number of images dealt with.

        Raises StorageError where an output cannot be written.
        """
        done = self._done_before()
        todo = [batch for batch in self._share(shard) if any(item.id not in done for item in batch)]
        advance(self.count(shard) - sum(len(batch) for batch in todo))
        failures: list[Problem] = []
        journal = self.folder / "journal" / f"rank_{shard.rank:05d}.jsonl"
        with (
            _opened_to_append(journal) as file,
            closing(self._read(iter(todo))) as batches,
            _Writer(self.outputs, file, journal, self.predictor.data.threads) as writer,
        ):
            for batch, read in batches:
                for place, item in enumerate(batch):
                    if read[place].waits:
                        read[place] = self._read_one(item, now=True)
                problems = [each.problem for each in read if each.problem is not None]
                for problem in problems:
                    logger.warning("%s", problem)
                failures += problems
                self._predict([*zip(batch, read, strict=True)], done.keys(), writer)
                advance(len(batch))
        return failures

    def finish(self) -> tuple[int, int]:
        """Write the tables; how many of the images are done, and how many failed. After all ranks' `run`."""
        done = self._collected()
        self._write_done(done)
        records = [done[id] for id in sorted(done)]
        if self.outputs.wanted.contours == "coco":
            self.outputs.write_coco(records)
        write_atomically(self.folder / "table.csv", table(records, self.outputs.classes.names))
        failed = self.folder / "failed.csv"
        mine = {item.id for item in self.items}
        missing = [item for item in self.items if item.id not in done]
        problems = [*self.problems, *(self._reason(item) for item in missing)]
        if problems:
            write_atomically(failed, problems_table(sorted(problems, key=lambda problem: (problem.id, problem.file))))
        else:
            failed.unlink(missing_ok=True)
        return len(mine & done.keys()), len(problems)

    def _plan(self) -> dict[str, Any]:
        data = self.predictor.data
        return {
            "network": self.predictor.identity,
            "settings": asdict(self.predictor.settings),
            "outputs": asdict(self.outputs.wanted),
            "data": {
                "image_size": data.image_size,
                "shape": data.shape,
                "scale": data.scale,
                "overlap": data.overlap,
                "orientation": data.orientation,
                "classes": list(data.class_names),
                "values": data.class_map.key,
            },
        }

    def _share(self, shard: ShardSpec) -> list[Sequence[Item]]:
        """This rank's batches, of those that the whole list is cut into."""
        size = 1 if self.predictor.data.shape == "crop" else self.predictor.settings.batch_size
        batches = [self.items[first : first + size] for first in range(0, len(self.items), size)]
        return [batches[index] for each in shard.evaluation_batches(len(batches), 1) for index in each]

    def _read(self, todo: Iterator[Sequence[Item]]) -> "Generator[tuple[Sequence[Item], list[_Read]], None, None]":
        size = max(1, self.predictor.settings.batch_size)
        return read_ahead(todo, self._read_one, size, self.predictor.data.threads)

    def _read_one(self, item: Item, now: bool = False) -> "_Read":
        """With `now` a large image too."""
        started = time.perf_counter()
        data = self.predictor.data
        try:
            if not now and data.shape == "crop" and stored_pixels(item.path, data.decoding) >= LARGE:
                return _Read(None, None, 0.0, waits=True)
            canvas = self.predictor.read(item.path)
        except BadFileError as error:
            return _Read(None, Problem(item.id, str(item.path), str(error).removeprefix(f"{item.path}: ")), 0.0)
        return _Read(canvas, None, time.perf_counter() - started)

    def _predict(self, batch: "list[tuple[Item, _Read]]", done: Any, writer: "_Writer") -> None:
        good = [(item, read) for item, read in batch if read.canvas is not None]
        started = time.perf_counter()
        predictions = self.predictor.predict(
            [read.canvas for _, read in good if read.canvas is not None], self.outputs.wanted.probabilities
        )
        if self.predictor.data.shape == "crop":
            predictions = iter([*predictions])  # at its end nothing holds the one image any more
        for item, read in good:
            try:
                prediction = next(predictions)
            except UserError as error:
                raise UserError(f"{item.path}: {error}") from None
            read.canvas = None  # frees the image before its mask is encoded
            seconds, started = read.seconds + time.perf_counter() - started, time.perf_counter()
            if item.id not in done:
                writer.add(item, prediction, seconds)

    def _reason(self, item: Item) -> Problem:
        """Why an image is not done: read once more, for another rank may have met it."""
        read = self._read_one(item, now=True)
        return read.problem or Problem(item.id, str(item.path), "was not predicted; start the command again")

    def _collected(self) -> dict[str, Record]:
        """What is done, by id: what the journals and done.jsonl say whose files are all there."""
        files = [self.folder / "done.jsonl", *sorted((self.folder / "journal").glob("rank_*.jsonl"))]
        records = {record.id: record for file in files for record in _read_records(file)}
        return {id: record for id, record in records.items() if all(path.is_file() for path in self.outputs.files(id))}

    def _done_before(self) -> dict[str, Record]:
        """Of this job's images those that are done, and whose files have not changed since."""
        records = {record.id: record for record in _read_records(self.folder / "done.jsonl")}
        return {item.id: record for item in self.items if (record := records.get(item.id)) and _is_of(record, item)}

    def _write_done(self, done: dict[str, Record]) -> None:
        write_atomically(self.folder / "done.jsonl", "".join(record_line(done[id]) for id in sorted(done)))
        for file in (self.folder / "journal").glob("rank_*.jsonl"):
            file.unlink()
        if (self.folder / "journal").is_dir():
            (self.folder / "journal").rmdir()

    def _check_sources(self, done: dict[str, Record]) -> None:
        """Refuse an image whose id another file's predictions have; the same file may have moved or changed."""
        for item in self.items:
            record = done.get(item.id)
            if record and Path(record.file) != item.path and not _is_of(record, item):
                raise UserError(
                    f"{item.path}: {self.folder} has the prediction of {record.file} under the name {item.id}; choose "
                    "another folder with --to"
                )


class _Read:
    """An image, or why there is none."""

    def __init__(self, canvas: Canvas | None, problem: Problem | None, seconds: float, waits: bool = False) -> None:
        self.canvas = canvas
        self.problem = problem
        self.seconds = seconds
        self.waits = waits
        """Whether it is large, and to be read when its turn comes."""


class _Writer:
    """Writes outputs in threads beside the network's work, and a line in the journal for each that is there."""

    def __init__(self, outputs: Outputs, journal: IO[str], path: Path, threads: int) -> None:
        self._outputs = outputs
        self._journal = journal
        self._path = path
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="distseg-write")
        self._pending: deque[Future[Record]] = deque()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._take(0)
        self._pool.shutdown(cancel_futures=True)

    def add(self, item: Item, prediction: Prediction, seconds: float) -> None:
        self._pending.append(self._pool.submit(self._outputs.write, item, prediction, seconds))
        self._take(0 if math.prod(prediction.size) >= LARGE else 2 * self._threads)

    def _take(self, leave: int) -> None:
        while len(self._pending) > leave:
            record = self._pending.popleft().result()
            try:
                self._journal.write(record_line(record))
                self._journal.flush()
            except OSError as error:
                raise StorageError.of(self._path, error) from error


def _is_of(record: Record, item: Item) -> bool:
    try:
        status = item.path.stat()
    except OSError:
        return False
    return (record.bytes, record.mtime_ns) == (status.st_size, status.st_mtime_ns)


def _opened_to_append(path: Path) -> IO[str]:
    try:
        return path.open("a", encoding="ascii")
    except OSError as error:
        raise StorageError.of(path, error) from error


def _read_plan(path: Path) -> dict[str, Any] | None:
    try:
        plan = json.loads(read_regular(path, _LARGEST_JSON))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _read_records(path: Path) -> list[Record]:
    """The whole lines of a file; a kill may have cut the last one, and what is damaged is done again."""
    try:
        lines = read_regular(path, _LARGEST_LINES).split(b"\n")
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            records.append(Record.model_validate_json(line))
        except ValidationError:
            continue
    return records


def _remove_all(folder: Path, ids: Sequence[str]) -> None:
    """The files that earlier settings have left for `ids`, and the tables."""
    for id in ids:
        for name in (f"masks/{id}.png", f"probabilities/{id}.png", f"probabilities/{id}.npz",
                     f"probabilities/{id}.npy",
                     f"contours/{id}.geojson", f"overlays/{id}.jpg"):  # fmt: skip
            (folder / name).unlink(missing_ok=True)
    for name in ("table.csv", "failed.csv", "contours.json", "done.jsonl"):
        (folder / name).unlink(missing_ok=True)
