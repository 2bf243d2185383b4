"""Codes as dense bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from uniq_jax import quantizers as q

settings.register_profile("uniq_jax", derandomize=True, deadline=None, database=None)
settings.load_profile("uniq_jax")


@settings(max_examples=60)
@given(st.data())
def test_unpacking_gives_the_codes_back(data):
    bits = data.draw(st.integers(1, 8))
    shape = data.draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7))
    codes = data.draw(npst.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    packed = q.pack_codes(codes, bits=bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (q.packed_size(codes.size, bits),)
    unpacked = q.unpack_codes(packed, bits=bits, shape=shape)
    assert unpacked.dtype == np.uint8
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_stream_is_little_endian(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, 37)
    number = sum(int(code) << (bits * k) for k, code in enumerate(codes))
    expected = number.to_bytes(q.packed_size(37, bits), "little")
    assert q.pack_codes(codes, bits=bits).tobytes() == expected


@pytest.mark.parametrize(
    ("count", "bits", "size"), [(0, 3, 0), (1, 1, 1), (8, 1, 1), (9, 1, 2), (3, 3, 2), (5, 8, 5)]
)
def test_packed_size(count, bits, size):
    assert q.packed_size(count, bits) == size


def test_a_size_beyond_floating_point():
    count = 2**60 + 1
    assert q.packed_size(count, 8) == count


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64])
def test_any_integer_dtype(dtype):
    codes = np.arange(4, dtype=dtype)
    assert q.pack_codes(codes, bits=2).tolist() == [0b11100100]


def test_codes_of_a_quantizer_pack():
    w = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    codes, scale, offset = q.uniq_weight_encode(w, 0.4, bits=3)
    unpacked = q.unpack_codes(q.pack_codes(codes, bits=3), bits=3, shape=w.shape)
    value = q.decode(q.Encoded(unpacked, scale, offset))
    np.testing.assert_array_equal(value, q.uniq_weight(w, 0.4, bits=3))


def test_errors():
    with pytest.raises(TypeError, match="codes must have an integer dtype, not float64"):
        q.pack_codes(np.zeros(3), bits=2)
    with pytest.raises(ValueError, match=r"codes \(from 0 to 4\) must lie in 0..3, as bits is 2"):
        q.pack_codes(np.array([0, 4]), bits=2)
    with pytest.raises(ValueError, match=r"codes \(from -1 to 1\) must lie in 0..3"):
        q.pack_codes(np.array([-1, 1]), bits=2)
    with pytest.raises(ValueError, match=r"must have shape \(2,\): 5 codes of 3 bits"):
        q.unpack_codes(np.zeros(3, np.uint8), bits=3, shape=(5,))
    with pytest.raises(ValueError, match=r"bits \(=9\) must be an integer from 1 to 8"):
        q.pack_codes(np.array([1]), bits=9)
    with pytest.raises(ValueError, match="bits"):
        q.unpack_codes(np.zeros(1, np.uint8), bits=0, shape=(1,))
    with pytest.raises(ValueError, match="bits"):
        q.packed_size(3, 17)
