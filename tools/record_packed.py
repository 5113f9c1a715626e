"""Record how the ecosystem's own packers lay out integers: golden arrays for the tests of GPTQ, AWQ and AutoRound.

    .readers/gptqmodel/bin/python tools/record_packed.py

Runs in the environment of tests/readers/gptqmodel (make readers). Codes, scales and zero-points are drawn; the weights
that they stand for are handed to each packer. Writes tests/golden/packed.npz, for every case "<case>/codes" (out, in),
"scale" and "zero" (out, groups), "g_idx" (in,), the packer's "qweight", "qzeros" and "scales", and for some "weight"
(out, in), which its kernel multiplies with in float16.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import numpy as np
import torch
from auto_round.export.export_to_awq.utils import WQLinear_GEMM
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from gptqmodel.nn_modules.qlinear.gemm_awq import AwqGEMMLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "packed.npz"
OUT, IN = 32, 64


@dataclass(frozen=True)
class Case:
    """`group` is -1 where a scale reaches over a whole row. `lowest` zero-point of an asymmetric case."""

    packer: str
    bits: int
    group: int
    asymmetric: bool = False
    ordered: bool = False
    lowest: int = 0

    @property
    def name(self) -> str:
        reach = "channel" if self.group == -1 else f"g{self.group}"
        kind = ("-asym" if self.asymmetric else "") + ("-order" if self.ordered else "")
        return f"{self.packer}-int{self.bits}-{reach}{kind}" + (f"-from{self.lowest}" if self.lowest else "")


@dataclass(frozen=True)
class Drawn:
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    g_idx: np.ndarray

    def linear(self) -> torch.nn.Linear:
        """Weights scale * (code - zero)."""
        values = (self.codes - self.zero[:, self.g_idx].astype(np.float32)) * self.scale[:, self.g_idx]
        found = torch.nn.Linear(IN, OUT, bias=False)
        found.weight.data = torch.from_numpy(values.astype(np.float32))
        return found


def draw(case: Case) -> Drawn:
    random = np.random.default_rng([case.bits, case.group + 1, case.asymmetric, case.ordered, case.lowest])
    size = IN if case.group == -1 else case.group
    groups = IN // size
    codes = random.integers(0, 1 << case.bits, (OUT, IN)).astype(np.uint8)
    # bfloat16 values, as the grids have them
    scale = (random.uniform(2**-8, 2**-3, (OUT, groups)).astype(np.float32).view(np.uint32) & 0xFFFF0000).view("f4")
    zero = np.full((OUT, groups), 1 << (case.bits - 1), np.uint8)
    if case.asymmetric:
        zero = random.integers(case.lowest, 1 << case.bits, (OUT, groups)).astype(np.uint8)
    g_idx = np.repeat(np.arange(groups), size).astype(np.int32)
    return Drawn(codes, scale, zero, random.permutation(g_idx) if case.ordered else g_idx)


def gptqmodel_v2(case: Case, drawn: Drawn) -> torch.nn.Module:
    made = TorchLinear(
        bits=case.bits,
        group_size=case.group,
        sym=not case.asymmetric,
        desc_act=case.ordered,
        in_features=IN,
        out_features=OUT,
        bias=False,
    )
    tensors = (torch.from_numpy(one) for one in (drawn.scale, drawn.zero.astype(np.float32), drawn.g_idx))
    made.pack_original(drawn.linear(), *tensors)
    return made


def gptqmodel_v1(case: Case, drawn: Drawn) -> torch.nn.Module:
    """The weight is that of version 2: kernels convert before they multiply."""
    made = gptqmodel_v2(case, drawn)
    convert_gptq_v2_to_v1_format_module(made, QuantizeConfig(bits=case.bits, group_size=case.group))
    return made


def auto_round(module: object) -> Callable[[Case, Drawn], torch.nn.Module]:
    def pack(case: Case, drawn: Drawn) -> torch.nn.Module:
        made = module.QuantLinear(case.bits, case.group, IN, OUT, False)
        made.device = "cpu"
        zero = torch.from_numpy(drawn.zero.astype(np.float32))
        made.pack(drawn.linear(), torch.from_numpy(drawn.scale), zero, None, "cpu")
        return made

    return pack


def auto_round_awq(case: Case, drawn: Drawn) -> torch.nn.Module:
    scale, zero = (torch.from_numpy(one.astype(np.float32).T.copy()) for one in (drawn.scale, drawn.zero))
    return WQLinear_GEMM.from_linear(drawn.linear(), case.bits, case.group, False, scale, zero, device="cpu")


def gptqmodel_awq(kind: type[torch.nn.Module]) -> Callable[[Case, Drawn], torch.nn.Module]:
    """The GEMM kernel is not made without a GPU; its packer, AutoAWQ's own loops, asks for no more of its module."""

    def pack(case: Case, drawn: Drawn) -> torch.nn.Module:
        made = AwqTorchLinear(
            bits=4,
            group_size=case.group,
            sym=not case.asymmetric,
            desc_act=False,
            in_features=IN,
            out_features=OUT,
            bias=False,
            register_buffers=True,
        )
        scale, zero = torch.from_numpy(drawn.scale).half(), torch.from_numpy(drawn.zero.astype(np.float32))
        kind.pack(made, drawn.linear(), scale.float(), zero)
        return made

    return pack


PACKERS = {
    "gptqmodel-v1": gptqmodel_v1,
    "gptqmodel-v2": gptqmodel_v2,
    "auto-round-v1": auto_round(qlinear_torch_zp),
    "auto-round-v2": auto_round(qlinear_torch),
    "auto-round-awq": auto_round_awq,
    "gptqmodel-awq-torch": gptqmodel_awq(AwqTorchLinear),
    "gptqmodel-awq-gemm": gptqmodel_awq(AwqGEMMLinear),
}


def cases() -> Iterator[Case]:
    for bits in (2, 3, 4, 8):
        for packer in ("gptqmodel-v1", "gptqmodel-v2", "auto-round-v1", "auto-round-v2"):
            if packer.endswith("v1"):
                yield Case(packer, bits, 32)
            yield Case(packer, bits, 64, True, lowest=1)
        yield Case("gptqmodel-v1", bits, 32, True)  # zero-points of 0 borrow
        yield Case("gptqmodel-v2", bits, 32, True, ordered=True)
        yield Case("gptqmodel-v2", bits, -1, True)
    for bits in (5, 6, 7):
        yield Case("auto-round-v1", bits, 32)
        yield Case("auto-round-v2", bits, 64, True)
    for packer in ("auto-round-awq", "gptqmodel-awq-torch", "gptqmodel-awq-gemm"):
        yield Case(packer, 4, 32, True)
        yield Case(packer, 4, -1, True)
        yield Case(packer, 4, 64)


def main() -> None:
    found = {}
    for case in cases():
        drawn = draw(case)
        made = PACKERS[case.packer](case, drawn)
        arrays = {name: getattr(drawn, name) for name in ("codes", "scale", "zero", "g_idx")}
        arrays |= {name: getattr(made, name).cpu().numpy() for name in ("qweight", "qzeros", "scales")}
        if case.asymmetric and case.bits in (3, 4) and case.packer != "gptqmodel-v1":
            with torch.inference_mode():
                arrays["weight"] = made(torch.eye(IN, dtype=torch.float16)[None])[0].numpy().T
        found |= {f"{case.name}/{name}": array for name, array in arrays.items()}
        print(case.name, {name: (array.dtype.name, array.shape) for name, array in arrays.items()})
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(GOLDEN, **found)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
