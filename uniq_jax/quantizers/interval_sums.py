"""The gradients of the generalized straight-through estimator, in few passes over the array.

Written naively this is one masked reduction for every threshold and sum, each of which reads the
whole array again. On CPU the input's gradient is one pass, and all sums are a second one, in chunks
that fit the cache and whose sums are kept elementwise until the end. On accelerators XLA fuses the
masks into the reductions; how many of these it fuses into one pass depends on how they are written
(`benchmarks/accelerators/compare.py` counts the bytes).
"""

import functools
import math

import jax
import jax.numpy as jnp

# Elements of one chunk: some arrays of this size at a time stay in a core's cache.
_CHUNK = 16 * 1024

# So many reductions XLA:TPU fuses into one pass, together with the gradient of u; more of them only
# as one reduction of many operands, which is a pass of its own.
_FUSED_ON_TPU = 8


def interval_gradients(
    x: jax.Array,
    cotangent: jax.Array,
    input_scale: jax.Array,
    edges: jax.Array,
    thresholds: jax.Array,
    slopes: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of the piecewise linear surrogate, before they are combined.

    With u = input_scale · x, segment i is edges[i] < u <= edges[i + 1], i = 0 … n − 1.

    Args:
      x: the input, any shape.
      cotangent: g, of the shape of `x`.
      input_scale: ().
      edges: (n + 1,), increasing.
      thresholds: (n,), where the code steps up.
      slopes: (n,), the surrogate's slope with respect to u in each segment.

    Returns:
      g · slope, zero outside the segments, of the shape of `x`;
      Σ g over each segment (n,); Σ g · (u − edges[i]) over each segment (n,);
      Σ g · code (); Σ g · slope · x ().
    """
    return jax.lax.platform_dependent(
        x,
        cotangent,
        input_scale,
        edges,
        thresholds,
        slopes,
        cpu=_chunked,
        tpu=functools.partial(_whole, most_apart=_FUSED_ON_TPU),
        default=_whole,
    )


def _whole(x, cotangent, input_scale, edges, thresholds, slopes, *, most_apart: int = 0):
    """All sums of the whole array, as one reduction where they are more than `most_apart`."""
    n = slopes.size
    grad_u, terms = _terms(x, cotangent, input_scale, edges, thresholds, slopes)
    if len(terms) <= most_apart:
        sums = [jnp.sum(term) for term in terms]
    else:
        sums = jax.lax.reduce(
            terms,
            tuple(jnp.zeros((), term.dtype) for term in terms),
            lambda totals, more: tuple(map(jnp.add, totals, more)),
            tuple(range(x.ndim)),
        )
    sums = jnp.stack(sums)
    return grad_u, sums[:n], sums[n : 2 * n], sums[-2], sums[-1]


def _chunked(x, cotangent, input_scale, edges, thresholds, slopes):
    n = slopes.size
    # The batch axis stays whole, so that a batch sharded over devices is never gathered.
    batch = x.shape[0] if x.ndim > 1 else 1
    width = max(x.size // max(batch, 1), 1)
    # Columns of fewer elements than these are no longer read as whole lines of the cache.
    chunk = _chunk_width(width, max(_CHUNK // max(batch, 1), 16))
    if x.size == 0 or chunk == width:
        return _whole(x, cotangent, input_scale, edges, thresholds, slopes)
    # Apart from the sums: chunks of it would have to be put together again.
    grad_u, _ = _terms(x, cotangent, input_scale, edges, thresholds, slopes)
    x, cotangent = x.reshape(batch, width), cotangent.reshape(batch, width)

    def body(sums, start):
        x_ = jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)
        cotangent_ = jax.lax.dynamic_slice_in_dim(cotangent, start, chunk, axis=1)
        _, terms = _terms(x_, cotangent_, input_scale, edges, thresholds, slopes)
        return [total + term for total, term in zip(sums, terms)], None

    zeros = [jnp.zeros((batch, chunk), x.dtype)] * (2 * n + 2)
    sums, _ = jax.lax.scan(body, zeros, jnp.arange(0, width, chunk))
    sums = jnp.stack([jnp.sum(total) for total in sums])
    return grad_u, sums[:n], sums[n : 2 * n], sums[-2], sums[-1]


def _terms(x, cotangent, input_scale, edges, thresholds, slopes):
    """The gradient of u, and the summands of the 2n + 2 sums, each of the shape of `x`.

    One array for each sum, not one of n sums: XLA:CPU makes a single loop of these.
    """
    u = input_scale * x
    grads, moments, grad_u, code = [], [], jnp.zeros_like(x), jnp.zeros_like(x)
    above = u > edges[0]
    for i in range(slopes.size):
        above, above_previous = u > edges[i + 1], above
        in_segment = above_previous & ~above
        grads.append(jnp.where(in_segment, cotangent, 0))
        # Outside its segment u may be infinite: choose before multiplying.
        moments.append(jnp.where(in_segment, cotangent * (u - edges[i]), 0))
        grad_u = jnp.where(in_segment, cotangent * slopes[i], grad_u)
        code = code + (u > thresholds[i]).astype(x.dtype)
    inside = (u > edges[0]) & ~above
    return grad_u, (*grads, *moments, cotangent * code, jnp.where(inside, grad_u * x, 0))


def _chunk_width(width: int, target: int) -> int:
    """The largest divisor of `width` up to `target`, or `width` itself if all are much smaller."""
    small = [i for i in range(1, math.isqrt(width) + 1) if width % i == 0]
    divisors = small + [width // i for i in small]
    best = max(d for d in divisors if d <= target) if target < width else width
    return best if 8 * best >= min(target, width) else width
