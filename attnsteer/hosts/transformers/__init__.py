"""transformers: language, vision-language and encoder models."""
