"""Pictures of runs and quantizers, as SVG text to put into a page. Needs no JAX and no display."""

from uniq_jax.plots.comparison import accuracy_against_size as accuracy_against_size
from uniq_jax.plots.comparison import overlay as overlay
from uniq_jax.plots.curves import curves as curves
from uniq_jax.plots.functions import Panel as Panel
from uniq_jax.plots.functions import functions as functions
from uniq_jax.plots.layers import histograms as histograms
from uniq_jax.plots.layers import over_training as over_training
