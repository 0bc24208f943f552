"""Files on disk <-> (LlamaConfig, named tensors, vocabulary); a module for each format."""
