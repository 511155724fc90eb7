"""STORED small: the entropy coder, a tensor's streams, and the `.muws` file. Knows nothing of training."""
