"""Models and classifiers behind HTTP protocols that existing programs speak.

One thread computes (`worker`), an event loop answers (`app`), and `service` is between the two.
Each protocol is a module of `routes`. The command `minllama serve` starts it; the libraries that it
needs come with the extra `serve`.
"""
