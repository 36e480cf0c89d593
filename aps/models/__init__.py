"""The encoder, its heads, and reading and writing their weights."""
