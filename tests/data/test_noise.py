import csv
import hashlib
import subprocess
import sys

import cv2
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from distseg.config.load import first_problem
from distseg.data.config import DataConfig
from distseg.data.decode import read_mask
from distseg.data.noise.boundary import boundary
from distseg.data.noise.box import box
from distseg.data.noise.config import NoiseConfig
from distseg.data.noise.kind import NoiseKind
from distseg.data.noise.markov import markov
from distseg.data.noise.polygon import polygon
from distseg.data.noise.unsupervised import unsupervised
from distseg.data.noise.write import corrupt, read_noisy_masks, write_noisy_masks
from distseg.data.seeding import generator
from distseg.data.splits import split_clean
from distseg.data.survey import read_samples
from distseg.errors import BadFileError
from distseg.run_folder import RunFolder
from distseg.training.splits import prepare_splits


def noise_of(**values) -> NoiseKind:
    """The section `data.noise` of a config."""
    return TypeAdapter(NoiseConfig).validate_python(values)


def draw_ellipse(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = np.zeros((60, 80), np.uint8)
    centre, axes = rng.integers((30, 20), (50, 40)), rng.integers(8, 20, 2)
    return cv2.ellipse(mask, centre.tolist(), axes.tolist(), float(rng.uniform(0, 180)), 0, 360, 1, -1)


MASKS = [draw_ellipse(seed) for seed in range(10)]


def rim(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask with a 4-neighbour outside it; the frame's outside counts as outside."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner & 1


def corners(drawn: np.ndarray) -> np.ndarray:
    contours, _ = cv2.findContours(drawn, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    (hull,) = [cv2.convexHull(contour).reshape(-1, 2) for contour in contours]
    return hull


@pytest.mark.parametrize("mask", MASKS)
def test_polygon_corners_lie_on_the_true_contour(mask):
    hull = corners(polygon(mask, 3, generator(0)))
    x, y = hull.T
    assert rim(mask)[y, x].sum() >= 3  # the rest of the hull is the raster of the straight edges
    assert not np.any(polygon(mask, 3, generator(0)) & ~cv2.dilate(mask, np.ones((3, 3))) & 1)


@pytest.mark.parametrize("mask", MASKS)
def test_polygon_approaches_a_convex_mask_from_below(mask):
    areas = [polygon(mask, n, generator(0)).sum() for n in (3, 7, 10_000)]
    assert 0 < areas[0] < areas[1] < mask.sum()
    np.testing.assert_array_equal(polygon(mask, 10_000, generator(0)), mask)


def test_polygon_vertices_are_at_equal_arc_length():
    square = np.zeros((50, 50), np.uint8)
    square[10:41, 10:41] = 1  # the contour is 120 pixels long, so four clicks are 30 apart: a turned square
    for seed in range(5):
        drawn = polygon(square, 4, generator(seed))
        (x0, y0), (x1, y1) = corners(drawn).min(axis=0), corners(drawn).max(axis=0)
        assert (x0, y0, x1, y1) == (10, 10, 40, 40)


def test_polygon_takes_the_largest_component_and_fills_holes():
    mask = np.zeros((60, 60), np.uint8)
    cv2.circle(mask, (15, 15), 10, 1, -1)
    cv2.circle(mask, (45, 45), 13, 1, -1)
    mask[44:47, 44:47] = 0
    drawn = polygon(mask, 1000, generator(0))
    assert drawn[:30, :30].sum() == 0
    assert drawn[45, 45] == 1
    assert box(mask)[5:59, 5:59].all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 2), (1, 5), (5, 1)])
def test_tiny_masks_survive(shape):
    mask = np.zeros((9, 9), np.uint8)
    mask[3 : 3 + shape[0], 2 : 2 + shape[1]] = 1
    for seed in range(5):
        drawn = polygon(mask, 7, generator(seed))
        assert 0 < drawn.sum() <= mask.sum()
        assert not np.any(drawn > mask)
    np.testing.assert_array_equal(box(mask), mask)


def test_empty_masks_stay_empty():
    empty = np.zeros((8, 8), np.uint8)
    assert polygon(empty, 3, generator(0)).sum() == 0
    assert box(empty).sum() == 0


def test_box_is_exact():
    mask = np.zeros((20, 30), np.uint8)
    mask[4, 7] = mask[15, 9] = mask[8, 21] = 1
    expected = np.zeros_like(mask)
    expected[4:16, 7:22] = 1
    np.testing.assert_array_equal(box(mask), expected)


def test_corrupt_is_a_pure_function_of_seed_and_id():
    mask, before = MASKS[0], MASKS[0].copy()
    config = noise_of(kind="polygon", vertices=3)
    drawn = corrupt(mask, config, "a")
    np.testing.assert_array_equal(corrupt(mask, config, "a"), drawn)
    np.testing.assert_array_equal(mask, before)
    assert np.any(corrupt(mask, config, "b") != drawn)
    assert np.any(corrupt(mask, noise_of(kind="polygon", seed=1), "a") != drawn)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(corrupt(mask, noise_of(kind="box"), "a"), box(mask))


def test_random_numbers_do_not_depend_on_the_process():
    program = "from distseg.data.seeding import generator; print(generator(3, 'noise', 'ISIC_1').random())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(run.stdout) == generator(3, "noise", "ISIC_1").random()


def test_written_masks_are_what_corrupt_says_and_a_rerun_is_byte_identical(make_dataset, tmp_path):
    samples = read_samples(DataConfig(root=make_dataset()))
    _, noisy = split_clean(samples, 3, seed=0)
    config, folder = noise_of(kind="polygon", vertices=3, seed=4), tmp_path / "noisy"
    written, rate = write_noisy_masks(noisy, config, folder)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}

    (folder / f"{noisy[0].id}.png").unlink()  # a run killed on the way, and its order changed
    again, again_rate = write_noisy_masks(noisy[::-1], config, folder)
    assert (again[::-1], again_rate) == (written, pytest.approx(rate))
    second = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert second.keys() == first.keys() == {"manifest.csv", *(f"{s.id}.png" for s in noisy)}
    assert all(second[name] == first[name] for name in first if name != "manifest.csv")
    write_noisy_masks(noisy, config, folder)
    assert (folder / "manifest.csv").read_bytes() == first["manifest.csv"]

    rates = []
    with (folder / "manifest.csv").open() as file:
        for sample, before, row in zip(written, noisy, csv.DictReader(file), strict=True):
            expected = corrupt(read_mask(sample.truth), config, sample.id)
            stored = cv2.imread(str(sample.annotations[0].mask), cv2.IMREAD_UNCHANGED)
            np.testing.assert_array_equal(stored, expected * 255)
            assert (sample.id, sample.image, sample.truth) == (before.id, before.image, before.truth)
            rates.append(np.mean(expected != read_mask(sample.truth)))
            assert (row["id"], row["kind"], row["parameters"], row["seed"]) == (sample.id, "polygon", "vertices=3", "4")
            assert float(row["wrong_pixel_rate"]) == pytest.approx(rates[-1], abs=1e-6)
    assert 0 < rate == pytest.approx(np.mean(rates))


@pytest.mark.parametrize("kind", ["polygon", "none"])
def test_one_rank_draws_and_the_others_find_the_same(make_dataset, tmp_path, kind):
    config = DataConfig(root=make_dataset(noisy=kind == "none"), clean_count=3, noise=noise_of(kind=kind))
    folder = RunFolder(tmp_path / "run")

    def files() -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.noisy_masks.glob("*")}

    first = prepare_splits(config, 0, folder, check=True)
    before = files()
    assert len(before) == (6 if kind == "polygon" else 0) and first.noise_rate > 0
    assert prepare_splits(config, 0, folder, check=False) == first  # the rate too, to the last bit
    assert files() == before

    own = prepare_splits(config, 0, RunFolder(tmp_path / "own"), check=False)  # of a rank with a folder of its own
    assert (own.clean, own.noise_rate) == (first.clean, first.noise_rate)
    assert [read_mask(s.annotations[0].mask).tolist() for s in own.noisy] == [
        read_mask(s.annotations[0].mask).tolist() for s in first.noisy
    ]


def test_noisy_masks_of_another_run_are_not_taken_for_its_own(make_dataset, tmp_path):
    samples, noise = read_samples(DataConfig(root=make_dataset())), noise_of(kind="polygon", vertices=3)
    written = write_noisy_masks(samples, noise, tmp_path)
    assert read_noisy_masks(samples, noise, tmp_path) == written
    others = [noise.with_seed(1), noise_of(kind="polygon", vertices=4), noise_of(kind="box")]
    for wrong_samples, wrong_noise in [(samples[1:], noise), (samples[::-1], noise), *((samples, n) for n in others)]:
        with pytest.raises(BadFileError, match=r"manifest\.csv: is not what the first rank has written for this run"):
            read_noisy_masks(wrong_samples, wrong_noise, tmp_path)
    for damage in (b"", b"\xff\n", b"id\n\n", (tmp_path / "manifest.csv").read_bytes()[:-30]):
        (tmp_path / "manifest.csv").write_bytes(damage)
        with pytest.raises(BadFileError, match=r"manifest\.csv: "):
            read_noisy_masks(samples, noise, tmp_path)


def test_kind_none_keeps_the_masks_that_the_data_brings(make_dataset, tmp_path):
    samples = read_samples(DataConfig(root=make_dataset(noisy=True)))  # its noisy masks are the complements
    assert write_noisy_masks(samples, noise_of(), tmp_path / "noisy") == (samples, 1.0)
    assert not (tmp_path / "noisy").exists()


def test_kind_none_without_noisy_masks_is_no_noise(make_dataset, tmp_path):
    samples = read_samples(DataConfig(root=make_dataset()))
    assert write_noisy_masks(samples, noise_of(), tmp_path / "noisy") == (samples, 0.0)


DEGENERATE = {
    "empty": np.zeros((12, 16), np.uint8),
    "full": np.ones((12, 16), np.uint8),
    "one pixel": np.pad(np.ones((1, 1), np.uint8), ((5, 6), (7, 8))),
    "touching the border": np.pad(np.ones((6, 5), np.uint8), ((0, 6), (0, 11))),
    "a row": np.ones((1, 16), np.uint8),
}
EVERY_KIND = [
    noise_of(kind="polygon"),
    noise_of(kind="box"),
    noise_of(kind="boundary", alpha=1, beta=0.7),
    noise_of(kind="markov", theta1=0.5),
    noise_of(kind="unsupervised"),
    noise_of(kind="mixed", annotators=[noise_of(kind="boundary"), noise_of(kind="unsupervised")]),
]


@pytest.mark.parametrize("config", EVERY_KIND, ids=lambda config: config.level)
@pytest.mark.parametrize("name", DEGENERATE)
def test_every_kind_survives_degenerate_masks(config: NoiseKind, name: str):
    mask = DEGENERATE[name]
    image = np.random.default_rng(0).integers(0, 256, (*mask.shape, 3)).astype(np.uint8)
    for seed in range(20):
        before = mask.copy()
        drawn = corrupt(mask, config.model_copy(update={"seed": seed}), "a", image)
        np.testing.assert_array_equal(mask, before)
        assert drawn.shape == mask.shape and drawn.dtype == np.uint8 and drawn.max(initial=0) <= 1
        if config.kind == "boundary":
            assert drawn.any() == mask.any()  # a lesion that was seen is drawn, and none is invented


@pytest.mark.parametrize("beta", [0.5, 0.7])
def test_boundary_changes_a_fraction_beta_of_the_lesion(beta: float):
    ways = {"larger": 0, "smaller": 0, "moved": 0}
    for number, mask in enumerate([m for m in MASKS for _ in range(9)]):
        drawn, area = boundary(mask, 1.0, beta, generator(number)), mask.sum()
        more, less = int((drawn > mask).sum()), int((drawn < mask).sum())
        ways["moved" if more and less else "larger" if more else "smaller"] += 1
        if more and less:  # by whole pixels: one more step changes at most the contour, twice
            assert abs(more + less - beta * area) <= boundary_length(mask)
        else:
            assert more + less == round(beta * area)
    assert all(count > 15 for count in ways.values()), ways


def boundary_length(mask: np.ndarray) -> int:
    return int((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())


def shift_by_brute_force(mask: np.ndarray, wrong: int, direction: np.ndarray) -> np.ndarray:
    """Of all whole steps that leave some of the lesion in the frame, the one whose wrong pixels are nearest."""
    nearest, least = mask, None
    for distance in range(2 * sum(mask.shape)):
        rows, columns = np.rint(distance * direction)
        matrix = np.array([[1, 0, columns], [0, 1, rows]])
        moved = cv2.warpAffine(mask, matrix, mask.shape[::-1], flags=cv2.INTER_NEAREST)
        missed = abs(int(np.count_nonzero(moved != mask)) - wrong)
        if moved.any() and (least is None or missed < least):
            nearest, least = moved, missed
    return nearest


def test_boundary_moves_a_lesion_by_the_nearest_whole_step():
    """Also where the count of wrong pixels goes up and down: several lesions, holes, and what leaves the frame."""
    rng, compared = np.random.default_rng(0), 0
    for seed in range(400):
        mask = np.zeros(tuple(int(side) for side in rng.integers(6, 40, 2)), np.uint8)
        for _ in range(rng.integers(1, 4)):
            centre, axes = rng.integers(0, mask.shape[::-1]), rng.integers(1, 1 + min(mask.shape) // 2, 2)
            cv2.ellipse(mask, centre.tolist(), axes.tolist(), float(rng.uniform(0, 180)), 0, 360, 1, -1)
        if seed % 3 == 0:
            mask &= (rng.random(mask.shape) < 0.6).astype(np.uint8)
        beta, draws = float(rng.uniform(0.1, 1)), generator(seed)
        _, way, direction = draws.random(), draws.integers(3), draws.random() * 2 * np.pi
        if way < 2 or not mask.any():
            continue
        wrong = round(beta * int(mask.sum()))
        expected = shift_by_brute_force(mask, wrong, np.array([np.sin(direction), np.cos(direction)]))
        np.testing.assert_array_equal(boundary(mask, 1.0, beta, generator(seed)), expected)
        compared += 1
    assert compared > 100


def test_boundary_takes_the_pixels_nearest_to_the_contour():
    square = np.zeros((40, 40), np.uint8)
    square[10:30, 10:30] = 1
    drawn = {boundary(square, 1.0, 76 / 400, generator(seed)).tobytes() for seed in range(40)}
    ring = np.zeros_like(square)
    ring[11:29, 11:29] = 1  # the outermost of the square's rings has 76 pixels
    assert ring.tobytes() in drawn


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_boundary_alters_a_fraction_alpha_of_the_masks(alpha: float):
    config = noise_of(kind="boundary", alpha=alpha, beta=0.5, seed=3)
    altered = sum(np.any(corrupt(MASKS[0], config, f"ISIC_{i:07d}") != MASKS[0]) for i in range(1000))
    deviation = (1000 * alpha * (1 - alpha)) ** 0.5
    assert abs(altered - 1000 * alpha) <= 3 * deviation


def test_a_growing_walk_adds_what_its_parameters_say():
    half = np.zeros((60, 200), np.uint8)
    half[30:] = 1
    # With theta2 = 1 the walk is no walk: each step moves the whole edge by one pixel.
    np.testing.assert_array_equal(markov(half, 7, 1.0, 1.0, 0.0, generator(0))[23:], 1)
    assert markov(half, 7, 1.0, 1.0, 0.0, generator(0))[:23].sum() == 0
    assert markov(half, 7, 0.0, 1.0, 0.0, generator(0))[:37].sum() == 0
    assert markov(half, 0, 0.5, 1.0, 0.0, generator(0)).tobytes() == half.tobytes()
    large, small = (
        np.mean([markov(half, 40, theta1, 0.05, 0.0, generator(s)).sum() for s in range(5)]) for theta1 in (0.8, 0.2)
    )
    assert large > half.sum() > small
    flips = np.mean(markov(half, 0, 0.5, 0.0, 0.1, generator(0)) != half)
    assert flips == pytest.approx(0.1, abs=0.01)


def test_a_walk_is_by_half_the_size_on_a_photograph_of_twice_the_size():
    small = np.zeros((256, 256), np.uint8)
    cv2.circle(small, (128, 128), 60, 1, -1)
    large = cv2.resize(small, (1024, 1024), interpolation=cv2.INTER_NEAREST)
    rates = [np.mean(markov(m, 100, 0.2, 0.1, 0.0, generator(1)) != m) for m in (small, large)]
    assert rates[0] == pytest.approx(rates[1], rel=0.02) and rates[0] > 0.02


def test_unsupervised_finds_the_dark_region_and_not_the_dark_corners():
    image = np.full((128, 128, 3), 200, np.uint8)
    lesion = cv2.circle(np.zeros((128, 128), np.uint8), (70, 60), 20, 1, -1)
    image[lesion > 0] = (120, 80, 60)
    corners = cv2.circle(np.ones((128, 128), np.uint8), (64, 64), 66, 0, -1)
    image[corners > 0] = 10
    assert corners.sum() > lesion.sum()
    drawn = unsupervised(image)
    assert 2 * (drawn & lesion).sum() / (drawn.sum() + lesion.sum()) > 0.9
    assert unsupervised(np.full((9, 9, 3), 7, np.uint8)).sum() == 0
    with pytest.raises(ValueError, match="drawn from the image"):
        corrupt(lesion, noise_of(kind="unsupervised"), "a")


def test_mixed_annotators_share_the_samples_and_keep_their_hands():
    annotators = [noise_of(kind="box"), noise_of(kind="polygon"), noise_of(kind="boundary", alpha=1)]
    config = noise_of(kind="mixed", annotators=annotators, seed=2)
    boxes = sum(corrupt(MASKS[0], config, f"{i}").tobytes() == box(MASKS[0]).tobytes() for i in range(600))
    assert abs(boxes - 200) < 3 * (600 * 2 / 9) ** 0.5
    np.testing.assert_array_equal(corrupt(MASKS[0], config, "7"), corrupt(MASKS[0], config, "7"))


DIGEST = """
import hashlib, numpy as np, cv2
from pydantic import TypeAdapter
from distseg.data.noise.config import NoiseConfig
from distseg.data.noise.write import corrupt
mask = cv2.ellipse(np.zeros((90, 130), np.uint8), (60, 40), (35, 22), 20, 0, 360, 1, -1)
image = np.random.default_rng(1).integers(0, 256, (90, 130, 3)).astype(np.uint8)
digest = hashlib.sha256()
for config in CONFIGS:
    for name in "abcdefgh":
        digest.update(corrupt(mask, TypeAdapter(NoiseConfig).validate_python(config), name, image).tobytes())
print(digest.hexdigest())
"""


def test_another_process_draws_the_same_bits():
    program = f"CONFIGS = {[config.model_dump() for config in EVERY_KIND]!r}\n{DIGEST}"
    command = [sys.executable, "-c", program]
    environments = [{"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)} for seed in ("1", "2")]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        for environment in environments
    )
    assert first == second and len(first.strip()) == hashlib.sha256().digest_size * 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"kind": "box", "vertices": 3},
            r"vertices is no key of box; remove it \(\.vertices=null takes it back\), or set \.kind=polygon",
        ),
        ({"kind": "polygon", "beta": 0.5}, "beta is no key of polygon"),
        ({"kind": "mixed"}, "mixed noise needs two or more"),
        (
            {"kind": "mixed", "annotators": [{"kind": "box"}, {"kind": "none"}]},
            "does not match any of the expected tags: 'polygon'",
        ),
        ({"kind": "boundary", "beta": 0}, "greater than 0"),
        ({"kind": "polygon", "vertices": 10**8}, "less than or equal to 10000"),
        ({"kind": "markov", "steps": 10**9}, "less than or equal to 10000"),
        ({"kind": "polygon", "seed": 10**30}, "less than"),
        ({"kind": "mixed", "annotators": [{"kind": "box", "seed": 1}, {"kind": "polygon"}]}, "set data.noise.seed"),
    ],
)
def test_a_parameter_of_another_kind_is_told(values: dict, said: str):
    with pytest.raises(ValueError, match=said):
        noise_of(**values)


BOX = {"kind": "box"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "ring"}, "noise.kind: input should be 'none', 'polygon', "),
        ({"kind": ["box"]}, "noise.kind: input should be 'none', 'polygon', "),
        ({"kind": "polygon", "vertice": 4}, "noise.vertice: unknown key; did you mean vertices?"),
        ({"vertice": 4}, "noise.vertice: unknown key; did you mean vertices?"),
        ({"kind": "box", "vertice": None}, "noise.vertice: unknown key; did you mean vertices?"),
        ({"kind": "box", "qqq": 4}, "noise.qqq: unknown key; known: kind, seed"),
        ({"kind": "polygon", "vertices": "many"}, "noise.vertices: input should be a valid integer"),
        (
            {"kind": "mixed", "annotators": [BOX, {"kind": "box", "sede": 1}]},
            "noise.annotators.1.sede: unknown key; did",
        ),
        (
            {"kind": "mixed", "annotators": [BOX, {"kind": "none"}]},
            "noise.annotators.1.kind: input should be 'polygon'",
        ),
    ],
)
def test_a_wrong_key_is_named_without_the_kind_in_its_place(values: dict, said: str):
    with pytest.raises(ValidationError) as raised:
        DataConfig.model_validate({"root": "/data", "noise": values})
    assert first_problem(raised.value, DataConfig).startswith(said)


def test_null_takes_back_a_parameter_of_another_kind_and_asks_for_an_own_ones_default():
    assert noise_of(kind="box", vertices=None, alpha=None, annotators=None) == noise_of(kind="box")
    assert noise_of(kind="polygon", vertices=None).parameters == "vertices=3"


def test_a_level_is_written_as_papers_write_it():
    assert noise_of(kind="boundary", beta=0.5).level == "boundary(0.7, 0.5)"
    assert noise_of().level == "none"
    mixed = noise_of(kind="mixed", annotators=[{"kind": "box"}, {"kind": "polygon"}])
    assert mixed.level == "mixed(box, polygon(3))"
