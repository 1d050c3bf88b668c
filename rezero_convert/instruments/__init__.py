"""What a converted model needs in training."""
