"""Writes the PyTorch files beside it that the tests of uniq_jax.interop read.

    pip install torch numpy
    python tests/data/make_torch_files.py

The files in the repository are of PyTorch 2.13. All values are small integers that the tests know.
"""

import argparse
import collections
import pathlib

import numpy as np
import torch
from torch import nn

HERE = pathlib.Path(__file__).parent
DTYPES = (
    *("float64", "float32", "float16", "bfloat16"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("bool", "complex128", "complex64"),
)


def counting(*shape: int) -> torch.Tensor:
    return torch.arange(np.prod(shape, dtype=int), dtype=torch.float32).reshape(shape)


def network() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 3, (1, 2)), nn.BatchNorm2d(3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(counting(*parameter.shape))
    return net


def views() -> dict[str, torch.Tensor]:
    base = counting(4, 6)
    return {
        "base": base,
        "transposed": base.t(),
        "slice": base[1:3, 1::2],
        "scalar": base[2, 3],
        "expanded": base[0, 5].expand(2, 3),
        "empty": base[:, :0],
        "channels_last": counting(1, 2, 3, 2).to(memory_format=torch.channels_last),
    }


def checkpoint() -> dict[str, object]:
    """As a training program writes it."""
    net = nn.DataParallel(network())
    optimizer = torch.optim.Adam(net.parameters())
    net.module[1](counting(1, 3, 2, 2)).sum().backward()
    optimizer.step()
    net.load_state_dict({f"module.{k}": v for k, v in network().state_dict().items()})
    return {
        "epoch": 7,
        "arch": "resnet18",
        "args": argparse.Namespace(lr=0.1, dirs=pathlib.PurePosixPath("runs"), gpus={0, 1}),
        "state_dict": net.state_dict(),
        "best_top1": torch.tensor(71.5),
        "best_top5": np.float64(90.25),
        "confusion": np.arange(6).reshape(2, 3),
        "counts": collections.Counter(a=1),
        "shape": torch.Size((3, 4)),
        "device": torch.device("cpu"),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state()[:8].clone(),
    }


def main() -> None:
    dtypes = {name: counting(2, 3).to(getattr(torch, name)) for name in DTYPES}
    parameters = {
        "net": collections.OrderedDict(
            weight=nn.Parameter(counting(2, 3)),
            frozen=nn.Parameter(counting(3), requires_grad=False),
            tagged=nn.Parameter(counting(2)),
            array=np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
            count=3,
        ),
        "acc": 91.3,
    }
    parameters["net"]["tagged"].tag = "state of its own"
    objects = {
        "dtypes": dtypes,
        "views": views(),
        "checkpoint": checkpoint(),
        "parameters": parameters,
        "several": {"generator": views(), "discriminator": {"fc.weight": counting(2)}},
    }
    for name, content in objects.items():
        torch.save(content, HERE / f"torch_{name}.pth")
        legacy = HERE / f"torch_{name}_legacy.pth"
        torch.save(content, legacy, _use_new_zipfile_serialization=False)
    torch.save(parameters, HERE / "torch_parameters_protocol4.pth", pickle_protocol=4)
    torch.save(network(), HERE / "torch_module.pth")
    torch.save({"fc.weight": counting(3, 3).to_sparse()}, HERE / "torch_sparse.pth")
    torch.save({"fc.weight": torch.ones(2, dtype=torch.complex64).conj()}, HERE / "torch_conj.pth")
    torch.jit.script(nn.Identity()).save(HERE / "torch_script.pt")


if __name__ == "__main__":
    main()
