"""Quantized layers for Flax Linen: `nn.Conv` and `nn.Dense` with quantizers on their two operands.

They have the fields and the parameters of the float layers, so that they serve wherever a model
takes its layers from a factory, and float checkpoints load. Beside "kernel" and "bias" lie the
learned parameters of the quantizers, under the same paths as those of the NNX layers:
"weight_quantizer/step", "activation_quantizer/step", and so on. They are ordinary params.

    conv = functools.partial(QuantConv, weight=UniqWeight(2), activation=UniqActivation(2))
    model = ResNet(conv=conv, …)
    variables = calibrate(model, float_checkpoint, batches)

Training multiplies fake-quantized values, with the methods' gradients. Evaluation, which
`deterministic=True` asks for in the constructor or in the call, multiplies integer levels exactly
and scales the sums once, see `uniq_jax.nn.levels`.
"""

from uniq_jax.linen.calibration import calibrate as calibrate
from uniq_jax.linen.layers import QuantConv as QuantConv
from uniq_jax.linen.layers import QuantDense as QuantDense
from uniq_jax.linen.state import STATISTICS as STATISTICS
from uniq_jax.linen.state import is_quantizer_state as is_quantizer_state
from uniq_jax.linen.state import quantized_product as quantized_product
