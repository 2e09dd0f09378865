"""One WebSocket (RFC 6455) on a plain socket: addresses, TLS, the upgrade, messages."""
