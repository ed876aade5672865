"""`make bench-engine`: the byte path against Envoy's, on two nodes joined by a veth pair."""
