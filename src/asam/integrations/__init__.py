"""ASAM inside training frameworks, one module each."""
