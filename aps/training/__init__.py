"""The stages that train or evaluate an encoder, except detection, and their shared parts."""
