"""Numbers about subspaces: spectra, stability, kinds of harm, exhaustion, coupling."""
