"""HOW a weight is fitted to calibration data without training, in plain torch."""
