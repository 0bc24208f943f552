"""The Llama itself: config, rotary embeddings, attention layouts, the cache, the layers."""
