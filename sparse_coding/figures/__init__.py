"""Rows of results.csv as heat-maps, frontiers and a report."""
