"""Other libraries whose modules graphcache runs."""
