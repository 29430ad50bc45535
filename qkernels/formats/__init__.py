"""Files: from checkpoints to QTensors and back."""
