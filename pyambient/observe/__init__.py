"""What operators read: log lines in ztunnel's layout and the access log of connections."""
