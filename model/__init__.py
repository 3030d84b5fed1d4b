"""The network: SAIL-ViT, adapter, Qwen3 decoder, processor, chat format, generation."""
