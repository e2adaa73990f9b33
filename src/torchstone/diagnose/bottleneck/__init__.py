"""The output head as a bottleneck: anisotropy, spectra, ranks of heads and of data."""
