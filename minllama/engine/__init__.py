"""What computes a forward pass: the modules, compiled CPU code, or CUDA graphs."""
