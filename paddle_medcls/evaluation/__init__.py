"""Metrics with intervals, tables, plots, significance tests, error reports and model cards."""
