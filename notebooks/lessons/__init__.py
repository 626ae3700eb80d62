"""What a reader of the notebooks touches: figures that everybody can read, and lenses to look into the model with."""
