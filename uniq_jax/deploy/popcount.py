"""Products of binary operands by AND and population count.

Activations are bits x in {0, 1}, weights ±1 are bits w in {0, 1}, and

    Σ x · (2w − 1) = 2 · popcount(x & w) − popcount(x)

over the taps of one output, 32 channels to a word (Rastegari et al., XNOR-Net, ECCV 2016, count
XNORs of ±1; an activation that is 0 makes an AND of it). A pixel of the padding has no bits, and
adds nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_WORD_BITS = 32


def pack(bits: jax.Array) -> jax.Array:
    """Bits along the last axis as uint32 words, (..., n) to (..., ceil(n / 32)); bit 0 is first."""
    missing = -bits.shape[-1] % _WORD_BITS
    padded = jnp.pad(bits.astype(jnp.uint32), [(0, 0)] * (bits.ndim - 1) + [(0, missing)])
    words = padded.reshape(*bits.shape[:-1], -1, _WORD_BITS)
    return jnp.sum(words << jnp.arange(_WORD_BITS, dtype=jnp.uint32), -1, dtype=jnp.uint32)


def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` of binary operands, int32 (..., outputs).

    Args:
      x: integer, 0 or 1, (..., inputs).
      kernel: integer, ±1, (inputs, outputs).
    """
    words, weights = pack(x), _known(kernel)
    ones = _ones(words)
    return _apart(lambda words, ones: 2 * _common([words], [weights]) - ones, words, ones)


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    dilation: tuple[int, int],
) -> jax.Array:
    """The convolution of binary operands, int32 (batch, height, width, outputs).

    Args:
      x: integer, 0 or 1, (batch, height, width, inputs).
      kernel: integer, ±1, (rows, columns, inputs, outputs).
      strides: along height and width.
      padding: pixels in front and behind, of both.
      dilation: of the kernel.
    """
    words, weights = lax.optimization_barrier(pack(x)), _known(kernel)
    words = jnp.pad(words, [(0, 0), *padding, (0, 0)])
    spans = [d * (n - 1) + 1 for n, d in zip(kernel.shape[:2], dilation)]
    sizes = [(n - s) // t + 1 for n, s, t in zip(words.shape[1:3], spans, strides)]

    def tap(array: jax.Array, i: int, j: int) -> jax.Array:
        start = (i * dilation[0], j * dilation[1])
        stop = [s + (n - 1) * t + 1 for s, n, t in zip(start, sizes, strides)]
        rows, columns = (slice(a, b, t) for a, b, t in zip(start, stop, strides))
        return array[:, rows, columns]

    taps = [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]

    def sums(words: jax.Array, ones: jax.Array) -> jax.Array:
        common = _common([tap(words, *t) for t in taps], [weights[t] for t in taps])
        return 2 * common - sum((tap(ones, *t) for t in taps[1:]), start=tap(ones, *taps[0]))

    return _apart(sums, words, _ones(words))


def _known(kernel: jax.Array) -> jax.Array:
    """The kernel's words, at once where it is known: the compiler would take seconds to fold it."""
    with jax.ensure_compile_time_eval():
        return _packed_kernel(kernel)


@jax.jit
def _packed_kernel(kernel: jax.Array) -> jax.Array:
    """Words (..., words, outputs) of a kernel (..., inputs, outputs)."""
    return jnp.swapaxes(pack(jnp.swapaxes(kernel > 0, -1, -2)), -1, -2)


def _ones(words: jax.Array) -> jax.Array:
    """How many bits are set, int32, with a last axis of 1."""
    return jnp.sum(lax.population_count(words).astype(jnp.int32), -1, keepdims=True)


def _common(taps: list[jax.Array], weights: list[jax.Array]) -> jax.Array:
    """Σ popcount(tap & weight), int32; taps are (..., words), weights (words, outputs)."""
    counts = [
        lax.population_count(x[..., i, None] & w[i])
        for x, w in zip(taps, weights)
        for i in range(w.shape[0])
    ]
    return sum(counts[1:], start=counts[0]).astype(jnp.int32)


def _apart(sums: Callable[..., jax.Array], words: jax.Array, ones: jax.Array) -> jax.Array:
    """`sums(words, ones)`, which XLA:CPU fuses with nothing.

    It would count anew for each of the operations that use a sum, in their loops. What is a branch,
    although one that is always taken, it leaves alone.
    """
    if ones.size == 0:  # Of no images.
        return sums(words, ones)
    shape = jax.eval_shape(sums, words, ones)
    is_possible = ones.reshape(-1)[0] >= 0
    return lax.cond(is_possible, sums, lambda *_: jnp.zeros(shape.shape, shape.dtype), words, ones)
