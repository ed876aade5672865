"""Floor 2: what is in the mesh, and what follows from it for one connection.

`view` keeps the current `snapshot` (from enrolments and `localfile`); `route`, `inbound` and
`authorize` are pure functions from a snapshot and a connection to a decision that says why.
"""
