"""Low-bit neural networks in JAX: learned quantizers, their training, exact integer networks."""

__version__ = "0.1.0"
