"""Save and load classifiers: manifest, head, adapters and model card."""
