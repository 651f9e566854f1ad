"""Pairs of runs that must agree in part, and the first op where they stop agreeing."""
