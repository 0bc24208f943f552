"""Compiled code for a CPU, with plain interfaces: the library, its structs, single operations.

Built when the package is installed, where there is a C++ compiler; whatever it computes, the
modules of `minllama.model.llama` compute without it, only slower. Knows nothing of models:
`minllama.engine.cpu` describes one to it.
"""
