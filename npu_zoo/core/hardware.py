"""Chips and products as data: what the matrix names and what kernels and operator rules are keyed by."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
DTYPE_ALIASES: dict[str, DType] = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}
ITEMSIZE: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


class Chip(BaseModel):
    """One kind of processor.

    Attributes:
        name: what kernels, attention backends and operator rules are keyed by.
        device: torch's device type for it.
        soc_codes: the integers that ``torch_npu`` reports for it (empty off Ascend).
        soc_names: the names ``npu-smi`` and ACL report, without the ``Ascend`` prefix.
        dtypes: compute dtypes that it has at all.
        expert_dispatch: how tokens reach experts of other ranks where replicas of the attention share them and both
            ways can be taken. all_gather sends every token to every replica, and all sizes are known on the host;
            all_to_all sends a token to its experts' ranks alone, and waits for sizes from the device.
        source: where these facts are from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    device: Literal["npu", "cpu", "cuda"]
    soc_codes: tuple[int, ...] = ()
    soc_names: tuple[str, ...] = ()
    dtypes: tuple[DType, ...]
    expert_dispatch: Literal["all_gather", "all_to_all"] = "all_gather"
    source: str


class Product(BaseModel):
    """A machine or card that users buy, which is what a matrix row names.

    Attributes:
        name: the spelling of ``--hardware``.
        chip: the name of its :class:`Chip`.
        dies_per_card: devices that one card shows; world sizes count dies.
        devices: devices of one full machine, 0 where that is up to the user.
        memory_gib: memory per die in GiB, one entry per model that is sold; empty where it is up to the user.
            The detected card's memory always wins over this.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    chip: str
    dies_per_card: int = 1
    devices: int = 0
    memory_gib: tuple[int, ...] = Field(default=())
    source: str


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="ascend910b",
            device="npu",
            soc_codes=(220, 221, 222, 223, 224, 225),
            soc_names=("910B1", "910B2", "910B2C", "910B3", "910B4", "910B4-1"),
            dtypes=("float32", "bfloat16", "float16"),
            expert_dispatch="all_to_all",
            source="SocVersion table of Ascend/pytorch, csrc/core/npu/NpuVariables; all_to_all is how the operator "
            "pages of ops-transformer have tokens dispatched on Atlas A2 (aclnnMoeDistributeDispatchV2)",
        ),
        Chip(
            name="ascend310p",
            device="npu",
            soc_codes=(200, 201, 202, 203, 204, 205),
            soc_names=("310P1", "310P2", "310P3", "310P4", "310P5", "310P7"),
            dtypes=("float32", "float16"),
            source="SocVersion table of Ascend/pytorch; no bfloat16 by the operator pages of Ascend/op-plugin",
        ),
        Chip(name="cpu", device="cpu", dtypes=DTYPES, source="torch"),
        Chip(name="cuda", device="cuda", dtypes=DTYPES, source="torch"),
    )
}

PRODUCTS: dict[str, Product] = {
    product.name: product
    for product in (
        Product(
            name="atlas_800i_a2",
            title="Atlas 800I A2",
            chip="ascend910b",
            devices=8,
            memory_gib=(32, 64),
            source="Atlas 800I A2 inference server, product page",
        ),
        Product(
            name="atlas_800t_a2",
            title="Atlas 800T A2",
            chip="ascend910b",
            devices=8,
            memory_gib=(64,),
            source="Atlas 800T A2 training server, product page",
        ),
        Product(
            name="atlas_300i_duo",
            title="Atlas 300I Duo",
            chip="ascend310p",
            dies_per_card=2,
            memory_gib=(24, 48),
            source="Atlas 300I Duo inference card, product page: 48 or 96 GB a card of two dies",
        ),
        Product(name="cpu", title="CPU", chip="cpu", source="torch"),
        Product(name="cuda", title="CUDA GPU", chip="cuda", source="torch"),
    )
}


def chip_of(product: str) -> Chip:
    """The chip of a product's name; KeyError where the product is unknown."""
    return CHIPS[PRODUCTS[product].chip]
