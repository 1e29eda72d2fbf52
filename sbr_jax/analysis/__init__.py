"""Analyses of subspaces: spectra, stability, kinds of harm, exhaustion, coupling."""
