"""Who a workload is: certificates per SPIFFE id, the embedded authority, checks of the peer.

`certificate` is the value, `ca` an `Authority` that issues it, `store` keeps it fresh, `context`
turns it into TLS contexts, `peer` judges what the other side presented.
"""
