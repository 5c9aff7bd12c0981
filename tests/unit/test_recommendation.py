"""What is recommended, from made-up measurements whose answer is known."""

import math

import numpy as np
import pandas as pd
import pytest

from eora import recommendation as rec

# Relative output errors 1, 0.9, ... at ranks 0, 1, ...
E = np.linspace(1, 0, 41)
MB = 1e6


def rows(values: dict[str, tuple[float, float]], task="acc", up=True) -> pd.DataFrame:
    """variant -> (megabytes, value), as the report has them; names like w2+eora-r8-16bit."""
    found = []
    for name, (size, value) in values.items():
        compression, _, adapter = name.partition("+")
        rank = int(adapter.split("-r")[1].split("-")[0]) if adapter else None
        found.append(
            {
                "model": "m",
                "variant": name,
                "compression": None if compression == "original" else compression,
                "adapter": "eora" if adapter else None,
                "rank": rank,
                "adapter_bits": 16 if adapter else None,
                "task": task,
                "metric": "acc" if up else "perplexity",
                "higher_is_better": up,
                "value": value,
                "bytes": size * MB,
                "adapter_bytes": (size - values.get(compression, (10,))[0]) * MB
                if adapter
                else None,
            }
        )
    return pd.DataFrame(found).astype({"rank": "Int64", "adapter_bits": "Int64"})


MEASURED = {
    "original": (100, 0.8),
    "w2": (10, 0.4),
    "w3": (15, 0.6),
    "w2+eora-r8-16bit": (14, 0.48),
    "w2+eora-r24-16bit": (22, 0.64),
}


def test_a_curve_is_the_mean_over_layers_and_narrow_ones_are_repaired():
    found = rec.curve({"a": [4.0, 1.0, 0.0], "b": [9.0, 0.0], "c": [0.0, 0.0, 0.0]})
    np.testing.assert_allclose(found, [2 / 3, 0.5 / 3, 0])


def test_the_scale_is_from_the_worst_compression_to_the_original():
    found = rec.scores(rows(MEASURED), ["acc"])
    assert found["original"] == 1 and found["w2"] == 0
    assert found["w3"] == pytest.approx(0.5)
    assert found["w2+eora-r8-16bit"] == pytest.approx(0.2)


def test_perplexities_count_by_their_logarithm_and_tasks_by_their_mean():
    perplexities = {"original": (100, 10.0), "w2": (10, 1000.0), "w3": (15, 100.0)}
    frame = pd.concat([rows(MEASURED), rows(perplexities, "ppl", up=False)])
    assert rec.scores(frame, ["ppl"])["w3"] == pytest.approx(0.5)
    both = rec.scores(frame, ["acc", "ppl"])
    assert both["w3"] == pytest.approx(0.5) and both["original"] == 1


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_gave_no_number_is_not_recommended(broken):
    frame = rows({"original": (9, 10.0), "w2": (1, 20.0), "w3": (2, broken)}, "ppl", up=False)
    assert "w3" not in rec.scores(frame, ["ppl"])


def test_a_task_on_which_nothing_was_lost_tells_nothing():
    assert rec.scores(rows({"original": (9, 0.5), "w2": (1, 0.5)}), ["acc"]) == {}


def test_ranks_between_are_where_the_error_says():
    ranks = {0: 0.0, 8: 0.2, 24: 0.6}
    assert rec.predicted(ranks, E, 16) == pytest.approx(0.4)
    assert rec.predicted(ranks, E, 4) == pytest.approx(0.1)
    assert rec.predicted(ranks, E, 40) == pytest.approx(1.0)  # drawn on
    assert rec.predicted({0: 0.0, 8: 0.1}, np.ones(9), 4) == 0  # no error left to repair


def test_how_far_predictions_are_off_is_found_by_leaving_ranks_out():
    assert rec.miss({0: 0.0, 8: 0.2, 24: 0.6}, E) == pytest.approx(0)
    assert rec.miss({0: 0.0, 8: 0.5, 24: 0.6}, E) == pytest.approx(0.3)
    assert math.isnan(rec.miss({0: 0.0, 8: 0.5}, E))


def test_untested_ranks_have_bytes_and_scores():
    frame = rows(MEASURED)
    found = {
        o.name: o for o in rec.untested(frame, rec.scores(frame, ["acc"]), {("w2", "eora"): E})
    }
    assert set(found) == {f"w2+eora-r{rank}-16bit" for rank in (16, 32, 40)}
    middle = found["w2+eora-r16-16bit"]
    assert middle.bytes == pytest.approx(18 * MB)
    assert middle.score == pytest.approx(0.4)
    assert middle.miss == pytest.approx(0)


def test_untested_ranks_of_a_compression_that_is_not_judged_alone():
    """Made around an adapter: it has no rank 0, so two judged ranks are the least."""
    frame = rows({name: MEASURED[name] for name in MEASURED if name != "w2"})
    scored = rec.scores(rows(MEASURED), ["acc"])
    del scored["w2"]
    found = {o.name: o for o in rec.untested(frame, scored, {("w2", "eora"): E})}
    middle = found["w2+eora-r16-16bit"]
    assert middle.bytes == pytest.approx(18 * MB) and middle.score == pytest.approx(0.4)
    assert math.isnan(middle.miss)
    one = frame[frame["variant"] != "w2+eora-r24-16bit"]
    assert rec.untested(one, scored, {("w2", "eora"): E}) == []


def test_the_best_within_a_budget_and_the_cheapest_that_is_enough():
    frame = rows(MEASURED)
    options = rec.measured(frame, rec.scores(frame, ["acc"]))
    assert rec.best_within(options, 16 * MB).name == "w3"
    assert rec.best_within(options, 14 * MB).name == "w2+eora-r8-16bit"
    assert rec.best_within(options, 9 * MB) is None
    assert rec.cheapest(options, 0.55).name == "w2+eora-r24-16bit"
    assert rec.cheapest(options, 0.49).name == "w3"
    assert rec.cheapest(options, 1.1) is None
