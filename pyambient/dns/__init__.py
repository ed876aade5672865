"""Floor 1: DNS messages as a forwarder sees them, without I/O: bytes in, bytes out."""
