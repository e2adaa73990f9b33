"""Spectra of the gradients of every projection."""
