"""The DNS forwarder of a pod: port 15053."""
