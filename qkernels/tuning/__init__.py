"""How kernels are configured, and which configuration a problem gets."""
