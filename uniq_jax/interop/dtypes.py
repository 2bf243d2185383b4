"""The element types that NumPy and PyTorch share."""

import jax.numpy as jnp
import numpy as np

# By name, which is the same in both.
DTYPES: dict[str, np.dtype] = {
    np.dtype(dtype).name: np.dtype(dtype)
    for dtype in (
        *(np.float64, np.float32, np.float16, jnp.bfloat16),
        *(jnp.float8_e4m3fn, jnp.float8_e4m3fnuz, jnp.float8_e5m2, jnp.float8_e5m2fnuz),
        jnp.float8_e8m0fnu,
        *(np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8),
        *(np.bool_, np.complex128, np.complex64),
    )
}
