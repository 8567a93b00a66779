"""Tasks in plain English for real language models, drawn by index from a seed: no files, no end, splits that share no text."""
