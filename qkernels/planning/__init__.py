"""A scheme for each layer: what its error costs the predictions, and the best choice for so many bytes."""
