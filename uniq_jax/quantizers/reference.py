"""Every quantizer in NumPy float64, forward and backward, as the formulas read.

The second implementation that the tests hold the first against, and the shortest statement of what
each quantizer is. Nothing here is fast. A backward function takes the arguments of its forward one
and the cotangent `g` of the value, and returns the gradients in the order of the arguments.
"""

import numpy as np


def _inside(v, n):
    """1 within 0..n, 1/2 on the edges, 0 outside."""
    return ((v >= 0) & (v <= n)) / 2 + ((v > 0) & (v < n)) / 2


def _sum_like(x, step):
    step = np.asarray(step)
    lead = x.ndim - step.ndim
    axes = (*range(lead), *(lead + i for i, size in enumerate(step.shape) if size == 1))
    return x.sum(axis=axes).reshape(step.shape)


def _uniform(x, step, n, offset):
    return step * (np.round(np.clip(x / step + offset, 0, n)) - offset)


def _uniform_backward(x, step, n, offset, largest_level, g):
    v = x / step + offset
    inside = _inside(v, n)
    slope = np.round(np.clip(v, 0, n)) - offset - np.where(inside > 0, inside * x / step, 0)
    elements_per_step = x.size / np.size(step)
    scale = 1 / np.sqrt(elements_per_step * max(largest_level, 1))
    return g * inside, scale * _sum_like(g * slope, step)


def uniq_weight(w, step, bits):
    """`Δ · (round(clip(w/Δ + n/2, 0, n)) − n/2)`."""
    n = 2**bits - 1
    return _uniform(w, step, n, n / 2)


def uniq_weight_backward(w, step, bits, g):
    """Gradients of w and step, the latter with the factor 1/sqrt(N·max(2**(bits−1) − 1, 1))."""
    n = 2**bits - 1
    return _uniform_backward(w, step, n, n / 2, 2 ** (bits - 1) - 1, g)


def uniq_activation(x, step, bits):
    """`Δ · round(clip(x/Δ, 0, n))`."""
    return _uniform(x, step, 2**bits - 1, 0)


def uniq_activation_backward(x, step, bits, g):
    """Gradients of x and step, the latter with the factor 1/sqrt(N·n)."""
    n = 2**bits - 1
    return _uniform_backward(x, step, n, 0, n, g)


def lsq(x, step, bits, signed=True):
    """`s · round(clip(x/s, −Q_N, Q_P))`."""
    n, offset = 2**bits - 1, 2 ** (bits - 1) if signed else 0
    return _uniform(x, step, n, offset)


def lsq_backward(x, step, bits, g, signed=True):
    """Gradients of x and step, the latter with the factor 1/sqrt(N·Q_P)."""
    n, offset = 2**bits - 1, 2 ** (bits - 1) if signed else 0
    return _uniform_backward(x, step, n, offset, n - offset, g)


def pact_activation(x, clip, bits):
    """`c/n · round(n · min(relu(x), c)/c)`."""
    n = 2**bits - 1
    return clip / n * np.round(n * np.minimum(np.maximum(x, 0), clip) / clip)


def pact_activation_backward(x, clip, bits, g, gradient="paper"):
    """Gradients of x and clip."""
    slope = (x >= clip).astype(float)
    if gradient == "reference":
        slope = slope + pact_activation(x, clip, bits) / clip
    return g * ((x > 0) & (x < clip)), _sum_like(g * slope, clip)


def n2uq_activation(x, start, intervals, input_scale, output_scale):
    """`β₂ · (2/n) · #{i : β₁·x > d_{i−1} + a_i/2}`."""
    n = len(intervals)
    a = np.maximum(intervals, 1e-3)
    d = start + np.concatenate([[0], np.cumsum(a)])
    code = sum((input_scale * x > d[i] + a[i] / 2).astype(float) for i in range(n))
    return output_scale * 2 / n * code


def n2uq_surrogate(x, start, intervals, input_scale, output_scale):
    """The piecewise linear function whose derivatives N2UQ's gradient takes (but ∂/∂β₂)."""
    n = len(intervals)
    d = start + np.concatenate([[0], np.cumsum(np.maximum(intervals, 1e-3))])
    return output_scale * np.interp(input_scale * x, d, np.arange(n + 1) * 2 / n)


def n2uq_activation_backward(x, start, intervals, input_scale, output_scale, g):
    """Gradients of all five arguments."""
    n = len(intervals)
    a = np.maximum(intervals, 1e-3)
    d = start + np.concatenate([[0], np.cumsum(a)])
    u = input_scale * x
    grad_x, grad_start, grad_a, grad_input_scale = np.zeros_like(x), 0.0, np.zeros(n), 0.0
    for i in range(n):
        here = (u > d[i]) & (u <= d[i + 1])
        r = output_scale * 2 / n / a[i]
        grad_x = grad_x + np.where(here, g * r * input_scale, 0)
        grad_start -= r * g[here].sum()
        grad_a[:i] -= r * g[here].sum()
        grad_a[i] -= r * (g[here] * (u[here] - d[i])).sum() / a[i]
        grad_input_scale += r * (g[here] * x[here]).sum()
    grad_a = np.where(intervals < 1e-3, 0, grad_a)
    code = n2uq_activation(x, start, intervals, input_scale, 1.0) * n / 2
    return grad_x, grad_start, grad_a, grad_input_scale, (g * code).sum() * 2 / n


def _n2uq_sigma(w, bits, channel_axis):
    axes = tuple(i for i in range(w.ndim) if i != channel_axis % w.ndim)
    return (2**bits - 1) / 2 ** (bits - 1) * np.abs(w).mean(axis=axes, keepdims=True)


def n2uq_weight(w, bits, channel_axis=-1):
    """`σ · (2·round((clip(w/σ, −1, 1) + 1)·n/2)/n − 1)`, σ = n/2**(bits−1) · mean|w|."""
    n, sigma = 2**bits - 1, _n2uq_sigma(w, bits, channel_axis)
    return sigma * (2 * np.round((np.clip(w / sigma, -1, 1) + 1) * n / 2) / n - 1)


def n2uq_weight_backward(w, bits, g, channel_axis=-1, gradient="reference"):
    """The gradient of w."""
    sigma = _n2uq_sigma(w, bits, channel_axis)
    return g / sigma if gradient == "reference" else g * _inside((w / sigma + 1) / 2, 1)
