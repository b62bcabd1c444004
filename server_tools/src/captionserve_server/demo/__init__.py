"""The demo checkpoint: scenes of openly licensed emoji art, and the training of its captioner."""
