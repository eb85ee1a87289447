"""The published efficiency, every figure to the digit it is given in (abstract and figure 1)."""

import pytest

from overleap.config import ModelConfig
from overleap.errors import ConfigError
from overleap.plan.compare import MILLION, Assumptions, Row, compare
from overleap.plan.flops import RAW, Previous, Rules, read_flops, token_flops

FLASH, PRO = ModelConfig.preset("v4-flash"), ModelConfig.preset("v4-pro")


USUAL = Assumptions()


def at(context: int, assumed: Assumptions = USUAL) -> dict[str, Row]:
    return {row.model: row for row in compare([context], assumed)}


def test_published_labels_at_a_million() -> None:
    """27 % and 10 % of the FLOPs, 10 % and 7 % of the cache; 3.7x, 9.8x, 9.5x, 13.7x; 2 %."""
    rows = at(MILLION)
    pro, flash = rows["V4-Pro"], rows["V4-Flash"]
    assert (f"{pro.flops_share:.0%}", f"{flash.flops_share:.0%}") == ("27%", "10%")
    assert (f"{pro.cache_share:.0%}", f"{flash.cache_share:.0%}") == ("10%", "7%")
    assert (f"{1 / pro.flops_share:.1f}", f"{1 / flash.flops_share:.1f}") == ("3.7", "9.8")
    assert (f"{1 / pro.cache_share:.1f}", f"{1 / flash.cache_share:.1f}") == ("9.5", "13.7")
    for row in (pro, flash):
        assert row.gqa_share is not None and f"{row.gqa_share:.0%}" == "2%"


def test_the_same_to_more_digits() -> None:
    rows = at(MILLION)
    assert {
        name: (
            f"{row.flops_share:.1%}",
            f"{1 / row.flops_share:.2f}",
            f"{row.cache_share:.1%}",
            f"{1 / row.cache_share:.2f}",
            row.gqa_share and f"{row.gqa_share:.2%}",
        )
        for name, row in rows.items()
    } == {
        "V3.2": ("100.0%", "1.00", "100.0%", "1.00", None),
        "V4-Pro": ("27.0%", "3.70", "10.5%", "9.54", "2.02%"),
        "V4-Flash": ("10.2%", "9.84", "7.3%", "13.67", "2.00%"),
    }


def test_gflop_by_component() -> None:
    """FP8 dense, experts, BF16 linears, core attention, indexer, and the weighted sum."""
    v32 = Previous().token_flops(MILLION)
    own = [round(x / 1e9, 1) for x in (v32.dense + v32.experts, v32.wide, v32.core, v32.index)]
    assert own == [70.8, 4.2, 34.8, 999.4] and round(v32.counted() / 1e9, 1) == 1148.1
    for config, known, counted in (
        (PRO, [45.4, 48.4, 4.0, 73.6, 122.9], 310.3),
        (FLASH, [11.7, 13.0, 1.9, 22.6, 86.0], 116.6),
    ):
        f = token_flops(config, MILLION)
        found = [round(x / 1e9, 1) for x in (f.dense, f.experts, f.wide, f.core, f.index)]
        assert found == known
        assert round(f.counted() / 1e9, 1) == counted
        assert sum(f.parts().values()) == pytest.approx(f.counted())


@pytest.mark.parametrize(
    ("rules", "context", "pro", "flash"),
    [
        (Rules(), 2**20, ("26.7%", "3.75"), ("10.1%", "9.91")),
        (Rules(bf16=1), MILLION, ("26.8%", "3.73"), ("10.0%", "9.97")),
        (RAW, MILLION, ("26.5%", "3.77"), ("12.2%", "8.21")),
        (Rules(fp4=1), MILLION, ("32.4%", "3.09"), ("13.9%", "7.19")),
        (Rules(core=1), MILLION, ("21.3%", "4.70"), ("8.4%", "11.84")),
    ],
)
def test_other_assumptions(
    rules: Rules, context: int, pro: tuple[str, str], flash: tuple[str, str]
) -> None:
    rows = at(context, Assumptions(rules))
    for name, known in (("V4-Pro", pro), ("V4-Flash", flash)):
        share = rows[name].flops_share
        assert (f"{share:.1%}", f"{1 / share:.2f}") == known


def test_where_the_gain_is() -> None:
    """Of V3.2's FLOPs: 80 % (Pro) at 4K; 52 % and 16 % at 128K. Its scan is 87 % at a million."""
    assert f"{at(4096)['V4-Pro'].flops_share:.0%}" == "80%"
    rows = at(131072)
    assert f"{rows['V4-Pro'].flops_share:.0%} {rows['V4-Flash'].flops_share:.0%}" == "52% 16%"
    assert f"{rows['V4-Pro'].cache_share:.1%} {rows['V4-Flash'].cache_share:.1%}" == "10.5% 7.4%"
    v32 = at(MILLION)["V3.2"]
    assert f"{v32.parts['indexer'] / v32.counted:.0%}" == "87%"


def test_cache_in_gb() -> None:
    rows = {context: at(context) for context in (MILLION, 2**20)}
    assert {
        (name, context): f"{found[name].cache_bytes / 1e9:.2f}"
        for context, found in rows.items()
        for name in found
    } == {
        ("V3.2", MILLION): "48.07",
        ("V4-Pro", MILLION): "5.04",
        ("V4-Flash", MILLION): "3.52",
        ("V3.2", 2**20): "50.40",
        ("V4-Pro", 2**20): "5.28",
        ("V4-Flash", 2**20): "3.69",
    }


def test_the_bf16_cache() -> None:
    """9.617 GiB of 83.875 at 2^20 tokens, 8.72x; windows not counted there."""
    rows = at(2**20, Assumptions(bf16=True, windows=False))
    assert f"{rows['V4-Pro'].cache_bytes / 2**30:.3f}" == "9.617"
    assert f"{rows['V3.2'].cache_bytes / 2**30:.3f}" == "83.875"
    assert f"{1 / rows['V4-Pro'].cache_share:.2f}" == "8.72"


def test_without_windows_the_95_label_is_missed() -> None:
    assert f"{1 / at(MILLION, Assumptions(windows=False))['V4-Pro'].cache_share:.3f}" == "9.554"


def test_what_leaves_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare([1], Assumptions(windows=False))


def test_reading_is_the_sum_of_its_tokens() -> None:
    for config, begin, end in ((FLASH, 0, 3000), (PRO, 100, 5000)):
        read = read_flops(config, begin, end)
        tokens = [token_flops(config, place + 0.5) for place in range(begin, end)]
        assert read.core == pytest.approx(sum(f.core for f in tokens), rel=1e-6)
        assert read.index == pytest.approx(sum(f.index for f in tokens), rel=1e-6)
        assert read.dense == pytest.approx(sum(f.dense for f in tokens))
        head = 2 * 129280 * config.hidden_size * (end - begin - 1)
        assert read.wide == pytest.approx(sum(f.wide for f in tokens) - head)


def test_every_assumption_is_named() -> None:
    lines = " ".join(Assumptions(Rules(bf16=1.5), bf16=True).lines())
    for words in ("10^6", "windows", "1.5", "BF16", "MTP", "indexer 0.5"):
        assert words in lines
