"""Floor 2: the byte path. One epoll loop with trio as its guest, TLS, tunnels and relays."""
