"""Real tables (vega-datasets ships them) and the integers that charts show of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

AXIS_MAX = 9


@dataclass(frozen=True, slots=True)
class Table:
    """One numeric column of a real data set: (label, value) rows, values above zero."""

    dataset: str
    topic: str
    rows: tuple[tuple[str, float], ...]


@lru_cache(maxsize=1)
def load_tables() -> tuple[Table, ...]:
    """The tables charts are drawn from; read from vega-datasets' bundled files, offline."""
    from vega_datasets import local_data  # imports pandas, so only where charts are drawn

    with warnings.catch_warnings():  # the package uses spellings that pandas is retiring
        warnings.simplefilter("ignore")
        return _columns(local_data)


def _columns(local_data: Any) -> tuple[Table, ...]:
    def column(frame: Any, dataset: str, label: str, value: str, topic: str) -> Table:
        rows = frame[[label, value]].dropna().itertuples(index=False)
        return Table(dataset, topic, tuple((str(a)[:32], float(b)) for a, b in rows if b > 0))

    cars, barley = local_data.cars(), local_data.barley()
    wheat, driving = local_data.wheat(), local_data.driving()
    weather, iris = local_data.seattle_weather(), local_data.iris()
    crimea, jobs = local_data.crimea(), local_data.us_employment()
    return (
        column(cars, "cars", "Name", "Miles_per_Gallon", "miles per gallon of cars"),
        column(cars, "cars", "Name", "Horsepower", "horsepower of cars"),
        column(cars, "cars", "Name", "Weight_in_lbs", "weight of cars"),
        column(barley, "barley", "variety", "yield", "barley yield"),
        column(wheat, "wheat", "year", "wheat", "price of wheat"),
        column(wheat, "wheat", "year", "wages", "weekly wages"),
        column(driving, "driving", "year", "miles", "miles driven"),
        column(driving, "driving", "year", "gas", "price of gas"),
        column(weather, "seattle-weather", "date", "temp_max", "warmth in Seattle"),
        column(weather, "seattle-weather", "date", "wind", "wind in Seattle"),
        column(iris, "iris", "species", "petalLength", "petal length"),
        column(crimea, "crimea", "date", "disease", "deaths in Crimea"),
        column(jobs, "us-employment", "month", "construction", "jobs in construction"),
        column(local_data.iowa_electricity(), "iowa-electricity", "source", "net_generation",
               "electricity in Iowa"),
        column(local_data.stocks(), "stocks", "symbol", "price", "stock price"),
    )  # fmt: skip


def unit_for(values: Sequence[float]) -> float:
    """The smallest 1, 2 or 5 times a power of ten that brings the top value to 9 or below."""
    top = max(values)
    power = 10.0 ** math.floor(math.log10(top / AXIS_MAX))
    for step in (1, 2, 5, 10):
        if top / (step * power) < AXIS_MAX + 0.49:
            return step * power
    raise AssertionError("10 steps of the power of ten below top / 9 always suffice")
