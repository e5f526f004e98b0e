"""The policies: the operators are Pillow's, a policy draws what its table says, and a seed decides all of it."""

import functools
import itertools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from sklearn.datasets import load_sample_image

from augment import policies

P_VALUE = 1e-3  # under this, a sample does not come from the distribution
SEED = tf.constant([1, 2])
POLICIES = {
    "autoaugment": policies.autoaugment,
    "randaugment": policies.randaugment,
    "broad_color": functools.partial(policies.broad_color, strength=1.0),
}
# The ImageNet policy as the paper prints it.
TABLE_9 = """
Posterize .4 8 / Rotate .6 9; Solarize .6 5 / AutoContrast .6 5; Equalize .8 8 / Equalize .6 3;
Posterize .6 7 / Posterize .6 6; Equalize .4 7 / Solarize .2 4; Equalize .4 4 / Rotate .8 8;
Solarize .6 3 / Equalize .6 7; Posterize .8 5 / Equalize 1.0 2; Rotate .2 3 / Solarize .6 8;
Equalize .6 8 / Posterize .4 6; Rotate .8 8 / Color .4 0; Rotate .4 9 / Equalize .6 2;
Equalize .0 7 / Equalize .8 8; Invert .6 4 / Equalize 1.0 8; Color .6 4 / Contrast 1.0 8;
Rotate .8 8 / Color 1.0 2; Color .8 8 / Solarize .8 7; Sharpness .4 7 / Invert .6 8;
ShearX .6 5 / Equalize 1.0 9; Color .4 0 / Equalize .6 3; Equalize .4 7 / Solarize .2 4;
Solarize .6 5 / AutoContrast .6 5; Invert .6 4 / Equalize 1.0 8; Color .6 4 / Contrast 1.0 8;
Equalize .8 8 / Equalize .6 3
"""


@pytest.fixture(scope="module")
def photo():
    """[80, 120, 3] uint8, with colours, noise, and a channel that does not fill its range."""
    image = load_sample_image("flower.jpg")[100:420:4, 100:580:4].astype(int)
    image += np.random.default_rng(0).integers(-8, 9, image.shape)
    return np.clip(image * [1.0, 0.9, 0.6] + [0, 10, 30], 0, 255).astype(np.uint8)


def floats(image):
    return tf.image.convert_image_dtype(image, tf.float32)


def seeds(count):
    return tf.data.Dataset.range(count).map(lambda i: tf.stack([tf.cast(i, tf.int32), 7]))


def streamed(transform, image, count):
    """[count, ...] results of `transform` on `image`, each with another seed."""
    made = seeds(count).map(lambda seed: transform(image, seed), num_parallel_calls=2)
    return np.stack(list(made.as_numpy_iterator()))


def affine(image, *rows):
    return image.transform(image.size, Image.Transform.AFFINE, rows, fillcolor=(128, 128, 128))


def enhance(kind, image, magnitude):
    return kind(image).enhance(0.1 + 0.18 * magnitude)


COLOUR = {  # by Pillow, and by how many of 255 levels we may be off
    "Identity": (lambda image, m: image, 0),
    "AutoContrast": (lambda image, m: ImageOps.autocontrast(image), 1),  # Pillow cuts to integers
    "Invert": (lambda image, m: ImageOps.invert(image), 0),
    "Equalize": (lambda image, m: ImageOps.equalize(image), 0),
    "Solarize": (lambda image, m: ImageOps.solarize(image, 256 - 25.6 * m), 0),
    "Posterize": (lambda image, m: ImageOps.posterize(image, 8 - round(0.4 * m)), 0),
    "Contrast": (functools.partial(enhance, ImageEnhance.Contrast), 1.5),  # Pillow rounds the mean,
    "Color": (functools.partial(enhance, ImageEnhance.Color), 1.5),  # the luma
    "Brightness": (functools.partial(enhance, ImageEnhance.Brightness), 1),
    "Sharpness": (functools.partial(enhance, ImageEnhance.Sharpness), 1.5),  # and the smooth image
}
GEOMETRY = {  # by Pillow, in the direction that is given
    "ShearX": lambda image, m: affine(image, 1, 0.03 * m, 0, 0, 1, 0),
    "ShearY": lambda image, m: affine(image, 1, 0, 0, 0.03 * m, 1, 0),
    "TranslateX": lambda image, m: affine(image, 1, 0, image.width * m * 15 / 331, 0, 1, 0),
    "TranslateY": lambda image, m: affine(image, 1, 0, 0, 0, 1, image.height * m * 15 / 331),
    "Rotate": lambda image, m: image.rotate(3 * m, fillcolor=(128, 128, 128)),
}


def test_every_operator_is_compared():
    assert set(COLOUR) | set(GEOMETRY) == set(policies.OPERATORS)


@pytest.mark.parametrize("magnitude", [0, 2.3, 5, 8, 10])
@pytest.mark.parametrize("name", COLOUR)
def test_colour_operators_are_pillows(photo, name, magnitude):
    by_pillow, tolerance = COLOUR[name]
    ours = policies.OPERATORS[name](floats(photo), magnitude, SEED)
    theirs = np.asarray(by_pillow(Image.fromarray(photo), magnitude), np.float32)
    np.testing.assert_allclose(255 * ours.numpy(), theirs, rtol=0, atol=tolerance + 1e-3)


@pytest.mark.parametrize("magnitude", [0, 2.3, 5, 10])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometric_operators_are_pillows_in_either_direction(photo, name, magnitude):
    wanted = [np.asarray(GEOMETRY[name](Image.fromarray(photo), m), float) for m in (magnitude, -magnitude)]
    seen = set()
    for seed in range(12):
        ours = 255 * policies.OPERATORS[name](floats(photo), magnitude, tf.constant([seed, 0])).numpy()
        shares = [(np.abs(ours - theirs) > 0.01).any(-1).mean() for theirs in wanted]  # of pixels that differ
        seen.add(int(np.argmin(shares)))
        assert min(shares) < 0.01  # where two pixels are as near
    assert seen == ({0, 1} if magnitude else {0})


def test_what_comes_in_from_outside_is_grey(photo):
    made = policies.translate_x(floats(photo), 10, SEED).numpy()
    outside = (made == np.float32(128 / 255)).all((0, 2))
    assert outside.sum() == math.floor(120 * 150 / 331) and (outside[0] or outside[-1])


@pytest.mark.parametrize("value", [0, 100, 255])
@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_a_flat_channel_stays(name, value):
    image = np.full([32, 24, 3], value, np.uint8)
    image[..., 1] = np.arange(24)
    made = policies.OPERATORS[name](floats(image), 5, SEED).numpy()
    np.testing.assert_allclose(made[..., [0, 2]], value / 255, atol=1e-6)
    np.testing.assert_allclose(255 * made, np.asarray(COLOUR[name][0](Image.fromarray(image), 5)), atol=1)


def test_equalize_of_few_pixels_is_pillows(photo):
    for side in (8, 16, 20, 32):
        image = np.ascontiguousarray(photo[:side, :side])
        theirs = np.asarray(ImageOps.equalize(Image.fromarray(image)))
        np.testing.assert_allclose(255 * policies.equalize(floats(image), 0, SEED).numpy(), theirs, atol=1e-3)


@pytest.mark.parametrize("name", ["Equalize", "Posterize"])
def test_no_level_is_lost_to_rounding(name):
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=-1)
    theirs = np.asarray(COLOUR[name][0](Image.fromarray(image), 10))
    for noise in (-1e-4, 0, 1e-4):  # as of resizing
        noisy = tf.clip_by_value(floats(image) + noise, 0.0, 1.0)
        np.testing.assert_allclose(255 * policies.OPERATORS[name](noisy, 10, SEED).numpy(), theirs, atol=1e-3)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("name", policies.OPERATORS)
def test_operators_stay_within_the_unit_range_eagerly_and_in_a_stream(name, size):
    noise = np.random.default_rng(0).uniform(-0.2, 1.2, [*size, 3]).clip(0, 1).astype(np.float32)
    operator = policies.OPERATORS[name]
    made = tf.data.Dataset.from_tensor_slices([0.0, 5.0, 10.0]).map(lambda m: operator(noise, m, SEED))
    assert made.element_spec == tf.TensorSpec([*size, 3], tf.float32)
    for magnitude, inside in zip((0, 5, 10), made.as_numpy_iterator(), strict=True):
        outside = operator(tf.constant(noise), magnitude, SEED).numpy()
        assert outside.dtype == np.float32 and outside.shape == (*size, 3)
        assert outside.min() >= 0 and outside.max() <= 1
        np.testing.assert_allclose(inside, outside, atol=1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_functions_of_their_seed(photo, name):
    policy = POLICIES[name]
    many = streamed(policy, floats(photo), 40)
    np.testing.assert_array_equal(many, streamed(policy, floats(photo), 40))
    assert len(np.unique(many.mean((1, 2, 3)).round(5))) > 10
    assert many.dtype == np.float32 and many.shape == (40, *photo.shape)
    assert many.min() >= 0 and many.max() <= 1


@pytest.mark.parametrize("name", POLICIES)
def test_eager_policies_equal_those_of_a_parallel_stream(photo, name):
    image = floats(photo[:48, :64])
    eager = np.stack([POLICIES[name](image, seed) for seed in seeds(25)])
    inside = streamed(POLICIES[name], image, 25)
    # Where a graph rounds otherwise, a pixel may go to a neighbouring level.
    assert (np.abs(inside - eager) > 1e-5).mean() < 1e-3
    assert np.abs(inside.mean((1, 2, 3)) - eager.mean((1, 2, 3))).max() < 1e-3


def test_layers_made_in_a_strategys_stream_under_mixed_precision_compute_in_float32(photo, mirrored):
    usual = {name: operator(floats(photo), 3, SEED) for name, operator in policies.OPERATORS.items()}
    policy = keras.config.dtype_policy()
    policies._layer.cache_clear()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        with mirrored(2).scope():
            for name, operator in policies.OPERATORS.items():
                made = streamed(lambda image, seed, run=operator: run(image, 3.0, SEED), floats(photo), 1)[0]
                np.testing.assert_allclose(made, usual[name], atol=1e-5)
    finally:
        keras.config.set_dtype_policy(policy)
        policies._layer.cache_clear()


def test_the_imagenet_policy_is_the_papers():
    pairs = [pair.split("/") for pair in TABLE_9.split(";")]
    printed = [[(name, float(p), int(m)) for name, p, m in map(str.split, pair)] for pair in pairs]
    assert len(printed) == 25
    assert [list(pair) for pair in policies.AUTOAUGMENT] == printed


BASE = 16


@pytest.fixture
def recording(monkeypatch):
    """Puts operators in place that write down their number; returns their names by number."""

    def write(number):
        return lambda image, magnitude, seed: image * BASE + number

    names = [name for name in policies.OPERATORS if name != "Identity"]
    for number, name in enumerate(names, start=1):
        monkeypatch.setitem(policies.OPERATORS, name, write(float(number)))
    return dict(enumerate(names, start=1))


def taken(policy, names, count):
    """[count] tuples of the names of the operators that ran, in their order."""
    for code in streamed(policy, tf.zeros([1, 1, 3]), count)[:, 0, 0, 0].astype(int):
        ran = []
        while code:
            code, number = divmod(int(code), BASE)
            ran.insert(0, names[number])
        yield tuple(ran)


def test_autoaugment_runs_the_operators_with_the_tables_probabilities(recording):
    expected = {}
    for (first, p, _), (second, q, _) in policies.AUTOAUGMENT:
        for runs_first, runs_second in itertools.product([True, False], repeat=2):
            ran = (first,) * runs_first + (second,) * runs_second
            chance = (p if runs_first else 1 - p) * (q if runs_second else 1 - q)
            expected[ran] = expected.get(ran, 0) + chance / 25
    expected = {ran: chance for ran, chance in expected.items() if chance}
    drawn = list(taken(policies.autoaugment, recording, 4000))
    assert set(drawn) <= set(expected)
    counts = [drawn.count(ran) for ran in expected]
    assert stats.chisquare(counts, [4000 * chance for chance in expected.values()]).pvalue > P_VALUE


def test_each_sub_policy_is_as_likely_and_has_its_own_magnitudes(monkeypatch):
    monkeypatch.setitem(policies.OPERATORS, "Invert", lambda image, magnitude, seed: image * 100 + magnitude)
    table = [(("Invert", 1.0, i), ("Invert", 1.0, 50 - i)) for i in range(25)]
    monkeypatch.setattr(policies, "AUTOAUGMENT", table)
    first, second = np.divmod(streamed(policies.autoaugment, tf.zeros([1, 1, 3]), 2000)[:, 0, 0, 0].astype(int), 100)
    np.testing.assert_array_equal(second, 50 - first)
    assert stats.chisquare(np.bincount(first, minlength=25)).pvalue > P_VALUE


@pytest.mark.parametrize(("probability", "changed"), [(0.0, 0), (1.0, 200)])
def test_an_operator_runs_never_at_probability_0_and_always_at_1(monkeypatch, probability, changed):
    monkeypatch.setattr(policies, "AUTOAUGMENT", [(("Invert", probability, 5), ("Rotate", 0.0, 10))])
    assert (streamed(policies.autoaugment, tf.zeros([8, 8, 3]), 200) == 1).all((1, 2, 3)).sum() == changed


def test_an_operator_of_probability_0_does_not_run_on_the_lowest_draw(monkeypatch):
    def lowest(shape, seed, low=0, high=1, dtype=tf.float32):
        return tf.zeros(shape, dtype)

    monkeypatch.setattr(tf.random, "stateless_uniform", lowest)
    monkeypatch.setattr(policies, "AUTOAUGMENT", [(("Invert", 0.0, 5), ("Rotate", 0.0, 10))])
    assert not policies.autoaugment(tf.zeros([8, 8, 3]), SEED).numpy().any()


def test_a_direction_is_drawn_anew_for_each_operator(monkeypatch):
    monkeypatch.setattr(policies, "AUTOAUGMENT", [(("TranslateX", 1.0, 5), ("TranslateX", 1.0, 5))])
    ramp = tf.tile(tf.linspace(0.0, 1.0, 40)[None, :, None], [4, 1, 3])
    middle = streamed(policies.autoaugment, ramp, 300)[:, 0, 20, 0]
    counts = [(middle < 0.4).sum(), (np.abs(middle - ramp[0, 20, 0]) < 0.02).sum(), (middle > 0.6).sum()]
    assert stats.chisquare(counts, [75, 150, 75]).pvalue > P_VALUE


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_randaugment_runs_as_many_operators_as_it_has_layers(monkeypatch, layers):
    ran = []

    def counted(name):
        def operator(image, magnitude, seed):
            tf.py_function(lambda m: ran.append((name, float(m))), [magnitude], [])
            return image

        return operator

    for name in policies.OPERATORS:
        monkeypatch.setitem(policies.OPERATORS, name, counted(name))
    streamed(functools.partial(policies.randaugment, layers=layers, magnitude=7.0), tf.zeros([1, 1, 3]), 300)
    assert len(ran) == 300 * layers  # so none but the chosen runs
    if layers:
        assert {magnitude for _, magnitude in ran} == {7.0}
        names = [name for name, _ in ran]
        assert set(names) == set(policies.OPERATORS) - {"Invert"}
        assert stats.chisquare([names.count(name) for name in set(names)]).pvalue > P_VALUE


def test_randaugments_layers_are_drawn_independently(recording):
    names = [*policies.RANDAUGMENT[1:]]
    pairs = [ran for ran in taken(policies.randaugment, recording, 3000) if len(ran) == 2]
    assert stats.binomtest(len(pairs), 3000, (13 / 14) ** 2).pvalue > P_VALUE
    table = np.array([[pairs.count((first, second)) for second in names] for first in names])
    assert stats.chi2_contingency(table).pvalue > P_VALUE


def test_broad_color_draws_its_operators_alike_at_full_strength(recording):
    drawn = list(taken(functools.partial(policies.broad_color, strength=1.0), recording, 1200))
    assert {len(ran) for ran in drawn} == {1}
    counts = [drawn.count((name,)) for name in policies.BROAD]
    assert sum(counts) == 1200 and stats.chisquare(counts).pvalue > P_VALUE


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 3.0])
def test_broad_color_scales_probabilities_and_magnitudes_by_its_strength(monkeypatch, strength):
    for name in policies.OPERATORS:
        offset = 100.0 * (1 + policies.BROAD.index(name)) if name in policies.BROAD else 0.0
        write = lambda image, magnitude, seed, offset=offset: image + (offset + magnitude if offset else 0.0)  # noqa: E731
        monkeypatch.setitem(policies.OPERATORS, name, write)
    made = streamed(functools.partial(policies.broad_color, strength=strength), tf.zeros([1, 1, 3]), 1200)[:, 0, 0, 0]
    reach = min(strength, 1.0)
    for i, name in enumerate(policies.BROAD):
        magnitudes = made[made // 100 == i + 1] - 100 * (i + 1)
        if name in ("AutoContrast", "Equalize", "Invert"):
            assert stats.binomtest(len(magnitudes), 1200, reach / 6).pvalue > P_VALUE
            continue
        assert stats.binomtest(len(magnitudes), 1200, 1 / 6).pvalue > P_VALUE
        low, high = (5 - 5 * reach, 5 + 5 * reach) if name == "Sharpness" else (0, 10 * reach)
        if reach:
            assert stats.kstest(magnitudes, stats.uniform(low, high - low).cdf).pvalue > P_VALUE
        else:
            np.testing.assert_array_equal(magnitudes, low)


def test_broad_color_of_no_strength_is_the_image(photo):
    made = streamed(functools.partial(policies.broad_color, strength=0.0), floats(photo), 60)
    np.testing.assert_allclose(made, np.broadcast_to(photo / 255, made.shape), atol=1e-6)
    between = tf.clip_by_value(floats(photo) + 0.4 / 255, 0.0, 1.0)  # off the 256 levels
    made = streamed(functools.partial(policies.broad_color, strength=0.0), between, 60)
    np.testing.assert_allclose(made, np.broadcast_to(between, made.shape), atol=0.5 / 255)


def test_sobel_of_a_flat_image_is_zero():
    made = policies.sobel(tf.fill([12, 20, 3], 0.7))
    assert made.dtype == tf.float32
    np.testing.assert_allclose(made, np.zeros([12, 20, 3]), atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_sobel_peaks_at_an_edge_of_its_channel(axis):
    image = np.zeros([12, 20, 3], np.float32)
    np.moveaxis(image, axis, 0)[7:, :, 1] = 1.0
    made = np.moveaxis(policies.sobel(tf.constant(image)).numpy(), axis, 0)
    np.testing.assert_allclose(made[6:8, :, 1], 4 / 20**0.5, atol=1e-6)
    assert made[[*range(6), *range(8, len(made))]].max() < 1e-6 and made[..., [0, 2]].max() < 1e-6


def test_the_largest_sobel_is_one():
    patches = np.array(list(itertools.product([0, 1], repeat=9)), np.float32).reshape(512, 3, 3)
    images = tf.constant(np.stack([patches] * 3, -1))  # the extremes are at the corners of the cube
    largest = max(float(policies.sobel(image)[1, 1].numpy().max()) for image in images)
    assert largest == pytest.approx(1.0, abs=1e-6) and largest <= 1.0
