"""Many processes that train, evaluate and predict as one, as `torchrun` starts them.

`launcher` reads what the launcher says, `ranks` connects the processes, `watch` notices when one
fails, and `gradients` adds up what they have computed. Imported where it is used: torch is heavy.
"""
