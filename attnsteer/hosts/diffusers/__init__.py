"""diffusers: pipelines, UNets and transformers of denoising."""
