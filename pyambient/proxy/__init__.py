"""Floor 3: what to do with a connection: outbound, inbound, plaintext, and the pods they are of."""
