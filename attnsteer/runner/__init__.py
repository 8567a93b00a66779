"""Recipes: run an intervention against its baseline and controls, compare runs, and report."""
