"""Other packages: their models with quantized weights."""
