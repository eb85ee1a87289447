"""Plans for pairs of a model and a chip, held against arithmetic by hand; and the engine's budget.

The figures that the comments add up are the releases': see `FLASH` and `PRO`.
"""

from dataclasses import dataclass, replace

import pytest

from overleap.cache.layout import CacheFormat
from overleap.checkpoint import locate
from overleap.config import ModelConfig
from overleap.engine.budget import budget
from overleap.errors import CapacityError, ConfigError
from overleap.plan import (
    Load,
    Machine,
    Money,
    Plan,
    Precision,
    bare,
    chip,
    chips,
    machines,
    plan,
    running,
    with_memory,
)
from overleap.plan.memory import Split, memory, splits
from overleap.plan.predict import Time, experts_touched

M = 1048576
KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class ByHand:
    """Bytes of a released model, put together by hand in the comments below."""

    experts: int
    cut: int  # by tensor parallelism
    whole: int  # on every chip
    expert: int  # one
    page: int
    slot: int
    snapshot: int
    native_token: int  # of scratch in native kernels
    torch_token: int
    torch_fixed: int


# Expert: 3 x 4096 x 2048 = 25,165,824 weights; FP4 half a byte, a scale for 32: 13,369,344 B.
# 44 blocks (MTP included) x 256 of them = 150,592,290,816 B.
# Cut (FP8, a scale for 128 x 128), a block: wq_a 1024 x 4096, wq_b 32768 x 1024, wkv 512 x 4096,
#   wo_a 8192 x 4096, wo_b 4096 x 8192, a shared expert of 25,165,824: 132,120,576 weights; 44
#   blocks. Indexer's wq_b 8192 x 1024 in 21 layers, MTP's two projections 4096 x 4096.
#   5,813,305,344 + 176,160,768 + 33,554,432 = 6,023,020,544 weights, / 16,384 scales: 367,616.
#   Embedding and head 2 x 129280 x 4096 in BF16: 2,118,123,520.
# A page: 21 layers x 32 x (584 + 68) + 20 x 584 = 449,824.
# A slot: rings 44 x 136 x 584 = 3,494,656; CSA tails 21 x 16 x 2 x (1024 + 256) x 4 = 3,440,640;
#   HCA tails 20 x 136 x 2 x 512 x 4 = 11,141,120.
# A snapshot: 44 x 128 x 584 = 3,289,088, and 21 x 4 x 2 x (1024 + 256) x 4 = 860,160.
# Scratch a token in torch, float32: streams 14 x 4096, queries 6 x 64 x 512, index 4 x 64 x 128,
#   inner 4 x 7 x 2048: 344,064 values; and the largest linear decoded three times and six tiles of
#   16 MiB: 12 x 33,554,432 + 100,663,296. In native kernels, bf16: streams 11 x 4096 x 2 and
#   attention 3 x 64 x 512 x 2 + 2 x 64 x 128 x 2 + 16 x 640, more than experts 9 x 4096 x 2 +
#   7 x 2048 x 8: 329,728 B and half as much again; and 4 MiB.
FLASH = ByHand(
    experts=44 * 256 * 13_369_344,
    cut=6_023_020_544 + 367_616 + 2_118_123_520,
    whole=9_007_886_920 - 6_023_020_544 - 367_616 - 2_118_123_520,
    expert=13_369_344,
    page=449_824,
    slot=3_494_656 + 3_440_640 + 11_141_120,
    snapshot=3_289_088 + 860_160,
    native_token=(90_112 + 196_608 + 32_768 + 10_240) * 3 // 2,
    torch_token=4 * (14 * 4096 + 6 * 64 * 512 + 4 * 64 * 128 + 28 * 2048),
    torch_fixed=12 * 32768 * 1024 + 6 * 16 * MIB,
)
# Expert: 3 x 7168 x 3072 = 66,060,288 weights: 35,094,528 B; 62 blocks x 384 of them.
# Cut, a block: wq_a 1536 x 7168, wq_b 65536 x 1536, wkv 512 x 7168, wo_a 16384 x 4096, wo_b
#   7168 x 16384, shared 66,060,288; added up below.
# A page: 30 x 32 x 652 + 31 x 584 = 644,024.
# A slot: 62 x 136 x 584 = 4,924,288; 30 x 163,840 = 4,915,200; 31 x 557,056 = 17,268,736.
# A snapshot: 62 x 128 x 584 = 4,634,624 and 30 x 40,960 = 1,228,800.
PRO_BLOCK = 1536 * 7168 + 65536 * 1536 + 512 * 7168 + 16384 * 4096 + 7168 * 16384 + 3 * 7168 * 3072
PRO_FP8 = 62 * PRO_BLOCK + 30 * 8192 * 1536 + 2 * 7168 * 7168
PRO_CUT = PRO_FP8 + PRO_FP8 // 16384 + 2 * 2 * 129280 * 7168
PRO = ByHand(
    experts=62 * 384 * 35_094_528,
    cut=PRO_CUT,
    whole=29_164_961_912 - PRO_CUT,
    expert=35_094_528,
    page=644_024,
    slot=4_924_288 + 4_915_200 + 17_268_736,
    snapshot=4_634_624 + 1_228_800,
    native_token=(157_696 + 393_216 + 32_768 + 10_240) * 3 // 2,
    torch_token=4 * (14 * 7168 + 6 * 128 * 512 + 4 * 64 * 128 + 28 * 3072),
    torch_fixed=12 * 16384 * 7168 + 6 * 16 * MIB,
)


def beside(
    x: ByHand, *, users: int, tensor: int, chunk: int, torch: bool, snapshots: int, reserve: int
) -> int:
    """Bytes of one chip, its routed experts not counted, at 1,048,576 tokens for each user."""
    weights = x.whole + -(-x.cut // tensor)
    cache = (users + 1) * x.slot + (users * 8192 + 2) * x.page
    text = 48 * M * users
    each, fixed = (x.torch_token, x.torch_fixed) if torch else (x.native_token, 4 * MIB)
    scratch = chunk * each + fixed
    return weights + cache + text + snapshots + scratch + reserve


def planned(model: str, machine: Machine, users: int = 1) -> Plan:
    return plan(Load(ModelConfig.preset(model), M, users), machine)


def test_1_flash_in_8_gib() -> None:
    """9.008 GB of other weights + 3.722 GB of cache + 6 experts are more than 8.590 GB."""
    found = planned("v4-flash", Machine(bare(8 * GIB)))
    tight = beside(
        FLASH, users=1, tensor=1, chunk=64, torch=False, snapshots=4 * FLASH.snapshot,
        reserve=256 * MIB,
    )  # fmt: skip
    assert (found.fits, found.runs, found.memory.chunk) == (False, False, 64)
    assert found.memory.least == tight + 6 * FLASH.expert == 13_181_325_960
    assert (found.largest_context, found.most_users) == (0, 0)
    assert found.step is None and found.prices is None


def test_2_flash_in_80_gib() -> None:
    """85.899 GB - 13.575 GB beside the experts leaves 72.325 of 150.592 GB: 48 % of them.

    A token uses 6 of 256 experts in 43 layers: 6 x 43 x 13.37 MB = 3.449 GB, 52 % of them from a
    disk of 7 GB/s: 0.2576 s. Users: (85.899 - 9.008 - 0.352 - 0.268 - 0.080 - ...) / 3.75 GB: 20.
    """
    found = planned("v4-flash", Machine(bare(80 * GIB)))
    held = beside(
        FLASH, users=1, tensor=1, chunk=512, torch=False, snapshots=256 * MIB, reserve=256 * MIB
    )
    assert found.memory.beside_experts == held
    assert (found.fits, found.runs, found.largest_context, found.most_users) == (False, True, M, 20)
    share = (80 * GIB - held) / FLASH.experts
    assert found.store is not None and found.store.resident == pytest.approx(share)
    assert round(100 * share) == 48
    assert found.step is not None and found.step.binding == "disk"
    assert found.step.seconds == pytest.approx((1 - share) * 6 * 43 * 13_369_344 / 7e9)
    # 21 users take (21 + 1) slots, 21 x 8192 + 2 pages, 4 snapshots, 21 x 48 MiB of text.
    fullest = [
        beside(
            FLASH, users=users, tensor=1, chunk=64, torch=False, snapshots=4 * FLASH.snapshot,
            reserve=256 * MIB,
        ) + 6 * FLASH.expert
        for users in (20, 21)
    ]  # fmt: skip
    assert fullest[0] <= 80 * GIB < fullest[1]


def test_3_flash_on_two_h100() -> None:
    """Experts halved 75.296, cut weights halved 4.071, whole 0.866, cache 3.722, 0.075 of the rest
    and 0.679 of scratch at steps of 128, 1.074 reserved: 85.775 of 85.899 GB."""
    found = planned("v4-flash", Machine(chip("h100"), 2))
    assert found.split == Split(2, 2)
    assert found.memory.chunk == 128
    held = beside(
        FLASH, users=1, tensor=2, chunk=128, torch=True, snapshots=4 * FLASH.snapshot, reserve=GIB
    )
    assert found.fits and found.spare_bytes == 80 * GIB - held - FLASH.experts // 2 == 123_911_032
    assert found.most_users == 1  # another takes 3.7 GB


def test_4_flash_on_one_h200() -> None:
    """141 GiB are 151.4 GB, 14.5 GB too few: 90 % of the experts stay, 10 % come from disk."""
    found = planned("v4-flash", Machine(chip("h200")))
    held = beside(FLASH, users=1, tensor=1, chunk=512, torch=True, snapshots=256 * MIB, reserve=GIB)
    assert not found.fits and found.runs
    assert found.spare_bytes == 141 * GIB - held - FLASH.experts == -14_525_059_720
    assert found.store is not None and round(found.store.disk, 3) == 0.096


def test_5_flash_on_one_mi300x() -> None:
    """206.2 GB hold it with 40.2 GB to spare; every further user takes 3.753 GB: 10 of them.

    A step reads 3.449 GB of experts, 7.949 GB of other weights (all but the embedding) and 0.480 GB
    of cache at 5.3 TB/s.
    """
    found = planned("v4-flash", Machine(chip("mi300x")))
    held = beside(FLASH, users=1, tensor=1, chunk=512, torch=True, snapshots=256 * MIB, reserve=GIB)
    assert found.fits and found.spare_bytes == 192 * GIB - held - FLASH.experts
    each = 8192 * FLASH.page + FLASH.slot + 48 * M
    tight = 448 * FLASH.torch_token + 256 * MIB - 4 * FLASH.snapshot
    assert found.most_users == 11 and 10 * each < found.spare_bytes + tight < 11 * each
    # Keys 262,144 x 68 and 640 rows of 584 B in 21 layers, 8,320 rows in 20, 128 rows in 2.
    cache = 21 * (262_144 * 68 + 640 * 584) + 20 * 8_320 * 584 + 2 * 128 * 584
    experts = 6 * 43 * 13_369_344
    dense = FLASH.whole + FLASH.cut - 2 * 129_280 * 4096  # the embedding is looked up
    assert found.step is not None and found.step.binding == "memory bandwidth"
    assert found.step.seconds == pytest.approx((cache + experts + dense) / 5.3e12)


def test_6_flash_on_a_gaming_card() -> None:
    """25.8 GB hold 10.0 GB of experts (7 %), the host's memory the other 93 %.

    A token brings 0.931 x 3.449 GB over PCIe 4 at 32 GB/s: 0.100 s.
    """
    found = planned("v4-flash", Machine(chip("rtx-4090"), ram_bytes=256 * GIB))
    held = beside(FLASH, users=1, tensor=1, chunk=512, torch=True, snapshots=256 * MIB, reserve=GIB)
    here = (24 * GIB - held) / FLASH.experts
    store = found.store
    assert store is not None and store.disk == 0 and store.resident == pytest.approx(here)
    assert found.step is not None and found.step.binding == "RAM to chip"
    assert found.step.seconds == pytest.approx((1 - here) * 6 * 43 * 13_369_344 / 32e9)
    little = planned("v4-flash", Machine(chip("rtx-4090"), ram_bytes=64 * GIB))
    assert little.store is not None
    assert little.store.ram == pytest.approx(64 * GIB / FLASH.experts)
    assert little.store.disk == pytest.approx(1 - here - little.store.ram)


def test_7_flash_for_64_users_on_an_m3_ultra() -> None:
    """64 x 3.685 GB of pages + 65 slots: 237.0 GB; with 9.0, 150.6, 3.5 of snapshots and text and
    1.5 of the rest: 401.6 of 549.8 GB. 64 tokens use 256 x (1 - (250/256)^64) = 200 experts."""
    found = planned("v4-flash", Machine(chip("m3-ultra")), users=64)
    held = beside(
        FLASH, users=64, tensor=1, chunk=512, torch=True, snapshots=256 * MIB, reserve=256 * MIB
    )
    assert found.fits and found.spare_bytes == 512 * GIB - held - FLASH.experts == 148_176_388_216
    used = experts_touched(ModelConfig.preset("v4-flash"), 64)
    assert used == pytest.approx(256 * (1 - (250 / 256) ** 64)) and round(used) == 200
    # Apple publishes no matmul rates: said, and not counted in the bound.
    assert found.step is not None and "fp8 matmul" in found.step.unknown


def test_8_pro_on_eight_h200() -> None:
    """835.5 / 8 = 104.4 GB of experts and (29.2 - 2.3) / 8 + 2.3 GB of the rest on each of 8."""
    found = planned("v4-pro", Machine(chip("h200"), 8))
    held = beside(PRO, users=1, tensor=8, chunk=512, torch=True, snapshots=256 * MIB, reserve=GIB)
    assert found.split == Split(8, 8)
    assert found.fits and found.spare_bytes == 141 * GIB - held - PRO.experts // 8
    # A user takes 5.35 GB on every chip of a group. Beside the first, 31.8 GB are to spare, 1.1
    # more with steps of 64 tokens, 0.24 more with four snapshots: 7 with one group of 8. Groups
    # of 2 hold (29.2 - 2.3) x (1/2 - 1/8) = 10.1 GB more of weights: 23.0 GB, 5 users for each of
    # the 4 groups. Groups of 1 hold 13.4 GB more of them: 9.6 GB, 2 users for each of 8: 16.
    each = 8192 * PRO.page + PRO.slot + 48 * M
    tight = 448 * PRO.torch_token + 256 * MIB - 4 * PRO.snapshot
    room = found.spare_bytes + tight
    assert 6 * each < room < 7 * each
    in_pairs, alone = (room - PRO.cut // n + PRO.cut // 8 for n in (2, 1))
    assert 4 * each < in_pairs < 5 * each and each < alone < 2 * each
    assert found.most_users == 4 * (1 + 4) > 8 * (1 + 1)


def test_9_pro_in_the_memory_of_a_cpu_server() -> None:
    """864.7 GB of weights are more than 824.6 GB: 46.4 GB too few, 94 % of the experts stay."""
    found = planned("v4-pro", Machine(chip("epyc-9755")))
    held = beside(
        PRO, users=1, tensor=1, chunk=512, torch=False, snapshots=256 * MIB, reserve=256 * MIB
    )
    assert not found.fits and found.runs
    assert found.spare_bytes == 768 * GIB - held - PRO.experts == -46_440_640_232
    assert found.store is not None and found.store.ram == 0
    missing = 46_440_640_232 / PRO.experts
    assert found.store.disk == pytest.approx(missing)
    assert found.step is not None and found.step.binding == "disk"
    assert found.step.seconds == pytest.approx(missing * 6 * 61 * PRO.expert / 7e9)


def test_10_base_weights_for_four_on_four_910c() -> None:
    """FP8 experts: 25,165,824 + 1,536 scales, 44 x 256 of them, a quarter on each: 70.9 GB."""
    found = planned("v4-flash-base", Machine(chip("ascend-910c"), 4), users=4)
    assert found.memory.experts == 44 * 256 * (25_165_824 + 1_536) // 4
    held = beside(FLASH, users=4, tensor=4, chunk=512, torch=True, snapshots=256 * MIB, reserve=GIB)
    assert found.split == Split(4, 4)
    assert found.fits and found.spare_bytes == 128 * GIB - held - found.memory.experts
    # No FP8 on this chip: those linears run at its BF16 rate, half of an FP8 chip's.
    assert chip("ascend-910c").rate("fp8") == chip("ascend-910c").rate("bf16") == 752e12


@pytest.mark.parametrize("tokens", [1, 1000, 131072, M])
@pytest.mark.parametrize("name", ["mini", "v4-flash"])
def test_the_engine_takes_what_the_plan_says(name: str, tokens: int) -> None:
    """One text: the planner's cache, snapshots, text and scratch are the engine's own."""
    preset = name != "mini"
    config = ModelConfig.preset(name) if preset else ModelConfig.from_checkpoint(locate(name))
    load = Load(config, tokens, reserve=0)
    for chunk in (512, 64):
        found = memory(load, bare(1 << 50), Split(1, 1), chunk, least=chunk == 64)
        resident = found.weights + found.experts
        engine = budget(
            config, tokens, CacheFormat.RELEASE, memory_bytes=found.total,
            resident_bytes=resident, native=True,
        )  # fmt: skip
        assert engine.peak_bytes == found.total
        assert engine.chunk_tokens == chunk
        if chunk == 64:
            with pytest.raises(CapacityError):
                budget(
                    config, tokens, CacheFormat.RELEASE, memory_bytes=found.total - 1,
                    resident_bytes=resident, native=True,
                )  # fmt: skip


def test_the_largest_context_fits_and_the_next_does_not() -> None:
    flash = ModelConfig.preset("v4-flash")
    for have in (150, 151, 152):
        machine = Machine(bare(have * GIB))
        found = plan(Load(flash, 1), machine)
        assert found.fits and 0 < found.largest_context < M
        assert plan(Load(flash, found.largest_context), machine).fits
        assert not plan(Load(flash, found.largest_context + 1), machine).fits


@pytest.mark.parametrize(("name", "count"), [("b200", 2), ("h200", 4)])
def test_the_most_users_fit_and_one_more_does_not(name: str, count: int) -> None:
    load = Load(ModelConfig.preset("v4-flash"), 131072)
    found = plan(load, Machine(chip(name), count))
    ways = splits(load.config, count)
    least, more = (
        min(
            memory(replace(load, users=users), found.machine.chip, way, 64, True).total
            for way in ways
        )
        for users in (found.most_users, found.most_users + 1)
    )
    assert least <= found.have_bytes < more
    assert found.most_users > 1


def test_reading_by_hand() -> None:
    """Flash on a B200, 131,072 tokens in 256 steps of 512, each of which uses every expert.

    Bytes: 256 x (7.949 GB beside the embedding + 43/44 of 150.592 GB of experts) and 256 halves of
    what the last query reads. Operations: 24.7 GFLOP a token at 4.5 PFLOP/s, and the rest.
    """
    found = plan(Load(ModelConfig.preset("v4-flash"), 131072), Machine(chip("b200")))
    time = found.first_token
    assert time is not None and time.seconds is not None and time.binding == "memory bandwidth"
    used = 1 - (250 / 256) ** 512
    cache = 21 * (32_768 * 68 + 640 * 584) + 20 * 1_152 * 584 + 2 * 128 * 584
    read = 256 * (7_948_825_160 + used * FLASH.experts * 43 / 44 + cache / 2)
    assert time.seconds == pytest.approx(read / 8e12)
    # All but the indexer: 2 x (13.270e9 - 0.927e9 of BF16 and the head) and attention.
    dense = 131072 * (11_714_691_072 + 12_985_565_184)
    assert dense / 4.5e15 < time.by["matmul"] < 2 * dense / 4.5e15
    large = plan(Load(ModelConfig.preset("v4-flash"), 131072, chunk=8192), found.machine)
    assert large.first_token is not None and large.first_token.seconds is not None
    assert large.first_token.seconds < time.seconds / 4


def test_splits_divide_chips_and_output_groups() -> None:
    flash = ModelConfig.preset("v4-flash")  # 8 output groups
    assert [s.tensor for s in splits(flash, 16)] == [1, 2, 4, 8]
    assert [s.tensor for s in splits(flash, 6)] == [1, 2]
    assert Split(16, 4).groups == 4 and Split(16, 4).users(9) == 3


def test_many_users_are_shared_between_groups() -> None:
    """A cache is whole on every chip of a tensor group, so many users want several groups."""
    found = planned("v4-flash", Machine(chip("h200"), 8), users=64)
    assert found.fits and found.split.groups > 1
    assert not [p for p in [planned("v4-flash", Machine(chip("h200"), 8), users=1)] if not p.fits]


def test_what_a_machine_holds_does_not_depend_on_the_split_of_the_load() -> None:
    """Eight H200 at a million tokens: one user is fastest with attention over all 8 chips, where
    every chip holds every cache. Alone, each chip holds a cache of its own users.

    141 GiB less 9.008 GB of weights, 18.824 of experts (150.592 / 8), 1.074 for the driver, 0.650
    of scratch (64 tokens), 0.018 of a spare slot and 0.017 of four snapshots leave 121.8 GB; a user
    takes 8,192 pages of 449,824 B, a slot and 48 B a token: 3.753 GB. 32 fit on each of 8.
    """
    one, many = (planned("v4-flash", Machine(chip("h200"), 8), users=n) for n in (1, 256))
    assert one.split == Split(8, 8) and many.split == Split(8, 1) and many.fits
    each = 8192 * FLASH.page + FLASH.slot + 48 * M
    fixed = FLASH.whole + FLASH.cut + FLASH.experts // 8 + GIB + 4 * FLASH.snapshot
    fixed += 64 * FLASH.torch_token + FLASH.torch_fixed + FLASH.slot + 2 * FLASH.page
    assert one.most_users == many.most_users == 8 * ((141 * GIB - fixed) // each) == 256
    assert not planned("v4-flash", Machine(chip("h200"), 8), users=257).fits


def test_more_users_than_are_searched_are_counted() -> None:
    """Mini in 100 TB: 100,000 users of 1,024 tokens fit, and more."""
    load = Load(ModelConfig.from_checkpoint(locate("mini")), 1024, users=100_000)
    found = plan(load, Machine(bare(100 * 10**12)))
    assert found.fits and found.most_users == 100_000
    assert plan(replace(load, users=1), found.machine).most_users == 65_536


def test_weights_that_are_not_packed_run_at_the_rate_of_their_type() -> None:
    """Plain Flash on an H100: at its BF16 rate or, where that is unknown, at none; never FP8's."""
    flash = ModelConfig.preset("v4-flash")

    def reading(config: ModelConfig, precision: Precision) -> Time:
        found = plan(Load(config, 4096, precision=precision), Machine(chip("h100"), 32))
        assert found.first_token is not None
        return found.first_token

    for dtype, precision in (("bfloat16", Precision.BF16), ("float32", Precision.F32)):
        plain = flash.with_(quantization_config=None, expert_dtype=None, torch_dtype=dtype)
        assert reading(plain, Precision.RELEASE) == reading(flash, precision)
    packed, wide = (reading(flash, each) for each in (Precision.RELEASE, Precision.BF16))
    assert packed.by["matmul"] < wide.by["matmul"]


def test_costs_by_hand() -> None:
    """An RTX 4090: 1,599 USD in 4 x 8,766 h are 0.0456 an hour; 450 W x 1.3 x 0.10: 0.0585."""
    money = Money(other=0.02)
    load = Load(ModelConfig.preset("v4-flash"), M)
    found = plan(load, Machine(chip("rtx-4090"), ram_bytes=256 * GIB), money)
    assert found.prices is not None and found.prices.output is not None
    assert found.step is not None and found.step.seconds is not None
    hours = found.step.seconds * 1e6 / 3600
    cost = found.prices.output
    assert cost.depreciation == pytest.approx(1599 / (4 * 8766) * hours)
    assert cost.power == pytest.approx(0.45 * 1.3 * 0.10 * hours)
    assert cost.other == pytest.approx(0.02 * hours)
    assert cost.complete and cost.total == pytest.approx((0.0456 + 0.0585 + 0.02) * hours, rel=1e-3)
    # A cached token is 3,514.25 B from a disk of 7 GB/s.
    hit = found.prices.hit.total
    assert hit == pytest.approx(cost.total * (3514.25 / 7e9) / found.step.seconds)
    idle = plan(load, found.machine, replace(money, busy=0.25)).prices
    assert idle is not None and idle.output is not None
    assert idle.output.total == pytest.approx(4 * cost.total)
    request = found.prices.request(1000, 2000, 300)
    assert request is not None and found.prices.miss is not None
    by_hand = 1000 * hit + 2000 * found.prices.miss.total + 300 * cost.total
    assert request.total == pytest.approx(by_hand / 1e6)


def test_an_unknown_price_is_not_counted_and_said() -> None:
    prices = planned("v4-flash", Machine(chip("h200"), 2)).prices
    assert prices is not None and prices.output is not None
    assert prices.output.depreciation is None and not prices.output.complete
    assert prices.output.total == prices.output.power
    load = Load(ModelConfig.preset("v4-flash"), M)
    given = plan(load, Machine(chip("h200"), 2), Money(price=30000)).prices
    assert given is not None and given.output is not None and given.output.complete


def test_what_is_unknown_is_said() -> None:
    with pytest.raises(ConfigError, match="memory of Cambricon MLU590 is unknown") as caught:
        planned("v4-flash", Machine(chip("mlu590")))
    assert caught.value.hint == "give --memory"
    given = planned("v4-flash", Machine(with_memory(chip("mlu590"), 200 * GIB)))
    assert given.fits and given.step is not None and given.step.seconds is None
    assert "memory bandwidth" in given.step.unknown and given.tokens_per_s is None
    assert given.prices is not None and given.prices.output is None
    with pytest.raises(ConfigError, match="no chip is called 'h10'") as caught:
        chip("h10")
    assert "h100" in str(caught.value.hint)
    with pytest.raises(CapacityError, match="1048577 tokens is asked for, the model has 1048576"):
        plan(Load(ModelConfig.preset("v4-flash"), M + 1), Machine(bare(GIB)))


def test_every_chip_says_where_its_figures_come_from() -> None:
    for name, one in chips().items():
        assert len(one.source) > 15 and "://" not in one.source, name
        assert one.kind in ("cpu", "gpu", "npu", "unified")
        assert set(one.rates) <= {"f32", "bf16", "fp8", "fp4", "int8"}
        wider = [one.rates[t] for t in ("f32", "bf16", "fp8", "fp4") if t in one.rates]
        assert wider == sorted(wider), f"{name}: a narrower type is slower"


def test_machines_that_hold_it() -> None:
    load = Load(ModelConfig.preset("v4-flash"), M)
    found = {each.machine.chip.name: each.machine.count for each in machines(load)}
    assert found["mi300x"] == found["b200"] == 1
    assert found["h100"] == found["h200"] == 2
    assert found["rtx-4090"] == 16
    assert "mlu590" not in found
    assert all(each.fits for each in machines(load))


def test_precision_and_cache_format() -> None:
    flash = ModelConfig.preset("v4-flash")
    wide = Load(flash, 4096, precision=Precision.BF16)
    found = plan(wide, Machine(bare(2 << 40)))
    assert found.memory.experts == 44 * 256 * 25_165_824 * 2
    # A page in float32: 21 x 32 x (2,048 + 512) + 20 x 2,048 = 1,761,280, 3.9 times the release.
    form, packed = (
        plan(Load(flash, M, cache_format=each), Machine(bare(2 << 40))).memory.cache
        for each in (CacheFormat.WIDE, CacheFormat.RELEASE)
    )
    assert form - packed > 8194 * (1_761_280 - 449_824)


def test_what_a_serving_process_can_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    mini = ModelConfig.from_checkpoint(locate("mini"))
    monkeypatch.setattr("overleap.plan.answer.free_bytes", lambda: GIB)
    monkeypatch.setattr("overleap.plan.answer.resident_bytes", lambda: GIB // 2)
    bare_row = running(Load(mini, M))
    assert bare_row["have_bytes"] == GIB * 3 // 2 and bare_row["fits"]
    assert bare_row["most_users"] == plan(Load(mini, M), Machine(bare(GIB * 3 // 2))).most_users
    assert bare_row["usd_per_million"]["output"] is None
    priced = running(Load(mini, M), chip("epyc-9755"))
    assert priced["have_bytes"] == bare_row["have_bytes"]
    assert priced["usd_per_million"]["output"]["total"] > 0
    monkeypatch.setattr("overleap.plan.answer.free_bytes", lambda: None)
    with pytest.raises(ConfigError, match="does not tell"):
        running(Load(mini, M))
