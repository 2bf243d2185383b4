"""Quantizers as pure functions of arrays: thresholds in, equally spaced levels out.

Every quantizer `f` comes as a pair: `f(x, …)` is the fake-quantized value with the gradient of
its method, and `f_encode(x, …)` the integer codes with the scale and offset that `decode` turns
into the same value, to the last bit. `*_initial*` functions give the first learned parameters.

This package needs jax and numpy only.
"""

from uniq_jax.quantizers import reference as reference
from uniq_jax.quantizers.encoding import Encoded as Encoded
from uniq_jax.quantizers.encoding import decode as decode
from uniq_jax.quantizers.fitted import uniq_activation_fitted_step as uniq_activation_fitted_step
from uniq_jax.quantizers.fitted import uniq_weight_fitted_step as uniq_weight_fitted_step
from uniq_jax.quantizers.grid import Grid as Grid
from uniq_jax.quantizers.initial import optimal_step as optimal_step
from uniq_jax.quantizers.initial import uniq_activation_initial_step as uniq_activation_initial_step
from uniq_jax.quantizers.initial import uniq_weight_initial_step as uniq_weight_initial_step
from uniq_jax.quantizers.lsq import lsq as lsq
from uniq_jax.quantizers.lsq import lsq_encode as lsq_encode
from uniq_jax.quantizers.lsq import lsq_initial_step as lsq_initial_step
from uniq_jax.quantizers.n2uq import N2uqActivationParameters as N2uqActivationParameters
from uniq_jax.quantizers.n2uq import n2uq_activation as n2uq_activation
from uniq_jax.quantizers.n2uq import n2uq_activation_edges as n2uq_activation_edges
from uniq_jax.quantizers.n2uq import n2uq_activation_encode as n2uq_activation_encode
from uniq_jax.quantizers.n2uq import n2uq_activation_initial as n2uq_activation_initial
from uniq_jax.quantizers.n2uq import n2uq_weight as n2uq_weight
from uniq_jax.quantizers.n2uq import n2uq_weight_encode as n2uq_weight_encode
from uniq_jax.quantizers.packing import pack_codes as pack_codes
from uniq_jax.quantizers.packing import packed_size as packed_size
from uniq_jax.quantizers.packing import unpack_codes as unpack_codes
from uniq_jax.quantizers.pact import pact_activation as pact_activation
from uniq_jax.quantizers.pact import pact_activation_encode as pact_activation_encode
from uniq_jax.quantizers.pact import pact_initial_clip as pact_initial_clip
from uniq_jax.quantizers.uniq import uniq_activation as uniq_activation
from uniq_jax.quantizers.uniq import uniq_activation_encode as uniq_activation_encode
from uniq_jax.quantizers.uniq import uniq_weight as uniq_weight
from uniq_jax.quantizers.uniq import uniq_weight_encode as uniq_weight_encode
