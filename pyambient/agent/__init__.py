"""Floor 4: the agent, which enrols network namespaces and hands them to the proxy.

Read in this order: `enrolment` (what happens to a pod), `records` (what survives a crash),
`zds_server` and `details_server` (the proxy's side), `watcher`, and `agent`, which joins them.
"""
