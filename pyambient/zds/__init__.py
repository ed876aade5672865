"""Floor 1: what agent and proxy say to each other, as values and bytes; no sockets, no trio.

`messages` and `session` are ZDS, Istio's protocol, wire-exact. `details` is our own second
channel for what ZDS cannot say; a peer that lacks it (a real ztunnel) is served all the same.
"""
