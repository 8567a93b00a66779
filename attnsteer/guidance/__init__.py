"""Guidance: branch inputs, combining predictions, weak branches and prefix reuse; losses on maps that move the latent."""
