"""Put any Linux network namespace into an Istio-ambient mesh."""

__version__ = "0.1.0"
