"""vLLM: attention steering inside its own engine, exact and per request (docs/vllm.md). Nothing here imports vLLM by itself."""
