"""Floor 2: what has to be in a pod for the proxy to get its traffic; plans, steps, backends."""
