"""Other packages: their models with our weights."""
