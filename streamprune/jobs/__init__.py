"""Jobs: their configuration, folder, journal and caches, and the forecast of their resources."""
