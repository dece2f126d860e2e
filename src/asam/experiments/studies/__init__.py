"""The studies, one a module: each has its ``STUDY``."""
