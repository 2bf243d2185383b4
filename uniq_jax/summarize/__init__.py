"""What a network is made of and costs, layer by layer."""

from uniq_jax.summarize.rows import Row as Row
from uniq_jax.summarize.table import Summary as Summary
from uniq_jax.summarize.table import summary as summary
