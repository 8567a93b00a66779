"""Guidance: branch inputs, combining predictions, weak branches and prefix reuse."""
