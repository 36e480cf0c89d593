"""One file an engine, each with a class `Engine`; the file's name is its name in the settings."""
