"""The Llama: config, rotary embeddings, attention layouts, the cache, the layers."""
