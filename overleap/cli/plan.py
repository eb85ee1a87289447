"""The planner's commands: what fits and how fast, the generations beside each other, the chips.

No torch: an answer takes less than a second. Not here: the formulas (overleap/plan), pictures
(eval/efficiency.py). Read next: plan/answer.py.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from overleap import machine, plan
from overleap.cache.layout import CacheFormat
from overleap.cli import screen
from overleap.cli.app import CacheKind, Json, app, cache_format_of
from overleap.config import PRESETS, ModelConfig
from overleap.engine.budget import parse_bytes
from overleap.errors import ConfigError, OverleapError, RequestError
from overleap.machine import size
from overleap.plan import calibrate


class _Default(TyperGroup):
    """`overleap plan MODEL` means `overleap plan fit MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the base class, with `fit` put in front where no command is named."""
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["fit", *args]
        return super().parse_args(ctx, args)


plans = typer.Typer(
    cls=_Default,
    help="Say what fits, how fast and for how much, before anything is fetched. "
    "`overleap plan MODEL` is short for `overleap plan fit MODEL`.",
)
app.add_typer(plans, name="plan")

Chips = Annotated[
    list[str] | None, typer.Option("--chip", help="A chip of `overleap plan chips`; repeated.")
]
Prices = Annotated[float | None, typer.Option(help="USD for one chip, else its list price.", min=0)]


@plans.command()
def fit(
    model: Annotated[
        str, typer.Argument(help="v4-flash, v4-pro, their -base, a folder, or `mini`.")
    ] = "v4-flash",
    tokens: Annotated[int, typer.Option("--context", help="Tokens of a text.", min=1)] = 1048576,
    users: Annotated[int, typer.Option(help="Texts at the same time.", min=1)] = 1,
    chip: Chips = None,
    count: Annotated[int, typer.Option(help="Chips of that kind.", min=1, max=4096)] = 1,
    memory: Annotated[
        str | None, typer.Option(help="Of a machine, or of each chip in place of its own.")
    ] = None,
    ram: Annotated[
        str | None, typer.Option(help="Of the chips' host, for experts they cannot hold.")
    ] = None,
    disk_speed: Annotated[str, typer.Option(help="Bytes a second of the disk.")] = "7GB",
    precision: Annotated[
        plan.Precision, typer.Option(help="How weights are held.")
    ] = plan.Precision.RELEASE,
    cache: CacheKind = "release",
    chunk: Annotated[int | None, typer.Option(help="Tokens of a step; else 512.", min=1)] = None,
    years: Annotated[float, typer.Option(help="To write off the chips.", min=0.1)] = 4.0,
    power_price: Annotated[float, typer.Option(help="USD a kWh.", min=0)] = 0.10,
    cooling: Annotated[float, typer.Option(help="Power times so much.", min=1)] = 1.3,
    other: Annotated[float, typer.Option(help="USD an hour for the rest.", min=0)] = 0.0,
    busy: Annotated[float, typer.Option(help="Share of the time at work.", min=0.01, max=1)] = 1.0,
    price: Prices = None,
    results: Annotated[Path, typer.Option(help="Records of this machine.")] = Path("results"),
    as_json: Json = False,
) -> None:
    """Say whether a model fits, with how much context, for how many, how fast, for how much.

    Without --chip and --memory: for this machine, and for every chip the fewest that hold it all.
    Times and costs are bounds: what bytes and operations take at the full rate of the chip.

    Example: `overleap plan v4-flash --context 1048576 --memory 80GiB`
    """
    if not chip:
        _refuse_of_chips(count=count > 1, price=price is not None, ram=ram is not None)
    config = config_of(model)
    form = cache_format_of(cache)
    load = plan.Load(config, tokens, users, precision, form, chunk)
    money = plan.Money(years, power_price, cooling, other, busy, price)
    ram_bytes = 0 if ram is None else parse_bytes(ram)
    have = None if memory is None else parse_bytes(memory)
    chosen = _chips(chip, have)
    if ram is not None:
        _expect_host(chosen)
    found = [
        plan.plan(load, plan.Machine(one, count, ram_bytes, parse_bytes(disk_speed)), money)
        for one in chosen
    ]
    here = not chip and have is None
    others = list(plan.machines(load, money)) if here else []
    known = _forecast(found[0], results) if here else None
    if as_json:
        rows = [each.row() for each in found]
        facts: dict[str, Any] = {"model": model, "parameters": plan.parameters(config)}
        facts |= {"plans": rows, "measured_here": None if known is None else asdict(known)}
        screen.put_json(facts | {"machines": [each.row() for each in others]})
        return
    if len(found) == 1:
        _show(model, found[0], money)
    if known is not None:
        print(_measured(known))
    if len(found) > 1 or others:
        _list(model, load, found if len(found) > 1 else others)


def config_of(name: str) -> ModelConfig:
    """A preset, or the config of a folder or of the bundled model. Fetches nothing."""
    if name in PRESETS:
        return ModelConfig.preset(name)
    folder = Path(__file__).parents[1] / "bundled" / "mini" if name == "mini" else Path(name)
    if folder.is_dir():
        return ModelConfig.from_checkpoint(folder)
    raise ConfigError(
        f"{name!r} is no folder and no preset",
        f"presets are {', '.join(sorted(PRESETS))}; a folder needs only its config.json",
    )


def _refuse_of_chips(**given: bool) -> None:
    """Raise for what is said of chips where none is named."""
    for name, there in given.items():
        if there:
            raise RequestError(
                f"--{name} is of a chip, and none is named",
                "name one with --chip; `overleap plan chips` lists them",
            )


def _expect_host(chosen: list[plan.Chip]) -> None:
    """Raise where no chip has a host whose memory is another one."""
    if not any(one.has_host for one in chosen):
        raise RequestError(
            f"--ram is of a host beside the chip, {chosen[0].label} has one memory",
            "give --memory for all of it",
        )


def _chips(names: list[str] | None, have: int | None) -> list[plan.Chip]:
    """The chips that were named, with the memory that was given in place of theirs."""
    if names:
        found = [plan.chip(name) for name in names]
        return found if have is None else [plan.with_memory(one, have) for one in found]
    if have is not None:
        return [plan.bare(have, f"a machine with {size(have)}")]
    free = machine.free_bytes()
    if free is None:
        raise RequestError("this system does not tell how much memory is free", "give --memory")
    return [plan.bare(free, f"this machine with {size(free)} free", "here")]


def _show(model: str, found: plan.Plan, money: plan.Money) -> None:
    """One plan for people: the verdict, what is where, the times, the costs."""
    load, chip, held = found.load, found.machine.chip, found.memory
    many = f"{found.machine.count} x " if found.machine.count > 1 else ""
    parameters = plan.parameters(load.config)
    print(
        f"{model}: {parameters['total'] / 1e9:,.2f}B parameters, "
        f"{parameters['active'] / 1e9:,.2f}B active, {load.precision} weights\n"
        f"{load.context:,} tokens for {_people(load.users)} on {many}{chip.label}\n\n"
        f"{_verdict(found)}\n"
        f"largest context for {_people(load.users)}: {found.largest_context:,} tokens; "
        f"most users at {load.context:,}: {found.most_users:,}"
    )
    if found.machine.count > 1:
        print(
            f"experts over {found.machine.count} chips, attention over {found.split.tensor}, "
            f"{found.split.groups} group(s) of users"
        )
    rows = [
        ("weights beside the experts", size(held.weights)),
        ("routed experts", size(held.experts)),
        (f"cache of {_people(found.split.users(load.users))}", size(held.cache)),
        ("snapshots and text", size(held.kept)),
        (f"scratch, steps of {held.chunk} tokens", size(held.scratch)),
        ("process and driver", size(held.reserve)),
        ("together", size(held.total)),
        ("there is", size(found.have_bytes)),
    ]
    screen.put_table("memory of the fullest chip" if many else "memory", ("", "bytes"), rows)
    if found.first_token is not None and found.step is not None:
        _times(found)
        _costs(found, money)


def _forecast(found: plan.Plan, results: Path) -> calibrate.Forecast | None:
    """What records of this machine say of a load that fits into it, in the forms they are of."""
    released = found.load.precision == plan.Precision.RELEASE
    if not found.fits or not released or found.load.cache_format != CacheFormat.RELEASE:
        return None
    load, chunk = found.load, found.memory.chunk
    try:
        runs = calibrate.runs_of(results)
    except OverleapError as error:
        screen.note(f"{error.message}; planned without records")
        return None
    where = calibrate.Where.here(runs, load.config)
    return calibrate.forecast(load.config, load.context, chunk, runs, where)


def _measured(known: calibrate.Forecast) -> str:
    rests = "of this model" if known.own else "of other models, so a rough guess"
    return (
        f"by {known.runs} measurements here {rests}: {1 / known.step_s:,.0f} tokens/s for one "
        f"user, first token after {_span(known.first_token_s)} (they differ by {known.error:.0%})"
    )


def _verdict(found: plan.Plan) -> str:
    held, store = found.memory, found.store
    if found.fits:
        return f"fits, {size(found.spare_bytes)} to spare"
    lacks = f"does not fit: {size(-found.spare_bytes)} short"
    if store is None:
        return (
            f"{lacks}, and {size(held.least - found.have_bytes)} short of what it takes with "
            f"all experts elsewhere ({size(held.least)})"
        )
    places = [(store.resident, "in memory"), (store.ram, "in the host's"), (store.disk, "on disk")]
    where = ", ".join(f"{share:.0%} {place}" for share, place in places if share > 0)
    return f"{lacks}; runs with its experts elsewhere: {where}"


def _times(found: plan.Plan) -> None:
    rows: list[tuple[str, ...]] = []
    unknown: dict[str, None] = {}
    for name, time, rate in (
        ("first token", found.first_token, None),
        ("a token for every user", found.step, found.tokens_per_s),
    ):
        assert time is not None
        unknown |= dict.fromkeys(time.unknown)
        bound = "unknown" if time.seconds is None else f"{_span(time.seconds)} or more"
        speed = "" if rate is None else f"{rate:,.1f} tokens/s each"
        rows.append((name, bound, speed, time.binding or ""))
    if any(row[3] for row in rows):
        screen.put_table("time at best", ("", "", "at most", "bound by"), rows)
    if unknown:
        print(f"unknown, so not counted in these times: {', '.join(unknown)}")


def _costs(found: plan.Plan, money: plan.Money) -> None:
    prices = found.prices
    if prices is None or _total(prices.hit) == "unknown":
        print("cost: unknown, as neither price nor power of this machine is known")
        return
    rows = []
    for name, cost in (
        ("input, cached", prices.hit),
        ("input, new", prices.miss),
        ("output", prices.output),
    ):
        if cost is not None:
            parts = (cost.depreciation, cost.power, cost.other)
            rows.append((name, *(_usd(part) for part in parts), _total(cost)))
    title = (
        f"USD a million tokens at least: chips written off in {money.years:g} years, "
        f"{money.per_kwh:g} a kWh x {money.pue:g}, busy {money.busy:.0%} of the time"
    )
    screen.put_table(title, ("tokens", "depreciation", "power", "other", "of what is known"), rows)


def _list(model: str, load: plan.Load, found: list[plan.Plan]) -> None:
    rows = []
    for each in found:
        first = each.first_token.seconds if each.first_token else None
        cost = each.prices.output if each.prices else None
        rows.append(
            (
                f"{each.machine.count} x {each.machine.chip.name}",
                "fits" if each.fits else ("experts elsewhere" if each.runs else "no"),
                size(each.spare_bytes),
                f"{each.most_users:,}",
                "unknown" if first is None else _span(first),
                "unknown" if each.tokens_per_s is None else f"{each.tokens_per_s:,.0f}",
                "unknown" if cost is None else _total(cost),
            )
        )
    columns = (
        "machine", "", "to spare", "users", "first token", "tokens/s", "USD a million written"
    )  # fmt: skip
    title = f"{model}, {load.context:,} tokens for {_people(load.users)}, at best"
    screen.put_table(title, columns, rows)


@plans.command("chips")
def list_chips(as_json: Json = False) -> None:
    """List the chips that are known, and where their figures come from.

    Example: `overleap plan chips --json`
    """
    known = plan.chips()
    if as_json:
        screen.put_json([_chip_row(one) for one in known.values()])
        return
    rows = []
    for one in known.values():
        rates = ", ".join(f"{name} {rate / 1e12:,.0f}" for name, rate in one.rates.items())
        memory = "unknown" if one.memory_bytes is None else size(one.memory_bytes)
        speed = "unknown" if one.bandwidth is None else f"{one.bandwidth / 1e9:,.0f} GB/s"
        price = "unknown" if one.price_usd is None else f"{one.price_usd:,.0f}"
        power = "unknown" if one.power_w is None else f"{one.power_w:g} W"
        rows.append((one.name, memory, speed, rates or "unknown", power, price))
    columns = ("chip", "memory", "bandwidth", "TFLOP/s", "power", "USD")
    screen.put_table("figures of the makers; --json has the sources", columns, rows)


def _chip_row(one: plan.Chip) -> dict[str, Any]:
    return {
        "name": one.name,
        "label": one.label,
        "kind": one.kind,
        "memory_bytes": one.memory_bytes,
        "bandwidth_bytes_per_s": one.bandwidth,
        "flops_per_s": dict(one.rates),
        "power_w": one.power_w,
        "price_usd": one.price_usd,
        "link_bytes_per_s": one.link,
        "host_bytes_per_s": one.host,
        "source": one.source,
    }


def _people(count: int) -> str:
    return "1 user" if count == 1 else f"{count:,} users"


def _span(seconds: float) -> str:
    """Seconds for people."""
    for limit, factor, unit in ((0.1, 1000, "ms"), (180, 1, "s"), (7200, 1 / 60, "min")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds / 3600:,.1f} h"


def _usd(amount: float | None) -> str:
    return "unknown" if amount is None else f"{amount:.4g}"


def _total(cost: plan.Cost) -> str:
    known = cost.depreciation is not None or cost.power is not None or cost.other > 0
    if not known:
        return "unknown"
    return f"{cost.total:.4g}" + ("" if cost.complete else " and more")
