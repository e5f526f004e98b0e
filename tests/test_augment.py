"""The views: the operators are the release's, a view is a function of its seed, and its distribution is the paper's."""

import functools
import itertools
from collections import Counter

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage, stats
from sklearn.datasets import load_sample_image

import augment
from augment import operators

NEUTRAL = dict(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0)
OPERATORS = list(NEUTRAL)
LOW = np.array([0.2, 0.2, 0.2, -0.2], np.float32)  # of the jitter's factors at strength 1
HIGH = np.array([1.8, 1.8, 1.8, 0.2], np.float32)
PLAIN = dict(flip=False, jitter=0.0, gray=0.0, blur=False)  # a view that is a crop and nothing else
P_VALUE = 1e-3  # under this, two samples do not come from one distribution


@pytest.fixture(scope="module")
def recorded(golden):
    return dict(np.load(golden / "augment.npz"))


@pytest.fixture(scope="module")
def photo():
    """[107, 160, 3] uint8."""
    return load_sample_image("china.jpg")[::4, ::4]


def ramp(height=150, width=200):
    """[height, width, 3] float32 that says where each pixel was: y, x in [0, 1]."""
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return np.stack([y, x, np.zeros_like(x)], axis=-1).astype(np.float32)


def seeds(count, start=0):
    return tf.data.Dataset.range(start, start + count).map(lambda i: tf.stack([tf.cast(i, tf.int32), 7]))


def views(view, image, count):
    """[count, ...] views of `image`, each with another seed."""
    begun = seeds(count).map(lambda seed: view.begin(image, seed), num_parallel_calls=2)
    made = begun.batch(50).map(view.finish)
    return np.concatenate(list(made.as_numpy_iterator()))


def extents(crops):
    """Signed height and width, in shares of the image, of crops [n, s, s, 3] of a ramp; mirrored ones are negative."""
    size = crops.shape[1]
    low, high = size // 4, size - 1 - size // 4  # off the border, where bicubic resizing of a ramp is exact
    heights = crops[:, high, size // 2, 0] - crops[:, low, size // 2, 0]
    widths = crops[:, size // 2, high, 1] - crops[:, size // 2, low, 1]
    return heights * size / (high - low), widths * size / (high - low)


def same_distribution(ours, theirs):
    return stats.ks_2samp(ours, theirs).pvalue > P_VALUE


@pytest.mark.parametrize(
    ("key", "factors", "order"),
    [
        ("contrast_0.4", dict(contrast=0.4), "bcsh"),
        ("contrast_1.7", dict(contrast=1.7), "hscb"),
        ("saturation_0.3", dict(saturation=0.3), "bcsh"),
        ("saturation_1.8", dict(saturation=1.8), "sbch"),
        ("hue_0.15", dict(hue=0.15), "bcsh"),
        ("hue_-0.2", dict(hue=-0.2), "hbcs"),
        ("order_b1.3_s1.4_c0.6_h-0.1", dict(brightness=1.3, saturation=1.4, contrast=0.6, hue=-0.1), "bsch"),
    ],
)
def test_colors_change_as_the_releases_operators_in_the_drawn_order(recorded, key, factors, order):
    wanted = tf.constant([[{**NEUTRAL, **factors}[name] for name in OPERATORS]])
    places = tf.constant([[order.index(letter) for letter in "bcsh"]])
    image = tf.image.convert_image_dtype(recorded["photo_0"], tf.float32)
    ours = operators.change_colors(image[None], wanted, places)[0]
    np.testing.assert_allclose(ours, recorded[key], atol=2e-5)


def tf_image_colors(image, factors, places):
    """The four changes by tf.image's own operators."""
    changes = [
        lambda x: x * factors[0],
        lambda x: tf.image.adjust_contrast(x, factors[1]),
        lambda x: tf.image.adjust_saturation(x, factors[2]),
        lambda x: tf.image.adjust_hue(x, factors[3]),
    ]
    for which in np.argsort(places):
        image = tf.clip_by_value(changes[which](image), 0.0, 1.0)
    return image


@pytest.mark.parametrize("compiled", [False, True], ids=["operators", "XLA"])
def test_each_image_of_a_batch_gets_its_own_changes_in_its_own_order(compiled):
    random = np.random.default_rng(0)
    orders = np.array(list(itertools.permutations(range(4))), np.int32)  # [24, 4]
    images = random.uniform(-0.2, 1.2, [24, 9, 7, 3]).astype(np.float32)  # Bicubic values may leave [0, 1].
    images[0], images[1], images[2, ..., 1:], images[3, ..., :2] = 0.0, 0.3, 0.0, 1.0  # black, grey, red, yellow
    factors = random.uniform([0, 0, 0, -0.4], [2.5, 2.5, 2.5, 0.4], [24, 4]).astype(np.float32)
    change = tf.function(operators.change_colors, jit_compile=compiled, autograph=False)
    ours = change(tf.constant(images), tf.constant(factors), tf.constant(orders)).numpy()
    theirs = [tf_image_colors(*each) for each in zip(images, factors, orders, strict=True)]
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
    ("drawn", "strength", "factor"), [(0, 0.5, 0.6), (1, 0.5, 1.4), (0, 1, 0.2), (1, 1, 1.8), (0, 2, 0)]
)
def test_brightness_reaches_as_far_as_the_strength_says(drawn, strength, factor):
    grey = tf.fill([1, 4, 4, 3], 0.25)  # on which the other operators have no effect
    made = operators.color_jitter(strength).apply(grey, tf.fill([1, 8], float(drawn)))
    np.testing.assert_allclose(made, np.full([1, 4, 4, 3], 0.25 * factor), atol=1e-5)


def test_the_jitter_takes_its_operators_in_every_order_alike(monkeypatch):
    drawn = []
    monkeypatch.setattr(operators, "change_colors", lambda images, factors, places: drawn.append(places))
    u = tf.random.stateless_uniform([4800, 8], [0, 1])
    operators.color_jitter(1.0).apply(tf.zeros([4800, 1, 1, 3]), u)
    orders = Counter(map(tuple, drawn[0].numpy()))
    assert set(orders) == set(itertools.permutations(range(4)))
    assert stats.chisquare(list(orders.values())).pvalue > P_VALUE


def test_brightness_is_the_releases(recorded):
    image = tf.image.convert_image_dtype(recorded["photo_0"], tf.float32)
    ours = operators.change_colors(image[None], tf.constant([[1.5, 1.0, 1.0, 0.0]]), tf.range(4)[None])[0]
    np.testing.assert_allclose(ours, recorded["brightness_1.5"], atol=1e-6)


def test_grayscale_is_the_releases(recorded):
    image = tf.image.convert_image_dtype(recorded["photo_0"], tf.float32)
    ours = operators.grayscale().apply(image[None], tf.zeros([1, 0]))[0]
    np.testing.assert_allclose(ours, recorded["grayscale"], atol=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_the_releases(recorded, sigma):
    image = tf.image.convert_image_dtype(recorded["photo_0"], tf.float32)
    ours = operators.gaussian_blur(image[None], kernel_size=12, sigma=tf.constant([sigma]))[0]
    np.testing.assert_allclose(ours, recorded[f"blur_k12_sigma{sigma}"], atol=1e-5)


@pytest.mark.parametrize("size", [20, 32, 50, 70])
def test_blur_equals_a_convolution_with_zeros_beyond_the_border(size):
    images = tf.constant(np.random.default_rng(size).uniform(size=[2, size, size, 3]), tf.float32)
    sigmas = np.array([0.4, 1.7], np.float32)
    ours = operators.gaussian_blur(images, size // 10, tf.constant(sigmas)).numpy()
    radius = size // 20
    for image, sigma, blurred in zip(images.numpy(), sigmas, ours, strict=True):
        bell = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
        for axis in (0, 1):
            image = ndimage.convolve1d(image, bell / bell.sum(), axis, mode="constant")
        np.testing.assert_allclose(blurred, image, atol=1e-5)


def test_center_crop_is_the_releases(recorded):
    np.testing.assert_allclose(augment.center_crop(recorded["photo_0"], 96), recorded["eval_preprocess_96"], atol=1e-5)


def test_center_crop_takes_the_middle_of_the_shorter_side():
    crop = augment.center_crop(ramp(100, 200), 64)[None].numpy()
    height, width = extents(crop)
    assert height[0] == pytest.approx(0.875, abs=0.01)
    assert width[0] == pytest.approx(0.875 / 2, abs=0.01)
    assert crop[0, ..., :2].mean(axis=(0, 1)) == pytest.approx([0.5, 0.5], abs=0.01)


def test_center_crop_takes_the_whole_of_a_small_image():
    height, width = extents(augment.center_crop(ramp(40, 60), 32)[None].numpy())
    assert (height[0], width[0]) == pytest.approx((1.0, 1.0), abs=0.01)


@pytest.mark.parametrize("make", [augment.pretrain_view, augment.crop_and_flip])
def test_a_view_is_a_function_of_its_seed(photo, make):
    view = make(32)
    first = view(photo, tf.constant([3, 4]))
    np.testing.assert_array_equal(first, view(photo, tf.constant([3, 4])))
    for other in ([3, 5], [4, 4]):
        assert np.abs(first - view(photo, tf.constant(other))).max() > 0.01


@pytest.mark.parametrize("make", [augment.pretrain_view, augment.crop_and_flip])
def test_eager_views_equal_those_of_a_parallel_stream(photo, make):
    view = make(40)
    streamed = views(view, photo, 12)
    eager = np.stack([view(tf.constant(photo), seed) for seed in seeds(12)])
    np.testing.assert_allclose(streamed, eager, atol=1e-5)


@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("make", [augment.pretrain_view, augment.crop_and_flip])
def test_views_of_bytes_and_of_floats_are_the_same_and_within_the_unit_range(photo, make, size):
    bytes_in = views(make(size), photo, 24)
    floats_in = views(make(size), (photo / 255).astype(np.float32), 24)
    assert bytes_in.shape == (24, size, size, 3)
    assert bytes_in.dtype == floats_in.dtype == np.float32
    assert bytes_in.min() >= 0 and bytes_in.max() <= 1
    np.testing.assert_allclose(bytes_in, floats_in, atol=1e-5)


def test_strong_jitter_stays_within_the_unit_range(photo):
    made = views(augment.pretrain_view(32, jitter=2.0), photo, 64)
    assert np.isfinite(made).all() and made.min() >= 0 and made.max() <= 1


@pytest.mark.parametrize(("min_area", "max_aspect"), [(0.08, 4 / 3), (0.3, 1.6), (1.0, 4 / 3)])
def test_crops_keep_within_their_areas_and_aspects(min_area, max_aspect):
    image = ramp(300, 400)
    made = views(augment.pretrain_view(32, min_area, max_aspect, **PLAIN), image, 300)
    heights, widths = extents(made)
    areas, aspects = heights * widths, widths * 400 / (heights * 300)
    whole = areas > 0.99  # what is left when nothing else fits: at min_area 1, the whole image
    assert areas.min() >= max(min_area, 0.1) - 0.01  # a crop of less than a tenth is drawn again
    assert areas.max() <= 1.01
    assert (aspects[~whole] <= max_aspect + 0.03).all() and (aspects[~whole] >= 1 / max_aspect - 0.03).all()
    if min_area < 1:
        assert areas.min() < min_area + 0.1 and areas.max() > 0.85  # the whole range is drawn from
        assert aspects.max() > 0.9 * max_aspect and aspects.min() < 1.1 / max_aspect
        assert whole.mean() < 0.1


def test_half_of_the_views_are_mirrored():
    options = {**PLAIN, "flip": True}
    for view in (augment.pretrain_view(32, **options), augment.crop_and_flip(32)):
        _, widths = extents(views(view, ramp(), 400))
        assert stats.binomtest(int((widths < 0).sum()), 400, 0.5).pvalue > P_VALUE


def test_views_without_flip_are_never_mirrored():
    for view in (augment.pretrain_view(32, **PLAIN), augment.crop_and_flip(32, flip=False)):
        _, widths = extents(views(view, ramp(), 200))
        assert (widths > 0).all()


COLOUR = np.array([0.7, 0.4, 0.2], np.float32)


@pytest.mark.parametrize(
    ("option", "share", "changed"),
    [
        (dict(jitter=1.0), 0.8, lambda made: np.abs(made[:, 16, 16] - COLOUR).max(-1) > 1e-3),
        (dict(gray=0.2), 0.2, lambda made: np.ptp(made[:, 16, 16], axis=-1) < 1e-5),
        (dict(gray=1.0), 1.0, lambda made: np.ptp(made[:, 16, 16], axis=-1) < 1e-5),
        (dict(blur=True), 0.5, lambda made: np.abs(made[:, 0, 0] - COLOUR).max(-1) > 1e-6),
        ({}, 0.0, lambda made: np.abs(made - COLOUR).max((1, 2, 3)) > 1e-5),
    ],
    ids=["jitter", "some grey", "all grey", "blur", "none"],
)
def test_each_piece_changes_its_share_of_the_views_and_none_when_left_out(option, share, changed):
    flat = np.broadcast_to(COLOUR, (40, 40, 3))
    count = int(changed(views(augment.pretrain_view(32, **{**PLAIN, **option}), flat, 400)).sum())
    assert count == 400 * share if share in (0.0, 1.0) else stats.binomtest(count, 400, share).pvalue > P_VALUE


def test_small_views_are_not_blurred():
    flat = np.ones((40, 40, 3), np.float32)
    assert (views(augment.pretrain_view(16, **{**PLAIN, "blur": True}), flat, 50) > 1 - 1e-6).all()


def test_blur_draws_a_sigma_for_each_image():
    white = tf.ones([300, 120, 120, 3])
    grid = np.linspace(0.1, 2.0, 100, dtype=np.float32)
    darkness = 1 - operators.gaussian_blur(white[:100], 12, tf.constant(grid))[:, 0, 60, 0].numpy()  # rises with sigma
    made = operators.random_blur().apply(white, tf.random.stateless_uniform([300, 1], [0, 1])).numpy()
    drawn = np.interp(1 - made[:, 0, 60, 0], darkness, grid)
    seen = drawn[drawn > 0.3]  # a smaller sigma leaves no trace in float32
    assert len(np.unique(seen.round(4))) > 0.95 * len(seen)
    assert stats.kstest(seen, stats.uniform(0.3, 1.7).cdf).pvalue > P_VALUE
    assert stats.binomtest(len(seen), 300, 1.7 / 1.9).pvalue > P_VALUE


def test_an_operator_for_some_images_changes_these_and_no_others():
    images = tf.random.stateless_uniform([40, 20, 20, 3], [0, 1])
    u = tf.random.stateless_uniform([40, 2], [2, 3])
    made = operators.sometimes(0.5, operators.random_blur()).apply(images, u)
    changed = np.abs(made - images).max((1, 2, 3)) > 1e-6
    np.testing.assert_array_equal(changed, (u[:, 0] < 0.5) & (u[:, 1] > 0.02))


def test_an_image_alone_takes_its_branch_only_and_a_batch_takes_all_of_them():
    taken = []

    def branch(number, batch):
        taken.append(number)
        return tf.fill([batch, 2], number), tf.fill([batch, 1, 1], 10 * number)

    def chosen(choice):
        branches = [functools.partial(branch, number, len(choice)) for number in range(3)]
        return [made.numpy().ravel().tolist() for made in operators.one_of(tf.constant(choice), branches)]

    assert chosen([1]) == [[1, 1], [10]] and taken == [1]
    taken.clear()
    assert chosen([2, 0, 1]) == [[2, 2, 0, 0, 1, 1], [20, 0, 10]] and taken == [0, 1, 2]


def test_each_image_gets_a_transform_by_a_seed_of_its_own():
    def transform(image, seed):
        return image + tf.cast(seed[0], tf.float32) + 2.0**-20 * tf.cast(seed[1], tf.float32)

    u = tf.constant([[0.1, 3 * 2.0**-23, 8 * 2.0**-23], [0.6, 0.5, 0.5], [0.4, 0.25, 0.0]])
    made = operators.each(transform, "add", 0.5).apply(tf.zeros([3, 1, 1, 3]), u).numpy()[:, 0, 0, 0]
    np.testing.assert_allclose(made, [3 + 8 * 2.0**-20, 0.0, 2.0**21])


@pytest.mark.parametrize("make", [augment.pretrain_view, augment.crop_and_flip])
def test_compiled_views_equal_those_that_are_not(photo, make):
    view = make(40)
    crops, draws = (tf.stack(each) for each in zip(*(view.begin(photo, seed) for seed in seeds(6)), strict=True))
    np.testing.assert_allclose(view.finish(crops, draws, compiled=True), view.finish(crops, draws), atol=1e-5)


def plain_blur(image):
    """Gaussian blur as a depthwise convolution with a two-dimensional kernel."""
    x = tf.range(-1.0, 2.0)  # radius of a tenth of 32 pixels, halved
    bell = tf.exp(-(x**2) / (2 * tf.random.uniform([], 0.1, 2.0) ** 2))
    kernel = bell[:, None] * bell[None, :]
    kernel = tf.tile((kernel / tf.reduce_sum(kernel))[..., None, None], [1, 1, 3, 1])
    return tf.nn.depthwise_conv2d(image[None], kernel, [1, 1, 1, 1], "SAME")[0]


def plain_view(image, colour=True):
    """The paper's view (appendix A) with tf.image's stateful operators, at 32 pixels."""
    begin, extent, _ = tf.image.sample_distorted_bounding_box(
        tf.shape(image), tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), min_object_covered=0.1,
        aspect_ratio_range=(3 / 4, 4 / 3), area_range=(0.08, 1.0), max_attempts=100,
    )  # fmt: skip
    image = tf.image.resize(tf.slice(image, begin, extent), [32, 32], "bicubic")
    image = tf.image.random_flip_left_right(image)
    if not colour:
        return image
    operators = [
        lambda x: x * tf.random.uniform([], 0.2, 1.8),
        lambda x: tf.image.random_contrast(x, 0.2, 1.8),
        lambda x: tf.image.random_saturation(x, 0.2, 1.8),
        lambda x: tf.image.random_hue(x, 0.2),
    ]
    if tf.random.uniform([]) < 0.8:
        order = tf.random.shuffle(tf.range(4))
        for i in range(4):
            for which, operator in enumerate(operators):
                if order[i] == which:
                    image = operator(image)
            image = tf.clip_by_value(image, 0.0, 1.0)
    if tf.random.uniform([]) < 0.2:
        image = tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image))
    image = tf.clip_by_value(image, 0.0, 1.0)
    if tf.random.uniform([]) < 0.5:
        image = plain_blur(image)
    return tf.clip_by_value(image, 0.0, 1.0)


def plain_views(image, count, colour=True):
    tf.random.set_seed(1)
    made = tf.data.Dataset.range(count).map(lambda _: plain_view(tf.constant(image), colour))
    return np.stack(list(made.as_numpy_iterator()))


def test_crop_sizes_and_places_are_distributed_as_those_of_the_stateful_sampler():
    image = ramp()
    ours = views(augment.pretrain_view(32, **{**PLAIN, "flip": True}), image, 1000)
    theirs = plain_views(image, 1000, colour=False)
    (our_heights, our_widths), (heights, widths) = extents(ours), extents(theirs)
    assert same_distribution(our_heights, heights)
    assert same_distribution(our_widths, widths)
    assert same_distribution(our_heights * np.abs(our_widths), heights * np.abs(widths))
    assert same_distribution(ours[..., 0].mean((1, 2)), theirs[..., 0].mean((1, 2)))  # where the crops lie
    assert same_distribution(ours[..., 1].mean((1, 2)), theirs[..., 1].mean((1, 2)))


def test_whole_views_are_distributed_as_those_of_the_stateful_pipeline(photo):
    image = (photo / 255).astype(np.float32)
    ours, theirs = views(augment.pretrain_view(32), image, 1000), plain_views(image, 1000)
    statistics = {
        "mean": lambda x: x.mean((1, 2, 3)),
        "std": lambda x: x.std((1, 2, 3)),
        "red": lambda x: x[..., 0].mean((1, 2)),
        "green": lambda x: x[..., 1].mean((1, 2)),
        "blue": lambda x: x[..., 2].mean((1, 2)),
        "colourfulness": lambda x: np.ptp(x, axis=-1).mean((1, 2)),
        "contrast": lambda x: x.mean(-1).std((1, 2)),
        "detail": lambda x: np.abs(np.diff(x, axis=1)).mean((1, 2, 3)),
        "border": lambda x: x[:, 0].mean((1, 2)),
    }
    unlike = [name for name, of in statistics.items() if not same_distribution(of(ours), of(theirs))]
    assert not unlike


def test_the_distribution_test_sees_a_weaker_jitter(photo):
    image = (photo / 255).astype(np.float32)
    weaker = views(augment.pretrain_view(32, jitter=0.5), image, 1000)
    assert not same_distribution(weaker.mean((1, 2, 3)), plain_views(image, 1000).mean((1, 2, 3)))


def on_canvases(view, images, side):
    """The views of images on canvases, with the random numbers that `views_of_each` uses."""
    drawn = [view.begin_on_canvas(tf.shape(image), tf.constant([i, 7])) for i, image in enumerate(images)]
    boxes, draws = (tf.stack(each) for each in zip(*drawn, strict=True))
    return view.of_canvas(tf.stack([augment.on_canvas(image, side) for image in images]), boxes, draws).numpy()


def views_of_each(view, images):
    return np.stack([view(tf.constant(image), tf.constant([i, 7])) for i, image in enumerate(images)])


@pytest.mark.parametrize("make", [augment.pretrain_view, augment.crop_and_flip])
def test_views_of_images_on_canvases_are_those_of_the_images(photo, make):
    images = [photo, photo[:64, :64], photo[:30, :90], photo[5:6, :40], photo[:, ::2], np.full_like(photo, 255)]
    view = make(40)
    np.testing.assert_allclose(on_canvases(view, images, 160), views_of_each(view, images), atol=2e-5)


def test_an_image_that_is_longer_than_the_canvas_is_shrunk_to_it(photo):
    image = tf.constant(photo[:100])  # [100, 160, 3]
    small = augment.shrink(image, 80)
    assert small.shape == (50, 80, 3) and small.dtype == tf.uint8
    blocks = photo[:100].reshape(50, 2, 80, 2, 3).mean((1, 3))
    np.testing.assert_allclose(small, blocks, atol=0.51)
    np.testing.assert_array_equal(augment.shrink(image, 160), image)
    assert augment.shrink(tf.constant(photo[:1]), 16).shape == (1, 16, 3)


def test_a_canvas_for_224_pixels_is_that_of_most_photographs():
    assert augment.canvas_side(224) == 512
    assert [augment.canvas_side(size) % 16 for size in (8, 32, 96, 300)] == [0, 0, 0, 0]


def test_a_view_reads_in_one_line():
    crop = "random_crop(size=32, min_area=0.08, max_aspect=1.33)"
    assert str(augment.crop_and_flip(32)) == f"{crop} | random_flip | clip"
    assert str(augment.crop_and_flip(32, flip=False)) == f"{crop} | clip"
    colours = "color_jitter(strength=0.5) for 80% | grayscale for 20% | clip | random_blur for 50%"
    assert str(augment.pretrain_view(32, jitter=0.5)) == f"{crop} | random_flip | {colours}"
