"""Bases of families of methods: a weak branch to steer away from, a loss that moves the latent."""
