"""Codes that suit the inputs which a layer really gets: calibration on batches, block by block."""
