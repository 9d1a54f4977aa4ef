"""What the key service does, without HTTP: one function per call, inside one transaction."""
