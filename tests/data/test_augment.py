import numpy as np
import pytest

from distseg.data.augment import CHANNEL_DEVIATIONS, CHANNEL_MEANS, draw_transform, identity_transform
from distseg.data.config import AugmentConfig

STRONG = AugmentConfig(
    flip=True,
    right_angles=True,
    rotate=180,
    scale=(0.5, 2),
    shear=20,
    translate=0.3,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=60,
)
KEYS = ["right_angles", "flip", "rotate", "scale", "shear", "translate", "brightness", "contrast", "saturation", "hue"]


def colours(transform, rgb: np.ndarray) -> np.ndarray:
    """The network's input for (N, 3) colours in [0, 1], back in [0, 1]: what augmentation did to them."""
    normalised = (255 * rgb) @ transform.colour[:, :3].T + transform.colour[:, 3]
    return normalised * CHANNEL_DEVIATIONS + CHANNEL_MEANS


def only(**keys) -> AugmentConfig:
    return AugmentConfig(**keys)


def test_defaults_are_the_identity():
    expected = identity_transform(65)
    for position in range(20):
        transform = draw_transform(AugmentConfig(), 65, 1, "noisy", position)
        np.testing.assert_array_equal(transform.matrix, np.eye(2, 3))
        np.testing.assert_array_equal(transform.matrix, expected.matrix)
        np.testing.assert_array_equal(transform.colour, expected.colour)


def test_identity_normalises_by_the_papers_statistics():
    rgb = np.array([[255.0, 0.0, 51.0]])
    transform = identity_transform(64)
    actual = rgb @ transform.colour[:, :3].T + transform.colour[:, 3]
    expected = [[(1 - 0.7077) / 0.1550, (0 - 0.5913) / 0.1635, (0.2 - 0.5467) / 0.1785]]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_pure_function_of_seed_stream_and_position():
    def draw(seed=0, stream="noisy", position=7):
        transform = draw_transform(STRONG, 64, seed, stream, position)
        return np.concatenate([transform.matrix.ravel(), transform.colour.ravel()])

    np.testing.assert_array_equal(draw(), draw())
    for other in (draw(seed=1), draw(stream="clean"), draw(position=8)):
        assert np.all(other[:6] != draw()[:6])
    assert draw().dtype == np.float32


@pytest.mark.parametrize("size", [64, 65])
def test_right_angles_and_flips_are_integer_and_all_eight_occur(size):
    matrices = set()
    for position in range(200):
        matrix = draw_transform(only(right_angles=True, flip=True), size, 0, "s", position).matrix
        assert np.all(matrix == np.round(matrix))
        corners = matrix @ np.array([[0, size, 0, size], [0, 0, size, size], [1, 1, 1, 1]])
        assert {tuple(corner) for corner in corners.T} == {(0, 0), (size, 0), (0, size), (size, size)}
        matrices.add(tuple(matrix[:, :2].ravel()))
    assert len(matrices) == 8


def test_geometry_stays_within_its_bounds_and_uses_them():
    size, centre = 100, np.array([50, 50, 1])
    shifts, zooms, angles, shears = [], [], [], []
    for position in range(300):
        moved = draw_transform(only(translate=0.1), size, 0, "s", position).matrix
        shifts.append(np.abs(moved @ centre - 50).max())
        zooms.append(1 / draw_transform(only(scale=(0.5, 2)), size, 0, "s", position).matrix[0, 0])
        turned = draw_transform(only(rotate=30), size, 0, "s", position).matrix
        np.testing.assert_allclose(turned @ centre, [50, 50], atol=1e-4)
        angles.append(np.degrees(np.arctan2(turned[1, 0], turned[0, 0])))
        shears.append(np.degrees(np.arctan(draw_transform(only(shear=10), size, 0, "s", position).matrix[0, 1])))
    assert 9 < max(shifts) <= 10.001
    assert 0.4999 < min(zooms) < 0.55 and 1.8 < max(zooms) < 2.0001
    assert abs(np.median(np.log(zooms))) < 0.1
    assert -30.001 < min(angles) < -28 and 28 < max(angles) < 30.001
    assert -10.001 < min(shears) < -9 and 9 < max(shears) < 10.001


def test_zoom_above_one_crops():
    corner = draw_transform(only(scale=(2, 2)), 100, 0, "s", 0).matrix @ np.array([0, 0, 1])
    np.testing.assert_allclose(corner, [25, 25], rtol=1e-5)


def test_colour_operations():
    rgb = np.random.default_rng(0).random((50, 3))
    grey = np.linspace(0, 1, 5)[:, None] * np.ones(3)
    luma = np.array([0.299, 0.587, 0.114])
    for position in range(20):
        bright = colours(draw_transform(only(brightness=0.3), 64, 0, "s", position), rgb) / rgb
        np.testing.assert_allclose(bright, np.broadcast_to(bright[0, 0], rgb.shape), rtol=1e-4)
        assert 0.7 <= bright[0, 0] <= 1.3

        contrast = (colours(draw_transform(only(contrast=0.3), 64, 0, "s", position), rgb) - CHANNEL_MEANS) / (
            rgb - CHANNEL_MEANS
        )
        np.testing.assert_allclose(contrast, np.broadcast_to(contrast[0, 0], rgb.shape), rtol=1e-2)
        assert 0.69 <= contrast[0, 0] <= 1.31

        saturated = draw_transform(only(saturation=0.3), 64, 0, "s", position)
        np.testing.assert_allclose(colours(saturated, grey), grey, atol=1e-5)
        np.testing.assert_allclose(colours(saturated, rgb) @ luma, rgb @ luma, atol=1e-5)

        turned = draw_transform(only(hue=90), 64, 0, "s", position)
        np.testing.assert_allclose(colours(turned, grey), grey, atol=1e-5)
        radius = np.linalg.norm(colours(turned, rgb) - rgb.mean(axis=1, keepdims=True), axis=1)
        np.testing.assert_allclose(radius, np.linalg.norm(rgb - rgb.mean(axis=1, keepdims=True), axis=1), atol=1e-5)


def test_effects_are_off_by_default_and_each_has_draws_of_its_own():
    plain = draw_transform(STRONG, 64, 0, "s", 3)
    assert (plain.elastic, plain.hairs, plain.blur, plain.grain) == (None,) * 4
    effects = {"elastic": 0.1, "hairs": 20, "blur": 2.0, "grain": 0.1}
    together = draw_transform(STRONG.model_copy(update=effects), 64, 0, "s", 3)
    np.testing.assert_array_equal(together.matrix, plain.matrix)
    np.testing.assert_array_equal(together.colour, plain.colour)
    for key, value in effects.items():
        alone = draw_transform(only(**{key: value}), 64, 0, "s", 3)
        np.testing.assert_array_equal(getattr(alone, key), getattr(together, key))
        assert all(getattr(alone, other) is None for other in effects if other != key)
        others = [draw_transform(only(**{key: value}), 64, *place) for place in [(1, "s", 3), (0, "t", 3), (0, "s", 4)]]
        assert all(np.any(getattr(other, key) != getattr(alone, key)) for other in others)


def test_effects_stay_within_their_bounds_and_use_them():
    config = only(elastic=0.1, hairs=5, blur=2.0, grain=0.1)
    drawn = [draw_transform(config, 64, 0, "s", position) for position in range(100)]
    reach = [np.abs(each.elastic).max() for each in drawn]
    assert max(reach) <= 6.4001 and min(reach) > 2
    steps = [np.abs(np.diff(each.elastic, axis=axis)).max() for each in drawn for axis in (0, 1)]
    assert max(steps) < 1.3  # pixels: smooth
    assert all(each.hairs.shape == (64, 64) and 0 < each.hairs.min() <= each.hairs.max() == 1 for each in drawn)
    covered = [np.mean(each.hairs < 1) for each in drawn]
    assert min(covered) == 0 and 0.05 < max(covered) < 0.5
    assert 0 <= min(each.blur for each in drawn) < 0.1 and 1.9 < max(each.blur for each in drawn) <= 2
    strengths = [(each.grain * CHANNEL_DEVIATIONS[:, None, None]).std() for each in drawn]
    assert min(strengths) < 0.01 and 0.09 < max(strengths) < 0.103


@pytest.mark.parametrize("key", KEYS)
def test_each_key_has_an_effect_and_leaves_the_other_draws_alone(key):
    value = getattr(STRONG, key)
    alone, identity = only(**{key: value}), identity_transform(64)
    some = [draw_transform(alone, 64, 0, "s", position) for position in range(8)]
    changed = [np.any(t.matrix != identity.matrix) or np.any(t.colour != identity.colour) for t in some]
    assert any(changed)
    is_colour = key in ("brightness", "contrast", "saturation", "hue")
    off = STRONG.model_copy(update={key: getattr(AugmentConfig(), key)})
    untouched = "matrix" if is_colour else "colour"
    for position in range(8):
        with_key, without = (getattr(draw_transform(c, 64, 0, "s", position), untouched) for c in (STRONG, off))
        np.testing.assert_array_equal(with_key, without)
