"""What an experiment refuses with the key of its config, and which images it recalibrates on."""

import jax
import numpy as np
import pytest

from mpq_jax.configs import digits
from mpq_jax.training import experiment


def config_of(**changes):
    config = digits.get_config()
    config.device_count = 1
    config.model.options.unlock()
    config.update_from_flattened_dict({key.replace("__", "."): x for key, x in changes.items()})
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__augment__crop_padding": 8}, r"crop_padding is 8, and digits has images of 8 pix"),
        ({"bits__candidates": ()}, r"config.bits: bits are \(\); wanted one or more"),
        (
            {"bits__rules": ({"patern": "head", "weights": 8},)},
            r"config.bits.rules: a rule has \['patern'\]; wanted a dict of some of \['pattern', ",
        ),
        ({"bits__rules": ("head",)}, "config.bits.rules: a rule has 'head'; wanted a dict"),
        ({"bits__rules": ({"pattern": 3},)}, "config.bits.rules: .*3 is not a regular expression"),
        (
            {"bits__rules": ({"float_weights": "no"},)},
            "config.bits.rules: float_weights of a rule is 'no'; wanted True or False",
        ),
        ({"model__options__width": 0}, "'resnet8': width is 0; wanted an integer, 1 or more"),
        ({"model__options__width": -4}, "'resnet8': width is -4; wanted an integer, 1 or more"),
        ({"model__options__stem_stride": 0}, "stem_stride is 0; wanted an integer, 1 or more"),
        ({"model__options__widht": 4}, r"'resnet8' takes no \['widht'\]; it takes .*'width'"),
        (
            {"data__name": "arrays", "data__arrays__path": "no/such.npz"},
            "^config.data.arrays: there is no file 'no/such.npz'",
        ),
        (
            {"data__name": "folder", "data__folder__path": "no/such"},
            "^config.data.folder: 'no/such' is not a folder",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        experiment.build(config_of(**changes))
    assert "\n" not in str(caught.value)


def test_no_image_is_recalibrated_on_twice_but_to_fill_the_last_batch(caplog):
    config = config_of(batch_size=100, data__validation_fraction=0.8)
    dataset = experiment.load_dataset(config)
    assert dataset.sizes["train"] == 287
    (device,) = jax.devices()[:1]
    mesh = experiment.sharding.make_mesh(1)

    def images(count):
        config.search.recalibration_images = count
        read = experiment.recalibration_images(
            config, dataset, mesh, lambda batch, key: batch["image"]
        )
        assert read.devices() == {device}
        return np.asarray(read)

    few = images(200)
    assert few.shape[:2] == (2, 100) and not caplog.records
    every = images(7168)
    assert every.shape[:2] == (3, 100)
    np.testing.assert_array_equal(every[:2], few)
    (record,) = caplog.records
    assert "recalibration_images is 7168 and there are 287 training images" in record.getMessage()
