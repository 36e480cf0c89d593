"""Detection engines, one file each with a class `Engine`; the file's name is the engine's name in the settings."""
