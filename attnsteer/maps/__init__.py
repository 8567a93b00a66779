"""What losses and readers see of the attention maps of a pipeline: words, regions, image positions."""
