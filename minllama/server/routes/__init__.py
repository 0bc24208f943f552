"""The protocols: each module has a `router`, which `minllama.server.app` lists."""
