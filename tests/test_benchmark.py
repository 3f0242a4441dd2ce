"""The benchmark's arithmetic and its faults; never its times."""

import pytest

from paddle_medcls import benchmark
from paddle_medcls.errors import RunError


def test_medians_ratios_and_interleaving(monkeypatch):
    order, figures = [], {"uncached": iter([2.0, 4.0, 3.0]), "cached": iter([30.0, 600.0, 60.0])}

    def measured(row, variant):
        order.append(variant)
        return next(figures[variant])

    monkeypatch.setattr(benchmark, "_fresh_process", measured)
    slow, fast = benchmark.run_rows(["head"], 3)
    assert order == ["uncached", "cached"] * 3
    assert (slow["images_per_second"], slow["ratio"]) == (3.0, 1.0)
    assert (fast["images_per_second"], fast["ratio"], fast["rounds"]) == (60.0, 20.0, [30.0, 600.0, 60.0])


def test_a_process_that_fails_is_one_clear_error():
    with pytest.raises(RunError, match="benchmark nothing, cached: exit code 1: KeyError: 'nothing'"):
        benchmark._fresh_process("nothing", "cached")


def test_rate_counts_images_over_time(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 4.0, 4.0])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    calls = []
    assert benchmark._rate(lambda: calls.append(1), images=8, seconds=3.0) == 4 * 8 / 4.0
    assert len(calls) == 5  # one to warm up
