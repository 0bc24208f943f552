"""A classifier in a folder: its manifest, head, adapters and model card."""
