"""Networks as ragged batches of weights: checkpoints read, layers found, tensors scaled and cut into chunks."""
