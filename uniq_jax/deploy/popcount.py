"""Products of binary operands by AND and population count.

Activations are bits x in {0, 1}, weights ±1 are bits w in {0, 1}, and

    Σ x · (2w − 1) = 2 · popcount(x & w) − popcount(x)

over the taps of one output, 32 channels to a word (Rastegari et al., XNOR-Net, ECCV 2016, count
XNORs of ±1; an activation that is 0 makes an AND of it). A pixel of the padding has no bits, and
adds nothing.
"""

import jax
import jax.numpy as jnp
from jax import lax

_WORD_BITS = 32

# Terms of one sum that are written out; the compiler takes long over more.
_MOST_TERMS = 160


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
    return _with_ones([words], [weights], _ones(words))


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
    words, weights = pack(x), _known(kernel)
    words = jnp.pad(words, [(0, 0), *padding, (0, 0)])
    spans = [d * (n - 1) + 1 for n, d in zip(kernel.shape[:2], dilation)]
    sizes = [(n - s) // t + 1 for n, s, t in zip(words.shape[1:3], spans, strides)]
    ones = _ones(words)

    def tap(array: jax.Array, i: int, j: int) -> jax.Array:
        start = (i * dilation[0], j * dilation[1])
        stop = [s + (n - 1) * t + 1 for s, n, t in zip(start, sizes, strides)]
        rows, columns = (slice(a, b, t) for a, b, t in zip(start, stop, strides))
        return array[:, rows, columns]

    taps = [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]
    window_ones = sum((tap(ones, *t) for t in taps[1:]), start=tap(ones, *taps[0]))
    return _with_ones([tap(words, *t) for t in taps], [weights[t] for t in taps], window_ones)


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


def _with_ones(taps: list[jax.Array], weights: list[jax.Array], ones: jax.Array) -> jax.Array:
    """`2 · Σ popcount(tap & weight) − ones`; taps (..., words), weights (words, outputs)."""
    terms = [(x, w, i) for x, w in zip(taps, weights) for i in range(w.shape[0])]
    total = jnp.zeros((), jnp.int32)
    for first in range(0, len(terms), _MOST_TERMS):
        some = terms[first : first + _MOST_TERMS]
        counts = [lax.population_count(x[..., i, None] & w[i]) for x, w, i in some]
        total = total + sum(counts[1:], start=counts[0]).astype(jnp.int32)
    return 2 * total - ones
