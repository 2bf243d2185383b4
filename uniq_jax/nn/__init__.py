"""Flax NNX layers that own learned quantizer state, and the methods they quantize by."""

from uniq_jax.nn.activation_methods import LsqActivation as LsqActivation
from uniq_jax.nn.activation_methods import N2uqActivation as N2uqActivation
from uniq_jax.nn.activation_methods import PactActivation as PactActivation
from uniq_jax.nn.activation_methods import UniqActivation as UniqActivation
from uniq_jax.nn.batch_norm import BatchNorm as BatchNorm
from uniq_jax.nn.calibrate import calibrate as calibrate
from uniq_jax.nn.calibrate import calibrate_weights as calibrate_weights
from uniq_jax.nn.conv import QuantConv as QuantConv
from uniq_jax.nn.einsum import QuantEinsum as QuantEinsum
from uniq_jax.nn.layer import QuantLayer as QuantLayer
from uniq_jax.nn.linear import QuantLinear as QuantLinear
from uniq_jax.nn.linear import QuantLinearGeneral as QuantLinearGeneral
from uniq_jax.nn.methods import ActivationMethod as ActivationMethod
from uniq_jax.nn.methods import WeightMethod as WeightMethod
from uniq_jax.nn.quantizer import ActivationQuantizer as ActivationQuantizer
from uniq_jax.nn.quantizer import WeightQuantizer as WeightQuantizer
from uniq_jax.nn.state import Clip as Clip
from uniq_jax.nn.state import QuantizerParam as QuantizerParam
from uniq_jax.nn.state import Scale as Scale
from uniq_jax.nn.state import Step as Step
from uniq_jax.nn.state import Threshold as Threshold
from uniq_jax.nn.state import is_quantizer_state as is_quantizer_state
from uniq_jax.nn.weight_methods import LsqWeight as LsqWeight
from uniq_jax.nn.weight_methods import N2uqWeight as N2uqWeight
from uniq_jax.nn.weight_methods import UniqWeight as UniqWeight
