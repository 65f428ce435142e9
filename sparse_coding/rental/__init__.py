"""Sweeps on rented machines. Imports no torch."""
