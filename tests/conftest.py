"""Prints, after the tests, the figures that they measured and held to a bound: what `record_property` was given."""

from collections import defaultdict

import torch

torch.set_num_threads(1)  # models of a few numbers run slower on two, and many times so where others run beside them


def pytest_terminal_summary(terminalreporter) -> None:
    """One line a figure: the largest of all tests that recorded it, and how many did."""
    measured: dict[str, list[float]] = defaultdict(list)
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", []):
                if getattr(report, "when", None) == "call":
                    measured[name].append(value)
    if measured:
        terminalreporter.section("measured (the largest of each)")
        for name, values in sorted(measured.items()):
            terminalreporter.write_line(f"{name}: {max(values):.3g} ({len(values)} cases)")
