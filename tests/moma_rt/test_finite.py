import numpy as np
import pytest

from moma_rt.finite import all_finite


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("strided", [False, True])
def test_every_special_value_is_found_wherever_it_is(dtype, strided):
    array = np.random.default_rng(0).standard_normal((3, 63, 14)).astype(dtype)
    array[0, 0, 0], array[1, 1, 1], array[2, 2, 2] = np.finfo(dtype).max, np.finfo(dtype).min, -0.0
    array = array[:, :, ::2] if strided else array
    assert all_finite(array)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for place in ((0, 0, 0), (1, 31, 3), (2, 62, 6)):
            bad = array.copy() if not strided else np.repeat(array, 2, axis=2)[:, :, ::2]
            bad[place] = value
            assert not all_finite(bad), (value, place)


def test_all_half_precision_numbers():
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = bits.view(np.float16)
    found = [all_finite(numbers[i : i + 1]) for i in range(len(numbers))]
    np.testing.assert_array_equal(found, np.isfinite(numbers))


def test_integers_and_empty_arrays_are_finite():
    assert all_finite(np.array([255], np.uint8))
    assert all_finite(np.array([True]))
    assert all_finite(np.zeros((0, 4), np.float16))
    assert all_finite(np.float32(1.0)[None][0:0])
    assert all_finite(np.array(1.0, np.float16))
    assert not all_finite(np.array(np.nan, np.float16))
