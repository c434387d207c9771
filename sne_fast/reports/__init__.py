"""Measures, plots and files that experiments report with."""
