"""`qkernels.report` and `qkernels report`: what quantizing cost, layer by layer, on weights and on real activations."""
