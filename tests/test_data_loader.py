"""Properties of the iterators: permutations, reseeding, exact resume, processes, padding."""

import itertools
import json
import re

import numpy as np
import pytest

from uniq_jax import data
from uniq_jax.data import augment


def make_data(count=23, channels=3, name="numbered"):
    """Random images whose labels are their indices."""
    images = np.random.default_rng(0).integers(1, 256, (count, 6, 5, channels), np.uint8)
    names = tuple(str(i) for i in range(count))
    return data.ImageData(images, np.arange(count, dtype=np.int32), names, name, "train")


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def labels_of(batches):
    return np.concatenate([batch["label"] for batch in batches]).tolist()


@pytest.mark.parametrize("prefetch", [0, 1, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 23])
def test_each_epoch_is_a_new_permutation(batch_size, prefetch):
    split = make_data()
    with data.train_iterator(split, batch_size=batch_size, seed=3, prefetch=prefetch) as batches:
        assert batches.steps_per_epoch == 23 // batch_size
        epochs = [labels_of(take(batches, batches.steps_per_epoch)) for _ in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 23 // batch_size * batch_size
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert sorted(epochs[0]) != epochs[0]
    if batch_size == 4:  # three are left over, not the same ones each time
        assert len({frozenset(epoch) for epoch in epochs}) > 1


def test_batches_hold_the_images_of_their_labels():
    split = make_data()
    with data.train_iterator(split, batch_size=4, seed=0) as batches:
        for batch in take(batches, 10):
            assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
            assert batch["image"].shape == (4, 6, 5, 3)
            np.testing.assert_array_equal(batch["image"], split.images[batch["label"]])


def test_every_position_is_equally_likely():
    split = make_data(5)
    counts = np.zeros((5, 5))
    with data.train_iterator(split, batch_size=5, seed=0) as batches:
        for batch in take(batches, 2000):
            counts[np.arange(5), batch["label"]] += 1
    # Chi-square of 16 degrees of freedom: 45 has a probability of 1e-4.
    assert ((counts - 400) ** 2 / 400).sum() < 45


@pytest.mark.parametrize("name", data.AUGMENTATIONS)
def test_seed_decides_everything(name):
    split = make_data()

    def run(seed, prefetch):
        with data.train_iterator(
            split, batch_size=4, seed=seed, augment=name, pad=2, prefetch=prefetch
        ) as batches:
            return take(batches, 12)

    assert_equal(run(0, prefetch=0), run(0, prefetch=8))
    assert labels_of(run(0, prefetch=0)) != labels_of(run(1, prefetch=0))


def test_augmentation_differs_between_epochs():
    split = make_data(4)
    with data.train_iterator(split, batch_size=4, seed=0, augment="crop_flip", pad=2) as batches:
        views = [batch["image"][np.argsort(batch["label"])] for batch in take(batches, 6)]
    assert len({view.tobytes() for view in views}) == 6


@pytest.mark.parametrize("prefetch", [0, 8])
@pytest.mark.parametrize("steps", [0, 1, 5, 13])
def test_resume_is_bit_exact(steps, prefetch):
    arguments = {"batch_size": 4, "seed": 1, "augment": "crop_flip", "pad": 2, "prefetch": prefetch}
    with data.train_iterator(make_data(), **arguments) as batches:
        before = take(batches, steps)
        state = json.loads(json.dumps(batches.get_state()))
        after = take(batches, 12)
        batches.set_state(state)
        assert_equal(take(batches, 12), after)
        assert before == [] or labels_of(before) != labels_of(after)
    with data.train_iterator(make_data(), **arguments) as fresh:
        take(fresh, 2)
        fresh.set_state(state)
        assert fresh.get_state() == state
        assert_equal(take(fresh, 12), after)


def test_state_of_other_settings_is_refused():
    arguments = {"batch_size": 4, "seed": 1, "augment": "crop", "pad": 2}
    with data.train_iterator(make_data(), **arguments) as batches:
        state = batches.get_state()
    for change in ({"batch_size": 2}, {"seed": 2}, {"augment": "flip"}, {"pad": 1}):
        with data.train_iterator(make_data(), **{**arguments, **change}) as batches:
            (key,) = change
            with pytest.raises(ValueError, match=f"'{key}': .* must equal .*'{key}': "):
                batches.set_state(state)


def test_closed_iterator_gives_nothing():
    batches = data.train_iterator(make_data(), batch_size=4, seed=0)
    next(batches)
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_processes_partition_the_global_batch(process_count):
    arguments = {"batch_size": 6, "seed": 5, "augment": "crop_flip", "pad": 2}

    def run(**processes):
        with data.train_iterator(make_data(), **arguments, **processes) as batches:
            return take(batches, 9)

    parts = [run(process_index=i, process_count=process_count) for i in range(process_count)]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts)
    ]
    assert_equal(joined, run())
    assert parts[0][0]["label"].shape == (6 // process_count,)


@pytest.mark.parametrize("process_count", [1, 2])
@pytest.mark.parametrize(("count", "batch_size"), [(23, 4), (24, 4), (5, 4), (3, 8), (1, 2)])
def test_eval_gives_every_example_once(count, batch_size, process_count):
    split = make_data(count)
    processes = [
        list(data.eval_batches(split, batch_size=batch_size, process_index=i,
                               process_count=process_count))
        for i in range(process_count)
    ]  # fmt: skip
    assert {len(batches) for batches in processes} == {-(-count // batch_size)}
    steps = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*processes)
    ]
    for step in steps:
        mask = step["mask"]
        assert mask.dtype == bool
        assert step["image"].shape == (batch_size, 6, 5, 3)
        assert (step["image"].dtype, step["label"].dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(step["image"][mask], split.images[step["label"][mask]])
        assert not step["image"][~mask].any()
        assert not step["label"][~mask].any()
    seen = np.concatenate([step["label"][step["mask"]] for step in steps])
    np.testing.assert_array_equal(seen, np.arange(count))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1 and divisible .*, got 0"),
        ({"batch_size": 6, "process_count": 4}, "divisible by process_count=4, got 6"),
        ({"process_index": 2, "process_count": 2}, "process_index=2, process_count=2"),
        ({"process_index": -1}, "process_index must be in 0"),
        ({"process_count": 0}, "process_count=0"),
    ],
)
@pytest.mark.parametrize("make", ["train", "eval"])
def test_wrong_batches(make, change, message):
    arguments = {"batch_size": 4, **change}
    if make == "train":
        arguments["seed"] = 0
    function = data.train_iterator if make == "train" else data.eval_batches
    with pytest.raises(ValueError, match=message):  # at the call, not at the first batch
        function(make_data(), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 24}, "batch_size must be at most the 23 examples of 'numbered', .*got 24"),
        ({"augment": "cutout"}, re.escape(f"one of {data.AUGMENTATIONS}, got 'cutout'")),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"pad": -2}, "pad must be 0 or more, got -2"),
        ({"prefetch": -1}, "prefetch must be 0 or more, got -1"),
    ],
)
def test_wrong_train_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        data.train_iterator(make_data(), **{"batch_size": 4, "seed": 0, **change})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pad", [0, 1, 4])
def test_crop_and_flip_equal_a_loop(pad, channels):
    images = make_data(40, channels).images
    rng = np.random.default_rng(7)
    corners, flips = augment.draw_crops(rng, 40, pad), augment.draw_flips(rng, 40)
    expected_crops, expected_flips = [], []
    for image, (y, x), mirror in zip(images, corners, flips):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        expected_crops.append(padded[y : y + 6, x : x + 5])
        expected_flips.append(image[:, ::-1] if mirror else image)
    before = images.copy()
    crops, mirrored = augment.crop(images, corners, pad), augment.flip(images, flips)
    np.testing.assert_array_equal(crops, expected_crops)
    np.testing.assert_array_equal(mirrored, expected_flips)
    np.testing.assert_array_equal(images, before)
    assert crops.dtype == mirrored.dtype == np.uint8
    assert crops.flags.c_contiguous
    assert mirrored.flags.c_contiguous


def test_draws_are_uniform():
    rng = np.random.default_rng(0)
    corners = augment.draw_crops(rng, 9000, 1)
    counts = np.zeros((3, 3))
    np.add.at(counts, tuple(corners.T), 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 32  # 8 degrees of freedom: 1e-4
    assert abs(augment.draw_flips(rng, 10000).mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("name", "cropped", "flipped"),
    [("none", 0, 0), ("crop", 1, 0), ("flip", 0, 1), ("crop_flip", 1, 1)],
)
def test_augment_names_mean_what_they_say(name, cropped, flipped):
    """From the pixels alone: every view is one crop of the padded image, perhaps mirrored."""
    split, pad = make_data(8), 2
    crops, mirrors = set(), set()
    with data.train_iterator(split, batch_size=8, seed=0, augment=name, pad=pad) as batches:
        for batch in take(batches, 30):
            for view, label in zip(batch["image"], batch["label"]):
                padded = np.pad(split.images[label], ((pad, pad), (pad, pad), (0, 0)))
                found = [
                    (y, x, mirror)
                    for y in range(2 * pad + 1)
                    for x in range(2 * pad + 1)
                    for mirror in (False, True)
                    if np.array_equal(view[:, ::-1] if mirror else view, padded[y:y+6, x:x+5])
                ]  # fmt: skip
                assert len(found) == 1
                crops.add(found[0][:2])
                mirrors.add(found[0][2])
    assert len(crops) == (25 if cropped else 1)
    assert len(mirrors) == (2 if flipped else 1)
