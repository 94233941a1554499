"""What the clients' figures come to."""

from __future__ import annotations

import statistics

import pytest

from fedgraft.intervals import of_mean
from fedgraft.report.record import summary
from fedgraft.report.summary import summarise


def results(count):
    """`count` clients whose losses are 1, 2, ... below a base of 20, intervals +- 0.5."""
    return {
        f"client-{number:02}": {
            "base": {"loss": 20.0, "interval": {"loss": [19.5, 20.5]}},
            "personal": {"loss": 20.0 - number, "gain": float(number), "interval": {"loss": [19.5 - number, 20.5 - number]}},
        }
        for number in range(1, count + 1)
    }


def test_every_model_and_figure_has_mean_spread_ends_and_intervals():
    found = summarise(results(25), 0, 500)
    assert {model: set(figures) for model, figures in found.items()} == {"base": {"loss"}, "personal": {"loss", "gain"}}
    loss = found["personal"]["loss"]
    assert (loss["clients"], loss["mean"], loss["worst"]) == (25, 7.0, 19.0)
    assert loss["std"] == pytest.approx(statistics.stdev(range(25)))
    assert loss["worst decile"] == pytest.approx(18.0)  # 19, 18, 17: a tenth of 25, rounded up
    assert found["personal"]["gain"]["worst decile"] == pytest.approx(2.0)  # there less is worse
    assert loss["gain_over_base"] == found["personal"]["gain"]["mean"] == 13.0
    assert "gain_over_base" not in found["base"]["loss"]
    assert loss["interval_rows"] == pytest.approx((7 - 0.1, 7 + 0.1))  # 0.5 / sqrt(25)
    low, high = loss["interval_clients"]
    assert low < 7 < high
    assert high - low == pytest.approx(2 * 1.96 * loss["std"] / 5, rel=0.15)
    assert summarise(results(25), 0, 500) == found


def test_few_clients_have_no_interval_over_clients_and_missing_rows_none_over_rows():
    some = results(4)
    del some["client-02"]["personal"]["interval"]["loss"]
    found = summarise(some, 0, 500)["personal"]["loss"]
    assert found["interval_clients"] is None
    assert found["interval_rows"] is None
    assert "worst decile" not in found
    assert summarise(results(4), 0, 500)["personal"]["loss"]["interval_rows"] == pytest.approx(
        of_mean([19.0, 18, 17, 16], [(value - 0.5, value + 0.5) for value in (19, 18, 17, 16)])
    )


def test_up_to_ten_clients_the_worst_one_is_the_worst_tenth():
    values = {str(number): float(number) for number in range(10)}
    assert "worst decile" not in summary(values, True)
    assert summary(values | {"ten": 10.0}, True)["worst decile"] == 0.5


def test_figures_of_tasks_are_summed_up_too_each_by_what_is_better():
    told = {"arc/acc": 0.5, "text/perplexity": 8.0}
    better = {"arc/acc": 0.75, "text/perplexity": 6.0}
    found = summarise({"one": {"base": told, "personal": better}, "two": {"base": told, "personal": told}}, 0, 10)["personal"]
    assert (found["arc/acc"]["mean"], found["arc/acc"]["worst"], found["arc/acc"]["gain_over_base"]) == (0.625, 0.5, 0.125)
    assert (found["text/perplexity"]["worst"], found["text/perplexity"]["gain_over_base"]) == (8.0, 1.0)
